"""Moves a tree as a plan says, and checks what arrived.

What is delivered shares no buffer with the source, so that the trainer may donate its parameters.

How (`Route` says when):

    host_views   Copies from the source's shard to the target's, compared as they are made (host.py).
    pieces       Per bucket: slices at the source, one `device_put` of them all, updates in place at the target; the
                 bucket before is waited for, so that two are under way.
    pathways     Its own resharding of the whole tree (jetstream.md section 5).
    whole        `jax.device_put` of the tree; on the same devices in the same order one program.  Between processes JAX
                 does that on one set of devices only; from one set to another it takes Pathways.

A plan that goes on (`TransferPlan.then`, fan_out.py) is two transfers, each checked.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.transfer import check, host, shards
from sharding.transfer.check import Delivered, Landed, TransferError
from sharding.transfer.plan import Moves, PyTree, Route, TransferPlan, named_leaves

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


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
  check.places(plan, sent, version)
  match plan.route:
    case Route.HOST_VIEWS:
      landed = host.move(plan, sent)
    case Route.PIECES:
      landed = in_pieces(plan, sent)
    case Route.PATHWAYS:
      landed = Landed(_by_pathways(plan, sent))
    case Route.WHOLE:
      landed = Landed(_as_a_whole(plan, sent, version))
  check.arrival(plan, landed, version)
  check.bits(plan, sent, landed, version, None if plan.then is not None else before)
  arrived = landed.arrived
  if plan.then is not None:
    named = dict(zip((leaf.name for leaf in plan.leaves), arrived, strict=True))
    parts = {leaf.name: named[leaf.name] for leaf in plan.then.leaves}
    named |= execute(plan.then, parts, version, before).tree
    arrived = list(named.values())
  return Delivered(version, jax.tree.unflatten(plan.structure, arrived))


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


def in_pieces(plan: TransferPlan, sent: Sequence[jax.Array]) -> Landed:
  """The tensors at the target, by slices and updates on the devices."""
  held = [shards.by_device(array) for array in sent]
  boxes = [tuple(side.boxes() for side in leaf.sides) for leaf in plan.leaves]
  parts: list[dict[int, jax.Array]] = []
  for leaf, (_, target) in zip(plan.leaves, boxes, strict=True):
    parts.append({device: _zeros(box_Nx2, leaf.dtype, plan.devices[device]) for device, box_Nx2 in target.items()})
  moves: Moves = []
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
  arrived = [shards.assembled(leaf, each) for leaf, each in zip(plan.leaves, parts, strict=True)]
  return Landed(arrived, moves)


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
