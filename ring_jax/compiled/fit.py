"""Compiling a program that may not fit, and saying by how much it does not and what would help."""

import re
from collections.abc import Sequence
from typing import Any

from configs.schema import ConfigError, Memory, RunConfig
from ring_jax.compiled import memory
from ring_jax.compiled.programs import Kind, Unit
from ring_jax.compiled.report import Report, device_bytes, report
from sharding.hardware import Chip
from sharding.topology import Topology

# The compiler's own message, when it gives up: "... Used 23.02G of 15.75G hbm. Exceeded hbm capacity by 7.27G."
_USED = re.compile(r"Used ([\d.]+)([GMK]) of ([\d.]+)([GMK]) hbm")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_GIB = 1 << 30


def compiled(config: RunConfig, kind: Kind, unit: Unit, chip: Chip) -> Report:
  """The report of a program; of one that the compiler refuses for its memory, what it said of it.

  Raises:
    ConfigError: the compiler refuses it for another reason.
  """
  try:
    program = unit.lowered.compile()
  except Exception as error:
    text = " ".join(str(error).split())
    used = _USED.search(text)
    if used is None and "RESOURCE_EXHAUSTED" not in text:
      raise ConfigError(f"{unit.name}: the TPU compiler refuses it: {text[:300]}") from error
    resident = sum(device_bytes(tree) for tree in unit.resident.values())
    needed = int(float(used[1]) * _UNITS[used[2]]) if used else chip.hbm_bytes + 1
    kinds = {name: device_bytes(tree) for name, tree in unit.arguments.items()}
    kinds |= {"resident": resident, "temp": max(needed - sum(kinds.values()), 0)}
    return Report(unit.name, False, needed + resident, chip.hbm_bytes, kinds, 0, 0, {}, 0.0, {"flops": 0.0})
  return report(config, kind, unit, program, chip)


def summary(
  config: RunConfig,
  kind: Kind,
  topology: Topology,
  overrides: dict[str, str],
  reports: Sequence[Report],
  seconds: float,
) -> dict[str, Any]:
  """One JSON object; its top level is the program that needs the most."""
  worst = max(reports, key=lambda one: one.hbm_bytes)
  return {
    "program": str(kind),
    "topology": str(topology),
    "devices": topology.num_devices,
    "overrides": overrides,
    "fits": all(one.fits for one in reports),
    "hbm_bytes": worst.hbm_bytes,
    "hbm_limit": worst.hbm_limit,
    "bytes": worst.bytes,
    "collectives": worst.collectives,
    "flops": sum(one.flops for one in reports),
    "roofline_seconds": sum(one.seconds for one in reports),
    "compile_seconds": round(seconds, 1),
    "programs": [
      one.to_dict() | {"hbm_bytes_by_formula": sum(memory.of(config, kind, one.name).values())} for one in reports
    ],
  }


def text(found: dict[str, Any], config: RunConfig) -> str:
  """For people."""
  lines = []
  for one in found["programs"]:
    limit = one["hbm_limit"]
    lines.append(
      f"{one['name']}: {one['hbm_bytes'] / _GIB:.2f} of {limit / _GIB:.2f} GiB a device"
      f" ({one['hbm_bytes_by_formula'] / _GIB:.2f} by formula)"
    )
    lines += [f"  {name:16} {size / _GIB:9.3f} GiB" for name, size in one["bytes"].items() if size]
    if one["host_bytes"]:
      lines.append(f"  {'host memory':16} {one['host_bytes'] / _GIB:9.3f} GiB")
    for name, traffic in one["collectives"].items():
      lines.append(f"  {name}: {traffic['count']} x, {traffic['bytes'] / _GIB:.3f} GiB")
    times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in one["roofline_seconds"].items())
    lines.append(f"  {one['flops']:.3g} FLOP; at best: {times}")
  lines.append("fits" if found["fits"] else "does not fit: " + advice(found, config))
  return "\n".join(lines)


def advice(found: dict[str, Any], config: RunConfig) -> str:
  """By how much, and what would help most."""
  worst = max(found["programs"], key=lambda one: one["hbm_bytes"])
  over = worst["hbm_bytes"] - worst["hbm_limit"]
  ideas = []
  if worst["bytes"].get("temp", 0) > over:
    ideas.append(
      "a smaller model.parallel.moe_chunk, model.remat=offload, a shorter packing.length or rollout.max_tokens (temp)"
    )
  state = worst["bytes"].get("optimizer", 0) + worst["bytes"].get("resident", 0)
  if found["program"] == Kind.TRAIN_STEP and state and config.rl.optimizer.memory is Memory.DEVICE:
    ideas.append(f"rl.optimizer.memory=host ({state / _GIB:.2f} GiB)")
  if worst["bytes"].get("kv_cache", 0) > over:
    ideas.append("fewer rollout.slots (kv_cache)")
  ideas.append("more chips")
  return f"{worst['name']} needs {over / _GIB:.2f} GiB more than there is; {'; or '.join(ideas)}"
