"""Tile sizes of the TPU kernels: one table for the chips, and what is cut where a hidden width does not fit.

A sweep reads a tile of weight [H, C] once for each block of R tokens, so R is the number of multiplications that a byte
of bfloat16 weight is used for (2 R FLOPs a weight of 2 bytes), 2 R where a second product follows; it should exceed the
chip's ridge, its peak over its bandwidth, or the sweep waits for memory.  In the sweep for dweight the roles are
reversed: it reads hidden states once for each tile of C ids and does two products with them, so 2 C counts.  A tile is
unrolled into one basic block; beyond 512 x 512 the compiler's own count of instruction words per product falls by at
most 5% and compile times triple (docs/kernels.md).

Which chip is compiled for is read from the mesh in whose context the program is traced (`jax.set_mesh`, or a mesh given
to the sharded form), never from `jax.devices()`: a process without a TPU compiles for any of them.  Without a mesh
the tiles are such that every chip of the table takes them.

Dimension key: H hidden width, R tokens of a block, C ids of a tile.
"""

import dataclasses
from typing import Literal

import jax

from sharding.hardware import CHIPS, Chip

Kernel = Literal["forward", "dhidden", "dweight"]

LANES = 128
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tile:
  rows: int  # R
  ids: int  # C


TILES = {
  "v5e": Tile(512, 512),  # ridge 240 FLOP/B
  "v5p": Tile(512, 512),  # ridge 166
  # Ridge 561: scoring alone, at 512 rows, would wait for memory only if it reached more than 91% of the peak.
  "v6e": Tile(512, 512),
  "tpu7x": Tile(512, 512),  # ridge 312
}

# Largest part of the hidden width that one unrolled product of bfloat16 takes: beyond it a loop, so that programs stay
# small.  A float32 product is six of bfloat16 on the matrix unit.
_HIDDEN_PART = 2048


def context_chip() -> Chip | None:
  """The chip of the mesh in whose context this is traced; None if there is none, or it is no chip of the table."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return next((chip for chip in CHIPS.values() if device is not None and chip.device_kind == device.device_kind), None)


def tile_for(kernel: Kernel, chip: Chip | None, hidden: int, itemsize: int) -> Tile:
  """The table's tile, halved until the kernel's buffers fit the chip's vector memory.

  Args:
    chip: None: one that all chips of the table take.
    hidden: H.
    itemsize: bytes of a number of hidden and weight.

  Raises:
    ValueError: not even the smallest tile fits.
  """
  tile = TILES[chip.name] if chip else Tile(*(min(getattr(t, n) for t in TILES.values()) for n in ("rows", "ids")))
  budget = vmem_budget(chip)
  for rows, ids in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (2, 4), (4, 4)):
    cut = Tile(max(tile.rows // rows, LANES), max(tile.ids // ids, LANES))
    if vmem_bytes(kernel, cut, hidden, itemsize) <= budget:
      return cut
  raise ValueError(f"linear_logprob: a hidden width of {hidden} needs more vector memory than {budget // _MIB} MiB")


def vmem_budget(chip: Chip | None) -> int:
  """Bytes of vector memory a kernel may take; the rest is the compiler's own."""
  return (chip.vmem_bytes if chip else min(chip.vmem_bytes for chip in CHIPS.values())) * 15 // 16


def vmem_bytes(kernel: Kernel, tile: Tile, hidden: int, itemsize: int) -> int:
  """What a kernel's buffers take: operands, results, accumulators, and the float32 tiles it works with."""
  rows, ids = tile.rows * hidden, tile.ids * hidden
  match kernel:
    case "forward":  # tokens and target columns once, weight twice; expected weight in float32, and the statistics
      buffers = itemsize * (rows + rows + 2 * ids) + 4 * rows + 7 * 4 * tile.rows * LANES
    case "dhidden":
      buffers = itemsize * (rows + 2 * ids) + 4 * rows + 4 * rows
    case "dweight":
      buffers = itemsize * (2 * rows + 2 * ids + 2 * ids) + 4 * ids
  return buffers + 4 * 4 * tile.rows * tile.ids + 2 * _MIB


def hidden_part(hidden: int, itemsize: int) -> int:
  """The part of the hidden width that one unrolled product takes; itemsize: of its operands."""
  most = _HIDDEN_PART if itemsize < 4 else max(_HIDDEN_PART // 4, LANES)
  if hidden <= most:
    return hidden
  return next((part for part in range(most, LANES - 1, -LANES) if hidden % part == 0), hidden)
