"""What moves where: exact overlaps of two layouts, without any data.

Every device of a layout holds a box of each tensor (`Sharding.devices_indices_map`).  The part that target device t needs
from source device s is the intersection of their boxes.  The distinct boxes of a layout tile the tensor, so that

    pieces     one for each target device and each distinct source box that meets its box; they tile the target's box,
               and so each of its bytes comes from exactly one source device
    holders    among the devices that hold the same source box: the target device itself where it is one of them (local:
               copied there, no link); else the one that sends the fewest bytes so far, largest tensors and pieces first
    buckets    a tensor is cut into parts along one axis until no device sends or receives more than `bucket_bytes` of a
               part; small tensors share a bucket.  What is under way, and not yet in its place, is at most two buckets

Source: the zero-redundancy plans of AState, Awex and NeMo's resharding (papers.md 1.6, rl_practice.md (d)).

Dimension key: S source devices of a tensor, T target devices, P pieces, N its dimensions; C and K distinct boxes of the
source and the target, R holders of one; D all devices.  A box is [N, 2]: start and stop of each dimension.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.base import ConfigError, Enum, require
from sharding import pathways

PyTree = Any
BUCKET_BYTES = 256 << 20
# A torus cut in two has at least this many times fewer links between the halves than its devices have within (predict.py).
_ACROSS = 4


class Route(Enum):
  """How the bytes go, by what the devices are."""

  HOST_VIEWS = "host_views"  # every device is host memory of this process: one copy, from shard to shard
  PIECES = "pieces"  # every device is this process's: cut at the source, sent, put in place at the target
  PATHWAYS = "pathways"  # one controller of many hosts: its own resharding, all tensors in one call
  WHOLE = "whole"  # several processes: `jax.device_put` of the tree, or one program where devices keep their order


class Piece(NamedTuple):
  """A part of a tensor on its way; devices are positions in `TransferPlan.devices`."""

  source: int
  target: int
  box_Nx2: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(int(n) for n in self.box_Nx2[:, 1] - self.box_Nx2[:, 0])

  @property
  def elements(self) -> int:
    return math.prod(self.shape)


Moves = list[tuple[int, Piece]]  # tensor, and what goes of it


class Layout(NamedTuple):
  """Where a tensor lies: which devices hold it, and which box each."""

  device_S: np.ndarray  # positions in `TransferPlan.devices`
  box_SxNx2: np.ndarray

  def boxes(self) -> dict[int, np.ndarray]:
    """By device."""
    return dict(zip(self.device_S.tolist(), self.box_SxNx2, strict=True))


@dataclasses.dataclass(frozen=True)
class Leaf:
  """The plan of one tensor."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  source_sharding: jax.sharding.Sharding
  sharding: jax.sharding.Sharding  # at the target
  source: Layout
  target: Layout
  pair_Px2: np.ndarray  # rows of `source` and `target`
  axis: int = 0  # along which it is cut into parts
  parts: int = 1

  def boxes(self, part: int = 0, parts: int = 1) -> np.ndarray:
    """[P, N, 2] of all pieces, or of one part of each along `axis`."""
    a_PxNx2, b_PxNx2 = (side.box_SxNx2[rows] for side, rows in zip(self.sides, self.pair_Px2.T, strict=True))
    box_PxNx2 = np.stack(
      [np.maximum(a_PxNx2[..., 0], b_PxNx2[..., 0]), np.minimum(a_PxNx2[..., 1], b_PxNx2[..., 1])], -1
    )
    if parts > 1:
      start_P, stop_P = box_PxNx2[:, self.axis, 0].copy(), box_PxNx2[:, self.axis, 1].copy()
      step_P = -(-(stop_P - start_P) // parts)
      box_PxNx2[:, self.axis, 0] = np.minimum(start_P + part * step_P, stop_P)
      box_PxNx2[:, self.axis, 1] = np.minimum(start_P + (part + 1) * step_P, stop_P)
    return box_PxNx2

  @property
  def sides(self) -> tuple[Layout, Layout]:
    return self.source, self.target

  @property
  def device_Px2(self) -> np.ndarray:
    """Source and target device of each piece."""
    return np.stack([side.device_S[rows] for side, rows in zip(self.sides, self.pair_Px2.T, strict=True)], -1)

  @property
  def shard_bytes_T(self) -> np.ndarray:
    return _elements(self.target.box_SxNx2) * self.dtype.itemsize

  def whole(self) -> Iterator[Piece]:
    """Everything that goes, not cut into parts."""
    return itertools.starmap(Piece, zip(*self.device_Px2.T.tolist(), self.boxes(), strict=True))

  def part(self, part: int) -> Iterator[Piece]:
    """What goes with one part."""
    for (source, target), box_Nx2 in zip(self.device_Px2.tolist(), self.boxes(part, self.parts), strict=True):
      if (box_Nx2[:, 0] < box_Nx2[:, 1]).all():  # the last parts of a short piece are empty
        yield Piece(source, target, box_Nx2)


class Bucket(NamedTuple):
  """What moves together."""

  parts: tuple[tuple[int, int], ...]  # (tensor, part of it)
  bytes: int  # over links
  peak: int  # that one device sends or receives


@dataclasses.dataclass(frozen=True)
class TransferPlan:
  """How a tree gets from one layout to another."""

  devices: tuple[Any, ...]
  leaves: tuple[Leaf, ...]  # in the order of the tree
  structure: Any  # of the tree
  buckets: tuple[Bucket, ...]
  bucket_bytes: int
  sent_D: np.ndarray  # bytes over links, by the device that sends
  received_D: np.ndarray
  local_D: np.ndarray  # bytes that stay on their device
  route: Route
  then: "TransferPlan | None" = None  # from this plan's target to where the tree is wanted (fan_out.py)

  @property
  def needed(self) -> int:
    """Bytes that the target's devices hold, all replicas counted."""
    return int(sum(leaf.shard_bytes_T.sum() for leaf in self.leaves))

  @property
  def moved(self) -> int:
    return int(self.sent_D.sum())

  @property
  def local(self) -> int:
    return int(self.local_D.sum())

  @property
  def cost(self) -> int:
    """Bytes, to choose by between ways to the same target.

    Where all is host memory, those that are written; elsewhere those over links, and those that come from devices which
    are not the target's, over the fewer links that join both sets, count more.
    """
    then = 0 if self.then is None else self.then.cost
    if self.route is Route.HOST_VIEWS:
      return self.needed + then
    inside = {device for leaf in self.leaves for device in leaf.target.device_S.tolist()}
    across = int(np.delete(self.sent_D, list(inside)).sum())
    return self.moved + (_ACROSS - 1) * across + then

  @property
  def extra_bytes(self) -> int:
    """Most that one device holds, beside both trees, of what is under way."""
    return 2 * max((bucket.peak for bucket in self.buckets), default=0)

  @property
  def addressable(self) -> bool:
    """Whether every shard, on both sides, can be read by this process on its own."""
    return self.route is not Route.PATHWAYS and _mine(self.devices)

  def unlike(self, tree: PyTree) -> list[str]:
    """How the tree differs from the plan's source, by tensor."""
    given, planned = dict(named_leaves(tree)), {leaf.name: leaf for leaf in self.leaves}
    found = [
      f"{name} is {'missing' if name in planned else 'not in the plan'}" for name in given.keys() ^ planned.keys()
    ]
    for name in sorted(given.keys() & planned.keys()):
      array, leaf = given[name], planned[name]
      if (tuple(array.shape), array.dtype) != (leaf.shape, leaf.dtype):
        found.append(f"{name} is {array.dtype}{list(array.shape)}, the plan says {leaf.dtype}{list(leaf.shape)}")
      elif not array.sharding.is_equivalent_to(leaf.source_sharding, len(leaf.shape)):
        found.append(f"{name} lies as {array.sharding}, the plan says {leaf.source_sharding}")
    return sorted(found)

  def summary(self) -> str:
    """For people."""
    sent_D, received_D = self.sent_D[self.sent_D > 0], self.received_D[self.received_D > 0]
    remote = self.needed - self.local
    ratio = f"{self.moved / remote:.2f}" if remote else "nothing to move"
    lines = [
      f"{len(self.leaves)} tensors, {_size(self.needed)} needed: {_size(self.moved)} over links, {_size(self.local)} local"
      f" (moved / needed over links: {ratio})",
      f"route {self.route}, {len(self.buckets)} buckets of at most {_size(self.bucket_bytes)} a device;"
      f" at most {_size(self.extra_bytes)} a device under way",
    ]
    for name, bytes_D in (("send", sent_D), ("receive", received_D)):
      if bytes_D.size:
        lines.append(f"{bytes_D.size} devices {name} {_size(bytes_D.min())} to {_size(bytes_D.max())}")
    if self.then is not None:
      lines.append("then " + self.then.summary())
    return "\n".join(lines)


def plan_transfer(
  source: PyTree, target: PyTree, *, bucket_bytes: int = BUCKET_BYTES, route: Route | None = None
) -> TransferPlan:
  """Plans the way from `source` to `target`.

  Args:
    source: tree of arrays, or `jax.ShapeDtypeStruct`s, with shardings.
    target: the same tree of `jax.ShapeDtypeStruct`s with the shardings wanted.
    bucket_bytes: that one device sends or receives in a bucket, at most.
    route: default: by what the devices are.

  Raises:
    ConfigError: the trees differ, a leaf has no sharding, or a bucket is smaller than the smallest part of a tensor.
  """
  names, sources, targets = _paired(source, target)
  require(bucket_bytes > 0, f"bucket_bytes={bucket_bytes}: must be > 0")
  index: dict[Any, int] = {}
  sides = [tuple(_layout(leaf, index) for leaf in pair) for pair in zip(sources, targets, strict=True)]
  sent_D, received_D, local_D = (np.zeros(len(index), np.int64) for _ in range(3))
  leaves: list[Any] = [None] * len(names)
  sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in targets]
  for i in sorted(range(len(names)), key=lambda i: (-sizes[i], i)):
    dtype = np.dtype(targets[i].dtype)
    pair_Px2 = _pairs(names[i], *sides[i], dtype.itemsize, sent_D)
    leaf = Leaf(names[i], tuple(targets[i].shape), dtype, sources[i].sharding, targets[i].sharding, *sides[i], pair_Px2)
    bytes_P = _elements(leaf.boxes()) * dtype.itemsize
    away_P = leaf.device_Px2[:, 0] != leaf.device_Px2[:, 1]
    np.add.at(received_D, leaf.device_Px2[away_P, 1], bytes_P[away_P])
    np.add.at(local_D, leaf.device_Px2[~away_P, 1], bytes_P[~away_P])
    leaves[i] = _cut(leaf, bucket_bytes, len(index))
  return TransferPlan(
    devices=tuple(index),
    leaves=tuple(leaves),
    structure=jax.tree.structure(target),
    buckets=tuple(_buckets(leaves, bucket_bytes, len(index))),
    bucket_bytes=bucket_bytes,
    sent_D=sent_D,
    received_D=received_D,
    local_D=local_D,
    route=route or _route(tuple(index)),
  )


def _mine(devices: Sequence[Any]) -> bool:
  return all(device.process_index == jax.process_index() for device in devices)


def _route(devices: Sequence[Any]) -> Route:
  if pathways.used():
    return Route.PATHWAYS
  if not _mine(devices):
    return Route.WHOLE
  return Route.HOST_VIEWS if all(device.platform == "cpu" for device in devices) else Route.PIECES


def _paired(source: PyTree, target: PyTree) -> tuple[list[str], list[Any], list[Any]]:
  """Names and both sides of every tensor."""
  ours, theirs = ({name: leaf for name, leaf in named_leaves(tree)} for tree in (source, target))
  for name in [name for name in theirs if name not in ours] + [name for name in ours if name not in theirs]:
    side = "target" if name in theirs else "source"
    raise ConfigError(f"transfer: {name} is in the {side} only: both sides must be the same tree")
  for name, leaf in theirs.items():
    held = ours[name]
    for side, one in (("source", held), ("target", leaf)):
      require(getattr(one, "sharding", None) is not None, f"transfer: {name}: the {side} has no sharding")
    require(
      not jnp.issubdtype(leaf.dtype, jax.dtypes.extended),
      f"transfer: {name} is {leaf.dtype}: send its bits (jax.random.key_data)",
    )
    require(
      tuple(held.shape) == tuple(leaf.shape),
      f"transfer: {name} is {held.shape} at the source, {leaf.shape} at the target",
    )
    require(
      held.dtype == leaf.dtype,
      f"transfer: {name} is {held.dtype} at the source, {leaf.dtype} at the target: cast it at the source first",
    )
  return list(theirs), [ours[name] for name in theirs], list(theirs.values())


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
  """Leaves by their dotted paths."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


def _layout(leaf: Any, index: dict[Any, int]) -> Layout:
  """Adds devices that are new to `index`."""
  held = leaf.sharding.devices_indices_map(tuple(leaf.shape))
  device_S = np.array([index.setdefault(device, len(index)) for device in held], np.int64)
  boxes = [[cut.indices(n)[:2] for cut, n in zip(cuts, leaf.shape, strict=True)] for cuts in held.values()]
  return Layout(device_S, np.array(boxes, np.int64).reshape(len(boxes), len(leaf.shape), 2))


def _elements(box_XxNx2: np.ndarray) -> np.ndarray:
  return (box_XxNx2[..., 1] - box_XxNx2[..., 0]).prod(axis=-1)


def _pairs(name: str, source: Layout, target: Layout, itemsize: int, sent_D: np.ndarray) -> np.ndarray:
  """Rows of source and target of each piece [P, 2]; adds what each device sends to `sent_D`."""
  box_CxNx2, cell_S = np.unique(source.box_SxNx2, axis=0, return_inverse=True)
  box_KxNx2, cell_T = np.unique(target.box_SxNx2, axis=0, return_inverse=True)
  cell_S, cell_T = cell_S.reshape(-1), cell_T.reshape(-1)
  common_CxK = np.ones((len(box_CxNx2), len(box_KxNx2)), np.int64)
  for n in range(box_CxNx2.shape[1]):
    a_Cx2, b_Kx2 = box_CxNx2[:, n], box_KxNx2[:, n]
    stop_CxK = np.minimum(a_Cx2[:, None, 1], b_Kx2[None, :, 1])
    common_CxK *= np.maximum(stop_CxK - np.maximum(a_Cx2[:, None, 0], b_Kx2[None, :, 0]), 0)
  require(
    np.array_equal(common_CxK.sum(axis=0), _elements(box_KxNx2)),
    f"transfer: {name}: the boxes of the source do not tile it",
  )
  cell_P, row_P = np.nonzero(common_CxK[:, cell_T])
  bytes_P = common_CxK[cell_P, cell_T[row_P]] * itemsize
  source_P = _kept(source, cell_S, cell_P, target.device_S[row_P], len(sent_D))
  away_P = source_P < 0
  source_P[away_P] = _least_loaded(source, cell_S, cell_P[away_P], bytes_P[away_P], sent_D)
  return np.stack([source_P, row_P], axis=-1)


def _kept(source: Layout, cell_S: np.ndarray, cell_P: np.ndarray, taker_P: np.ndarray, devices: int) -> np.ndarray:
  """The row of the source that is the target device itself, where that holds the piece; else -1."""
  row_D = np.full(devices, -1)
  row_D[source.device_S] = np.arange(len(source.device_S))
  row_P = row_D[taker_P]
  return np.where((row_P >= 0) & (cell_S[row_P] == cell_P), row_P, -1)


def _least_loaded(
  source: Layout, cell_S: np.ndarray, cell_P: np.ndarray, bytes_P: np.ndarray, sent_D: np.ndarray
) -> np.ndarray:
  """For each piece the row of the holder that sends the fewest bytes so far; largest pieces of a box first.

  Boxes have different holders, so the first pieces of all boxes are given out at once, then the second ones, and so on.
  """
  by_cell_S = np.argsort(cell_S, kind="stable")
  count_C = np.bincount(cell_S)
  first_C = np.concatenate([[0], np.cumsum(count_C)[:-1]])
  # Boxes with fewer holders than others name their first one more than once.
  row_CxR = by_cell_S[first_C[:, None] + np.arange(count_C.max()) * (np.arange(count_C.max()) < count_C[:, None])]
  order = np.lexsort((-bytes_P, cell_P))
  sorted_P = cell_P[order]
  turn_P = np.arange(len(order)) - np.searchsorted(sorted_P, sorted_P)
  chosen_P = np.empty(len(order), np.int64)
  by_turn = order[np.argsort(turn_P, kind="stable")]
  for now in np.split(by_turn, np.cumsum(np.bincount(turn_P))[:-1]) if len(order) else []:
    row_XxR = row_CxR[cell_P[now]]
    least_X = sent_D[source.device_S[row_XxR]].argmin(axis=1)
    chosen_P[now] = row_XxR[np.arange(len(now)), least_X]
    np.add.at(sent_D, source.device_S[chosen_P[now]], bytes_P[now])
  return chosen_P


class _Loads:
  """What each device sends and receives of a tensor, or of a part of it."""

  def __init__(self, leaf: Leaf, devices: int):
    away_P = leaf.device_Px2[:, 0] != leaf.device_Px2[:, 1]
    box_PxNx2 = leaf.boxes()[away_P]
    self._devices = devices
    self._from_P, self._to_P = leaf.device_Px2[away_P].T
    self._bytes_P = _elements(box_PxNx2) * leaf.dtype.itemsize
    self.rows_PxN = box_PxNx2[..., 1] - box_PxNx2[..., 0]

  def of(self, part: int, parts: int, axis: int) -> np.ndarray:
    """Bytes that each device sends, then those that each receives [2 D]."""
    bytes_P = self._bytes_P
    if parts > 1:
      rows_P = self.rows_PxN[:, axis]
      step_P = -(-rows_P // parts)
      bytes_P = bytes_P // rows_P * np.clip(rows_P - part * step_P, 0, step_P)
    both = (np.bincount(device_P, bytes_P, self._devices) for device_P in (self._from_P, self._to_P))
    return np.concatenate([load_D.astype(np.int64) for load_D in both])


def _cut(leaf: Leaf, bucket_bytes: int, devices: int) -> Leaf:
  """In as few parts as the buckets allow, along the first axis that has enough rows: parts are then long runs."""
  loads = _Loads(leaf, devices)
  peak = int(loads.of(0, 1, 0).max(initial=0))
  if peak <= bucket_bytes:
    return leaf
  parts = -(-peak // bucket_bytes)
  rows_N = loads.rows_PxN.max(axis=0)
  axis = next((n for n, rows in enumerate(rows_N) if rows >= parts), int(rows_N.argmax()) if len(rows_N) else 0)
  most = int(rows_N[axis]) if len(rows_N) else 1
  while parts <= most:
    if loads.of(0, parts, axis).max() <= bucket_bytes:  # the first part is the largest
      return dataclasses.replace(leaf, axis=axis, parts=parts)
    parts += 1
  smallest = int(loads.of(0, most, axis).max())
  raise ConfigError(f"bucket_bytes={bucket_bytes}: a row of {leaf.name} is {smallest}; it must be at least that")


def _buckets(leaves: Sequence[Leaf], bucket_bytes: int, devices: int) -> Iterator[Bucket]:
  """Parts in the order of the tree, as many in a bucket as fit."""
  parts: list[tuple[int, int]] = []
  load = np.zeros(2 * devices, np.int64)
  for i, leaf in enumerate(leaves):
    loads = _Loads(leaf, devices)
    for part in range(leaf.parts):
      added = loads.of(part, leaf.parts, leaf.axis)
      if parts and (load + added).max() > bucket_bytes:
        yield Bucket(tuple(parts), int(load[:devices].sum()), int(load.max()))
        parts, load = [], np.zeros_like(load)
      parts.append((i, part))
      load += added
  if parts:
    yield Bucket(tuple(parts), int(load[:devices].sum()), int(load.max(initial=0)))


def _size(count: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1000
  return f"{count:.2f} TB"
