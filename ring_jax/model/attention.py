"""Grouped-query attention with per-head query/key norms (reference notes, bailing_moe_v2.md 3.3).

One module serves training on packed sequences, prefill and decode.  They differ in where keys and values live:

* `__call__`: keys and values of the tokens given; a token attends to earlier positions of its own segment.  They are
  returned, so that a prefill can keep them.
* `decode`: one token a slot; its key and value are written into the cache, and it attends to the slot's past.
* `extend`: the same for several tokens of a row over pages: a prefill whose beginning is in the cache already.

Dimension key: B rows or slots, T positions, S cache length, W pages of a slot, L layers, D hidden, H query heads, K kv heads,
G = H / K query heads a kv head, d head dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from configs.schema import ModelConfig
from kernels.attention import (
  DenseCache,
  PagedCache,
  decode_attention,
  extend_attention,
  packed_attention,
  prefill_attention,
)
from ring_jax.model.layers import RMSNorm, normal, rotate, weight
from sharding import rules

KVCache = DenseCache | PagedCache

_DENSE_AXES = (None, "batch", "kv_heads", None, None)
_PAGED_AXES = (None, "batch", None, "kv_heads", None)  # keys and values interleaved by head: cut, heads stay whole


def cache_axes(cache: KVCache) -> KVCache:
  """The logical axes of a cache's arrays; a slot's pages lie with its slot."""
  return DenseCache(_DENSE_AXES, _DENSE_AXES) if isinstance(cache, DenseCache) else PagedCache(_PAGED_AXES)


def init_cache(config: ModelConfig, slots: int, length: int, page_size: int = 0, pages: int = 0) -> KVCache:
  """An empty cache in the model's dtype; with a page size, of so many pages (0: as many as all slots at full length)."""
  layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
  if page_size:
    pages = pages or slots * (length // page_size)
    return PagedCache.empty(layers, pages, page_size, heads, dim, config.dtype)
  lead = (layers, slots, heads)
  return DenseCache(jnp.zeros((*lead, dim, length), config.dtype), jnp.zeros((*lead, length, dim), config.dtype))


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
    self, x_BxTxD: jax.Array, rotary, segment_ids_BxT: jax.Array, prefill: bool = False
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (output [B, T, D], (k [B, K, d, T], v [B, K, T, d])).

    Args:
      prefill: rows are of one segment each, and no gradient is asked for.
    """
    q_BxTxHxd, k_BxTxKxd, v_BxTxKxd = self._project(x_BxTxD, rotary)
    attend = rules.manual(
      prefill_attention if prefill else packed_attention,
      self.config.parallel.rules,
      (("batch", None, "heads", None), *[("batch", None, "kv_heads", None)] * 2, ("batch", None)),
      ("batch", None, "heads", None),
    )
    out_BxTxHxd = attend(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT)
    return self._out(out_BxTxHxd), (k_BxTxKxd.transpose(0, 2, 3, 1), v_BxTxKxd.transpose(0, 2, 1, 3))

  def decode(
    self, x_Bx1xD: jax.Array, rotary, positions_B, active_B, cache: KVCache, layer, page_table_BxW: jax.Array | None
  ):
    """One token a slot at `positions_B`; returns (output [B, 1, D], cache with the active slots' keys and values)."""
    slots, heads, kept = ("batch",), ("batch", None, "kv_heads", None), cache_axes(cache)
    step = rules.manual(
      _attend_slots,
      self.config.parallel.rules,
      (("batch", None, "heads", None), heads, heads, slots, slots, kept, (), ("batch", None)),
      (("batch", None, "heads", None), kept),
    )
    projected = self._project(x_Bx1xD, rotary)
    out_Bx1xHxd, cache = step(*projected, positions_B, active_B, cache, layer, page_table_BxW)
    return self._out(out_Bx1xHxd), cache

  def extend(self, x_BxTxD: jax.Array, rotary, starts_B, counts_B, cache: PagedCache, layer, page_table_BxW):
    """`counts_B` of T tokens a row from `starts_B` on; returns (output [B, T, D], cache with their keys and values)."""
    rows, heads, kept = ("batch",), ("batch", None, "kv_heads", None), cache_axes(cache)
    step = rules.manual(
      _attend_rows,
      self.config.parallel.rules,
      (("batch", None, "heads", None), heads, heads, rows, rows, kept, (), ("batch", None)),
      (("batch", None, "heads", None), kept),
    )
    projected = self._project(x_BxTxD, rotary)
    out_BxTxHxd, cache = step(*projected, starts_B, counts_B, cache, layer, page_table_BxW)
    return self._out(out_BxTxHxd), cache


def _attend_slots(q_Bx1xHxd, k_Bx1xKxd, v_Bx1xKxd, positions_B, active_B, cache: KVCache, layer, page_table_BxW):
  """Writes one layer's keys and values of the new tokens and attends to each slot's past."""
  new = layer, k_Bx1xKxd[:, 0], v_Bx1xKxd[:, 0]
  paged = isinstance(cache, PagedCache)
  cache = cache.write(*new, *((page_table_BxW,) if paged else ()), positions_B, active_B)
  lengths_B = jnp.where(active_B, positions_B + 1, 0)
  out_BxHxd = decode_attention(q_Bx1xHxd[:, 0], cache, lengths_B, layer=layer, page_table_BxW=page_table_BxW)
  return out_BxHxd[:, None], cache


def _attend_rows(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, starts_B, counts_B, cache: PagedCache, layer, page_table_BxW):
  cache = cache.extend(layer, k_BxTxKxd, v_BxTxKxd, page_table_BxW, starts_B, counts_B)
  return extend_attention(q_BxTxHxd, cache, starts_B, layer=layer, page_table_BxW=page_table_BxW), cache
