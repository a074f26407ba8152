"""Whether what arrived is what was sent, and a report that names the tensor where it is not.

    places         the source's arrays hold, and the target's will hold, every piece where the plan says so
    arrival        every target shard got all of its pieces: a bucket that was dropped is missing here
    bits           of each piece as it was moved, read after it was moved at the source and at the target, from where the
                   arrays themselves say that it lies: a wrong slice, a stale shard or a flipped bit differ here.  Compared
                   as they are where both sides are host memory; what was compared while it was copied (host.py) only if
                   that very memory is in the arrays now.  By fingerprint where they are devices; by the fingerprint of
                   each tensor as a whole where devices belong to several processes
    probe          a function of the tree (the log-probs of a fixed prompt), of both sides: that the weights are the right
                   ones, and are used as they should be

Only when a check fails are pieces looked at one by one, to say which, where, and what stands there instead.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from sharding import processes
from sharding.fingerprint import fingerprint
from sharding.transfer import shards
from sharding.transfer.plan import Moves, Piece, PyTree, TransferPlan, named_leaves, plan_transfer

_NAMED = 5  # tensors in a message


class TransferError(RuntimeError):
  """A version did not arrive as it was sent, or must not be sent; what was committed before is as it was."""


@dataclasses.dataclass(frozen=True)
class Probe:
  """Both sides of the comparison; each gets its tree and returns the same numbers."""

  sent: Callable[[PyTree], Any]
  arrived: Callable[[PyTree], Any]
  tolerance: float  # largest absolute difference of one number
  share: float = 0.0  # of the numbers that may differ by more: where experts are nearly tied, rounding chooses


class Delivered(NamedTuple):
  """A tree that arrived and was checked."""

  version: int
  tree: PyTree


class Landed(NamedTuple):
  """What a move left behind, before the checks."""

  arrived: list[jax.Array]  # in the order of the plan
  moves: Moves | None = None  # that were made; None: JAX moved whole tensors
  differing: frozenset[int] = frozenset()  # positions in `moves` that were found to have other bits
  compared: Mapping[tuple[int, int], np.ndarray] = MappingProxyType({})  # memory looked at, by tensor and target device


def places(plan: TransferPlan, sent: Sequence[jax.Array], version: int) -> None:
  """Raises TransferError: the plan takes a piece from a device that does not hold it, or to one that is not to."""
  if not plan.addressable:
    return
  wrong = []
  for i, leaf in enumerate(plan.leaves):
    held = {device: shard.box_Nx2 for device, shard in shards.by_device(sent[i]).items()}
    sides = held, shards.boxes(leaf.sharding, leaf.shape)
    for piece in leaf.whole():
      for device, side in zip((plan.devices[place] for place in piece[:2]), sides, strict=True):
        if device not in side or not shards.inside(piece.box_Nx2, side[device]):
          wrong.append(f"{shards.text(leaf, piece.box_Nx2)} of {device}, which does not hold it")
  _raise(version, wrong, "would be taken from the wrong place")


def arrival(plan: TransferPlan, landed: Landed, version: int) -> None:
  """Raises TransferError: some shard is not full."""
  if landed.moves is None:
    return
  elements: collections.Counter = collections.Counter()
  # What came twice does not make up for what did not come.
  once = {(i, piece.target, piece.box_Nx2.tobytes()): piece for i, piece in landed.moves}
  for (i, target, _), piece in once.items():
    elements[i, target] += piece.elements
  short = []
  for i, leaf in enumerate(plan.leaves):
    for device, needed in zip(leaf.target.device_S.tolist(), leaf.shard_bytes_T.tolist(), strict=True):
      came = elements[i, device] * leaf.dtype.itemsize
      if came != needed:
        short.append(f"{leaf.name} on {plan.devices[device]}: {came} of {needed} bytes arrived")
  _raise(version, short, "were left out")


def bits(
  plan: TransferPlan, sent: Sequence[jax.Array], landed: Landed, version: int, before: Delivered | None = None
) -> None:
  """Raises TransferError: a piece does not have the bits that were sent.

  Args:
    sent: the tensors in the order of the plan.
    before: the version that the target had, to know a stale shard by.
  """
  if not plan.addressable:
    sums = [[int(processes.fetch(fingerprint(leaf))) for leaf in tree] for tree in (sent, landed.arrived)]
    wrong = [leaf.name for leaf, a, b in zip(plan.leaves, *sums, strict=True) if a != b]
  else:
    old = {} if before is None else dict(named_leaves(before.tree))
    find = _host_differences if all(device.platform == "cpu" for device in plan.devices) else _device_differences
    wrong = []
    for i, piece in find(plan, sent, landed):
      stale = (before.version, old[plan.leaves[i].name]) if old else None
      wrong.append(_described(plan, i, piece, sent[i], landed.arrived[i], stale))
  _raise(version, wrong, "do not have the bits that were sent")


def probe(how: Probe, sent: PyTree, arrived: PyTree, version: int, stored: Callable[[PyTree], PyTree]) -> None:
  """Raises TransferError, which names the tensors that differ: both sides do not agree on the probe.

  Args:
    stored: makes of `sent` what should have arrived, on the source's devices; only called to look for differences.
  """
  says = _disagreement(how, sent, arrived)
  if not says:
    return
  _raise(version, _differing(stored(sent), arrived), f"differ, and {says}")
  raise TransferError(
    f"version {version}: {says}, though every tensor arrived bit for bit: both sides compute differently"
  )


def _disagreement(how: Probe, sent: PyTree, arrived: PyTree) -> str:
  """What the probe has against the pair; empty: nothing."""
  a, b = (np.asarray(processes.fetch(value), np.float64) for value in (how.sent(sent), how.arrived(arrived)))
  if a.shape != b.shape:
    return f"the probe gives {list(a.shape)} at the source, {list(b.shape)} at the target"
  far = ~(np.abs(a - b) <= how.tolerance)  # also where it is NaN
  if far.sum() <= how.share * a.size:
    return ""
  worst = float(np.max(np.abs(a - b)))
  return f"the probe differs by {worst:.3g} (at most {how.tolerance:.3g}) in {int(far.sum())} of {a.size} numbers"


def _differing(sent: PyTree, arrived: PyTree) -> list[str]:
  """Tensors that are not the same bits on both sides, described; for people, slow."""
  plan, held = plan_transfer(sent, arrived), dict(named_leaves(sent))
  ours, theirs = [held[leaf.name] for leaf in plan.leaves], jax.tree.leaves(arrived)
  if not plan.addressable:
    whole = zip(plan.leaves, *(map(processes.fetch, tree) for tree in (ours, theirs)), strict=True)
    return [leaf.name for leaf, a, b in whole if not np.array_equal(_as_bytes(a), _as_bytes(b))]
  found = []
  for i, piece in _pieces(plan):
    if not np.array_equal(*map(_as_bytes, _both(plan, piece, ours[i], theirs[i]))):
      found.append(_described(plan, i, piece, ours[i], theirs[i], None))
  return found


def _raise(version: int, wrong: list[str], what: str) -> None:
  if wrong:
    more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    raise TransferError(f"version {version}: {len(wrong)} parts {what}: {'; '.join(wrong[:_NAMED])}{more}")


def _pieces(plan: TransferPlan) -> Iterator[tuple[int, Piece]]:
  """As they were moved: what is summed as one could have its rows anywhere within."""
  for i, leaf in enumerate(plan.leaves):
    for part in range(leaf.parts):
      for piece in leaf.part(part):
        yield i, piece


def _host_differences(plan: TransferPlan, sent: Sequence[jax.Array], landed: Landed) -> list[tuple[int, Piece]]:
  """Pieces that differ: the bits themselves, which costs what their sums would."""
  views = [
    [{device: (shard.view, shard.box_Nx2) for device, shard in shards.by_device(array).items()} for array in side]
    for side in (sent, landed.arrived)
  ]

  def differs(numbered: tuple[int, tuple[int, Piece]]) -> bool:
    number, (i, piece) = numbered
    (ours, ours_Nx2), (theirs, theirs_Nx2) = (
      views[side][i][plan.devices[place]] for side, place in enumerate(piece[:2])
    )
    seen = landed.compared.get((i, piece.target))
    if seen is not None and seen.ctypes.data == theirs.ctypes.data:
      return number in landed.differing
    parts = ours[shards.within(piece.box_Nx2, ours_Nx2)], theirs[shards.within(piece.box_Nx2, theirs_Nx2)]
    return not shards.Equal()(*shards.words(*parts))

  found = list(_pieces(plan)) if landed.moves is None else landed.moves
  wrong = shards.each(differs, enumerate(found), 0 if landed.compared else plan.needed)
  return [one for one, bad in zip(found, wrong, strict=True) if bad]


@functools.partial(jax.jit, static_argnums=2)
def _part_fingerprint(shard: jax.Array, start_N: tuple, shape: tuple[int, ...]) -> jax.Array:
  return fingerprint(jax.lax.dynamic_slice(shard, start_N, shape))


def _device_differences(plan: TransferPlan, sent: Sequence[jax.Array], landed: Landed) -> list[tuple[int, Piece]]:
  """Pieces that have another fingerprint."""
  ours, theirs = (_device_sums(plan, arrays, side) for side, arrays in enumerate((sent, landed.arrived)))
  return [one for one, bad in zip(_pieces(plan), ours != theirs, strict=True) if bad]


def _device_sums(plan: TransferPlan, arrays: Sequence[jax.Array], side: int) -> np.ndarray:
  held = [shards.by_device(array) for array in arrays]
  sums = []
  for i, piece in _pieces(plan):
    shard = held[i][plan.devices[piece[side]]]
    sums.append(_part_fingerprint(shard.data, shards.start(piece.box_Nx2, shard.box_Nx2), piece.shape))
  return np.array(jax.device_get(sums), np.int64)


def _both(plan: TransferPlan, piece: Piece, sent: jax.Array, arrived: jax.Array) -> list[np.ndarray]:
  """The piece as it lies on both sides."""
  found = []
  for device, array in zip(piece[:2], (sent, arrived), strict=True):
    shard = shards.by_device(array)[plan.devices[device]]
    found.append(shard.view[shards.within(piece.box_Nx2, shard.box_Nx2)])
  return found


def _as_bytes(values: np.ndarray) -> np.ndarray:
  """Compared as bits: NaNs are equal to themselves, and zero is not minus zero."""
  return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _described(
  plan: TransferPlan, i: int, piece: Piece, sent: jax.Array, arrived: jax.Array, old: tuple[int, jax.Array] | None
) -> str:
  leaf = plan.leaves[i]
  a, b = _both(plan, piece, sent, arrived)
  size = leaf.dtype.itemsize
  wrong = (_as_bytes(a) != _as_bytes(b)).reshape(-1, size).any(axis=1)
  what = f"{int(wrong.sum())} of {wrong.size} elements differ"
  if old is not None and np.array_equal(_as_bytes(_both(plan, piece, sent, old[1])[1]), _as_bytes(b)):
    what += f", stale: these are the bits of version {old[0]}"
  elif not _as_bytes(b).any():
    what += ", all of them zero: it never arrived"
  where = f"{plan.devices[piece.target]} (from {plan.devices[piece.source]})"
  return f"{shards.text(leaf, piece.box_Nx2)} on {where}: {what}"
