"""Costs of stages on this machine, fitted to short runs, and what they say of other runs.

    stage seconds = a work  +  s work / devices  +  b calls devices
                    where the model is cut  +  c calls pieces  +  w work, up to one device a core

Work is what the stage computes: tokens of its microbatches, padding included; decode steps times slots.  Calls are its
microbatches or dispatches.  s is work that a device does not spread over all cores, b what it costs to dispatch to one more
device, c a piece of the model that reaches a device which lacks it: with d replicas of the model on n devices, each of which
gathers what the others have, n - d models in all.  w is what devices idle that wait for each other in a collective while no
other device is there to use their core (seen in runs on two cores: training with fsdp on two devices took 1.5 to 2.4 times as
long as on two replicas, or with fsdp on four).
Coefficients are of at least 0, by least absolute deviations over the runs; one more must lower these by a twentieth
(rollout/simulator/calibration.py), so that a single run gives a alone.

Fake CPU devices are played by the same cores: the law has no speed-up in it, `load` says how many cores a stage keeps
busy alone, one a device, and what runs at the same time shares them (sharding/timeline.py).

The runs to fit must be co-located, since there stages take turns and each second belongs to one of them.  Of each run the
median step counts, without the first ones, which compile.
"""

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs import loading
from configs.schema import Advantage, ConfigError, Role, RunConfig, Strategy
from ring_jax.planning.holdings import holdings
from ring_jax.planning.rollouts import Rollouts, microbatches
from ring_jax.records import read_lines
from rollout.simulator.calibration import least_absolute
from rollout.simulator.lengths import Trace
from sharding.planner import Estimate, Generation, Holdings, Price, Stage, estimate

WARM_UP = 3  # steps that are left out
_FEWEST = 3  # steps that a median needs

# Names in timings.jsonl.  The hand-over to the shadow critic is within sync, and is priced like the engine's.
_SECONDS = {
  Stage.GENERATE: "rollout",
  Stage.SCORE: "score",
  Stage.LOGP: "logp",
  Stage.REFERENCE: "reference",
  Stage.REWARD: "reward",
  Stage.VALUES: "values",
  Stage.TRAIN: "train",
  Stage.CRITIC: "critic",
  Stage.SYNC: "sync",
  Stage.TO_HOST: "to_host",
  Stage.FROM_HOST: "from_host",
}
_ROLES = {
  Stage.LOGP: Role.ACTOR,
  Stage.REFERENCE: Role.REFERENCE,
  Stage.REWARD: Role.REWARD,
  Stage.TRAIN: Role.ACTOR,
  Stage.CRITIC: Role.CRITIC,
}


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir says."""

  name: str
  config: RunConfig
  seconds: Mapping[Stage, float]  # of the median step
  every_step: Sequence[float]  # seconds of each step that counts
  answers: Sequence[tuple[int, int]]  # tokens of prompt and answer
  trained: float  # share of the answers that were trained on

  @property
  def step_seconds(self) -> float:
    """Of the median step."""
    return statistics.median(self.every_step)


def read_run(workdir: pathlib.Path, phase: str, metrics: Sequence[Mapping], timings: Sequence[Mapping]) -> Run:
  """Args:
    workdir: of a run, finished or not.
    phase: rl or rlhf.
    metrics, timings: records of its metrics.jsonl and timings.jsonl.

  Raises:
    ConfigError: what it lacks.
  """
  config = loading.of_run(workdir, str(workdir))
  steps = [record for record in timings if record.get("phase") == phase][WARM_UP:]
  if len(steps) < _FEWEST:
    raise ConfigError(f"{workdir}: holds {len(steps)} timed {phase} steps after the first {WARM_UP}, needs {_FEWEST}")
  each = [_stages(step) for step in steps]
  seconds = {
    stage: statistics.median(one[stage] for one in each) for stage in each[0] if all(stage in one for one in each)
  }
  totals = [step.get("seconds/step", sum(one.values())) for step, one in zip(steps, each, strict=True)]
  shown = [record for record in metrics if record.get("phase") == phase][WARM_UP:]
  without = [record["without_advantage"] for record in shown if "without_advantage" in record]
  dropped = without if config.phase(phase).advantage is not Advantage.GAE else []
  return Run(
    workdir.name, config, seconds, totals, _answers(workdir, steps),
    1 - (statistics.mean(dropped) if dropped else 0.0),
  )  # fmt: skip


def _stages(step: Mapping[str, Any]) -> dict[Stage, float]:
  """Seconds of a step that belong to one stage alone: the critic's turn lies within what a run calls train."""
  found = {stage: step[f"seconds/{name}"] for stage, name in _SECONDS.items() if f"seconds/{name}" in step}
  if Stage.CRITIC in found and Stage.TRAIN in found:
    found[Stage.TRAIN] = max(found[Stage.TRAIN] - found[Stage.CRITIC], 0.0)
  return found


def _answers(workdir: pathlib.Path, steps: Sequence[Mapping]) -> list[tuple[int, int]]:
  found = []
  for step in steps:
    path = workdir / "rollouts" / f"step_{step['step']:06d}.jsonl"
    if path.is_file():
      records = map(json.loads, read_lines(path))
      found += [(len(record["prompt_tokens"]), len(record["tokens"])) for record in records if record["tokens"]]
  if not found:
    raise ConfigError(f"{workdir}: rollouts/ holds no answers of the timed steps")
  return found


def resampled(runs: Sequence[Run]):
  """`rollouts.Answers` drawn from those of the runs."""
  known = np.array([pair for run in runs for pair in run.answers])

  def draw(groups: int, group_size: int) -> Trace:
    chosen = known[np.random.default_rng(0).integers(len(known), size=groups * group_size)]
    return Trace(group_size, chosen[:, 1].tolist(), chosen[:, 0].tolist())

  return draw


class Measured:
  """`sharding.planner.CostModel` of this machine.

  Args:
    runs: to fit, co-located; best on different numbers of devices and with different layouts.
    phase: rl or rlhf.

  Raises:
    ConfigError: a run whose stages overlapped.
  """

  def __init__(self, runs: Sequence[Run], phase: str):
    for run in runs:
      strategy = run.config.placement.strategy
      if strategy is not Strategy.COLOCATED or run.config.phase(phase).stream:
        raise ConfigError(
          f"--calibrate: {run.name} is {strategy}, rl.stream={run.config.phase(phase).stream}: only of a co-located run"
          " without streaming does each second belong to one stage"
        )
    self.capacity, self.limit = float(len(os.sched_getaffinity(0))), float("inf")
    self._phase = phase
    self._rollouts = Rollouts(resampled(runs))
    self._trained = statistics.mean(run.trained for run in runs)
    # What a step takes beside its stages: a host's own work, as scoring is.
    self._rest = statistics.median(max(run.step_seconds - sum(run.seconds.values()), 0.0) for run in runs)
    stages = {stage for run in runs for stage in run.seconds}
    self.laws = {stage: self._fit(stage, [run for run in runs if stage in run.seconds]) for stage in stages}

  def generation(self, config: RunConfig, parts: int) -> Generation:
    work = self._rollouts.work(config.rollout)
    return Generation(self._price(config, Stage.GENERATE), work.parts(parts), work.rollouts, work.tokens)

  def price(self, config: RunConfig, stage: Stage) -> Price:
    price = self._price(config, stage)
    return dataclasses.replace(price, seconds=price.seconds + self._rest) if stage is Stage.SYNC else price

  def holdings(self, config: RunConfig, role: Role) -> Holdings:
    return holdings(config, self._phase, role)

  def _price(self, config: RunConfig, stage: Stage) -> Price:
    if stage is Stage.SYNC_CRITIC:
      stage = Stage.SYNC
    if stage not in self.laws:
      raise ConfigError(
        f"--calibrate: no run has seconds/{_SECONDS[stage]} for {stage}: calibrate with a run of these roles"
      )
    seconds = float(np.dot(self.laws[stage], self._features(config, stage)))
    load = 1.0 if stage is Stage.SCORE else min(self._devices(config, stage), self.capacity)
    return Price(seconds, "measured", load)

  def _fit(self, stage: Stage, runs: Sequence[Run]) -> tuple[float, ...]:
    features = np.array([self._features(run.config, stage) for run in runs], float)
    return least_absolute(features, np.array([run.seconds[stage] for run in runs]))

  def _role(self, config: RunConfig, stage: Stage) -> Role:
    shadow = Role.SHADOW_CRITIC if Role.SHADOW_CRITIC in config.seats else Role.CRITIC
    return _ROLES.get(stage, shadow if stage is Stage.VALUES else Role.ROLLOUT)

  def _devices(self, config: RunConfig, stage: Stage) -> int:
    return len(config.seats[self._role(config, stage)].devices)

  def _features(self, config: RunConfig, stage: Stage) -> tuple[float, ...]:
    """What the law's coefficients are multiplied by."""
    work = self._rollouts.work(config.rollout)
    devices = self._devices(config, stage)
    data = config.seats[self._role(config, stage)].parallel.mesh.data
    cut = devices > data
    match stage:
      case Stage.SCORE:
        return work.rollouts, 0.0, 0.0, 0.0, 0.0
      case Stage.SYNC | Stage.TO_HOST | Stage.FROM_HOST:
        calls, units = 1.0, 1.0
      case Stage.GENERATE:
        calls, units = work.steps / config.rollout.steps_per_dispatch, work.steps * config.rollout.slots
      case _:
        calls = microbatches(config, self._phase, work, self._trained)
        units = calls * config.packing.rows * config.packing.length
    idles = cut and devices <= self.capacity
    return units, units / devices, calls * devices, calls * (devices - data), units * idles


# ---------------------------------------------------------------------------------------------------------------------
# Predicted and measured, side by side


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Runs that were measured, and what the model says of them."""

  runs: Sequence[Run]
  estimates: Sequence[Estimate]

  @property
  def predicted_winner(self) -> Run:
    """Most tokens a second; the runs train on about the same number of tokens a step."""
    return min(zip(self.estimates, self.runs, strict=True), key=lambda pair: pair[0].seconds)[1]

  @property
  def measured_winner(self) -> Run:
    return min(self.runs, key=lambda run: run.step_seconds)

  def summary(self) -> dict[str, Any]:
    """Plain JSON data."""
    rows = [
      {
        "run": run.name,
        "strategy": str(run.config.placement.strategy),
        "devices": {str(role): f"{seat.devices.start}:{seat.devices.stop}" for role, seat in run.config.seats.items()},
        "predicted_seconds": found.seconds,
        "measured_seconds": run.step_seconds,
        "ratio": found.seconds / run.step_seconds,
        "stages": {
          str(stage): {"predicted": price.seconds, "measured": run.seconds.get(stage)}
          for stage, price in found.prices.items()
        },
      }
      for run, found in zip(self.runs, self.estimates, strict=True)
    ]
    return {
      "runs": rows,
      "largest_error": max(abs(row["ratio"] - 1) for row in rows),
      "predicted_winner": self.predicted_winner.name,
      "measured_winner": self.measured_winner.name,
      "right_winner": self.predicted_winner.name == self.measured_winner.name,
    }

  def lines(self) -> list[str]:
    """The same for a person."""
    found = self.summary()
    width = max(len(row["run"]) for row in found["runs"])
    lines = [
      f"{row['run']:<{width}}  {row['strategy']:<13}  predicted {row['predicted_seconds']:8.4g} s"
      f"  measured {row['measured_seconds']:8.4g} s  ratio {row['ratio']:.2f}"
      for row in found["runs"]
    ]
    verdict = "as measured" if found["right_winner"] else f"but {found['measured_winner']} was measured to be"
    lines.append(f"fastest: {found['predicted_winner']}, {verdict}; largest error {found['largest_error']:.0%}")
    return lines


def compare(costs: Measured, runs: Sequence[Run], phase: str) -> Comparison:
  return Comparison(runs, [estimate(run.config, phase, costs) for run in runs])
