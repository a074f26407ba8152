"""Attention over packed rows by definition: all scores at once, masked.

Also the fastest form for short rows, where all scores are few.  In strips of queries, each with the keys up to its end,
less than two thirds of the work remains, and no softmax is put together from parts.

Dimension key: B rows, T positions, C queries of a strip, S keys of a strip, H query heads, K key/value heads, G = H / K, d head dim.
"""

import jax
import jax.numpy as jnp

_STRIPS = 4


def packed_attention_reference(
  q_BxTxHxd: jax.Array, k_BxTxKxd: jax.Array, v_BxTxKxd: jax.Array, segment_ids_BxT: jax.Array
) -> jax.Array:
  """out_BxTxHxd; scores and softmax in float32 (float64 for float64 arguments)."""
  return _strip(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT, 0)


def packed_attention_strips(
  q_BxTxHxd: jax.Array, k_BxTxKxd: jax.Array, v_BxTxKxd: jax.Array, segment_ids_BxT: jax.Array
) -> jax.Array:
  """The same, in strips."""
  T = q_BxTxHxd.shape[1]
  size = -(-T // _STRIPS)
  strips = [
    _strip(
      q_BxTxHxd[:, first : first + size],
      *(x[:, : first + size] for x in (k_BxTxKxd, v_BxTxKxd, segment_ids_BxT)),
      first,
    )
    for first in range(0, T, size)
  ]
  return jnp.concatenate(strips, axis=1)


def _strip(q_BxCxHxd, k_BxSxKxd, v_BxSxKxd, segment_ids_BxS, first: int) -> jax.Array:
  """Queries from position `first` on, keys from 0 on; both end at the same position."""
  (B, C, H, d), (S, K) = q_BxCxHxd.shape, k_BxSxKxd.shape[1:3]
  wide = jnp.promote_types(q_BxCxHxd.dtype, jnp.float32)
  same_BxCxS = segment_ids_BxS[:, first:, None] == segment_ids_BxS[:, None, :]
  mask_BxCxS = same_BxCxS & jnp.tri(C, S, first, dtype=bool)
  # The key head leads and its query heads share one matrix product of G * C rows.
  q_BxKxGCxd = q_BxCxHxd.reshape(B, C, K, -1, d).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, d)
  scores = jnp.einsum("bkrd,bskd->bkrs", q_BxKxGCxd, k_BxSxKxd, preferred_element_type=wide) * d**-0.5
  scores_BxKxGxCxS = scores.reshape(B, K, -1, C, S)
  masked_BxKxGxCxS = jnp.where(mask_BxCxS[:, None, None], scores_BxKxGxCxS, jnp.finfo(wide).min)
  probs_BxKxGCxS = jax.nn.softmax(masked_BxKxGxCxS, axis=-1).reshape(scores.shape).astype(v_BxSxKxd.dtype)
  out_BxKxGCxd = jnp.einsum("bkrs,bskd->bkrd", probs_BxKxGCxS, v_BxSxKxd)
  return out_BxKxGCxd.reshape(B, K, -1, C, d).transpose(0, 3, 1, 2, 4).reshape(B, C, H, d)
