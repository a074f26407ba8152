"""Moves a tree as a plan says, checks what arrived, and commits it as a version.

Nothing of a version can be seen before all of it has arrived and was checked; a transfer that fails leaves the version
before as it was.  What is delivered shares no buffer with the source, so that the trainer may donate its parameters.

How (`Route` says when):

    host_views   The CPU backend's shards are host memory: each piece is copied once, from a view of the source's shard into
                 the buffer that becomes the target's (64-byte aligned, which the backend takes over without a copy).
                 `jax.device_put` between two such devices runs at half the speed, and would need a slice before and an
                 update after it.
    pieces       Per bucket: slices at the source, one `device_put` of them all, updates in place at the target; the
                 bucket before is waited for, so that two are under way.
    pathways     Its own resharding of the whole tree (jetstream.md section 5).
    whole        `jax.device_put` of the tree; on the same devices in the same order one program.  Between processes JAX
                 does that on one set of devices only; from one set to another it takes Pathways.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sharding.transfer import check, shards
from sharding.transfer.check import Probe, TransferError
from sharding.transfer.plan import Leaf, Piece, PyTree, Route, TransferPlan, named_leaves

_ALIGNMENT = 64  # of memory that the CPU backend takes over as it is
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Delivered(NamedTuple):
  """A tree that arrived and was checked."""

  version: int
  tree: PyTree


class Holder:
  """The weights that an engine decodes with: one version, replaced as a whole."""

  def __init__(self) -> None:
    self.current: Delivered | None = None

  def receive(self, plan: TransferPlan, params: PyTree, version: int, probe: Probe | None = None) -> Delivered:
    """Moves, checks and commits a version; until it returns, and after an error, `current` is the one before.

    Raises:
      TransferError: the version is not newer, the tree is not the plan's, or a check failed.
    """
    before = self.current
    if before is not None and version <= before.version:
      raise TransferError(f"version {version} after version {before.version}: versions must grow")
    delivered = execute(plan, params, version, before)
    if probe is not None:
      check.probe(plan, probe, params, delivered.tree, version)
    self.current = delivered
    return delivered


def execute(plan: TransferPlan, params: PyTree, version: int, before: Delivered | None = None) -> Delivered:
  """Moves `params` to the plan's target and checks that it arrived.

  Args:
    params: arrays that lie as the plan's source does.
    before: what the target holds, so that an error can tell a stale shard.

  Raises:
    TransferError: it is another tree, or did not arrive as it was sent; names tensors and devices.
  """
  for difference in plan.unlike(params)[:1]:
    raise TransferError(f"version {version}: {difference}")
  held = dict(named_leaves(params))
  sent = [held[leaf.name] for leaf in plan.leaves]
  match plan.route:
    case Route.HOST_VIEWS:
      arrived, elements = host_views(plan, sent)
      check.arrival(plan, elements, version)
    case Route.PIECES:
      arrived, elements = in_pieces(plan, sent)
      check.arrival(plan, elements, version)
    case Route.PATHWAYS:
      arrived = _by_pathways(plan, sent)
    case Route.WHOLE:
      arrived = _as_a_whole(plan, sent, version)
  old = None if before is None else (before.version, jax.tree.leaves(before.tree))
  check.bits(plan, sent, arrived, version, old if plan.then is None else None)
  tree = jax.tree.unflatten(plan.structure, arrived)
  return Delivered(version, tree) if plan.then is None else execute(plan.then, tree, version, before)


def _assembled(plan: TransferPlan, leaf: Leaf, parts: dict[int, jax.Array]) -> jax.Array:
  shape, order = leaf.shape, leaf.target.device_S.tolist()
  return jax.make_array_from_single_device_arrays(shape, leaf.sharding, [parts[device] for device in order])


def _boxes(leaf: Leaf) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
  """The box that each device holds at the source, and at the target."""
  source, target = (dict(zip(side.device_S.tolist(), side.box_SxNx2, strict=True)) for side in leaf.sides)
  return source, target


# ---- host_views


def host_views(plan: TransferPlan, sent: Sequence[jax.Array]) -> tuple[list[jax.Array], dict[tuple[int, int], int]]:
  """The tensors at the target, and how many elements each of their shards was given."""
  views = [{device: shard.view for device, shard in shards.by_device(array).items()} for array in sent]
  boxes = [_boxes(leaf) for leaf in plan.leaves]
  buffers: list[dict[int, np.ndarray]] = []
  for leaf, (_, target) in zip(plan.leaves, boxes, strict=True):
    buffers.append({device: _empty(box_Nx2, leaf.dtype) for device, box_Nx2 in target.items()})

  def move(leaf: Leaf, piece: Piece, i: int) -> None:
    source, target = boxes[i]
    values = views[i][plan.devices[piece.source]][shards.within(piece.box_Nx2, source[piece.source])]
    _copy(buffers[i][piece.target][shards.within(piece.box_Nx2, target[piece.target])], values)

  # Nothing waits here between buckets, as nothing is under way: a piece goes straight into its place.
  moves = [(i, piece) for bucket in plan.buckets for i, part in bucket.parts for piece in plan.leaves[i].part(part)]
  shards.each(move, ((plan.leaves[i], piece) for i, piece in moves), [i for i, _ in moves])
  arrived = [
    _assembled(plan, leaf, {device: jax.device_put(buffer, plan.devices[device]) for device, buffer in parts.items()})
    for leaf, parts in zip(plan.leaves, buffers, strict=True)
  ]
  return arrived, _counted(moves)


def _empty(box_Nx2: np.ndarray, dtype: np.dtype) -> np.ndarray:
  shape = tuple((box_Nx2[:, 1] - box_Nx2[:, 0]).tolist())
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  first = -memory.ctypes.data % _ALIGNMENT
  return memory[first : first + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, values: np.ndarray) -> None:
  to, what = shards.words(out, values)
  to[...] = what


def _counted(moves: Sequence[tuple[int, Piece]]) -> dict[tuple[int, int], int]:
  """Elements that were put in place, by tensor and target device."""
  counts: dict[tuple[int, int], int] = {}
  for i, piece in moves:
    key = (i, piece.target)
    counts[key] = counts.get(key, 0) + int(np.prod(piece.shape, dtype=np.int64))
  return counts


# ---- pieces


@functools.partial(jax.jit, static_argnums=2)
def _slice(shard: jax.Array, start_N: tuple, shape: tuple[int, ...]) -> jax.Array:
  return jax.lax.dynamic_slice(shard, start_N, shape)


@functools.partial(jax.jit, donate_argnums=0)
def _update(shard: jax.Array, piece: jax.Array, start_N: tuple) -> jax.Array:
  if not jnp.issubdtype(shard.dtype, jnp.floating):
    return jax.lax.dynamic_update_slice(shard, piece, start_N)
  # As words: XLA may go through float32 where a device has no arithmetic of the dtype, and that changes some NaNs.
  word = _WORDS[shard.dtype.itemsize]
  words = (jax.lax.bitcast_convert_type(values, word) for values in (shard, piece))
  return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(*words, start_N), shard.dtype)


def in_pieces(plan: TransferPlan, sent: Sequence[jax.Array]) -> tuple[list[jax.Array], dict[tuple[int, int], int]]:
  """As `host_views`."""
  held = [shards.by_device(array) for array in sent]
  boxes = [_boxes(leaf) for leaf in plan.leaves]
  parts: list[dict[int, jax.Array]] = []
  for leaf, (_, target) in zip(plan.leaves, boxes, strict=True):
    parts.append({device: _zeros(box_Nx2, leaf.dtype, plan.devices[device]) for device, box_Nx2 in target.items()})
  moves: list[tuple[int, Piece]] = []
  before: set[tuple[int, int]] = set()  # tensors and devices that the last bucket reached
  for bucket in plan.buckets:
    now = [(i, piece) for i, part in bucket.parts for piece in plan.leaves[i].part(part)]
    pieces = [
      _slice(
        held[i][plan.devices[piece.source]].data,
        shards.start(piece.box_Nx2, boxes[i][0][piece.source]),
        piece.shape,
      )
      for i, piece in now
    ]
    landed = jax.device_put(pieces, [plan.devices[piece.target] for _, piece in now])
    jax.block_until_ready([parts[i][target] for i, target in before])
    for (i, piece), values in zip(now, landed, strict=True):
      start_N = shards.start(piece.box_Nx2, boxes[i][1][piece.target])
      parts[i][piece.target] = _update(parts[i][piece.target], values, start_N)
    before = {(i, piece.target) for i, piece in now}
    moves += now
  return [_assembled(plan, leaf, each) for leaf, each in zip(plan.leaves, parts, strict=True)], _counted(moves)


def _zeros(box_Nx2: np.ndarray, dtype: np.dtype, device: Any) -> jax.Array:
  return jnp.zeros(tuple((box_Nx2[:, 1] - box_Nx2[:, 0]).tolist()), dtype, device=device)


# ---- what belongs to several processes


def _by_pathways(plan: TransferPlan, sent: Sequence[jax.Array]) -> list[jax.Array]:
  from pathwaysutils.experimental import reshard  # imported late: of use on Pathways only

  return reshard.reshard(list(sent), [leaf.sharding for leaf in plan.leaves], cache_resharding_plans=True)


def _same(leaves: list[jax.Array]) -> list[jax.Array]:
  return leaves


def _as_a_whole(plan: TransferPlan, sent: Sequence[jax.Array], version: int) -> list[jax.Array]:
  shardings = [leaf.sharding for leaf in plan.leaves]
  first = plan.leaves[0].source.device_S if plan.leaves else None
  if all(np.array_equal(side.device_S, first) for leaf in plan.leaves for side in leaf.sides):
    return jax.jit(_same, out_shardings=shardings)(list(sent))
  for leaf in plan.leaves:
    if not plan.addressable and set(leaf.source.device_S) != set(leaf.target.device_S):
      raise TransferError(
        f"version {version}: {leaf.name} goes to other devices, and these belong to several processes:"
        " JAX moves arrays so under Pathways only"
      )
  return jax.device_put(list(sent), shardings, may_alias=False)
