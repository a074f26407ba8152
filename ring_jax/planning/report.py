"""The planner's ranking for people and for programs, and the config file that says the same as its winner."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from configs.loading import differences
from configs.parallel import AXES
from configs.placement import num_devices
from configs.schema import RunConfig
from sharding.placement import Placement
from sharding.planner import Estimate, Ranking

_GIB = 1 << 30
_REASONS = {
  "flops": "bound by arithmetic",
  "hbm": "bound by reading weights and caches from memory",
  "links": "bound by exchange between devices",
  "latency": "bound by the latency of exchange",
  "host": "bound by the host",
  "measured": "as measured",
}

_FILE = '''"""{name} as `ring_jax.launch.plan` placed it on {where}.

Made by the planner: {strategy}, {seconds:.3g} s a step predicted.
"""

import pathlib

from configs.loading import load, override
from configs.schema import RunConfig

BASE = pathlib.Path(__file__).parent / {base!r}
OVERRIDES = {{
{overrides}
}}


def get_config() -> RunConfig:
  return override(load(BASE), OVERRIDES)
'''


def as_json(found: Estimate) -> dict[str, Any]:
  """Of one candidate, plain JSON data."""
  config = found.config
  return {
    "strategy": str(config.placement.strategy),
    "switching": str(config.placement.switching),
    "placement": {
      str(role): {
        "devices": f"{seat.devices.start}:{seat.devices.stop}",
        "mesh": dict(zip(AXES, seat.parallel.mesh.sizes, strict=True)),
      }
      for role, seat in config.seats.items()
    },
    "slots": config.rollout.slots,
    "rows": config.packing.rows,
    "optimizer_memory": str(config.rl.optimizer.memory),
    "step_seconds": found.seconds,
    "tokens_per_second": found.tokens_per_second,
    "bottleneck": {
      "stage": str(found.bottleneck),
      "share": found.path[found.bottleneck] / found.seconds,
      "bound": found.prices[found.bottleneck].bound,
    },
    "stages": {str(stage): {"seconds": price.seconds, "bound": price.bound} for stage, price in found.prices.items()},
    "critical_path": {str(stage): seconds for stage, seconds in found.path.items()},
    "idle": {f"{group.start}:{group.stop}": share for group, share in found.idle.items()},
    "hbm_bytes": found.tightest.bytes,
    "tightest_devices": f"{found.tightest.devices.start}:{found.tightest.devices.stop}",
  }


def summary(
  config: RunConfig,
  phase: str,
  where: str,
  devices: int,
  ranking: Ranking,
  baseline: Estimate | None,
  limit: float,
  top: int,
) -> dict[str, Any]:
  """One JSON object; its top level is the winner."""
  best = ranking.estimates[0] if ranking.estimates else None
  head = {
    "config": config.name,
    "phase": phase,
    "topology": where,
    "devices": devices,
    "fits": best is not None,
    "hbm_limit": limit if limit != float("inf") else None,
  }
  if best:
    head |= as_json(best) | {"picture": picture(best), "overrides": differences(config, best.config)}
  return head | {
    "naive": {"step_seconds": baseline.seconds, "factor": baseline.seconds / best.seconds}
    if baseline and best
    else None,
    "ranking": [as_json(one) for one in ranking.estimates[:top]],
    "by_strategy": {str(one.config.placement.strategy): as_json(one) for one in best_of_each(ranking)},
    "tried": len(ranking.estimates) + sum(count for count, _ in ranking.discarded.values()),
    "discarded": {str(strategy): {"count": n, "reason": why} for strategy, (n, why) in ranking.discarded.items()},
  }


def best_of_each(ranking: Ranking) -> list[Estimate]:
  """The first of each strategy, in the ranking's order."""
  found: dict[Any, Estimate] = {}
  for one in ranking.estimates:
    found.setdefault(one.config.placement.strategy, one)
  return list(found.values())


def picture(found: Estimate) -> str:
  seats = found.config.seats
  positions = range(num_devices(seats))
  return Placement.of_seats(found.config.placement.strategy, seats, positions).picture()


def reason(found: Estimate) -> str:
  """The bottleneck in words."""
  stage = found.bottleneck
  share = found.path[stage] / found.seconds
  return f"{stage} is {share:.0%} of the critical path, {_REASONS[found.prices[stage].bound]}"


def lines(ranking: Ranking, baseline: Estimate | None, limit: float, top: int) -> list[str]:
  """For people."""
  rows = [["", "strategy", "s/step", "tokens/s", "GiB", "idle", "slots", "trainer", "engine", "why"]]
  shown = ranking.estimates[:top]
  shown += [one for one in best_of_each(ranking) if one not in shown]
  for one in shown:
    seats = one.config.seats
    rows.append([
      str(ranking.estimates.index(one) + 1),
      str(one.config.placement.strategy) + ("" if one.config.placement.switching == "keep" else ", state to host"),
      f"{one.seconds:.4g}",
      f"{one.tokens_per_second:.4g}",
      f"{one.tightest.bytes / _GIB:.1f}",
      f"{one.mean_idle:.0%}",
      str(one.config.rollout.slots),
      *(f"{len(seats[role].devices)} ({_mesh(seats[role].parallel.mesh)})" for role in ("actor", "rollout")),
      reason(one),
    ])  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  text = [*table, ""]
  for strategy, (count, why) in ranking.discarded.items():
    text.append(f"discarded: {strategy}{f', {count} candidates' if count else ''}: {why}")
  if not ranking.estimates:
    return [*text, "nothing fits"]
  best = ranking.estimates[0]
  text += ["", picture(best), "", _stages(best)]
  if baseline:
    text.append(
      f"naive co-location (everything cut over all devices, the engine too): {baseline.seconds / best.seconds:.1f}x"
    )
  if limit != float("inf"):
    text.append(f"memory: {best.tightest.bytes / _GIB:.1f} of {limit / _GIB:.1f} GiB on the tightest device")
  return text


def _stages(found: Estimate) -> str:
  return "alone, in seconds: " + ", ".join(f"{stage} {price.seconds:.4g}" for stage, price in found.prices.items())


def _mesh(mesh) -> str:
  sizes = [f"{name} {size}" for name, size in zip(AXES, mesh.sizes, strict=True) if size > 1]
  return " x ".join(sizes) or "1"


def config_file(base: str, target: pathlib.Path, where: str, found: Estimate, overrides: Mapping[str, str]) -> str:
  """A Python file with `get_config()` that gives the candidate.

  Args:
    base: the config file that was planned for.
    target: where the text will be written to; finds `base` from there.
    overrides: from the base, as it is in its file, to the candidate.
  """
  return _FILE.format(
    name=found.config.name,
    where=where,
    strategy=found.config.placement.strategy,
    seconds=found.seconds,
    base=os.path.relpath(os.path.abspath(base), os.path.abspath(target.parent)),
    overrides="\n".join(f"  {name!r}: {value!r}," for name, value in overrides.items()),
  )
