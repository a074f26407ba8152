"""The route `host_views`: shards of the CPU backend are host memory, and are copied from one to the other.

Each piece goes once from a view of the source's shard into the buffer that becomes the target's (64-byte aligned, which the
backend takes over without a copy).  `jax.device_put` between two such devices would need a slice before it and an update
after it.

What was copied is compared at once, block by block, while it is in the processor's cache; a pass of its own over both sides
would cost more than the copy:

    copy       from where the plan says to where the plan says
    compare    what now lies where the *arrays* say that the piece is, at the source and at the target: both are read again

Blocks that share rows of the source follow each other.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from sharding.transfer import shards
from sharding.transfer.check import Landed
from sharding.transfer.plan import Moves, Piece, TransferPlan

_ALIGNMENT = 64  # of memory that the CPU backend takes over as it is
_RUN = 64  # blocks that a thread takes at a time


class _Block(NamedTuple):
  """A part of a piece, as words: where it goes and comes from by the plan, and where it lies by the arrays."""

  number: int  # of the piece, in `moves`
  to: np.ndarray
  what: np.ndarray
  put: np.ndarray
  held: np.ndarray


def move(plan: TransferPlan, sent: Sequence[jax.Array], compare: bool = True) -> Landed:
  """The tensors at the target; without the comparison for benches only."""
  place = _Places(plan, sent)
  moves: Moves = []
  differing: set[int] = set()
  for bucket in plan.buckets:
    now = [(i, piece) for i, part in bucket.parts for piece in plan.leaves[i].part(part)]
    size = sum(piece.elements * plan.leaves[i].dtype.itemsize for i, piece in now)
    ordered = _ordered(place, list(enumerate(now, len(moves))))
    runs = [ordered[at : at + _RUN] for at in range(0, len(ordered), _RUN)]
    differing.update(*shards.each(functools.partial(_moved, compare=compare), runs, size))
    moves += now
  return Landed(place.arrays(), moves, frozenset(differing), place.buffers() if compare else {})


class _Places:
  """Where pieces come from and go to: by the plan, and by what the arrays say of themselves."""

  def __init__(self, plan: TransferPlan, sent: Sequence[jax.Array]):
    self._plan = plan
    self._held = [shards.by_device(array) for array in sent]
    self._views = [{device: shard.view for device, shard in held.items()} for held in self._held]
    self._planned = [tuple(side.boxes() for side in leaf.sides) for leaf in plan.leaves]
    self._wanted = [shards.boxes(leaf.sharding, leaf.shape) for leaf in plan.leaves]
    self._buffers: list[dict[int, np.ndarray]] = []
    for leaf, (_, target) in zip(plan.leaves, self._planned, strict=True):
      self._buffers.append({device: _empty(box_Nx2, leaf.dtype) for device, box_Nx2 in target.items()})

  def of(self, i: int, piece: Piece) -> list[np.ndarray]:
    """The piece in the buffer and in the source's shard by the plan, and in both by the arrays."""
    source, target = (self._plan.devices[device] for device in piece[:2])
    values, buffer = self._views[i][source], self._buffers[i][piece.target]
    planned = [box[device] for box, device in zip(self._planned[i], piece[:2], strict=True)]
    held_Nx2, put_Nx2 = self._held[i][source].box_Nx2, self._wanted[i][target]
    ways = [(buffer, planned[1]), (values, planned[0]), (buffer, put_Nx2), (values, held_Nx2)]
    return shards.words(*(memory[shards.within(piece.box_Nx2, box_Nx2)] for memory, box_Nx2 in ways))

  def arrays(self) -> list[jax.Array]:
    plan = self._plan
    return [
      shards.assembled(leaf, {device: jax.device_put(buffer, plan.devices[device]) for device, buffer in parts.items()})
      for leaf, parts in zip(plan.leaves, self._buffers, strict=True)
    ]

  def buffers(self) -> dict[tuple[int, int], np.ndarray]:
    """By tensor and target device."""
    return {(i, device): buffer for i, parts in enumerate(self._buffers) for device, buffer in parts.items()}


def _empty(box_Nx2: np.ndarray, dtype: np.dtype) -> np.ndarray:
  shape = tuple((box_Nx2[:, 1] - box_Nx2[:, 0]).tolist())
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  first = -memory.ctypes.data % _ALIGNMENT
  return memory[first : first + size].view(dtype).reshape(shape)


def _ordered(place: _Places, moves: list[tuple[int, tuple[int, Piece]]]) -> list[_Block]:
  """Blocks of a source shard in turns of the pieces that are cut from it: what lies side by side is read together."""
  blocks = []
  for number, (i, piece) in moves:
    for at, views in enumerate(shards.blocks(place.of(i, piece))):
      blocks.append((i, piece.source, at, _Block(number, *views)))
  blocks.sort(key=lambda block: block[:3])
  return [block[3] for block in blocks]


def _moved(blocks: Sequence[_Block], compare: bool) -> set[int]:
  """Copies blocks, and returns the pieces of those that are not what they should be."""
  differing, equal = set(), shards.Equal()
  for block in blocks:
    _copy(block.to, block.what)
    if compare and not equal(block.put, block.held):
      differing.add(block.number)
  return differing


def _copy(to: np.ndarray, what: np.ndarray) -> None:
  to[...] = what
