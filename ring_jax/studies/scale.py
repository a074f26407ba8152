"""Tokens a second and memory of the real programs, over model size and devices.

measured   RL on this machine's cores, seen as 1 to 8 devices: what more devices cost and not what they gain
compiled   Ring-mini for slices of v5p, by the real TPU compiler: memory and FLOPs of a chip, and the roofline's tokens a
           second; nothing is run
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import jax

from configs import ring_mini, ring_tiny
from configs.loading import override
from configs.scaling import at_length
from configs.schema import RunConfig
from ring_jax.compiled import fit, layout
from ring_jax.compiled.programs import Kind, lower
from ring_jax.studies import figures
from ring_jax.studies.statistics import interval, paired_ratio
from ring_jax.studies.study import Figure, Place, Point, Report, Result, Results, Settings, Study, Table
from ring_jax.studies.training import history, timed
from sharding.topology import Topology

SIZES: Mapping[str, tuple[str, dict[str, str]]] = {
  "tiny": ("0.2M", {}),
  "wide": ("2.7M", {"hidden_size": "256", "intermediate_size": "768", "moe_intermediate_size": "128"}),
  "large": ("14M", {"hidden_size": "512", "num_hidden_layers": "4", "intermediate_size": "1536", "moe_intermediate_size": "256"}),
}  # fmt: skip
_DEVICES = (1, 2, 4, 8)
_TOPOLOGIES = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4")
_LENGTH = 32_768
_WARM_UP = 2  # steps that are left out: they compile


def config_of(size: str, devices: int, settings: Settings) -> RunConfig:
  """RL with replicas of the model, from random weights."""
  _, shape = SIZES[size]
  return override(
    ring_tiny.get_config(),
    {
      **{f"model.{name}": value for name, value in shape.items()},
      "name": "scale", "task.exact": "false", "model.parallel.mesh.data": str(devices), "sft.steps": "0", "rl.steps": "4" if settings.quick else "6",
      "rl.eval_every": "0", "eval.problems": "16", "eval.samples": "1", "eval.slots": "64", "rollout.slots": "64",
      "rollout.pool": "0", "rollout.token_budget": "1000", "packing.rows": "8", "checkpoint.every": "100",
    },
  )  # fmt: skip


class Scale(Study):
  name = "scale"
  title = "Tokens a second and memory over size and devices"
  claim = "The same programs train the toy and the pod (Ring-1T, section 2.5): what does a larger model or a larger slice cost?"

  def points(self, settings: Settings) -> list[Point]:
    measured = [
      Point(f"run-{size}-{devices}", seed, devices=devices, turns=True)
      for seed in settings.all_seeds
      for size in (("tiny",) if settings.quick else SIZES)
      for devices in ((1, 8) if settings.quick else _DEVICES)
    ]
    compiled = [Point(f"{kind}-{name.replace(':', '_')}") for name in _TOPOLOGIES for kind in ("train_step", "decode")]
    return measured + ([] if settings.quick else compiled)

  def measure(self, point: Point, settings: Settings, place: Place) -> Result:
    kind, *rest = point.arm.split("-")
    if kind != "run":
      return _compiled(Kind(kind), Topology.parse(rest[0].replace("_", ":")))
    config = dataclasses.replace(config_of(rest[0], int(rest[1]), settings), seed=point.seed)
    workdir = timed(config, "rl", _WARM_UP, place)
    return _rates(history(workdir, ("scheduler/tokens_generated", "policy/tokens")))

  def report(self, settings: Settings, results: Results) -> Report:
    compiled = [arm for arm in results.arms() if not arm.startswith("run-")]
    return Report(
      findings=_findings(results, compiled),
      tables=[_measured_table(results), *([_compiled_table(results, compiled)] if compiled else [])],
      figures=[_picture(results)],
      not_shown=[
        "Speed on a TPU: seconds of the compiled programs are a roofline's, at assumed efficiencies.",
        "Speed-up by devices: the fake ones share the machine's cores.",
        "Ring-flash and Ring-1T, which docs/sharding.md has (`make test-pods` compiles them).",
      ],
    )


def _rates(found: dict[str, Any]) -> Result:
  series, seconds = found["series"], found["seconds"]
  after = lambda values: values[_WARM_UP:]  # noqa: E731
  rates = lambda tokens, times: statistics.median(  # noqa: E731
    count / time for count, time in zip(after(tokens), after(times), strict=True) if count and time
  )
  train = [one + other for one, other in zip(seconds["train"], seconds["logp"], strict=True)]
  return {
    "generated": rates(series["scheduler/tokens_generated"], seconds["rollout"]),
    "trained": rates(series["policy/tokens"], train),
    "step": statistics.median(after(seconds["step"])),
  }


def _compiled(kind: Kind, topology: Topology) -> Result:
  jax.config.update("jax_enable_compilation_cache", False)  # what has no device cannot be read back from it
  config, overrides = layout.laid_out(at_length(ring_mini.get_config(), _LENGTH), topology)
  found = _fit(config, kind, topology, overrides)
  while kind is Kind.DECODE and not found["fits"] and config.rollout.slots > topology.num_devices:
    # The formula that chose the slots may be a little low; the compiler is asked.
    overrides = overrides | {"rollout.slots": str(config.rollout.slots // 2)}
    config = override(config, {"rollout.slots": overrides["rollout.slots"]})
    found = _fit(config, kind, topology, overrides)
  return {
    "program": kind.value, "topology": str(topology), "devices": topology.num_devices, "fits": found["fits"],
    "hbm_bytes": found["hbm_bytes"], "flops": found["flops"], "roofline_seconds": found["roofline_seconds"],
    "collectives": sum(one["bytes"] for one in found["collectives"].values()),
    "tokens": config.packing.rows * config.packing.length if kind is Kind.TRAIN_STEP else config.rollout.slots,
  }  # fmt: skip


def _fit(config: RunConfig, kind: Kind, topology: Topology, overrides: dict[str, str]) -> dict[str, Any]:
  reports = [fit.compiled(config, kind, unit, topology.chip) for unit in lower(config, kind, topology.devices())]
  return fit.summary(config, kind, topology, overrides, reports, 0.0)


# ---- what it says


def _measured_table(results: Results) -> Table:
  rows = []
  for arm in (arm for arm in results.arms() if arm.startswith("run-")):
    _, size, devices = arm.split("-")
    of = lambda name, arm=arm: interval([one[name] for one in results.of(arm)])  # noqa: E731
    rows.append([SIZES[size][0], devices, of("generated").format(0), of("trained").format(0), of("step").format(2)])
  header = ["parameters", "devices", "generated, tokens/s", "trained on, answer tokens/s", "step, s"]
  return Table(
    "Measured: RL on the same cores, seen as so many devices", header, rows,
    f"Of each run the median step counts, without the first {_WARM_UP}.",
  )  # fmt: skip


def _picture(results: Results) -> Figure:
  def lines(name: str) -> dict[str, figures.Curves]:
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for arm in (arm for arm in results.arms() if arm.startswith("run-")):
      _, size, devices = arm.split("-")
      found.setdefault(SIZES[size][0], []).append((int(devices), [one[name] for one in results.of(arm)]))
    return {
      label: ([devices for devices, _ in line], [list(run) for run in zip(*(rates for _, rates in line), strict=True)])
      for label, line in found.items()
    }

  with figures.picture(1, 2) as (figure, axes):
    xlabel = "devices, played by the same cores"
    figures.curves(axes[0], lines("generated"), "Generated", "tokens/s", xlabel, log=True)
    figures.curves(axes[1], lines("trained"), "Trained on", "answer tokens/s", xlabel, log=True)
    figures.legend_below(figure, axes[0])
    return Figure("rates", "Tokens a second by model size, over fake devices", figures.png(figure))


def _compiled_table(results: Results, compiled: list[str]) -> Table:
  rows = []
  for arm in compiled:
    one = results.of(arm)[0]
    made = one["flops"] > 0  # of a program that does not fit the compiler tells the memory and no more
    rows.append([
      one["program"], one["topology"], f"{one['hbm_bytes'] / 2**30:.1f}", "yes" if one["fits"] else "no",
      f"{one['flops'] / 1e12:.1f}" if made else "-", f"{one['collectives'] / 2**30:.2f}" if made else "-",
      f"{one['tokens'] / one['roofline_seconds']:,.0f}" if made else "-",
    ])  # fmt: skip
  header = [
    "program",
    "slice",
    "GiB a chip",
    "fits",
    "TFLOPs a chip",
    "GiB exchanged a chip",
    "tokens/s of the slice, roofline",
  ]
  return Table(f"Compiled by the TPU compiler: Ring-mini, {_LENGTH:,} tokens a rollout", header, rows)


def _findings(results: Results, compiled: list[str]) -> list[str]:
  found = []
  if {"run-tiny-1", "run-tiny-8"} <= set(results.arms()):
    one, eight = ([run["step"] for run in results.of(f"run-tiny-{devices}")] for devices in (1, 8))
    ratio = paired_ratio(eight, one).format(2)
    found.append(
      f"The smallest model's step takes {ratio} times as long on the same cores seen as eight devices: dispatch and exchange."
    )
  if compiled:
    found.append(
      f"{sum(results.of(arm)[0]['fits'] for arm in compiled)} of {len(compiled)} programs of Ring-mini fit their slices, by the TPU compiler."
    )
  return found
