"""The grouped matmul on a GPU: Triton kernels, written in Pallas.

    forward    out[m] = lhs[m] @ rhs[e]            one program for a block of rows of one group and a tile of the outer side
    backward   dlhs[m] = dout[m] @ rhs[e]^T        the same kernel, which reads rhs the other way
               drhs[e] = lhs[rows of e]^T @ dout[rows of e]      one program a tile of drhs[e], over the rows of e

Blocks begin where their group begins, so that a program needs one matrix.  How many blocks there are is data; the grid is
as large as they can be, and the programs beyond end at once.  The last block of a group reaches beyond its group, the last
of all would reach beyond the array and begins earlier instead; rows that are not the block's own are not stored.

XLA has no form of this that is fast on a GPU: `blocked` waits for the host at every turn of its loops, and `ragged_dot`
multiplies all rows with all matrices (measured, docs/gpu.md).

Dimension key: M rows, E groups, K inner, N outer; V blocks of rows, of B rows each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.triton import compiler_params, dot

DTYPES = (jnp.bfloat16, jnp.float32)  # what the kernels take

_FEWEST_ROWS = 16  # of a product in Triton
_ROW_BLOCKS = (128, 64, 32, 16)
_SIDES = (128, 64, 32, 16)  # tiles of the inner and outer side


class Launch(NamedTuple):
  """How a kernel is cut up."""

  rows: int
  inner: int
  outer: int
  warps: int
  stages: int


def forward(lhs_MxK: jax.Array, rhs_ExKxN: jax.Array, group_sizes_E: jax.Array, *, interpret: bool = False):
  """out_MxN; see the api.  interpret: evaluate the kernel's body with XLA, on any machine."""
  return _rows_times_matrices(lhs_MxK, rhs_ExKxN, group_sizes_E, transposed=False, interpret=interpret)


def backward(lhs_MxK, rhs_ExKxN, group_sizes_E, dout_MxN, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(dlhs_MxK, drhs_ExKxN) for the cotangent of the result."""
  dlhs_MxK = _rows_times_matrices(dout_MxN, rhs_ExKxN, group_sizes_E, transposed=True, interpret=interpret)
  return dlhs_MxK, _of_matrices(lhs_MxK, dout_MxN, rhs_ExKxN, group_sizes_E, interpret)


# ---------------------------------------------------------------------------------------------------------------------
# Rows times matrices


def _rows_times_matrices(x_MxK, rhs, group_sizes_E, *, transposed: bool, interpret: bool) -> jax.Array:
  """x[m] @ rhs[e], or its transpose, in the dtype of x; 0 for rows of no group."""
  from jax.experimental import pallas as pl

  num_rows, num_groups = x_MxK.shape[0], rhs.shape[0]
  outer = rhs.shape[1 if transposed else 2]
  if 0 in (num_rows, *rhs.shape):
    return jnp.zeros((num_rows, outer), x_MxK.dtype)
  # Sides that no tile divides are padded; those of real models are multiples of 128.
  rhs = _padded(_padded(rhs, 1, _side(rhs.shape[1])), 2, _side(rhs.shape[2]))
  x_MxK = _padded(_padded(x_MxK, 0, _FEWEST_ROWS, least=True), 1, _side(x_MxK.shape[1]))
  M, K = x_MxK.shape
  N = rhs.shape[1 if transposed else 2]
  launch = _launch(num_rows, num_groups, K, N, x_MxK.dtype)
  blocks = _Blocks.of(group_sizes_E, num_rows, launch.rows)
  kernel = functools.partial(_product_kernel, launch=launch, num_rows=M, inner=K, transposed=transposed)
  out_MxN = pl.pallas_call(
    kernel,
    grid=(N // launch.outer, blocks.count),  # tiles of one block first: they share its rows
    out_shape=jax.ShapeDtypeStruct((M, N), x_MxK.dtype),
    compiler_params=compiler_params(launch.warps, launch.stages),
    interpret=interpret,
    name="grouped_matmul",
  )(blocks.group_V, blocks.first_V, blocks.end_V, x_MxK, rhs)
  in_group = jnp.arange(num_rows)[:, None] < jnp.sum(group_sizes_E)
  return jnp.where(in_group, out_MxN[:num_rows, :outer], 0)


def _product_kernel(group_V, first_V, end_V, x_MxK, rhs, out_MxN, *, launch: Launch, num_rows, inner, transposed):
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  tile, block = pl.program_id(0), pl.program_id(1)
  e, first, end = group_V[block], first_V[block], end_V[block]

  @pl.when(first < end)
  def _():
    place = jnp.minimum(first, num_rows - launch.rows)
    row_B = place + jnp.arange(launch.rows)
    own_Bx1 = ((row_B >= first) & (row_B < end))[:, None]
    columns = pl.ds(tile * launch.outer, launch.outer)

    def add(step, sum_BxN):
      depth = pl.ds(step * launch.inner, launch.inner)
      x_BxK = triton.load(x_MxK.at[pl.ds(place, launch.rows), depth])
      matrix = rhs.at[e, columns, depth] if transposed else rhs.at[e, depth, columns]
      return sum_BxN + dot(x_BxK, triton.load(matrix), trans_b=transposed)

    zero_BxN = jnp.zeros((launch.rows, launch.outer), jnp.float32)
    sum_BxN = lax.fori_loop(0, inner // launch.inner, add, zero_BxN)
    triton.store(out_MxN.at[pl.ds(place, launch.rows), columns], sum_BxN.astype(out_MxN.dtype), mask=own_Bx1)


class _Blocks(NamedTuple):
  """Blocks of rows: of block v the group, its first row and the row at which it ends; empty ones have none."""

  group_V: jax.Array
  first_V: jax.Array
  end_V: jax.Array

  @property
  def count(self) -> int:
    return self.group_V.shape[0]

  @classmethod
  def of(cls, group_sizes_E: jax.Array, num_rows: int, rows: int) -> "_Blocks":
    sizes_E = group_sizes_E.astype(jnp.int32)
    start_E = jnp.cumsum(sizes_E) - sizes_E
    blocks_E = (sizes_E + rows - 1) // rows
    until_E = jnp.cumsum(blocks_E)
    count = num_rows // rows + len(sizes_E)  # every group may end in a block that is not full
    v = jnp.arange(count, dtype=jnp.int32)
    group_V = jnp.minimum(jnp.searchsorted(until_E, v, side="right").astype(jnp.int32), len(sizes_E) - 1)
    first_V = start_E[group_V] + (v - (until_E - blocks_E)[group_V]) * rows
    end_V = jnp.where(v < until_E[-1], jnp.minimum(first_V + rows, (start_E + sizes_E)[group_V]), 0)
    return cls(group_V, first_V, end_V)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient of the matrices


def _of_matrices(lhs_MxK, dout_MxN, rhs_ExKxN, group_sizes_E, interpret: bool) -> jax.Array:
  """drhs_ExKxN; 0 for a group without rows."""
  from jax.experimental import pallas as pl

  num_rows, shape = lhs_MxK.shape[0], rhs_ExKxN.shape
  if 0 in (num_rows, *shape):
    return jnp.zeros(shape, rhs_ExKxN.dtype)
  lhs_MxK, dout_MxN = (
    _padded(_padded(x, 0, _FEWEST_ROWS, least=True), 1, _side(x.shape[1])) for x in (lhs_MxK, dout_MxN)
  )
  (M, K), N = lhs_MxK.shape, dout_MxN.shape[1]
  launch = _matrix_launch(num_rows, shape[0], K, N, lhs_MxK.dtype)
  sizes_E = group_sizes_E.astype(jnp.int32)
  end_E = jnp.cumsum(sizes_E)
  kernel = functools.partial(_matrix_kernel, launch=launch, num_rows=M)
  drhs_ExKxN = pl.pallas_call(
    kernel,
    grid=(N // launch.outer, K // launch.inner, shape[0]),
    out_shape=jax.ShapeDtypeStruct((shape[0], K, N), rhs_ExKxN.dtype),
    compiler_params=compiler_params(launch.warps, launch.stages),
    interpret=interpret,
    name="grouped_matmul_of_matrices",
  )(end_E - sizes_E, end_E, lhs_MxK, dout_MxN)
  return drhs_ExKxN[:, : shape[1], : shape[2]]


def _matrix_kernel(start_E, end_E, lhs_MxK, dout_MxN, drhs_ExKxN, *, launch: Launch, num_rows):
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  e = pl.program_id(2)
  start, end = start_E[e], end_E[e]
  columns = pl.ds(pl.program_id(0) * launch.outer, launch.outer)
  depth = pl.ds(pl.program_id(1) * launch.inner, launch.inner)

  def add(step, sum_KxN):
    first = start + step * launch.rows
    place = jnp.minimum(first, num_rows - launch.rows)
    row_B = place + jnp.arange(launch.rows)
    own_Bx1 = ((row_B >= first) & (row_B < end))[:, None]
    # Both sides: another group's rows may hold infinities, and 0 * inf is not 0.
    lhs_BxK = triton.load(lhs_MxK.at[pl.ds(place, launch.rows), depth], mask=own_Bx1, other=0.0)
    dout_BxN = triton.load(dout_MxN.at[pl.ds(place, launch.rows), columns], mask=own_Bx1, other=0.0)
    return sum_KxN + dot(lhs_BxK, dout_BxN, trans_a=True)

  zero_KxN = jnp.zeros((launch.inner, launch.outer), jnp.float32)
  sum_KxN = lax.fori_loop(0, (end - start + launch.rows - 1) // launch.rows, add, zero_KxN)
  triton.store(drhs_ExKxN.at[e, depth, columns], sum_KxN.astype(drhs_ExKxN.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def _side(size: int) -> int:
  """The largest tile that divides a side; else the smallest, of whose multiples it is padded to one."""
  return next((tile for tile in _SIDES if size % tile == 0), _SIDES[-1])


def _padded(x: jax.Array, axis: int, multiple: int, least: bool = False) -> jax.Array:
  """least: only up to one multiple, if it is shorter."""
  size = x.shape[axis]
  missing = max(multiple - size, 0) if least else -size % multiple
  return x if missing == 0 else jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _row_block(num_rows: int, num_groups: int) -> int:
  """About the rows of a group, and no more than there are."""
  per_group = -(-num_rows // num_groups)
  wanted = next((rows for rows in reversed(_ROW_BLOCKS) if rows >= per_group), _ROW_BLOCKS[0])
  return max(_FEWEST_ROWS, min(wanted, 1 << (num_rows.bit_length() - 1)))


def _launch(num_rows: int, num_groups: int, inner: int, outer: int, dtype: jnp.dtype) -> Launch:
  """The best of ten on an H100 for many rows and of six for few, bfloat16 (docs/gpu.md)."""
  rows = _row_block(num_rows, num_groups)
  deepest = 32 if dtype == jnp.float32 else 128 if rows == _FEWEST_ROWS else 64
  return Launch(rows, min(_side(inner), deepest), min(_side(outer), 128), 8 if rows == _ROW_BLOCKS[0] else 4, 3)


def _matrix_launch(num_rows: int, num_groups: int, inner: int, outer: int, dtype: jnp.dtype) -> Launch:
  rows = min(_row_block(num_rows, num_groups), 32 if dtype == jnp.float32 else 64)
  return Launch(rows, min(_side(inner), 128), min(_side(outer), 128), 8, 3)
