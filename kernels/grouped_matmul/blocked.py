"""The grouped matmul as a loop over blocks of rows, in plain XLA.

For each group that has rows: slice its matrix once, cut its rows into full blocks of the largest size, then into blocks
of the next size, and round up only at the smallest.  So a group wastes less than one smallest block, while nearly all
its rows go through matmuls large enough to run at full speed.  Full blocks lie inside their group and need no mask; the
last one may reach into the next group (or, moved back to stay inside the array, into the group before) and leaves those
rows as they were.

The loops have trip counts that depend on the group sizes, which XLA cannot differentiate, hence a backward pass of its
own:

    dlhs = grouped_matmul(dout, rhs transposed)          drhs[e] = lhs[rows of e]^T @ dout[rows of e]

Both need the same rows of dout, so that one loop makes both; drhs is summed in float32 over the blocks of a group and
written once.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.bits import bits, widened

Carry = TypeVar("Carry")

# Measured on a CPU (docs/objective.md).  From 128 rows a group on: 256 rows reach the speed of a plain matmul, tails of
# 64 balance waste against the number of iterations.  Below (decode, small batches): one size, about that of a group.
_LARGE_GROUP = 128
_LARGE_BLOCKS = (256, 64)
_SMALL_BLOCKS = (4, 32)  # from, to


def block_sizes(num_rows: int, num_groups: int) -> tuple[int, ...]:
  """Block sizes, falling, for a number of rows and groups known at trace time."""
  rows_per_group = -(-num_rows // num_groups)
  if rows_per_group >= _LARGE_GROUP:
    return tuple(size for size in _LARGE_BLOCKS if size <= num_rows)
  smallest, largest = _SMALL_BLOCKS
  power_of_two = 1 << (rows_per_group - 1).bit_length()
  return (min(max(power_of_two, smallest), largest, num_rows),)


def padded_rows(group_sizes_E: np.ndarray, num_rows: int) -> int:
  """Rows that the blocks of these groups hold together, those computed in vain included."""
  smallest = block_sizes(num_rows, len(group_sizes_E))[-1]
  return int((-(-np.asarray(group_sizes_E) // smallest) * smallest).sum())


def _for_blocks(
  sizes: tuple[int, ...], start: jax.Array, count: jax.Array, carry: Carry, body: Callable[..., Carry]
) -> Carry:
  """Calls body(size, first row, whether it may be ragged, carry) for blocks that cover count rows from start."""
  for size in sizes:
    ragged = size == sizes[-1]
    blocks = (count + size - 1) // size if ragged else count // size
    carry = lax.fori_loop(
      0, blocks, lambda i, c, size=size, start=start, ragged=ragged: body(size, start + i * size, ragged, c), carry
    )
    start, count = start + blocks * size, count - blocks * size
  return carry


def _for_groups(group_sizes_E: jax.Array, carry: Carry, body: Callable[..., Carry]) -> Carry:
  """Calls body(group, its first row, its number of rows, carry) for every group that has rows.

  Empty groups are passed over rather than looped over: in decode most experts have no token, and reading their
  matrices would be all the time.
  """
  sizes_E = group_sizes_E.astype(jnp.int32)
  start_E = jnp.cumsum(sizes_E) - sizes_E
  filled_E = jnp.argsort(sizes_E == 0, stable=True)

  def group(i: jax.Array, carry: Carry) -> Carry:
    e = filled_E[i]
    return body(e, start_E[e], sizes_E[e], carry)

  return lax.fori_loop(0, jnp.count_nonzero(sizes_E), group, carry)


def _rows(x_MxD: jax.Array, first: jax.Array, size: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(x_MxD, first, size)


def _place(first: jax.Array, end: jax.Array, size: int, num_rows: int) -> tuple[jax.Array, jax.Array]:
  """Where a ragged block is read and written, and which of its rows are its own."""
  place = jnp.minimum(first, num_rows - size)
  row_B = place + jnp.arange(size, dtype=place.dtype)
  return place, ((row_B >= first) & (row_B < end))[:, None]


def _put(out_MxD: jax.Array, rows_BxD: jax.Array, place: jax.Array, own_Bx1: jax.Array | None) -> jax.Array:
  """A block's rows where they belong; of a ragged block (`own_Bx1`, see `_place`) only its own."""
  if own_Bx1 is not None:
    rows_BxD = jnp.where(own_Bx1, rows_BxD, _rows(out_MxD, place, len(rows_BxD)))
  return lax.dynamic_update_slice_in_dim(out_MxD, rows_BxD, place, 0)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  dtype = jnp.promote_types(a.dtype, jnp.float32)
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def forward(lhs_MxK: jax.Array, rhs_ExKxN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
  """out_MxN; see the api."""
  num_rows, num_groups = lhs_MxK.shape[0], rhs_ExKxN.shape[0]
  out_MxN = jnp.zeros((num_rows, rhs_ExKxN.shape[2]), lhs_MxK.dtype)
  if num_rows == 0 or num_groups == 0:
    return out_MxN
  sizes = block_sizes(num_rows, num_groups)

  def group(e: jax.Array, start: jax.Array, count: jax.Array, out_MxN: jax.Array) -> jax.Array:
    rhs_KxN = lax.dynamic_index_in_dim(rhs_ExKxN, e, keepdims=False)

    def block(size: int, first: jax.Array, ragged: bool, out_MxN: jax.Array) -> jax.Array:
      place, own_Bx1 = _place(first, start + count, size, num_rows) if ragged else (first, None)
      out_BxN = _dot(_rows(lhs_MxK, place, size), rhs_KxN, (1, 0)).astype(out_MxN.dtype)
      return _put(out_MxN, out_BxN, place, own_Bx1)

    return _for_blocks(sizes, start, count, out_MxN, block)

  return _for_groups(group_sizes_E, out_MxN, group)


def gated_experts(
  rows_MxD: jax.Array, gate_up_LxExDxG: jax.Array, down_LxExFxD: jax.Array, group_sizes_E: jax.Array, layer: jax.Array
) -> jax.Array:
  """down(silu(gate row) * up row) by each row's own expert, out_MxD; see the api.

  An expert's matrices are cut out of the stack of all layers just before they are used.  (Cut out for a whole layer
  first, as a scan over layers does, they are a copy of all its experts, and that was most of a decode step.)
  """
  num_rows, num_groups = rows_MxD.shape[0], down_LxExFxD.shape[1]
  if num_rows == 0 or num_groups == 0:
    return jnp.zeros_like(rows_MxD)
  sizes, dtype = block_sizes(num_rows, num_groups), rows_MxD.dtype
  rows_MxD = widened(rows_MxD)
  if down_LxExFxD.dtype == jnp.bfloat16:
    gate_up_LxExDxG, down_LxExFxD = bits(gate_up_LxExDxG), bits(down_LxExFxD)

  def matrix(stack_LxExKxN: jax.Array, e: jax.Array) -> jax.Array:
    zero = jnp.zeros((), e.dtype)
    place = layer.astype(e.dtype), e, zero, zero
    return widened(lax.dynamic_slice(stack_LxExKxN, place, (1, 1, *stack_LxExKxN.shape[2:]))[0, 0])

  def group(e: jax.Array, start: jax.Array, count: jax.Array, out_MxD: jax.Array) -> jax.Array:
    gate_up_DxG, down_FxD = matrix(gate_up_LxExDxG, e), matrix(down_LxExFxD, e)

    def block(size: int, first: jax.Array, ragged: bool, out_MxD: jax.Array) -> jax.Array:
      place, own_Bx1 = _place(first, start + count, size, num_rows) if ragged else (first, None)
      hidden_BxG = _dot(_rows(rows_MxD, place, size), gate_up_DxG, (1, 0)).astype(dtype)
      gate_BxF, up_BxF = jnp.split(hidden_BxG, 2, axis=-1)
      out_BxD = _dot(widened(jax.nn.silu(gate_BxF) * up_BxF), down_FxD, (1, 0))
      return _put(out_MxD, out_BxD, place, own_Bx1)

    return _for_blocks(sizes, start, count, out_MxD, block)

  return _for_groups(group_sizes_E, jnp.zeros_like(rows_MxD), group).astype(dtype)


def backward(
  lhs_MxK: jax.Array, rhs_ExKxN: jax.Array, group_sizes_E: jax.Array, dout_MxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(dlhs_MxK, drhs_ExKxN) for the cotangent of the result."""
  num_rows, num_groups = lhs_MxK.shape[0], rhs_ExKxN.shape[0]
  grads = (jnp.zeros_like(lhs_MxK), jnp.zeros_like(rhs_ExKxN))
  if num_rows == 0 or num_groups == 0:
    return grads
  sizes = block_sizes(num_rows, num_groups)
  sum_dtype = jnp.promote_types(lhs_MxK.dtype, jnp.float32)

  def group(e: jax.Array, start: jax.Array, count: jax.Array, grads: tuple[jax.Array, jax.Array]):
    dlhs_MxK, drhs_ExKxN = grads
    rhs_KxN = lax.dynamic_index_in_dim(rhs_ExKxN, e, keepdims=False)

    def block(size: int, first: jax.Array, ragged: bool, carry: tuple[jax.Array, jax.Array]):
      dlhs_MxK, sum_KxN = carry
      place, own_Bx1 = _place(first, start + count, size, num_rows) if ragged else (first, None)
      lhs_BxK, dout_BxN = _rows(lhs_MxK, place, size), _rows(dout_MxN, place, size)
      if ragged:  # both sides: another group's rows may hold infinities, and 0 * inf is not 0
        lhs_BxK, dout_BxN = jnp.where(own_Bx1, lhs_BxK, 0), jnp.where(own_Bx1, dout_BxN, 0)
      dlhs_BxK = _dot(dout_BxN, rhs_KxN, (1, 1)).astype(dlhs_MxK.dtype)
      sum_KxN = sum_KxN + _dot(lhs_BxK, dout_BxN, (0, 0))
      return _put(dlhs_MxK, dlhs_BxK, place, own_Bx1), sum_KxN

    zero_KxN = jnp.zeros(rhs_KxN.shape, sum_dtype)
    dlhs_MxK, sum_KxN = _for_blocks(sizes, start, count, (dlhs_MxK, zero_KxN), block)
    return dlhs_MxK, lax.dynamic_update_index_in_dim(drhs_ExKxN, sum_KxN.astype(drhs_ExKxN.dtype), e, 0)

  return _for_groups(group_sizes_E, grads, group)
