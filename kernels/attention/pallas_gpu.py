"""Attention over packed rows on a GPU: FlashAttention as Triton kernels, written in Pallas.

    forward    one program a block of queries of one head: over its key blocks, from the first that shares a segment with it
               to the diagonal, with a running maximum
    backward   one program a block of queries for dq, over the same key blocks; one program a block of keys of one key
               head for dk and dv, over its query heads and, of each, from the diagonal to the last block that needs it

So a row costs what its segments cost, and no two programs add to the same place.  The equations are those of xla_blocked.py
(FlashAttention, arXiv 2205.14135, sections 2.3 and 3.1; FlashAttention-2, arXiv 2307.08691, section 3.1).

Masked scores are the lowest float, not -inf: a query whose segment begins later has weights of 1 until its own first score
comes, whose larger maximum then wipes them out exactly.

Dimension key: B rows, T positions, H query heads, K key/value heads, d head dim, C queries and D keys of a block, I query
blocks, J key blocks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.segments import PADDING, blocks_needed
from kernels.triton import compiler_params, dot

_LOWEST = float(jnp.finfo(jnp.float32).min)
_SMALLEST = 16  # of a product's side in Triton


class Launch(NamedTuple):
  """How a kernel is cut up."""

  queries: int
  keys: int
  warps: int
  stages: int


class _Launches(NamedTuple):
  forward: Launch
  dq: Launch
  dkv: Launch

  @property
  def multiple(self) -> int:
    """What a row's length is padded to."""
    return max(max(launch.queries, launch.keys) for launch in self)


# The best of six each on an H100, heads of 128 (docs/gpu.md).
_HALF = _Launches(forward=Launch(64, 64, 4, 3), dq=Launch(128, 64, 8, 3), dkv=Launch(64, 64, 4, 3))
_FULL = _Launches(Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2))  # float32


def forward(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT, *, interpret: bool = False):
  """(out_BxTxHxd, lse_BxHxT float32); see the api.  interpret: evaluate the kernel's body with XLA, on any machine."""
  from jax.experimental import pallas as pl

  launches = _launches(q_BxTxHxd.dtype)
  B, T, H, d = q_BxTxHxd.shape
  q, k, v, ids_BxT = (_padded(x, launches.multiple) for x in (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT))
  launch, length = launches.forward, q.shape[1]
  first_BxI = _first_keys(ids_BxT, launch)
  out_BxTxHxd, lse_BxHxT = pl.pallas_call(
    functools.partial(_forward_kernel, launch=launch, group=H // k.shape[2], scale=d**-0.5),
    grid=(length // launch.queries, H, B),
    out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, length), jnp.float32)),
    interpret=interpret,
    name="packed_attention",
    compiler_params=compiler_params(launch.warps, launch.stages),
  )(first_BxI, ids_BxT, q, k, v)
  return out_BxTxHxd[:, :T, :, :d], lse_BxHxT[..., :T]


def backward(
  q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT, out_BxTxHxd, lse_BxHxT, dout_BxTxHxd, *, interpret: bool = False
):
  """(dq_BxTxHxd, dk_BxTxKxd, dv_BxTxKxd) for the cotangent of out."""
  from jax.experimental import pallas as pl

  launches = _launches(q_BxTxHxd.dtype)
  B, T, H, d = q_BxTxHxd.shape
  K = k_BxTxKxd.shape[2]
  delta_BxTxH = jnp.sum(dout_BxTxHxd.astype(jnp.float32) * out_BxTxHxd.astype(jnp.float32), axis=-1)
  q, k, v, dout, ids_BxT, delta_BxTxH, lse_BxTxH = (
    _padded(x, launches.multiple)
    for x in (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, dout_BxTxHxd, segment_ids_BxT, delta_BxTxH, lse_BxHxT.swapaxes(1, 2))
  )
  per_query = q, dout, lse_BxTxH.swapaxes(1, 2), delta_BxTxH.swapaxes(1, 2)
  length, options = q.shape[1], {"group": H // K, "scale": d**-0.5}
  launch = launches.dq
  dq_BxTxHxd = pl.pallas_call(
    functools.partial(_dq_kernel, launch=launch, **options),
    grid=(length // launch.queries, H, B),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    interpret=interpret,
    name="packed_attention_dq",
    compiler_params=compiler_params(launch.warps, launch.stages),
  )(_first_keys(ids_BxT, launch), ids_BxT, *per_query, k, v)
  launch = launches.dkv
  dk_BxTxKxd, dv_BxTxKxd = pl.pallas_call(
    functools.partial(_dkv_kernel, launch=launch, **options),
    grid=(length // launch.keys, K, B),
    out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
    interpret=interpret,
    name="packed_attention_dkv",
    compiler_params=compiler_params(launch.warps, launch.stages),
  )(_end_queries(ids_BxT, launch), ids_BxT, *per_query, k, v)
  return tuple(x[:, :T, :, :d] for x in (dq_BxTxHxd, dk_BxTxKxd, dv_BxTxKxd))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels.  Every one sees whole arrays and cuts its blocks out itself.


def _forward_kernel(first_BxI, ids_BxT, q_ref, k_ref, v_ref, out_ref, lse_ref, *, launch: Launch, group: int, scale):
  from jax.experimental import pallas as pl

  i, h, b = (pl.program_id(axis) for axis in range(3))
  head, queries = h // group, pl.ds(i * launch.queries, launch.queries)
  q_Cxd, ids_C = q_ref[b, queries, h, :], ids_BxT[b, queries]

  def keys(j, carry):
    sum_Cxd, max_C, mass_C = carry
    block = pl.ds(j * launch.keys, launch.keys)
    mask_CxD = _mask(ids_C, ids_BxT[b, block], i * launch.queries, j * launch.keys)
    scores_CxD = _scores(q_Cxd, k_ref[b, block, head, :], mask_CxD, scale)
    grown_C = jnp.maximum(max_C, jnp.max(scores_CxD, axis=1))
    kept_C, weights_CxD = jnp.exp2(max_C - grown_C), jnp.exp2(scores_CxD - grown_C[:, None])
    v_Dxd = v_ref[b, block, head, :]
    sum_Cxd = sum_Cxd * kept_C[:, None] + dot(weights_CxD.astype(v_Dxd.dtype), v_Dxd)
    return sum_Cxd, grown_C, mass_C * kept_C + jnp.sum(weights_CxD, axis=1)

  nothing = (
    jnp.zeros(q_Cxd.shape, jnp.float32),
    jnp.full((launch.queries,), _LOWEST, jnp.float32),
    jnp.zeros((launch.queries,), jnp.float32),
  )
  sum_Cxd, max_C, mass_C = lax.fori_loop(first_BxI[b, i], _end_keys(i, launch), keys, nothing)
  out_ref[b, queries, h, :] = (sum_Cxd / mass_C[:, None]).astype(out_ref.dtype)
  lse_ref[b, h, queries] = (max_C + jnp.log2(mass_C)) * math.log(2)


def _dq_kernel(
  first_BxI, ids_BxT, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, dq_ref, *, launch: Launch, group: int, scale
):
  from jax.experimental import pallas as pl

  i, h, b = (pl.program_id(axis) for axis in range(3))
  head, queries = h // group, pl.ds(i * launch.queries, launch.queries)
  ids_C = ids_BxT[b, queries]
  of_queries = q_ref[b, queries, h, :], dout_ref[b, queries, h, :], lse_ref[b, h, queries], delta_ref[b, h, queries]

  def keys(j, dq_Cxd):
    block = pl.ds(j * launch.keys, launch.keys)
    k_Dxd = k_ref[b, block, head, :]
    mask_CxD = _mask(ids_C, ids_BxT[b, block], i * launch.queries, j * launch.keys)
    _, dscores_CxD = _weights(*of_queries, k_Dxd, v_ref[b, block, head, :], mask_CxD, scale)
    return dq_Cxd + dot(dscores_CxD.astype(k_Dxd.dtype), k_Dxd)

  zeros_Cxd = jnp.zeros(of_queries[0].shape, jnp.float32)
  dq_Cxd = lax.fori_loop(first_BxI[b, i], _end_keys(i, launch), keys, zeros_Cxd)
  dq_ref[b, queries, h, :] = dq_Cxd.astype(dq_ref.dtype)


def _dkv_kernel(
  end_BxJ, ids_BxT, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, dk_ref, dv_ref, *, launch: Launch, group: int,
  scale,
):  # fmt: skip
  from jax.experimental import pallas as pl

  j, head, b = (pl.program_id(axis) for axis in range(3))
  keys = pl.ds(j * launch.keys, launch.keys)
  k_Dxd, v_Dxd, ids_D = k_ref[b, keys, head, :], v_ref[b, keys, head, :], ids_BxT[b, keys]

  def of_head(member, sums):
    h = head * group + member

    def queries(i, sums):
      dk_Dxd, dv_Dxd = sums
      block = pl.ds(i * launch.queries, launch.queries)
      q_Cxd, dout_Cxd = q_ref[b, block, h, :], dout_ref[b, block, h, :]
      mask_CxD = _mask(ids_BxT[b, block], ids_D, i * launch.queries, j * launch.keys)
      weights_CxD, dscores_CxD = _weights(
        q_Cxd, dout_Cxd, lse_ref[b, h, block], delta_ref[b, h, block], k_Dxd, v_Dxd, mask_CxD, scale
      )
      dv_Dxd += dot(weights_CxD.astype(dout_Cxd.dtype), dout_Cxd, trans_a=True)
      return dk_Dxd + dot(dscores_CxD.astype(q_Cxd.dtype), q_Cxd, trans_a=True), dv_Dxd

    return lax.fori_loop(j * launch.keys // launch.queries, end_BxJ[b, j], queries, sums)

  zeros_Dxd = jnp.zeros(k_Dxd.shape, jnp.float32)
  dk_Dxd, dv_Dxd = lax.fori_loop(0, group, of_head, (zeros_Dxd, zeros_Dxd))
  dk_ref[b, keys, head, :] = dk_Dxd.astype(dk_ref.dtype)
  dv_ref[b, keys, head, :] = dv_Dxd.astype(dv_ref.dtype)


def _mask(query_ids_C, key_ids_D, first_query, first_key) -> jax.Array:
  query_C, key_D = first_query + jnp.arange(len(query_ids_C)), first_key + jnp.arange(len(key_ids_D))
  return (query_ids_C[:, None] == key_ids_D[None]) & (query_C[:, None] >= key_D[None])


def _scores(q_Cxd, k_Dxd, mask_CxD, scale: float) -> jax.Array:
  """In units of log 2, as the hardware has exp2."""
  return jnp.where(mask_CxD, dot(q_Cxd, k_Dxd, trans_b=True) * (scale * math.log2(math.e)), _LOWEST)


def _weights(q_Cxd, dout_Cxd, lse_C, delta_C, k_Dxd, v_Dxd, mask_CxD, scale: float) -> tuple[jax.Array, jax.Array]:
  """(attention weights, gradient of the scores), [C, D]."""
  weights_CxD = jnp.exp2(_scores(q_Cxd, k_Dxd, mask_CxD, scale) - lse_C[:, None] * math.log2(math.e))
  dweights_CxD = dot(dout_Cxd, v_Dxd, trans_b=True)
  return weights_CxD, weights_CxD * (dweights_CxD - delta_C[:, None]) * scale


# ---------------------------------------------------------------------------------------------------------------------
# Which blocks, and sizes


def _end_keys(i: jax.Array, launch: Launch) -> jax.Array:
  """The key block after the last that query block i sees."""
  return lax.div((i + 1) * launch.queries + launch.keys - 1, launch.keys)


def _first_keys(ids_BxT: jax.Array, launch: Launch) -> jax.Array:
  """int32 [B, I]: the first key block that each query block needs."""
  needed = functools.partial(blocks_needed, query_block=launch.queries, key_block=launch.keys)
  return jnp.argmax(jax.vmap(needed)(ids_BxT), axis=2).astype(jnp.int32)


def _end_queries(ids_BxT: jax.Array, launch: Launch) -> jax.Array:
  """int32 [B, J]: the query block after the last that needs each key block."""
  needed_BxIxJ = jax.vmap(functools.partial(blocks_needed, query_block=launch.queries, key_block=launch.keys))(ids_BxT)
  return (needed_BxIxJ.shape[1] - jnp.argmax(needed_BxIxJ[:, ::-1], axis=1)).astype(jnp.int32)


def _launches(dtype: jnp.dtype) -> _Launches:
  return _FULL if dtype == jnp.float32 else _HALF


def _padded(x_BxT: jax.Array, multiple: int) -> jax.Array:
  """Rows of whole blocks, heads of a power of two: what is added is padding, and changes nothing."""
  widths = [(0, 0), (0, -x_BxT.shape[1] % multiple)] + [(0, 0)] * (x_BxT.ndim - 2)
  if x_BxT.ndim == 4:
    head_dim = x_BxT.shape[3]
    widths[3] = (0, max(_SMALLEST, 1 << (head_dim - 1).bit_length()) - head_dim)
  return jnp.pad(x_BxT, widths, constant_values=PADDING) if any(after for _, after in widths) else x_BxT
