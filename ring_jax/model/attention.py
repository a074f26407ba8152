"""Grouped-query attention with per-head query/key norms (reference notes, bailing_moe_v2.md 3.3).

One module serves training on packed sequences, prefill and decode.  They differ in where keys and values live:

* `__call__`: keys and values of the tokens given; a token attends to earlier positions of its own segment.  They are
  returned, so that a prefill can keep them.
* `decode`: one token a slot; its key and value are written into the cache, and it attends to the slot's past.

Dimension key: B rows or slots, T positions, S cache length, L layers, D hidden, H query heads, K kv heads,
G = H / K query heads a kv head, d head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from configs.schema import ModelConfig
from kernels.attention import packed_attention
from ring_jax.model.layers import RMSNorm, normal, rotate, weight
from sharding import rules


class KVCache(NamedTuple):
  """Keys and values of all layers.

  Keys lie with the position last, which makes the decode step's q.k a plain matrix product (cpu_speed.md section 4).
  """

  k_LxBxKxdxS: jax.Array
  v_LxBxKxSxd: jax.Array


CACHE_AXES = KVCache((None, "batch", "kv_heads", None, None), (None, "batch", "kv_heads", None, None))


def init_cache(config: ModelConfig, slots: int, length: int) -> KVCache:
  """An empty cache in the model's dtype."""
  lead = (config.num_hidden_layers, slots, config.num_key_value_heads)
  return KVCache(
    jnp.zeros((*lead, config.head_dim, length), config.dtype), jnp.zeros((*lead, length, config.head_dim), config.dtype)
  )


class Attention(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, d = config.hidden_size, config.head_dim
    self.config = config
    self.wq = normal(config, rngs, (D, config.num_attention_heads, d), ("embed", "heads", None))
    self.wk = normal(config, rngs, (D, config.num_key_value_heads, d), ("embed", "kv_heads", None))
    self.wv = normal(config, rngs, (D, config.num_key_value_heads, d), ("embed", "kv_heads", None))
    self.wo = normal(config, rngs, (config.num_attention_heads, d, D), ("heads", None, "embed"))
    self.q_norm = RMSNorm(config, d)
    self.k_norm = RMSNorm(config, d)

  def _project(self, x_BxTxD, rotary):
    """Queries, keys and values; norm first, then rotation (section 3.3)."""
    wq_DxHxd, wk_DxKxd, wv_DxKxd = (weight(self.config, w, x_BxTxD.dtype) for w in (self.wq, self.wk, self.wv))
    q_BxTxHxd = rotate(self.q_norm(jnp.einsum("btD,Dhd->bthd", x_BxTxD, wq_DxHxd)), *rotary)
    k_BxTxKxd = rotate(self.k_norm(jnp.einsum("btD,Dkd->btkd", x_BxTxD, wk_DxKxd)), *rotary)
    v_BxTxKxd = jnp.einsum("btD,Dkd->btkd", x_BxTxD, wv_DxKxd)
    return q_BxTxHxd, k_BxTxKxd, v_BxTxKxd

  def _out(self, out_BxTxHxd: jax.Array) -> jax.Array:
    wo_HxdxD = weight(self.config, self.wo, out_BxTxHxd.dtype)
    whole = rules.out_sharding(self.config.parallel.rules, "batch", None, None)
    return jnp.einsum("bthd,hdD->btD", out_BxTxHxd, wo_HxdxD, out_sharding=whole)

  def __call__(
    self, x_BxTxD: jax.Array, rotary, segment_ids_BxT: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (output [B, T, D], (k [B, K, d, T], v [B, K, T, d]))."""
    q_BxTxHxd, k_BxTxKxd, v_BxTxKxd = self._project(x_BxTxD, rotary)
    attend = rules.manual(
      packed_attention,
      self.config.parallel.rules,
      (("batch", None, "heads", None), *[("batch", None, "kv_heads", None)] * 2, ("batch", None)),
      ("batch", None, "heads", None),
    )
    out_BxTxHxd = attend(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT)
    return self._out(out_BxTxHxd), (k_BxTxKxd.transpose(0, 2, 3, 1), v_BxTxKxd.transpose(0, 2, 1, 3))

  def decode(self, x_Bx1xD: jax.Array, rotary, positions_B: jax.Array, active_B: jax.Array, cache: KVCache, layer):
    """One token a slot at `positions_B`; returns (output [B, 1, D], cache with the active slots' keys and values)."""
    slots, heads = ("batch",), ("batch", None, "kv_heads", None)
    step = rules.manual(
      _attend_slots,
      self.config.parallel.rules,
      (("batch", None, "heads", None), heads, heads, slots, slots, CACHE_AXES, ()),
      (("batch", None, "heads", None), CACHE_AXES),
    )
    out_Bx1xHxd, cache = step(*self._project(x_Bx1xD, rotary), positions_B, active_B, cache, layer)
    return self._out(out_Bx1xHxd), cache


def _attend_slots(q_Bx1xHxd, k_Bx1xKxd, v_Bx1xKxd, positions_B, active_B, cache: KVCache, layer):
  """Writes one layer's keys and values of the new tokens and attends to each slot's past."""
  B, _, K, d = k_Bx1xKxd.shape
  # A silent slot writes beyond the cache, which the scatter drops: what it holds stays as it was.
  rows, at_B = jnp.arange(B), jnp.where(active_B, positions_B, cache.k_LxBxKxdxS.shape[-1])
  cache = KVCache(
    cache.k_LxBxKxdxS.at[layer, rows, :, :, at_B].set(k_Bx1xKxd[:, 0], mode="drop"),
    cache.v_LxBxKxSxd.at[layer, rows, :, at_B].set(v_Bx1xKxd[:, 0], mode="drop"),
  )
  k_BxKxdxS = jax.lax.dynamic_index_in_dim(cache.k_LxBxKxdxS, layer, keepdims=False)
  v_BxKxSxd = jax.lax.dynamic_index_in_dim(cache.v_LxBxKxSxd, layer, keepdims=False)
  past_Bx1xS = jnp.arange(k_BxKxdxS.shape[-1]) <= positions_B[:, None, None]
  out_BxKxGxd = _attend(q_Bx1xHxd.reshape(B, K, -1, d), k_BxKxdxS, v_BxKxSxd, past_Bx1xS)
  return out_BxKxGxd.reshape(B, 1, -1, d), cache


def _attend(q_BxKxGTxd: jax.Array, k_BxKxdxS: jax.Array, v_BxKxSxd: jax.Array, mask_BxTxS: jax.Array) -> jax.Array:
  """softmax(q k / sqrt(d)) v, the softmax in float32; a row that may attend to nothing gives finite values."""
  B, K, GT, d = q_BxKxGTxd.shape
  T, S = mask_BxTxS.shape[1:]
  wide = jnp.promote_types(q_BxKxGTxd.dtype, jnp.float32)
  scores = jnp.einsum("bkqd,bkds->bkqs", q_BxKxGTxd, k_BxKxdxS, preferred_element_type=wide) * d**-0.5
  scores_BxKxGxTxS = scores.reshape(B, K, GT // T, T, S)
  masked = jnp.where(mask_BxTxS[:, None, None], scores_BxKxGxTxS, jnp.finfo(wide).min)
  probs_BxKxGTxS = jax.nn.softmax(masked, axis=-1).reshape(B, K, GT, S).astype(v_BxKxSxd.dtype)
  return jnp.einsum("bkqs,bksd->bkqd", probs_BxKxGTxS, v_BxKxSxd)
