"""Attention of new tokens over what their slot has seen: one of every slot, or several of a row over pages.

Dimension key: L layers, B slots or rows, T new positions of a row, S positions, P pages, N positions of a page, W pages of
one slot's table, H query heads, K key/value heads, G = H / K, R = T G rows of a head's matrix products, C = 2K, d head dim.
"""

import jax
import jax.numpy as jnp

from configs.schema import Enum, require
from kernels.attention.cache import DenseCache, PagedCache
from kernels.attention.dense_blocks import decode_dense_blocks
from kernels.attention.online import OnlineSoftmax
from kernels.attention.ragged_paged import attend_ragged_paged, fits
from kernels.choice import choose
from kernels.precision import full_products


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
      `DenseCache.bits` is for a CPU alone.
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
    if cache.k_LxBxKxdxS.dtype == jnp.uint16:
      return decode_dense_blocks(*arguments)
    with full_products(q_BxHxd.dtype):
      return jax.lax.platform_dependent(*arguments, cpu=decode_dense_blocks, default=_decode_dense)
  out_Bx1xHxd = _attend_pages(q_BxHxd[:, None], cache, page_table_BxW, lengths_B - 1, layer, chosen)
  return jnp.where((lengths_B > 0)[:, None, None], out_Bx1xHxd[:, 0], 0)


def extend_attention(
  q_BxTxHxd: jax.Array,
  cache: PagedCache,
  starts_B: jax.Array,
  *,
  layer: jax.Array | int,
  page_table_BxW: jax.Array,
  implementation: DecodeImplementation | str | None = None,
) -> jax.Array:
  """The same for T tokens in a row: query t of row b is at position `starts_B[b] + t`, and sees all up to itself.

  Args:
    q_BxTxHxd: queries.
    cache: keys and values of the past and of the new positions.
    starts_B: int32, at least 0.
    layer, page_table_BxW, implementation: as for `decode_attention`.

  Returns:
    out_BxTxHxd in the dtype of q.  Queries whose own position is in no page give something finite.

  Raises:
    ConfigError, ValueError: as `decode_attention`.
  """
  _check(q_BxTxHxd[:, 0], cache, starts_B, page_table_BxW)
  chosen = choose(implementation, DecodeImplementation.XLA, "extend_attention") if implementation else None
  layer, starts_B = jnp.asarray(layer, jnp.int32), starts_B.astype(jnp.int32)
  return _attend_pages(q_BxTxHxd, cache, page_table_BxW, starts_B, layer, chosen)


def _attend_pages(q_BxTxHxd, cache: PagedCache, page_table_BxW, starts_B, layer, chosen) -> jax.Array:
  takes = fits(q_BxTxHxd, cache.pages_LxPxNxCxd)
  require(
    takes or chosen is not DecodeImplementation.RAGGED_PAGED,
    f"decode_attention: implementation='ragged_paged' does not take q {q_BxTxHxd.dtype}{list(q_BxTxHxd.shape)} with pages"
    f" {cache.pages_LxPxNxCxd.dtype}{list(cache.pages_LxPxNxCxd.shape)}",
  )
  arguments = q_BxTxHxd, cache.pages_LxPxNxCxd, page_table_BxW.astype(jnp.int32), starts_B, layer
  with full_products(q_BxTxHxd.dtype):
    if chosen is DecodeImplementation.XLA or not takes:
      return _attend_one_by_one(*arguments)
    if chosen is DecodeImplementation.RAGGED_PAGED:
      return attend_ragged_paged(*arguments)
    return jax.lax.platform_dependent(*arguments, tpu=attend_ragged_paged, default=_attend_one_by_one)


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


def _attend_one_by_one(q_BxTxHxd, pages_LxPxNxCxd, page_table_BxW, starts_B, layer) -> jax.Array:
  """Online softmax over the pages.  (Gathered all at once they are a copy of the cache, and took ten times as long.)"""
  (B, T, H, d), (N, C) = q_BxTxHxd.shape, pages_LxPxNxCxd.shape[2:4]
  K, G = C // 2, 2 * H // C
  wide = jnp.promote_types(q_BxTxHxd.dtype, jnp.float32)
  q_BxKxRxd = q_BxTxHxd.reshape(B, T, K, G, d).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, d)
  position_BxR = starts_B[:, None] + jnp.arange(T * G) // G

  def page(w: jax.Array, softmax: OnlineSoftmax) -> OnlineSoftmax:
    kv_BxNxCxd = pages_LxPxNxCxd.at[layer, page_table_BxW.at[:, w].get(mode="clip")].get(mode="clip")
    k_BxNxKxd, v_BxNxKxd = kv_BxNxCxd[:, :, 0::2], kv_BxNxCxd[:, :, 1::2]
    scores_BxKxRxN = jnp.einsum("bkrd,bnkd->bkrn", q_BxKxRxd, k_BxNxKxd, preferred_element_type=wide) * d**-0.5
    past_BxRxN = w * N + jnp.arange(N) <= position_BxR[:, :, None]
    masked_BxKxRxN = jnp.where(past_BxRxN[:, None], scores_BxKxRxN, jnp.finfo(wide).min)

    def weigh(probs_BxKxRxN: jax.Array) -> jax.Array:
      probs_BxKxRxN = probs_BxKxRxN.astype(v_BxNxKxd.dtype)
      return jnp.einsum("bkrn,bnkd->bkrd", probs_BxKxRxN, v_BxNxKxd, preferred_element_type=wide)

    return softmax.add(masked_BxKxRxN, weigh)

  # One page at least, so that the sum is never 0.
  pages = jnp.maximum(-(-(jnp.max(starts_B) + T) // N), 1)
  softmax = jax.lax.fori_loop(0, pages, page, OnlineSoftmax.empty(q_BxKxRxd.shape, wide))
  out_BxKxTxGxd = softmax.result_Rxd.reshape(B, K, T, G, d)
  return out_BxKxTxGxd.transpose(0, 2, 1, 3, 4).reshape(B, T, H, d).astype(q_BxTxHxd.dtype)
