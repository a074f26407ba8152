"""Placement strategies: predicted and measured step time over model size, devices and answer length.

    calibration   co-located runs on this machine, to which the planner's law is fitted       planning/measured.py
    measured      every strategy in every setting; the law has not seen them
    predicted     what it says of them, and whether it names the winner: a law a seed, of the runs of that seed
    pods          the planner's formulas for slices of v5p: simulated, on no hardware          planning/roofline.py

RLHF with all roles: PPO with actor, critic, reference and reward model.  `naive` is one layout for all of them, the engine
included, as in the paper's baseline.  Devices are fake ones that share this machine's cores: what one strategy gains over
another here is dispatch, collectives and overlap, and no parallel work.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from configs import ring_mini, ring_tiny_rlhf
from configs.loading import override
from configs.schema import RunConfig
from ring_jax.planning import measured
from ring_jax.planning.report import best_of_each
from ring_jax.planning.rollouts import Rollouts
from ring_jax.planning.roofline import Roofline
from ring_jax.studies import figures
from ring_jax.studies.scale import SIZES
from ring_jax.studies.statistics import interval, paired_ratio
from ring_jax.studies.study import Figure, Place, Point, Report, Result, Results, Settings, Study, Table
from ring_jax.studies.training import timed
from ring_jax.train.report import metrics
from rollout.simulator.lengths import Generator, Shape
from sharding.planner import naive_estimate, search
from sharding.topology import Topology

_PHASE = "rlhf"
_WHOLE = '{{"mesh":{{"data":{}}},"rules":{{"embed":[]}}}}'  # an engine with all weights on each of its devices
_CALIBRATION = {  # name: devices, mesh
  "1": (1, {}),
  "2_fsdp": (2, {"fsdp": 2}),
  "4_data": (4, {"data": 4}),
  "8_fsdp": (8, {"fsdp": 8}),
  "8_data": (8, {"data": 8}),
}
STRATEGIES = ("colocated", "interleaving", "disaggregated", "naive")


@dataclasses.dataclass(frozen=True)
class Setting:
  size: str  # of `scale.SIZES`
  devices: int
  answer: int  # tokens, at most
  predicted: bool = True  # the law that is fitted to the calibration is of its model

  @property
  def label(self) -> str:
    return f"{SIZES[self.size][0]} parameters, {self.devices} devices, answers of up to {self.answer}"


SETTINGS: Mapping[str, Setting] = {
  "wide_8_108": Setting("wide", 8, 108),
  "wide_4_108": Setting("wide", 4, 108),
  "wide_8_24": Setting("wide", 8, 24),
  "tiny_8_108": Setting("tiny", 8, 108, predicted=False),
}
_QUICK = {"quick": Setting("tiny", 2, 24)}
_PODS = {"ring_mini": ("v5p:2x2x4", "v5p:4x4x4", "v5p:8x8x8")}


def config_of(setting: Setting, settings: Settings) -> RunConfig:
  """RLHF from random weights: what it learns does not matter, what it computes does."""
  return override(
    ring_tiny_rlhf.get_config(),
    {
      **{f"model.{name}": value for name, value in SIZES[setting.size][1].items()},
      "name": "placement", "sft.steps": "0", "rl.steps": "0", "reward_model.steps": "1",
      "rlhf.steps": "6" if settings.quick else "7", "rlhf.eval_every": "0", "rlhf.optimizer.learning_rate": "1e-5",
      "rollout.slots": "8", "rollout.pool": "16", "rollout.max_tokens": str(setting.answer), "rollout.prefill_batch": "8",
      "rollout.token_budget": str(8 * setting.answer), "packing.rows": "8", "eval.slots": "8", "eval.problems": "8",
      "eval.samples": "1", "reward_model.probe_pairs": "16", "checkpoint.every": "100",
    },
  )  # fmt: skip


def placed(config: RunConfig, strategy: str, devices: int) -> RunConfig:
  """fsdp for what is trained, whole weights for the engine, but for `naive`."""
  half = devices // 2
  layouts = {
    "naive": {"model.parallel.mesh.fsdp": f"{devices}"},
    "colocated": {"model.parallel.mesh.fsdp": f"{devices}", "rollout.parallel": _WHOLE.format(devices)},
    "interleaving": {
      "model.parallel.mesh.fsdp": f"{devices}", "rollout.parallel": _WHOLE.format(devices),
      "placement.strategy": "interleaving",
    },
    "disaggregated": {
      "model.parallel.mesh.fsdp": f"{half}", "rollout.parallel": _WHOLE.format(half),
      "placement.strategy": "disaggregated", "rlhf.staleness": "1",
    },
  }  # fmt: skip
  return override(config, layouts[strategy])


class PlacementStudy(Study):
  name = "placement"
  title = "Where the roles work"
  claim = (
    "An Adaptive Placement and Parallelism Framework for Accelerating RLHF Training: interleaving and disaggregation beat one layout"
    " for all models, by up to 11x; which one wins depends on model size, devices and how much is generated."
  )

  def points(self, settings: Settings) -> list[Point]:
    chosen = ("colocated",) if settings.quick else STRATEGIES
    runs, predicted = [], []
    # All arms of a seed, then the next: what the machine does meanwhile falls on all of them.
    for seed in settings.all_seeds:
      calibration = [
        Point(f"calibration_{name}", seed, devices=devices, turns=True)
        for name, (devices, _) in _CALIBRATION.items()
        if not settings.quick or name == "1"
      ]
      own = [
        Point(f"{strategy}_{name}", seed, devices=setting.devices, turns=True)
        for name, setting in _settings(settings).items()
        for strategy in chosen
      ]
      runs += calibration + own
      # With all cores, as the law asks how many there are.
      predicted.append(Point("predicted", seed, alone=True, needs=tuple(one.name for one in calibration + own)))
    return [*runs, *predicted, Point("pods")]

  def measure(self, point: Point, settings: Settings, place: Place) -> Result:
    if point.arm == "pods":
      return {"rows": [row for model in _PODS for row in _simulated(model, settings)]}
    if point.arm == "predicted":
      return _predicted([one for one in self.points(settings) if one.name in point.needs], settings, place)
    config = dataclasses.replace(_config(point.arm, settings), seed=point.seed)
    return {"step": _read(timed(config, _PHASE, measured.WARM_UP, place)).step_seconds}

  def report(self, settings: Settings, results: Results) -> Report:
    tables = [*([_measured_table(results, settings)] if "predicted" in results.arms() else []),
              *([_pod_table(results)] if "pods" in results.arms() else [])]  # fmt: skip
    return Report(
      findings=_findings(results, settings),
      tables=tables,
      figures=[_picture(results, settings)] if "predicted" in results.arms() else [],
      not_shown=[
        "Parallel work: the fake devices share two cores.",
        "The paper's 11x: its cases and its baseline are not published in a form that could be set up again.",
        "Pods: formulas at assumed efficiencies, nothing was run.",
      ],
    )


def _config(arm: str, settings: Settings) -> RunConfig:
  kind, _, name = arm.partition("_")
  if kind == "calibration":
    _, mesh = _CALIBRATION[name]
    changes = {f"model.parallel.mesh.{axis}": str(size) for axis, size in mesh.items()}
    return override(config_of(next(iter(_settings(settings).values())), settings), changes)
  setting = _settings(settings)[name]
  return placed(config_of(setting, settings), kind, setting.devices)


def _settings(settings: Settings) -> Mapping[str, Setting]:
  """The first one is that of the calibration."""
  return _QUICK if settings.quick else SETTINGS


def _read(workdir: pathlib.Path) -> measured.Run:
  return measured.read_run(workdir, _PHASE, *metrics.read_logs(workdir))


def _predicted(points: Sequence[Point], settings: Settings, place: Place) -> Result:
  """By setting and arm, seconds of a step."""
  runs = {point.arm: _read(place.of(point.name) / "run") for point in points}
  calibration = [run for arm, run in runs.items() if arm.startswith("calibration_")]
  law = measured.Measured(calibration, _PHASE)
  found: dict[str, Any] = {}
  for name, setting in _settings(settings).items():
    own = {arm: run for arm, run in runs.items() if arm.endswith(f"_{name}") and not arm.startswith("calibration_")}
    if setting.predicted:
      compared = measured.compare(law, list(own.values()), _PHASE).estimates
      found[name] = {arm: one.seconds for arm, one in zip(own, compared, strict=True)}
  return {"seconds": found}


# ---- pods, by formula


def _simulated(model: str, settings: Settings) -> list[dict[str, Any]]:
  base = {"ring_mini": ring_mini}[model].get_config()
  config = override(
    base,
    {
      "rollout.page_size": "256", "rollout.max_tokens": "30720", "packing.length": "32768", "rl.steps": "0",
      "reward_model.steps": "1", "rlhf.steps": "1", "rlhf.reward": "model", "rlhf.advantage": "gae", "rlhf.stream": "512",
      "rlhf.staleness": "1",
    },
  )  # fmt: skip
  rows = []
  for name in _PODS[model][: 1 if settings.quick else None]:
    topology = Topology.parse(name)
    for mean in (8192,) if settings.quick else (2048, 8192):
      answers = Generator(Shape.LOGNORMAL, mean=mean, sigma=1.2, cap=config.rollout.max_tokens, prompt_tokens=512).draw
      costs = Roofline(topology.chip, _PHASE, Rollouts(answers))
      ranking = search(config, _PHASE, topology.num_devices, costs, may_change=True)
      naive = naive_estimate(config, _PHASE, topology.num_devices, costs, may_change=True)
      rates = {str(one.config.placement.strategy): one.tokens_per_second for one in best_of_each(ranking)}
      rows.append(
        {"model": model, "topology": name, "mean": mean, "rates": rates, "naive": naive and naive.tokens_per_second}
      )
  return rows


# ---- what it says


def _steps(results: Results, name: str) -> dict[str, list[float]]:
  """Measured seconds of a step in a setting: by strategy, in the order of seeds."""
  arms = results.arms()
  return {
    strategy: [one["step"] for one in results.of(f"{strategy}_{name}")]
    for strategy in STRATEGIES
    if f"{strategy}_{name}" in arms
  }


def _predictions(results: Results, name: str) -> dict[str, list[float]]:
  found: dict[str, list[float]] = {}
  for one in results.of("predicted"):
    for arm, seconds in one["seconds"].get(name, {}).items():
      found.setdefault(arm.removesuffix(f"_{name}"), []).append(seconds)
  return found


def _fastest(steps: Mapping[str, Sequence[float]]) -> str:
  return min(steps, key=lambda strategy: statistics.mean(steps[strategy]))


def _measured_table(results: Results, settings: Settings) -> Table:
  rows = []
  for name, setting in _settings(settings).items():
    steps, predicted = _steps(results, name), _predictions(results, name)
    for strategy, seconds in steps.items():
      best, shown = _fastest(steps), interval(seconds).format(2)
      ratio = paired_ratio(predicted[strategy], seconds).format(2) if strategy in predicted else "not predicted"
      rows.append([
        setting.label, strategy, f"**{shown}**" if strategy == best else shown, ratio,
        "1" if strategy == best else paired_ratio(seconds, steps[best]).format(2),
      ])  # fmt: skip
  return Table(
    "Measured on fake devices: seconds of a step of RLHF", ["setting", "placement", "step, s", "predicted / measured", "of the best"],
    rows, "A run's step is the median of those after the third. Ratios are within a seed, and so is the law that predicts: it is fitted to that seed's calibration runs, which are of the larger model.",
  )  # fmt: skip


def _picture(results: Results, settings: Settings) -> Figure:
  shown = {name: steps for name in _settings(settings) if (steps := _steps(results, name))}
  with figures.picture(1, len(shown), width=3.6, height=2.4) as (figure, axes):
    for axis, (name, steps) in zip(axes, shown.items(), strict=True):
      title = _settings(settings)[name].label.replace(", answers", "\nanswers")
      figures.bars(axis, {strategy: interval(seconds) for strategy, seconds in steps.items()}, title, "seconds a step")
      if predicted := _predictions(results, name):
        means = [statistics.mean(seconds) for seconds in predicted.values()]
        axis.plot(means, list(predicted), "D", color="black", markersize=4, label="predicted")
    if axes[0].get_legend_handles_labels()[0]:
      figures.legend_below(figure, axes[0])
    return Figure("steps", "A step of RLHF by placement: measured, and what the planner predicts", figures.png(figure))


def _pod_table(results: Results) -> Table:
  rows = []
  for row in results.of("pods")[0]["rows"]:
    rates, naive = row["rates"], row["naive"]
    best = max(rates.values())
    cells = [
      f"{rates[name]:,.0f}" if name in rates else "does not fit"
      for name in ("colocated", "interleaving", "disaggregated")
    ]
    rows.append(
      [
        row["model"],
        row["topology"],
        f"{row['mean']:,}",
        *cells,
        f"{best / naive:.0f}" if naive else "naive does not fit",
      ]
    )
  return Table(
    "Simulated by formula: answer tokens a second on v5p, streamed with staleness 1",
    ["model", "slice", "mean length", "co-located", "interleaving", "disaggregated", "best / naive"], rows,
  )  # fmt: skip


def _findings(results: Results, settings: Settings) -> list[str]:
  return [*_largest_measured(results, settings), *_planner(results, settings), *_largest_simulated(results)]


def _largest_measured(results: Results, settings: Settings) -> list[str]:
  found = []
  for name, setting in _settings(settings).items():
    if steps := _steps(results, name):
      best = _fastest(steps)
      for strategy in steps.keys() - {best}:
        ratio = paired_ratio(steps[strategy], steps[best])
        found.append((ratio.mean, f"{ratio.format(2)} ({setting.label}: {best} against {strategy})"))
  if not found:
    return []
  return [f"The largest measured ratio is {max(found)[1]}; the paper says up to 11, on its clusters."]


def _planner(results: Results, settings: Settings) -> list[str]:
  """How often it is near, and how often it names the winner: of means over seeds, and seed by seed."""
  ratios, right, right_seeds, seeds = [], [], 0, 0
  for name in _settings(settings):
    steps, predicted = _steps(results, name), _predictions(results, name)
    if predicted:
      ratios += [paired_ratio(seconds, steps[strategy]).mean for strategy, seconds in predicted.items()]
      right.append(_fastest(predicted) == _fastest(steps))
      for one in range(len(steps[STRATEGIES[0]])):
        own, told = ({strategy: [values[one]] for strategy, values in of.items()} for of in (steps, predicted))
        right_seeds, seeds = right_seeds + (_fastest(own) == _fastest(told)), seeds + 1
  if not ratios:
    return []
  within = sum(abs(ratio - 1) <= 0.2 for ratio in ratios)
  return [
    f"The planner, calibrated by other runs, is within 20% of {within} of {len(ratios)} measured step times (from {min(ratios):.2f} to"
    f" {max(ratios):.2f}), and names the winner in {sum(right)} of {len(right)} settings; seed by seed, in {right_seeds} of {seeds}."
  ]


def _largest_simulated(results: Results) -> list[str]:
  simulated = [
    (max(row["rates"].values()) / row["naive"], f"{row['model']} on {row['topology']}, mean length {row['mean']:,}")
    for row in (results.of("pods")[0]["rows"] if "pods" in results.arms() else [])
    if row["naive"]
  ]
  if not simulated:
    return []
  factor, where = max(simulated)
  return [f"The largest simulated ratio of the best placement over the naive one is {factor:.0f} ({where})."]
