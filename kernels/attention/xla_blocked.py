"""Attention over packed rows, block by block, in plain XLA: memory linear in the length of a row.

One row goes after the other.  For a block of queries, its key blocks are visited from the diagonal down to the first one
that shares a segment with it (online.py).  So a row costs what its segments cost, the sum of their squared lengths, and
not the square of the row.

The diagonal comes first: there every query meets itself, the maximum is a real score from then on, and whatever is
masked adds exactly nothing.

The backward pass computes the scores again from the saved log-sum-exp (FlashAttention, arXiv 2205.14135, section 3.1):

    p = exp(s - lse)    dv = p^T dout    ds = p * (dout v^T - rowsum(dout * out))    dq = ds k    dk = ds^T q

Dimension key: B rows, T positions, H query heads, K key/value heads, G = H / K, d head dim, n blocks, C positions of a
block, R = G * C rows of a block's matrix products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.online import OnlineSoftmax
from kernels.attention.segments import PADDING, blocks_needed

# Positions of a block.  On a CPU small blocks win: more of them can be skipped, and one's scores stay in the cache
# (measured, docs/kernels.md).  What else there is gets few and large products.
CPU_BLOCK = 64
BLOCK = 512


def forward(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT, *, block: int) -> tuple[jax.Array, jax.Array]:
  """(out_BxTxHxd, lse_BxHxT float32); see the api."""
  T, H = q_BxTxHxd.shape[1:3]
  blocks = functools.partial(_blocks, size=min(block, T))
  rows = (_query_rows(blocks(q_BxTxHxd), k_BxTxKxd.shape[2]), *_keys(blocks, k_BxTxKxd, v_BxTxKxd))
  out_BxnxKxRxd, lse_BxnxKxR = lax.map(lambda row: _forward_row(*row), (*rows, blocks(segment_ids_BxT)))
  out_BxTxHxd = _from_query_rows(out_BxnxKxRxd, H)[:, :T].astype(q_BxTxHxd.dtype)
  lse_BxTxHx1 = _from_query_rows(lse_BxnxKxR[..., None], H)[:, :T]
  return out_BxTxHxd, lse_BxTxHx1[..., 0].transpose(0, 2, 1)


def backward(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT, out_BxTxHxd, lse_BxHxT, dout_BxTxHxd, *, block: int):
  """(dq_BxTxHxd, dk_BxTxKxd, dv_BxTxKxd) for the cotangent of out."""
  (T, H), K = q_BxTxHxd.shape[1:3], k_BxTxKxd.shape[2]
  blocks = functools.partial(_blocks, size=min(block, T))
  delta_BxTxH = jnp.einsum("bthd,bthd->bth", dout_BxTxHxd, out_BxTxHxd, preferred_element_type=lse_BxHxT.dtype)
  per_query = (q_BxTxHxd, dout_BxTxHxd, lse_BxHxT.transpose(0, 2, 1)[..., None], delta_BxTxH[..., None])
  rows = (*(_query_rows(blocks(x), K) for x in per_query), *_keys(blocks, k_BxTxKxd, v_BxTxKxd))
  dq_BxnxKxRxd, dk_BxnxKxCxd, dv_BxnxKxCxd = lax.map(lambda row: _backward_row(*row), (*rows, blocks(segment_ids_BxT)))
  dk_BxTxKxd, dv_BxTxKxd = (_from_query_rows(x, K)[:, :T].astype(k_BxTxKxd.dtype) for x in (dk_BxnxKxCxd, dv_BxnxKxCxd))
  return _from_query_rows(dq_BxnxKxRxd, H)[:, :T].astype(q_BxTxHxd.dtype), dk_BxTxKxd, dv_BxTxKxd


# ---------------------------------------------------------------------------------------------------------------------
# Layout: blocks lead, heads before positions, so that a step's products are plain batched matrix products


def _blocks(x_BxT: jax.Array, size: int) -> jax.Array:
  """[B, n, C, ...]; positions beyond T are padding."""
  B, T = x_BxT.shape[:2]
  padded = jnp.pad(x_BxT, ((0, 0), (0, -T % size)) + ((0, 0),) * (x_BxT.ndim - 2), constant_values=PADDING)
  return padded.reshape(B, -1, size, *x_BxT.shape[2:])


def _query_rows(x_BxnxCxHxd: jax.Array, num_kv_heads: int) -> jax.Array:
  """[B, n, K, G * C, d]: the query heads of one key head share a product."""
  B, n, C, _, d = x_BxnxCxHxd.shape
  x_BxnxCxKxGxd = x_BxnxCxHxd.reshape(B, n, C, num_kv_heads, -1, d)
  return x_BxnxCxKxGxd.transpose(0, 1, 3, 4, 2, 5).reshape(B, n, num_kv_heads, -1, d)


def _from_query_rows(x_BxnxKxRxd: jax.Array, num_heads: int) -> jax.Array:
  """The inverse: [B, n * C, H, d]."""
  B, n, K, R, d = x_BxnxKxRxd.shape
  groups = num_heads // K
  x_BxnxKxGxCxd = x_BxnxKxRxd.reshape(B, n, K, groups, R // groups, d)
  return x_BxnxKxGxCxd.transpose(0, 1, 4, 2, 3, 5).reshape(B, -1, num_heads, d)


def _keys(blocks, k_BxTxKxd: jax.Array, v_BxTxKxd: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys [B, n, K, d, C] and values [B, n, K, C, d]."""
  return blocks(k_BxTxKxd).transpose(0, 1, 3, 4, 2), blocks(v_BxTxKxd).transpose(0, 1, 3, 2, 4)


# ---------------------------------------------------------------------------------------------------------------------
# One row


def _scores(q_KxRxd, k_KxdxC, query_ids_C, key_ids_C, diagonal: bool) -> jax.Array:
  """Masked scores [K, R, C], float32."""
  size = query_ids_C.shape[0]
  wide = jnp.promote_types(q_KxRxd.dtype, jnp.float32)
  scores_KxRxC = jnp.einsum("krd,kdc->krc", q_KxRxd, k_KxdxC, preferred_element_type=wide) * q_KxRxd.shape[-1] ** -0.5
  mask_CxC = query_ids_C[:, None] == key_ids_C
  if diagonal:
    mask_CxC &= jnp.tri(size, dtype=bool)
  scores_KxGxCxC = scores_KxRxC.reshape(len(k_KxdxC), -1, size, size)
  return jnp.where(mask_CxC, scores_KxGxCxC, jnp.finfo(wide).min).reshape(scores_KxRxC.shape)


def _block(x_n: jax.Array, i: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(x_n, i, keepdims=False)


def _first_keys(ids_nxC: jax.Array) -> jax.Array:
  """For every query block the first key block that it needs."""
  size = ids_nxC.shape[1]
  return jnp.argmax(blocks_needed(ids_nxC.reshape(-1), size, size), axis=1)


def _forward_row(q_nxKxRxd, k_nxKxdxC, v_nxKxCxd, ids_nxC):
  def visit(i, j, diagonal):
    """(Scores of block i with block j, how they weigh its values.)"""
    scores_KxRxC = _scores(_block(q_nxKxRxd, i), _block(k_nxKxdxC, j), _block(ids_nxC, i), _block(ids_nxC, j), diagonal)
    v_KxCxd = _block(v_nxKxCxd, j)

    def weigh(probs_KxRxC):
      wide = probs_KxRxC.dtype
      return jnp.einsum("krc,kcd->krd", probs_KxRxC.astype(v_KxCxd.dtype), v_KxCxd, preferred_element_type=wide)

    return scores_KxRxC, weigh

  def queries(block):
    i, first = block
    keys = lambda step, softmax: softmax.add(*visit(i, i - 1 - step, False))  # noqa: E731
    softmax = lax.fori_loop(0, i - first, keys, OnlineSoftmax.of(*visit(i, i, True)))
    return softmax.result_Rxd, softmax.lse_Rx1[..., 0]

  return lax.map(queries, (jnp.arange(len(ids_nxC)), _first_keys(ids_nxC)))


def _backward_row(q_nxKxRxd, dout_nxKxRxd, lse_nxKxRx1, delta_nxKxRx1, k_nxKxdxC, v_nxKxCxd, ids_nxC):
  wide = lse_nxKxRx1.dtype
  scale = v_nxKxCxd.shape[-1] ** -0.5

  def visit(i, j, diagonal):
    """(dq of block i, dk and dv of block j) from this pair."""
    q_KxRxd, dout_KxRxd, k_KxdxC = _block(q_nxKxRxd, i), _block(dout_nxKxRxd, i), _block(k_nxKxdxC, j)
    scores_KxRxC = _scores(q_KxRxd, k_KxdxC, _block(ids_nxC, i), _block(ids_nxC, j), diagonal)
    probs_KxRxC = jnp.exp(scores_KxRxC - _block(lse_nxKxRx1, i))
    dot = functools.partial(jnp.einsum, preferred_element_type=wide)
    dv_KxCxd = dot("krc,krd->kcd", probs_KxRxC.astype(dout_KxRxd.dtype), dout_KxRxd)
    dprobs_KxRxC = dot("krd,kcd->krc", dout_KxRxd, _block(v_nxKxCxd, j))
    dscores_KxRxC = (probs_KxRxC * (dprobs_KxRxC - _block(delta_nxKxRx1, i)) * scale).astype(q_KxRxd.dtype)
    return dot("krc,kdc->krd", dscores_KxRxC, k_KxdxC), dot("krc,krd->kcd", dscores_KxRxC, q_KxRxd), dv_KxCxd

  def add(total_nxKxCxd, j, part_KxCxd):
    return lax.dynamic_update_index_in_dim(total_nxKxCxd, _block(total_nxKxCxd, j) + part_KxCxd, j, 0)

  def queries(totals, block):
    i, first = block
    dq_KxRxd, dk_KxCxd, dv_KxCxd = visit(i, i, True)
    totals = add(totals[0], i, dk_KxCxd), add(totals[1], i, dv_KxCxd)

    def keys(step, carry):
      dq_KxRxd, dk_nxKxCxd, dv_nxKxCxd = carry
      j = i - 1 - step
      more_KxRxd, dk_KxCxd, dv_KxCxd = visit(i, j, False)
      return dq_KxRxd + more_KxRxd, add(dk_nxKxCxd, j, dk_KxCxd), add(dv_nxKxCxd, j, dv_KxCxd)

    dq_KxRxd, *totals = lax.fori_loop(0, i - first, keys, (dq_KxRxd, *totals))
    return tuple(totals), dq_KxRxd

  zeros_nxKxCxd = jnp.zeros(v_nxKxCxd.shape, wide)
  blocks = jnp.arange(len(ids_nxC)), _first_keys(ids_nxC)
  (dk_nxKxCxd, dv_nxKxCxd), dq_nxKxRxd = lax.scan(queries, (zeros_nxKxCxd, zeros_nxKxCxd), blocks)
  return dq_nxKxRxd, dk_nxKxCxd, dv_nxKxCxd
