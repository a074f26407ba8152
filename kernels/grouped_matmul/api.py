"""The grouped matmul: out[m] = lhs[m] @ rhs[group of m], rows sorted by group (architecture decision 9).

Both fast backends have a forward and a backward pass over the same arrays, so that one VJP serves them, and which of
them runs is decided where a program is compiled: the same trace runs on a CPU and compiles for a TPU.

Dimension key: M rows, E groups, K inner, N outer; L layers, D hidden, F expert width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import Enum, require
from kernels.choice import choose, passes
from kernels.grouped_matmul import blocked, megablox, pallas_gpu
from kernels.grouped_matmul.reference import grouped_matmul_reference
from kernels.precision import full_products


class Implementation(Enum):
  REFERENCE = "reference"  # every row times every group's matrix, masked: E times the work, obviously right
  BLOCKED = "blocked"  # blocks of rows of one group, in XLA: CPU, and what the kernels do not take
  MEGABLOX = "megablox"  # JAX's Pallas kernels: TPU; elsewhere interpreted, for tests
  PALLAS_GPU = "pallas_gpu"  # Triton kernels: NVIDIA's GPUs; elsewhere interpreted, for tests


_KERNELS = {Implementation.MEGABLOX: ("tpu", megablox), Implementation.PALLAS_GPU: ("cuda", pallas_gpu)}


def grouped_matmul(
  lhs_MxK: jax.Array,
  rhs_ExKxN: jax.Array,
  group_sizes_E: jax.Array,
  *,
  implementation: Implementation | str | None = None,
) -> jax.Array:
  """Multiplies each group of rows with the group's own matrix; differentiable in lhs and rhs.

  Args:
    lhs_MxK: rows sorted by group, floating point.
    rhs_ExKxN: one matrix a group, same dtype as lhs.
    group_sizes_E: integers >= 0, rows of each group in order.  Their sum may be less than M: the rows beyond belong to
      no group, are zero in the result and get zero gradient.  A sum above M is not allowed (and cannot be checked).
    implementation: None means `megablox` where the program is compiled for a TPU, `pallas_gpu` for a GPU, else `blocked`.

  Returns:
    out_MxN in the dtype of lhs; products are summed in float32 (float64 for float64 arguments).

  Raises:
    ConfigError: unknown implementation, or one that does not take the dtype.
    ValueError: shapes or dtypes that do not fit together.
  """
  if lhs_MxK.ndim != 2 or rhs_ExKxN.ndim != 3 or lhs_MxK.shape[1] != rhs_ExKxN.shape[1]:
    raise ValueError(f"grouped_matmul: lhs {lhs_MxK.shape} and rhs {rhs_ExKxN.shape}: expected [M, K] and [E, K, N]")
  if group_sizes_E.shape != rhs_ExKxN.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(
      f"grouped_matmul: group_sizes {group_sizes_E.dtype}{list(group_sizes_E.shape)}: expected"
      f" {rhs_ExKxN.shape[0]} integers, one a group of rhs"
    )
  if lhs_MxK.dtype != rhs_ExKxN.dtype or not jnp.issubdtype(lhs_MxK.dtype, jnp.floating):
    raise ValueError(
      f"grouped_matmul: lhs is {lhs_MxK.dtype} and rhs {rhs_ExKxN.dtype}: expected one floating dtype for both"
    )
  fits_kernels = all(lhs_MxK.dtype in kernels.DTYPES for _, kernels in _KERNELS.values())
  if implementation is None:
    return _differentiable(lhs_MxK, rhs_ExKxN, group_sizes_E, None if fits_kernels else Implementation.BLOCKED)
  chosen = choose(implementation, Implementation.BLOCKED, "grouped_matmul")
  if chosen is Implementation.REFERENCE:
    with full_products(lhs_MxK.dtype):
      return grouped_matmul_reference(lhs_MxK, rhs_ExKxN, group_sizes_E)
  require(
    chosen is Implementation.BLOCKED or fits_kernels,
    f"grouped_matmul: implementation={chosen.value!r} with {lhs_MxK.dtype}: bfloat16 or float32",
  )
  return _differentiable(lhs_MxK, rhs_ExKxN, group_sizes_E, chosen)


def gated_experts(
  rows_MxD: jax.Array,
  gate_up_LxExDx2xF: jax.Array,
  down_LxExFxD: jax.Array,
  group_sizes_E: jax.Array,
  layer: jax.Array | int,
) -> jax.Array:
  """down(silu(gate row) * up row), each row by its own expert of one layer of a stack: a decode step's, forward only.

  Args:
    rows_MxD: rows sorted by expert.
    gate_up_LxExDx2xF: index 0: gate, 1: up.
    down_LxExFxD: same dtype as the rows.
    group_sizes_E: as of `grouped_matmul`.
    layer: which layer's experts.

  Returns:
    out_MxD in the dtype of the rows, as two calls of `grouped_matmul` would give, and on all but a CPU do.
  """
  layer = jnp.asarray(layer, jnp.int32)

  def products(rows_MxD, gate_up_LxExDx2xF, down_LxExFxD, group_sizes_E, layer):
    gate_up_ExDx2xF, down_ExFxD = (
      jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in (gate_up_LxExDx2xF, down_LxExFxD)
    )
    # One layer's: a TPU lays gate and up in tiles, so that side by side they are a copy, which XLA would make of all layers.
    gate_up_ExDxG = gate_up_ExDx2xF.reshape(*gate_up_ExDx2xF.shape[:2], -1)
    gate_MxF, up_MxF = jnp.split(grouped_matmul(rows_MxD, gate_up_ExDxG, group_sizes_E), 2, axis=-1)
    return grouped_matmul(jax.nn.silu(gate_MxF) * up_MxF, down_ExFxD, group_sizes_E)

  def in_blocks(rows_MxD, gate_up_LxExDx2xF, *rest):
    return blocked.gated_experts(rows_MxD, gate_up_LxExDx2xF.reshape(*gate_up_LxExDx2xF.shape[:3], -1), *rest)

  arguments = rows_MxD, gate_up_LxExDx2xF, down_LxExFxD, group_sizes_E, layer
  return jax.lax.platform_dependent(*arguments, cpu=in_blocks, default=products)


def _run(chosen: Implementation | None, name: str, *arrays: jax.Array):
  """The pass of that name."""
  with full_products(arrays[0].dtype):
    return jax.lax.platform_dependent(*arrays, **passes(chosen, name, _KERNELS, default=getattr(blocked, name)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _differentiable(lhs_MxK, rhs_ExKxN, group_sizes_E, chosen):
  return _run(chosen, "forward", lhs_MxK, rhs_ExKxN, group_sizes_E)


def _forward(lhs_MxK, rhs_ExKxN, group_sizes_E, chosen):
  return _differentiable(lhs_MxK, rhs_ExKxN, group_sizes_E, chosen), (lhs_MxK, rhs_ExKxN, group_sizes_E)


def _backward(chosen, residuals, dout_MxN):
  dlhs_MxK, drhs_ExKxN = _run(chosen, "backward", *residuals, dout_MxN)
  return dlhs_MxK, drhs_ExKxN, np.zeros(residuals[2].shape, jax.dtypes.float0)


_differentiable.defvjp(_forward, _backward)
