"""Attention over packed rows by definition: all scores at once, masked.

Also the fastest form for short rows, where all scores are few.

Dimension key: B rows, T positions, H query heads, K key/value heads, G = H / K, d head dim.
"""

import jax
import jax.numpy as jnp


def packed_attention_reference(
  q_BxTxHxd: jax.Array, k_BxTxKxd: jax.Array, v_BxTxKxd: jax.Array, segment_ids_BxT: jax.Array
) -> jax.Array:
  """out_BxTxHxd; scores and softmax in float32 (float64 for float64 arguments)."""
  (B, T, H, d), K = q_BxTxHxd.shape, k_BxTxKxd.shape[2]
  wide = jnp.promote_types(q_BxTxHxd.dtype, jnp.float32)
  same_BxTxT = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
  mask_BxTxT = same_BxTxT & jnp.tri(T, dtype=bool)
  # The key head leads and its query heads share one matrix product of G * T rows.
  q_BxKxGTxd = q_BxTxHxd.reshape(B, T, K, -1, d).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, d)
  scores = jnp.einsum("bkrd,bskd->bkrs", q_BxKxGTxd, k_BxTxKxd, preferred_element_type=wide) * d**-0.5
  scores_BxKxGxTxT = scores.reshape(B, K, -1, T, T)
  masked_BxKxGxTxT = jnp.where(mask_BxTxT[:, None, None], scores_BxKxGxTxT, jnp.finfo(wide).min)
  probs_BxKxGTxT = jax.nn.softmax(masked_BxKxGxTxT, axis=-1).reshape(scores.shape).astype(v_BxTxKxd.dtype)
  out_BxKxGTxd = jnp.einsum("bkrs,bskd->bkrd", probs_BxKxGTxT, v_BxTxKxd)
  return out_BxKxGTxd.reshape(B, K, -1, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)
