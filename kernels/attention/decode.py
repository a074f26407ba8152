"""Attention of one new token a slot over what the slot has seen.

Dimension key: L layers, B slots, S positions, P pages, N positions of a page, W pages of one slot's table, H query
heads, K key/value heads, G = H / K, C = 2K, d head dim.
"""

import jax
import jax.numpy as jnp

from configs.schema import Enum, require
from kernels.attention.cache import DenseCache, PagedCache
from kernels.attention.dense_blocks import decode_dense_blocks
from kernels.attention.ragged_paged import decode_ragged_paged, fits
from kernels.choice import choose


class DecodeImplementation(Enum):
  XLA = "xla"  # dense: all positions at once, on a CPU in blocks; pages: one of every slot after the other, to the longest's end
  RAGGED_PAGED = "ragged_paged"  # JAX's Pallas kernel over pages: TPU only


def decode_attention(
  q_BxHxd: jax.Array,
  cache: DenseCache | PagedCache,
  lengths_B: jax.Array,
  *,
  layer: jax.Array | int,
  page_table_BxW: jax.Array | None = None,
  implementation: DecodeImplementation | str | None = None,
) -> jax.Array:
  """softmax(q k / sqrt(d)) v over the first `lengths_B` positions of each slot.

  Args:
    q_BxHxd: queries; query head h reads key head h // (H / K).
    cache: keys and values, the new token's own among them.  What stands beyond a slot's length must be finite.
    lengths_B: int32; 0 marks an idle slot, which gives zeros.
    layer: which layer of the cache.
    page_table_BxW: int32, with a PagedCache; see there.
    implementation: None means `ragged_paged` for pages where the program is compiled for a TPU and the kernel takes the
      heads, else `xla`.

  Returns:
    out_BxHxd in the dtype of q; the softmax is float32.

  Raises:
    ConfigError: unknown implementation, or one that does not take this cache.
    ValueError: shapes that do not fit together.
  """
  paged = isinstance(cache, PagedCache)
  _check(q_BxHxd, cache, lengths_B, page_table_BxW)
  chosen = choose(implementation, DecodeImplementation.XLA, "decode_attention") if implementation else None
  layer, lengths_B = jnp.asarray(layer, jnp.int32), lengths_B.astype(jnp.int32)
  if not paged:
    require(
      chosen is not DecodeImplementation.RAGGED_PAGED,
      "decode_attention: implementation='ragged_paged' reads pages, this cache is dense",
    )
    arguments = q_BxHxd, cache, lengths_B, layer
    return jax.lax.platform_dependent(*arguments, cpu=decode_dense_blocks, default=_decode_dense)
  takes = fits(q_BxHxd, cache.pages_LxPxNxCxd)
  require(
    takes or chosen is not DecodeImplementation.RAGGED_PAGED,
    f"decode_attention: implementation='ragged_paged' does not take q {q_BxHxd.dtype}{list(q_BxHxd.shape)} with pages"
    f" {cache.pages_LxPxNxCxd.dtype}{list(cache.pages_LxPxNxCxd.shape)}",
  )
  arguments = q_BxHxd, cache.pages_LxPxNxCxd, page_table_BxW.astype(jnp.int32), lengths_B, layer
  if chosen is DecodeImplementation.XLA or not takes:
    return _decode_pages(*arguments)
  if chosen is DecodeImplementation.RAGGED_PAGED:
    return decode_ragged_paged(*arguments)
  return jax.lax.platform_dependent(*arguments, tpu=decode_ragged_paged, default=_decode_pages)


def _check(q, cache, lengths, page_table) -> None:
  if isinstance(cache, PagedCache):
    kv_heads, head_dim = cache.pages_LxPxNxCxd.shape[3] // 2, cache.pages_LxPxNxCxd.shape[4]
    if page_table is None or page_table.ndim != 2 or len(page_table) != len(q):
      raise ValueError(f"decode_attention: a paged cache needs a page table [{len(q)}, W]")
  else:
    kv_heads, head_dim = cache.v_LxBxKxSxd.shape[2], cache.v_LxBxKxSxd.shape[4]
    if page_table is not None or cache.v_LxBxKxSxd.shape[1] != len(q):
      raise ValueError(f"decode_attention: a dense cache has {len(q)} slots, one a query, and no page table")
  if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % kv_heads or lengths.shape != q.shape[:1]:
    raise ValueError(
      f"decode_attention: q {q.shape}, lengths {lengths.shape}: expected [B, H, {head_dim}] with H a multiple of"
      f" {kv_heads}, and [B]"
    )


def _decode_dense(q_BxHxd, cache: DenseCache, lengths_B, layer) -> jax.Array:
  k_BxKxdxS = jax.lax.dynamic_index_in_dim(cache.k_LxBxKxdxS, layer, keepdims=False)
  v_BxKxSxd = jax.lax.dynamic_index_in_dim(cache.v_LxBxKxSxd, layer, keepdims=False)
  (B, H, d), (K, S) = q_BxHxd.shape, v_BxKxSxd.shape[1:3]
  wide = jnp.promote_types(q_BxHxd.dtype, jnp.float32)
  q_BxKxGxd = q_BxHxd.reshape(B, K, H // K, d)
  scores_BxKxGxS = jnp.einsum("bkgd,bkds->bkgs", q_BxKxGxd, k_BxKxdxS, preferred_element_type=wide) * d**-0.5
  past_Bx1x1xS = (jnp.arange(S) < lengths_B[:, None])[:, None, None]
  masked_BxKxGxS = jnp.where(past_Bx1x1xS, scores_BxKxGxS, jnp.finfo(wide).min)
  probs_BxKxGxS = jax.nn.softmax(masked_BxKxGxS, axis=-1).astype(v_BxKxSxd.dtype)
  out_BxHxd = jnp.einsum("bkgs,bksd->bkgd", probs_BxKxGxS, v_BxKxSxd).reshape(B, H, d).astype(q_BxHxd.dtype)
  return jnp.where((lengths_B > 0)[:, None, None], out_BxHxd, 0)


def _decode_pages(q_BxHxd, pages_LxPxNxCxd, page_table_BxW, lengths_B, layer) -> jax.Array:
  """Online softmax over the pages.  (Gathered all at once they are a copy of the cache, and took ten times as long.)"""
  (B, H, d), (N, C) = q_BxHxd.shape, pages_LxPxNxCxd.shape[2:4]
  wide = jnp.promote_types(q_BxHxd.dtype, jnp.float32)
  q_BxKxGxd = q_BxHxd.reshape(B, C // 2, -1, d)

  def page(w, carry):
    old_BxKxGx1, sum_BxKxGx1, value_BxKxGxd = carry
    kv_BxNxCxd = pages_LxPxNxCxd.at[layer, page_table_BxW[:, w]].get(mode="clip")
    k_BxNxKxd, v_BxNxKxd = kv_BxNxCxd[:, :, 0::2], kv_BxNxCxd[:, :, 1::2]
    scores_BxKxGxN = jnp.einsum("bkgd,bnkd->bkgn", q_BxKxGxd, k_BxNxKxd, preferred_element_type=wide) * d**-0.5
    past_BxN = w * N + jnp.arange(N) < lengths_B[:, None]
    masked_BxKxGxN = jnp.where(past_BxN[:, None, None], scores_BxKxGxN, jnp.finfo(wide).min)
    max_BxKxGx1 = jnp.maximum(old_BxKxGx1, masked_BxKxGxN.max(axis=-1, keepdims=True))
    probs_BxKxGxN = jnp.exp(masked_BxKxGxN - max_BxKxGx1)
    shrink_BxKxGx1 = jnp.exp(old_BxKxGx1 - max_BxKxGx1)
    more_BxKxGxd = jnp.einsum(
      "bkgn,bnkd->bkgd", probs_BxKxGxN.astype(v_BxNxKxd.dtype), v_BxNxKxd, preferred_element_type=wide
    )
    sum_BxKxGx1 = shrink_BxKxGx1 * sum_BxKxGx1 + probs_BxKxGxN.sum(axis=-1, keepdims=True)
    return max_BxKxGx1, sum_BxKxGx1, shrink_BxKxGx1 * value_BxKxGxd + more_BxKxGxd

  zeros_BxKxGx1 = jnp.zeros((*q_BxKxGxd.shape[:3], 1), wide)
  carry = (zeros_BxKxGx1 + jnp.finfo(wide).min, zeros_BxKxGx1, jnp.zeros(q_BxKxGxd.shape, wide))
  _, sum_BxKxGx1, value_BxKxGxd = jax.lax.fori_loop(0, -(-jnp.max(lengths_B) // N), page, carry)
  out_BxHxd = (value_BxKxGxd / sum_BxKxGx1).reshape(B, H, d).astype(q_BxHxd.dtype)
  return jnp.where((lengths_B > 0)[:, None, None], out_BxHxd, 0)
