"""The weights' way from a trainer on one half of a pod to an engine on the other half, predicted."""

import functools
from typing import Any

from configs.base import require
from configs.schema import RunConfig
from ring_jax import model as ring_model
from ring_jax.compiled.programs import engine_on
from rollout import weights
from sharding import rules
from sharding.mesh import make_mesh
from sharding.topology import Topology
from sharding.transfer import predict


def predicted(config: RunConfig, topology: Topology) -> dict[str, Any]:
  """One JSON object: bytes, and the seconds of each way with what limits it.

  Args:
    topology: its first half trains as `model.parallel` says, the second half generates as `rollout.parallel` says.

  Raises:
    ConfigError: the meshes are for another number of devices.
  """
  between = predict.halves(topology)
  trainer, engine = config.model.parallel, config.rollout.parallel or config.model.parallel
  for name, layout, half in (("model", trainer, between.first), ("rollout", engine, between.second)):
    size = layout.mesh.num_devices
    require(
      size == len(half), f"{name}.parallel.mesh has {size} devices, but half of {topology} has {len(half)} devices"
    )
  mesh = make_mesh(trainer.mesh, between.first)
  pack = rules.Program(mesh, functools.partial(weights.pack, dtype=config.rollout.dtype))
  source = pack.shapes(ring_model.abstract_params(config.model, mesh))
  ways = predict.predict(source, engine_on(config, between.second).abstract_stored(), between)
  return {
    "config": config.name,
    "dtype": str(config.rollout.dtype),
    "topology": str(topology),
    "links": between.links,
    "ways": [way.to_dict() for way in ways],
  }


def text(found: dict[str, Any]) -> str:
  """For people."""
  first = found["ways"][0]
  lines = [
    f"{found['config']} as {found['dtype']} on {found['topology']}: {first['needed'] / 1e12:.2f} TB needed,"
    f" over {found['links']}"
  ]
  for way in found["ways"]:
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in way["seconds"].items())
    lines.append(
      f"  {way['way']:8} {way['total']:.2f} s at best, limited by {way['limit']} ({parts} s);"
      f" {way['moved'] / 1e12:.2f} TB cross, {way['buckets']} buckets, {way['extra_bytes'] / 1e9:.2f} GB under way"
    )
  return "\n".join(lines)
