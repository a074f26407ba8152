"""What a compiled program needs of each device: memory by kind, exchange, FLOPs, a roofline time, and whether it fits.

    bytes       arguments by what they are (parameters, optimizer, gradients, kv_cache, batch); `output`, what the program
                makes beside what it overwrites; `temp`, everything it needs meanwhile: activations, gathered weights,
                exchange buffers; `resident`, what lies there without being an argument
    hbm_bytes   their sum; the program fits where it is at most what the chip grants
    roofline    the longest of: FLOPs at the chip's peak, HBM traffic at its bandwidth, exchange over its links.  A lower
                bound: nothing here was run

Memory is the compiler's own count.  FLOPs are by formula (`flops.py`): the compiler's count takes a loop's body once.
"""

import dataclasses
from typing import Any

import jax

from configs.schema import RunConfig
from ring_jax.compiled import flops
from ring_jax.compiled.programs import Kind, Unit
from sharding import hlo
from sharding.hardware import Chip

_KINDS = ("parameters", "optimizer", "gradients", "kv_cache", "batch")


@dataclasses.dataclass(frozen=True)
class Report:
  """Of one program, a device."""

  name: str
  fits: bool
  hbm_bytes: int
  hbm_limit: int
  bytes: dict[str, int]
  host_bytes: int
  logit_rows: int  # of the largest array as wide as the vocabulary: at most the hidden width where no logits are kept
  collectives: dict[str, dict[str, int]]
  flops: float
  roofline_seconds: dict[str, float]

  @property
  def seconds(self) -> float:
    return max(self.roofline_seconds.values())

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def report(config: RunConfig, kind: Kind, unit: Unit, compiled: jax.stages.Compiled, chip: Chip) -> Report:
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  parts = {name: device_bytes(tree) for name, tree in unit.arguments.items()}
  kinds = {name: parts.get(name, 0) for name in _KINDS}
  kinds["other_arguments"] = max(memory.argument_size_in_bytes - sum(parts.values()), 0)
  kinds["output"] = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
  kinds["temp"] = memory.temp_size_in_bytes
  kinds["resident"] = sum(device_bytes(tree) for tree in unit.resident.values())
  needed = memory.argument_size_in_bytes + kinds["output"] + kinds["temp"] + kinds["resident"]
  traffic = hlo.collectives(text)
  work = flops.of(config, kind, unit.name)
  always = sum(found.bytes for name, found in traffic.items() if not name.startswith("conditional"))
  touched = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
  return Report(
    name=unit.name,
    fits=needed <= chip.hbm_bytes,
    hbm_bytes=needed,
    hbm_limit=chip.hbm_bytes,
    bytes=kinds,
    host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    logit_rows=hlo.most_rows(text, _vocabulary(config, kind)),
    collectives={name: dataclasses.asdict(found) for name, found in sorted(traffic.items())},
    flops=work,
    roofline_seconds={
      "flops": work / chip.flops,
      "hbm": touched / chip.hbm_bandwidth,
      "links": always / (chip.link_bandwidth * chip.torus_dims),
    },
  )


def _vocabulary(config: RunConfig, kind: Kind) -> int:
  """A device's part of it."""
  parallel = config.model.parallel
  if kind in (Kind.PREFILL, Kind.DECODE):
    parallel = config.rollout.parallel or parallel
  return config.model.vocab_size // (parallel.mesh.tensor if parallel.rules.vocab else 1)


def device_bytes(tree: Any) -> int:
  """Bytes of abstract arrays on one device; those in host memory count as none."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    sharding = leaf.sharding
    if sharding is not None and sharding.memory_kind not in (None, "device"):
      continue
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    for dim in shape:
      size *= dim
    total += size
  return total
