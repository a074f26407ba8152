"""Attention, for training and prefill on packed rows, and for decoding one token a slot.

Packed rows hold several segments one after the other; a token attends to the tokens of its own segment at or before
its column.  Positions count up within a segment, so the order of columns is the order of positions, and none are asked
for.

Dimension key: B rows, T positions, H query heads, K key/value heads, d head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import Enum, require
from kernels.attention import pallas_gpu, splash, xla_blocked
from kernels.attention.reference import packed_attention_reference, packed_attention_strips
from kernels.attention.segments import PADDING
from kernels.choice import choose, passes
from kernels.precision import full_products


class Implementation(Enum):
  REFERENCE = "reference"  # all scores at once: tests, and short rows
  XLA_STRIPS = "xla_strips"  # all scores of some queries at once, up to the diagonal: a prefill on a CPU
  XLA_BLOCKED = "xla_blocked"  # block by block in XLA: CPU, and what the kernels do not take
  SPLASH = "splash"  # JAX's Pallas kernels: TPU; elsewhere interpreted, for tests
  PALLAS_GPU = "pallas_gpu"  # Triton kernels: NVIDIA's GPUs; elsewhere interpreted, for tests


# Up to here all scores of a row are few, and computing them at once is at least as fast (measured, docs/kernels.md).
SHORT_ROW = 128
LONGEST_STRIP = 1024  # beyond, the scores of a strip leave the cache
_KERNELS = {Implementation.SPLASH: ("tpu", splash), Implementation.PALLAS_GPU: ("cuda", pallas_gpu)}


def packed_attention(
  q_BxTxHxd: jax.Array,
  k_BxTxKxd: jax.Array,
  v_BxTxKxd: jax.Array,
  segment_ids_BxT: jax.Array,
  *,
  implementation: Implementation | str | None = None,
) -> jax.Array:
  """softmax(q k / sqrt(d)) v within segments, causal; differentiable in q, k and v.

  Args:
    q_BxTxHxd: queries, floating point; H is a multiple of K, and query head h reads key head h // (H / K).
    k_BxTxKxd: keys, same dtype.
    v_BxTxKxd: values, same dtype.
    segment_ids_BxT: int32 >= 0; 0 marks padding.  Any arrangement is right; segments in rising order along a row, as
      packing makes them, are what lets whole blocks be left out.
    implementation: None means `reference` for rows of at most 128, else `splash` where the program is compiled for a
      TPU, `pallas_gpu` for a GPU, else `xla_blocked`.

  Returns:
    out_BxTxHxd in the dtype of q.  The softmax is float32 (float64 for float64 arguments).  Padding gives zeros and
    takes no gradient, and what it holds, NaN included, reaches no other position.

  Raises:
    ConfigError: unknown implementation, or one that does not take the dtype.
    ValueError: shapes or dtypes that do not fit together.
  """
  _check(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT)
  default = Implementation.REFERENCE if q_BxTxHxd.shape[1] <= SHORT_ROW else None
  chosen = default if implementation is None else choose(implementation, Implementation.REFERENCE, "packed_attention")
  fits_kernels = q_BxTxHxd.dtype in (jnp.bfloat16, jnp.float32)
  require(
    chosen not in _KERNELS or fits_kernels,
    f"packed_attention: implementation={str(chosen)!r} with {q_BxTxHxd.dtype}: bfloat16 or float32",
  )
  if chosen is None and not fits_kernels:
    chosen = Implementation.XLA_BLOCKED
  if 0 in q_BxTxHxd.shape:
    return jnp.zeros_like(q_BxTxHxd)
  valid_BxTx1x1 = (segment_ids_BxT != PADDING)[:, :, None, None]
  q, k, v = (jnp.where(valid_BxTx1x1, x, 0) for x in (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd))
  with full_products(q.dtype):
    if chosen is Implementation.REFERENCE:
      out_BxTxHxd = packed_attention_reference(q, k, v, segment_ids_BxT)
    elif chosen is Implementation.XLA_STRIPS:
      out_BxTxHxd = packed_attention_strips(q, k, v, segment_ids_BxT)
    else:
      out_BxTxHxd = _differentiable(q, k, v, segment_ids_BxT, chosen)
  return jnp.where(valid_BxTx1x1, out_BxTxHxd, 0)


def prefill_attention(
  q_BxTxHxd: jax.Array, k_BxTxKxd: jax.Array, v_BxTxKxd: jax.Array, segment_ids_BxT: jax.Array
) -> jax.Array:
  """The same for rows of one segment each, of which no gradient is asked: on a CPU in strips, elsewhere as above."""
  if not SHORT_ROW < q_BxTxHxd.shape[1] <= LONGEST_STRIP:
    return packed_attention(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT)
  strips = functools.partial(packed_attention, implementation=Implementation.XLA_STRIPS)
  arguments = q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT
  return jax.lax.platform_dependent(*arguments, cpu=strips, default=packed_attention)


def _check(q, k, v, segment_ids) -> None:
  fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
  if not fits or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
    raise ValueError(
      f"packed_attention: q {q.shape}, k {k.shape}, v {v.shape}: expected [B, T, H, d] and twice [B, T, K, d], H a"
      " multiple of K"
    )
  if segment_ids.shape != q.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(
      f"packed_attention: segment_ids {segment_ids.dtype}{list(segment_ids.shape)}: expected integers"
      f" {list(q.shape[:2])}"
    )
  if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"packed_attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one floating dtype")


# ---------------------------------------------------------------------------------------------------------------------
# One VJP for both backends.  Its residuals are the arguments, the result and the log-sum-exp, whatever runs; which of
# them does is decided where the program is compiled.  (With a VJP for each backend, JAX would keep the residuals of
# all of them, on every platform.)


def _run(chosen: Implementation | None, name: str, *arrays: jax.Array):
  """The pass of that name."""
  blocked = getattr(xla_blocked, name)
  on_cpu, elsewhere = (functools.partial(blocked, block=size) for size in (xla_blocked.CPU_BLOCK, xla_blocked.BLOCK))
  by_platform = passes(chosen, name, _KERNELS, cpu=on_cpu, default=elsewhere)
  with full_products(arrays[0].dtype):
    return jax.lax.platform_dependent(*arrays, **by_platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(q, k, v, segment_ids, chosen):
  return _run(chosen, "forward", q, k, v, segment_ids)[0]


def _forward(q, k, v, segment_ids, chosen):
  out, lse = _run(chosen, "forward", q, k, v, segment_ids)
  return out, (q, k, v, segment_ids, out, lse)


def _backward(chosen, residuals, dout):
  return *_run(chosen, "backward", *residuals, dout), np.zeros(residuals[3].shape, jax.dtypes.float0)


_differentiable.defvjp(_forward, _backward)
