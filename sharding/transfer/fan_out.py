"""Replicas that complete one another: every byte crosses once, then they gather from each other.

Where an engine repeats a tensor on n devices, a direct plan sends it n times over the links between trainer and engine.
Here each of the n is sent a part, and an all-gather over the engine's own links makes the tensor whole: two transfers,
the second on the engine's devices alone.  The engine holds the parts (1/n of such tensors) until the gather is done.

On pods with whole weights on every device this is what counts (docs/transfer.md); on one host it is a copy more, and
`cheapest` takes the direct plan.
"""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.transfer.plan import BUCKET_BYTES, PyTree, Route, TransferPlan, named_leaves, plan_transfer


def cheapest(
  source: PyTree, target: PyTree, *, bucket_bytes: int = BUCKET_BYTES, route: Route | None = None
) -> TransferPlan:
  """The direct plan, or this one where that costs less (`TransferPlan.cost`)."""
  direct = plan_transfer(source, target, bucket_bytes=bucket_bytes, route=route)
  fanned = plan_fan_out(source, target, bucket_bytes=bucket_bytes, route=route)
  return fanned if fanned.cost < direct.cost else direct


def plan_fan_out(
  source: PyTree, target: PyTree, *, bucket_bytes: int = BUCKET_BYTES, route: Route | None = None
) -> TransferPlan:
  """As `plan_transfer`, in two steps: to parts, and `then` from parts to whole tensors, in one program.

  Tensors without replicas take the first step only; where none has any, it is the direct plan.
  """
  parts = scattered(target)
  plan = plan_transfer(source, parts, bucket_bytes=bucket_bytes, route=route)
  whole = dict(named_leaves(target))
  cut = {
    name: part
    for name, part in named_leaves(parts)
    if not part.sharding.is_equivalent_to(whole[name].sharding, len(part.shape))
  }
  if not cut:
    return plan
  gather = plan_transfer(cut, {name: whole[name] for name in cut}, bucket_bytes=bucket_bytes, route=Route.WHOLE)
  return dataclasses.replace(plan, then=gather)


def scattered(target: PyTree) -> PyTree:
  """The target with every tensor cut also along the mesh axes that only repeat it, where a dimension divides by them."""
  return jax.tree.map(_scattered, target)


def _scattered(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  if not isinstance(leaf.sharding, NamedSharding):
    return leaf  # on one device
  mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
  cuts = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec]
  cuts += [()] * (len(leaf.shape) - len(cuts))
  for axis in mesh.axis_names:
    if mesh.shape[axis] > 1 and not any(axis in axes for axes in cuts):
      for dim, axes in enumerate(cuts):
        if leaf.shape[dim] % (math.prod(mesh.shape[one] for one in axes) * mesh.shape[axis]) == 0:
          cuts[dim] = (*axes, axis)
          break
  return leaf.update(sharding=NamedSharding(mesh, PartitionSpec(*cuts)))
