"""Whether what arrived is what was sent, and a report that names the tensor where it is not.

    arrival        every target shard got all of its bytes: a bucket that was dropped is missing here
    bits           of each piece as it was moved, read after the transfer at the source and at the target, from where the
                   arrays themselves say that it lies: a wrong slice, a stale shard or a flipped bit differ here.  Compared
                   as they are where both sides are host memory, by fingerprint where they are devices; by the fingerprint
                   of each tensor as a whole where devices belong to several processes
    probe          the caller's function of the tree (the log-probs of a fixed prompt), of both sides: that the weights
                   are the right ones, and are used as they should be

Only when a check fails are pieces looked at one by one, to say which, where, and what stands there instead.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from sharding import processes
from sharding.fingerprint import fingerprint
from sharding.transfer import shards
from sharding.transfer.plan import Leaf, Piece, PyTree, TransferPlan, named_leaves, plan_transfer

_NAMED = 5  # tensors in a message
_BLOCK_BYTES = 1 << 20


class TransferError(RuntimeError):
  """A version did not arrive as it was sent, or must not be sent; what was committed before is as it was."""


@dataclasses.dataclass(frozen=True)
class Probe:
  """Both sides of the comparison; each gets its tree and returns the same numbers."""

  sent: Callable[[PyTree], Any]
  arrived: Callable[[PyTree], Any]
  tolerance: float  # largest absolute difference of one number
  share: float = 0.0  # of the numbers that may differ by more: where experts are nearly tied, rounding chooses


def arrival(plan: TransferPlan, elements: dict[tuple[int, int], int], version: int) -> None:
  """Raises TransferError: some shard is not full.

  Args:
    elements: that were put in place, by tensor and device.
  """
  short = []
  for i, leaf in enumerate(plan.leaves):
    for device, needed in zip(leaf.target.device_S.tolist(), leaf.shard_bytes_T.tolist(), strict=True):
      came = elements.get((i, device), 0) * leaf.dtype.itemsize
      if came != needed:
        short.append(f"{leaf.name} on {plan.devices[device]}: {came} of {needed} bytes arrived")
  _raise(version, short, "left out")


def bits(
  plan: TransferPlan,
  sent: Sequence[jax.Array],
  arrived: Sequence[jax.Array],
  version: int,
  before: tuple[int, Sequence[jax.Array]] | None = None,
) -> None:
  """Raises TransferError: a piece does not have the bits that were sent.

  Args:
    sent, arrived: the tensors in the order of the plan.
    before: the version that the target had, and its tensors, to know a stale shard by.
  """
  if not plan.addressable:
    sums = [[int(processes.fetch(fingerprint(leaf))) for leaf in tree] for tree in (sent, arrived)]
    wrong = [leaf.name for leaf, a, b in zip(plan.leaves, *sums, strict=True) if a != b]
  else:
    _raise(version, _misplaced(plan, sent, arrived), "were taken from the wrong place")
    find = _host_differences if all(device.platform == "cpu" for device in plan.devices) else _device_differences
    wrong = []
    for (i, piece), differs in zip(_pieces(plan), find(plan, sent, arrived).tolist(), strict=True):
      if differs:
        old = None if before is None else (before[0], before[1][i])
        wrong.append(_described(plan, i, piece, sent[i], arrived[i], old))
  _raise(version, wrong, "do not have the bits that were sent")


def probe(plan: TransferPlan, how: Probe, sent: PyTree, arrived: PyTree, version: int) -> None:
  """Raises TransferError: both sides do not agree on the probe."""
  says = disagreement(how, sent, arrived)
  if says:
    report(version, says, differing(plan, sent, arrived))


def disagreement(how: Probe, sent: PyTree, arrived: PyTree) -> str:
  """What the probe has against the pair; empty: nothing."""
  a, b = (np.asarray(processes.fetch(value), np.float64) for value in (how.sent(sent), how.arrived(arrived)))
  if a.shape != b.shape:
    return f"the probe gives {list(a.shape)} at the source, {list(b.shape)} at the target"
  far = ~(np.abs(a - b) <= how.tolerance)  # also where it is NaN
  if far.sum() <= how.share * a.size:
    return ""
  worst = float(np.max(np.abs(a - b)))
  return f"the probe differs by {worst:.3g} (at most {how.tolerance:.3g}) in {int(far.sum())} of {a.size} numbers"


def report(version: int, says: str, tensors: list[str]) -> NoReturn:
  """Raises TransferError for what a probe said; `tensors` are those that differ."""
  _raise(version, tensors, f"differ, and {says}")
  raise TransferError(
    f"version {version}: {says}, though every tensor arrived bit for bit: both sides compute differently"
  )


def differing(plan: TransferPlan, sent: PyTree, arrived: PyTree) -> list[str]:
  """Tensors that are not the same bits on both sides, described; for people, slow."""
  if plan.then is not None:
    plan = plan_transfer(sent, arrived)
  held = dict(named_leaves(sent))
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


def _misplaced(plan: TransferPlan, sent: Sequence[jax.Array], arrived: Sequence[jax.Array]) -> list[str]:
  """Pieces that the arrays do not hold where the plan says so."""
  held = [[shards.by_device(array) for array in side] for side in (sent, arrived)]
  wrong = []
  for i, piece in _pieces(plan):
    for side in (0, 1):
      shard = held[side][i].get(plan.devices[piece[side]])
      if shard is None or not shards.inside(piece.box_Nx2, shard.box_Nx2):
        text = shards.text(plan.leaves[i], piece.box_Nx2)
        wrong.append(f"{text} of {plan.devices[piece[side]]}, which does not hold it")
  return wrong


def _host_differences(plan: TransferPlan, sent: Sequence[jax.Array], arrived: Sequence[jax.Array]) -> np.ndarray:
  """Whether each piece differs: the bits themselves, which costs what their sums would."""
  held = [
    [{device: (shard.view, shard.box_Nx2) for device, shard in shards.by_device(array).items()} for array in side]
    for side in (sent, arrived)
  ]
  found = list(_pieces(plan))

  def differs(leaf: Leaf, piece: Piece, i: int) -> bool:
    parts = []
    for side in (0, 1):
      view, shard_Nx2 = held[side][i][plan.devices[piece[side]]]
      parts.append(view[shards.within(piece.box_Nx2, shard_Nx2)])
    return not _same(*shards.words(*parts))

  return np.array(shards.each(differs, ((plan.leaves[i], piece) for i, piece in found), [i for i, _ in found]), bool)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
  """In blocks whose differences stay in the processor's cache."""
  if a.nbytes <= _BLOCK_BYTES or not a.ndim:
    return not (a != b).any()
  step = max(len(a) * _BLOCK_BYTES // a.nbytes, 1)
  if step == 1 and a.ndim > 1:
    return all(map(_same, a, b))
  return all(not (a[at : at + step] != b[at : at + step]).any() for at in range(0, len(a), step))


@functools.partial(jax.jit, static_argnums=2)
def _part_fingerprint(shard: jax.Array, start_N: tuple, shape: tuple[int, ...]) -> jax.Array:
  return fingerprint(jax.lax.dynamic_slice(shard, start_N, shape))


def _device_differences(plan: TransferPlan, sent: Sequence[jax.Array], arrived: Sequence[jax.Array]) -> np.ndarray:
  """Whether each piece has another fingerprint."""
  ours, theirs = (_device_sums(plan, arrays, side) for side, arrays in enumerate((sent, arrived)))
  return ours != theirs


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
