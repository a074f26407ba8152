"""The grouped matmul on a TPU: the megablox kernels that JAX ships, behind the interface of `blocked`.

megablox walks over pairs of a row tile and a group: a tile that lies in two groups is computed twice, each time with
the other group's rows masked.  The list of pairs is computed on the device, so that one program serves all group sizes:

    gmm    out[m] = lhs[m] @ rhs[e]               dlhs[m] = dout[m] @ rhs[e]^T    (the transpose is the kernel's)
    tgmm   drhs[e] = lhs[rows of e]^T @ dout[rows of e]

What the kernels leave open is closed here: rows are padded to whole tiles; rows beyond the last group, which no step
writes, are set to zero; tiles are chosen for the shape.

Under `jax.shard_map` the kernels need check_vma=False: their results do not say over which axes they vary.

Sources: jax.experimental.pallas.ops.tpu.megablox; reference notes, jax_practice.md section 6 and pallas.md section 3.
Dimension key: M rows, E groups, K inner, N outer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Tiles = tuple[int, int, int]  # rows, inner, outer

DTYPES = (jnp.bfloat16, jnp.float32)  # what the kernels take

# A kernel may use 16 MiB of vector memory on v5e and v5p and 32 MiB on v6e and tpu7x (what the compiler grants without
# being asked; megablox does not ask).  The chip is not known when a program is traced, hence one limit for all, which
# leaves room for the compiler's own buffers.
_VMEM_BYTES = 14 << 20
_LANES = 128
_ROW_TILES = (512, 256, 128)
_SMALLEST_ROW_TILE = 32
_WIDEST = 1024  # of a tile's inner or outer side, where the inner one has to be cut or is the result's


def forward(lhs_MxK: jax.Array, rhs_ExKxN: jax.Array, group_sizes_E: jax.Array, *, interpret: bool = False):
  """out_MxN; see the api.  interpret: evaluate the kernel's body with XLA, on any machine."""
  num_rows, num_groups = lhs_MxK.shape[0], rhs_ExKxN.shape[0]
  if 0 in (num_rows, *rhs_ExKxN.shape):
    return jnp.zeros((num_rows, rhs_ExKxN.shape[2]), lhs_MxK.dtype)
  tiles = gmm_tiles(num_rows, num_groups, *rhs_ExKxN.shape[1:], lhs_MxK.dtype)
  return _gmm(lhs_MxK, rhs_ExKxN, group_sizes_E, tiles, transpose_rhs=False, interpret=interpret)


def backward(lhs_MxK, rhs_ExKxN, group_sizes_E, dout_MxN, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(dlhs_MxK, drhs_ExKxN) for the cotangent of the result."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  num_rows, (num_groups, inner, outer) = lhs_MxK.shape[0], rhs_ExKxN.shape
  if 0 in (num_rows, *rhs_ExKxN.shape):
    return jnp.zeros_like(lhs_MxK), jnp.zeros_like(rhs_ExKxN)
  tiles = gmm_tiles(num_rows, num_groups, outer, inner, lhs_MxK.dtype)
  dlhs_MxK = _gmm(dout_MxN, rhs_ExKxN, group_sizes_E, tiles, transpose_rhs=True, interpret=interpret)
  tiles = tgmm_tiles(num_rows, num_groups, inner, outer, lhs_MxK.dtype)
  drhs_ExKxN = tgmm(
    _whole_tiles(lhs_MxK, tiles[0]).T,
    _whole_tiles(dout_MxN, tiles[0]),
    group_sizes_E.astype(jnp.int32),
    preferred_element_type=rhs_ExKxN.dtype,
    tiling=tiles,
    interpret=interpret,
  )
  return dlhs_MxK, drhs_ExKxN


def _gmm(lhs_MxK, rhs, group_sizes_E, tiles: Tiles, *, transpose_rhs: bool, interpret: bool) -> jax.Array:
  # Imported late: a process that runs on a CPU needs no kernel before it traces one.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  num_rows, sizes_E = lhs_MxK.shape[0], group_sizes_E.astype(jnp.int32)
  total = jnp.sum(sizes_E)
  # The number of steps is data.  A kernel of no steps at all is nothing that megablox promises, so without any row one
  # is computed, in vain.
  visited_E = sizes_E.at[0].add((total == 0).astype(jnp.int32))
  out_MxN = gmm(
    _whole_tiles(lhs_MxK, tiles[0]),
    rhs,
    visited_E,
    preferred_element_type=lhs_MxK.dtype,
    tiling=tiles,
    transpose_rhs=transpose_rhs,
    interpret=interpret,
  )[:num_rows]
  return jnp.where(jnp.arange(num_rows)[:, None] < total, out_MxN, 0)


def _whole_tiles(x_MxD: jax.Array, tile: int) -> jax.Array:
  return jnp.pad(x_MxD, ((0, -x_MxD.shape[0] % tile), (0, 0)))


# ---------------------------------------------------------------------------------------------------------------------
# Tiles.  Bundle counts of the compiled kernels and what follows from them: docs/kernels.md.


def gmm_tiles(num_rows: int, num_groups: int, inner: int, outer: int, dtype: jnp.dtype) -> Tiles:
  """Tiles of rows [M, inner] times matrices [E, inner, outer].

  The inner side whole, where it fits: then a group's matrix is read once, however many row tiles the group has, and
  the row tile may be small, which is what keeps the work on tiles that two groups share small.
  """
  rows = _row_tile(num_rows, num_groups, 16)
  for widest in (1024, 512, 256, 128):
    tiles = rows, inner, _cut(outer, widest)
    if _gmm_bytes(tiles, dtype) <= _VMEM_BYTES:
      return tiles
  return rows, _cut(inner, _WIDEST), _cut(outer, _WIDEST // 2)


def tgmm_tiles(num_rows: int, num_groups: int, inner: int, outer: int, dtype: jnp.dtype) -> Tiles:
  """Tiles of drhs[e] = lhs[rows of e]^T @ dout[rows of e], whose result is [E, inner, outer].

  Rows are what is summed over, and each row tile reads and writes the sum once: twice the row tile of `gmm`.
  """
  rows = _row_tile(num_rows, num_groups, 8)
  for tall, wide in ((_WIDEST, _WIDEST), (_WIDEST, _WIDEST // 2), (_WIDEST // 2, _WIDEST // 2)):
    tiles = rows, _cut(inner, tall, halve=False), _cut(outer, wide)
    if _tgmm_bytes(tiles, dtype) <= _VMEM_BYTES:
      break
  return tiles


def _row_tile(num_rows: int, num_groups: int, share: int) -> int:
  """At most 1 / share of a group, where that is no less than 128 rows; below, about what a group has.

  Every border between two groups costs one tile more, so 1 / share is also the bound on the work done in vain.
  """
  per_group = -(-num_rows // num_groups)
  if per_group >= _ROW_TILES[-1]:
    return next((tile for tile in _ROW_TILES if tile * share <= per_group), _ROW_TILES[-1])
  return max(_SMALLEST_ROW_TILE, 1 << (per_group - 1).bit_length())


def _cut(size: int, widest: int, halve: bool = True) -> int:
  """The side of a tile: the whole of a small size, else the multiple of 128 that leaves the least over.

  halve: cut at least in two.  The outer side is the kernels' parallel one, and v5p, whose chip is one device of two
  cores, gives each core half of it.
  """
  if size < 2 * _LANES or (size <= widest and not halve):
    return size
  widest = min(widest, -(-size // (2 * _LANES)) * _LANES) if halve else widest
  return min(range(widest, 0, -_LANES), key=lambda tile: -(-size // tile) * tile)


def _gmm_bytes(tiles: Tiles, dtype: jnp.dtype) -> int:
  rows, inner, outer = tiles  # operands and result are buffered twice; the sum is float32
  buffers = 2 * (rows * inner + inner * outer + rows * outer) * jnp.dtype(dtype).itemsize
  return buffers + rows * outer * 4 + _parts_bytes(rows * inner + inner * outer, dtype)


def _tgmm_bytes(tiles: Tiles, dtype: jnp.dtype) -> int:
  rows, inner, outer = tiles  # as above; the operands are masked in float32
  buffers = 2 * (rows * inner + rows * outer + inner * outer) * jnp.dtype(dtype).itemsize
  return buffers + (inner * outer + rows * inner + rows * outer) * 4 + _parts_bytes(rows * (inner + outer), dtype)


def _parts_bytes(elements: int, dtype: jnp.dtype) -> int:
  """A full float32 product is one of the three bfloat16 parts of each operand."""
  return elements * 3 * 2 if dtype == jnp.float32 else 0


class Work(NamedTuple):
  """Multiply-adds that the kernels do, in units of those needed."""

  forward: float
  backward: float  # of both gradients together


def padded_work(group_sizes_E: np.ndarray, num_rows: int, inner: int, outer: int, dtype: jnp.dtype) -> Work:
  """Counts the steps that the kernels take for these groups, with the rows and columns they compute in vain.

  The compiler's own count, from the estimate that megablox hands to it, is that of the ideal work, whatever the tiles:
  it shows that no product with all groups is hidden in the program, and no more.
  """
  num_groups, ideal = len(group_sizes_E), int(np.sum(group_sizes_E)) * inner * outer
  end_E = np.cumsum(np.asarray(group_sizes_E, np.int64))
  start_E = end_E - group_sizes_E

  def work(tiles: Tiles, inner: int, outer: int) -> int:
    rows, *sides = tiles
    visits_E = np.where(end_E > start_E, -(-end_E // rows) - start_E // rows, 0)
    columns = [-(-size // side) * side for size, side in zip((inner, outer), sides, strict=True)]
    return int(visits_E.sum()) * rows * columns[0] * columns[1]

  out = work(gmm_tiles(num_rows, num_groups, inner, outer, dtype), inner, outer)
  dlhs = work(gmm_tiles(num_rows, num_groups, outer, inner, dtype), outer, inner)
  drhs = work(tgmm_tiles(num_rows, num_groups, inner, outer, dtype), inner, outer)
  return Work(out / ideal, (dlhs + drhs) / (2 * ideal))
