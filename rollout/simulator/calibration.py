"""Prices from a real run: its schedule is simulated from the answers that it logged, and its seconds are fitted.

    replay    config.json's rules over the answers of rollouts/: steps, slot-steps, prefills and tokens of each iteration.
              What the run's metrics say of an iteration (tokens drawn, rollouts left over) shows whether it is the same one
    decode    rollout - prefill seconds  ~  decode_step steps + decode_per_slot slot-steps
    prefill   prefill seconds            ~  prefill_call calls + prefill_per_token tokens
    update    train, log-prob and scoring seconds  ~  train_update + train_per_token tokens
    sync      the median

Each line is fitted by least absolute deviations with coefficients of at least 0, since the first iterations compile and
later ones meet new shapes: seconds that are no price.  A second coefficient, or another one, must lower the deviations by
a twentieth: where the use of the slots hardly varied, a step's time cannot be told from a slot's, and a step of an engine
that computes all of its slots costs the same for one.

To show what prices are worth, those from the first half of the iterations predict the second; those that are returned
come from all of them.  Prices from elsewhere can be tried on the whole run.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs import loading
from configs.schema import ConfigError, RolloutConfig
from ring_jax.records import FinishReason, read_lines
from rollout.simulator.costs import Costs, costs_dict
from rollout.simulator.lengths import Trace
from rollout.simulator.simulation import Simulation

_FEWEST = 6  # iterations that a fit needs
_GAIN = 0.95  # what a coefficient more must bring the deviations down to
_UPDATE = ("seconds/train", "seconds/logp", "seconds/score")


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir says of its rollouts."""

  config: RolloutConfig
  trace: Trace
  metrics: list[Mapping[str, Any]]  # of RL steps, one an iteration
  timings: list[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Work:
  """What one iteration did, and the seconds it took."""

  steps: int
  busy: int
  calls: int
  prefill_tokens: int
  trained: int
  exact: bool  # whether the replay agrees with the run's own metrics
  decode_seconds: float
  prefill_seconds: float
  sync_seconds: float
  update_seconds: float

  @property
  def seconds(self) -> dict[str, float]:
    return {
      "rollout": self.decode_seconds + self.prefill_seconds,
      "iteration": self.decode_seconds + self.prefill_seconds + self.sync_seconds + self.update_seconds,
    }


@dataclasses.dataclass(frozen=True)
class Calibration:
  costs: Costs
  config: RolloutConfig
  work: list[_Work]
  predicted: list[dict[str, float]]  # of the last iterations
  given: bool  # whether by prices from elsewhere; else by prices from the iterations before

  def summary(self) -> dict[str, Any]:
    """Plain JSON data."""
    measured = [work.seconds for work in self.work[-len(self.predicted) :]]
    return {
      "costs": costs_dict(self.costs),
      "iterations": len(self.work),
      "replayed_exactly": sum(work.exact for work in self.work),
      "mean_slots_in_use": sum(work.busy for work in self.work) / sum(work.steps for work in self.work),
      "slots": self.config.slots,
      "predicted_iterations": len(self.predicted),
      "prediction": {
        name: _compare([one[name] for one in self.predicted], [one[name] for one in measured])
        for name in ("rollout", "iteration")
      },
      "predicted": self.predicted,
      "measured": measured,
    }

  def lines(self) -> list[str]:
    """The same for a person."""
    found = self.summary()
    origin = "the given costs" if self.given else "costs from the iterations before"
    lines = [
      f"{found['iterations']} iterations, {found['replayed_exactly']} of them simulated token for token as they were;"
      f" {found['mean_slots_in_use']:.0f} of {found['slots']} slots in use on average",
      "costs in seconds: " + ", ".join(f"{name} {value:.4g}" for name, value in found["costs"].items()),
      f"{origin}, tried on {len(self.predicted)} iterations:",
    ]
    for name, fit in found["prediction"].items():
      lines.append(
        f"  {name:<9}  predicted {fit['predicted']:.4g} s, measured {fit['measured']:.4g} s (the median iteration);"
        f" predicted / measured: median {fit['ratio']:.2f}, from {fit['ratio_p10']:.2f} to {fit['ratio_p90']:.2f} in 8 of 10"
      )
    return lines


def read_run(workdir: pathlib.Path, metrics: Sequence[Mapping], timings: Sequence[Mapping]) -> Run:
  """Args:
    workdir: of a run, finished or not.
    metrics: records of its metrics.jsonl.
    timings: records of its timings.jsonl.

  Raises:
    ConfigError: what it lacks.
  """
  config = loading.of_run(workdir, f"--calibrate={workdir}").rollout
  steps = {record["step"]: record for record in metrics if record.get("phase") == "rl"}
  seconds = {record["step"]: record for record in timings if record.get("phase") == "rl"}
  shared = sorted(steps.keys() & seconds.keys())
  first = steps[shared[0]].get("version") if shared else None
  if len(shared) < _FEWEST or first != 0:
    raise ConfigError(f"--calibrate={workdir}: holds {len(shared)} timed RL steps from the first on, needs {_FEWEST}")
  trace = _read_trace(workdir / "rollouts", config, steps[shared[-1]]["problems_seen"])
  return Run(config, trace, [steps[step] for step in shared], [seconds[step] for step in shared])


def _read_trace(folder: pathlib.Path, config: RolloutConfig, groups: int) -> Trace:
  """Answers by uid.  One that was purged or never trained on has the length limit: it was cut off before it ended."""
  known: dict[int, tuple[int, int]] = {}
  for path in sorted(folder.glob("step_*.jsonl")):
    for line in read_lines(path):
      record = json.loads(line)
      whole = record["finish_reason"] != FinishReason.PURGED
      known[record["uid"]] = (len(record["prompt_tokens"]), len(record["tokens"]) if whole else config.max_tokens)
  if not known:
    raise ConfigError(f"--calibrate={folder.parent}: rollouts/ holds no answers")
  usual = round(statistics.mean(prompt for prompt, _ in known.values()))
  count = (groups + config.pool) * config.group_size  # more than the run took, so that the replay does not run dry
  pairs = [known.get(uid, (usual, config.max_tokens)) for uid in range(count)]
  return Trace(config.group_size, [tokens for _, tokens in pairs], [prompt for prompt, _ in pairs])


def fit(run: Run, given: Costs | None = None) -> Calibration:
  """Args:
  run: to fit the costs to.
  given: costs to try on all of it; None: those of its first half are tried on the second.
  """
  work = _replay(run)
  first = 0 if given else len(work) // 2
  prices = given or _prices(work[:first])
  return Calibration(_prices(work), run.config, work, [_predict(prices, one) for one in work[first:]], bool(given))


def _replay(run: Run) -> list[_Work]:
  simulation = Simulation(run.trace, run.config, Costs())
  clock = simulation.clock
  found = []
  for metrics, timings in zip(run.metrics, run.timings, strict=True):
    before = (clock.steps, clock.busy, clock.prefill_calls, clock.prefill_tokens)
    result = simulation.iterate()
    after = (clock.steps, clock.busy, clock.prefill_calls, clock.prefill_tokens)
    seen = (metrics["scheduler/tokens_generated"], metrics["scheduler/in_flight"], metrics["scheduler/tokens_trained"])
    found.append(
      _Work(
        *(now - then for now, then in zip(after, before, strict=True)),
        trained=result.counts.trained,
        exact=seen == (result.counts.generated, result.in_flight, result.counts.trained),
        decode_seconds=timings["seconds/rollout"] - timings["seconds/prefill"],
        prefill_seconds=timings["seconds/prefill"],
        sync_seconds=timings["seconds/sync"],
        update_seconds=sum(timings[name] for name in _UPDATE),
      )
    )
  return found


def _prices(work: Sequence[_Work]) -> Costs:
  def line(seconds: str, *features: Any) -> tuple[float, float]:
    columns = np.array([[float(feature(one)) for feature in features] for one in work])
    return least_absolute(columns, np.array([getattr(one, seconds) for one in work]))

  step, slot = line("decode_seconds", lambda one: one.steps, lambda one: one.busy)
  call, token = line("prefill_seconds", lambda one: one.calls, lambda one: one.prefill_tokens)
  trained, update = line("update_seconds", lambda one: one.trained, lambda one: 1)
  return Costs(
    decode_step=step, decode_per_slot=slot, prefill_call=call, prefill_per_token=token,
    sync=statistics.median(one.sync_seconds for one in work), train_update=update, train_per_token=trained,
  )  # fmt: skip


def _predict(costs: Costs, work: _Work) -> dict[str, float]:
  decode = costs.decode_step * work.steps + costs.decode_per_slot * work.busy
  rollout = decode + costs.prefill_call * work.calls + costs.prefill_per_token * work.prefill_tokens
  return {"rollout": rollout, "iteration": rollout + costs.sync + costs.update_seconds(work.trained)}


def least_absolute(features_NxF: np.ndarray, seconds_N: np.ndarray) -> tuple[float, ...]:
  """Coefficients of at least 0 that minimise sum |features @ w - seconds|, the first feature's alone if it does as well."""
  best, least = np.zeros(features_NxF.shape[1]), np.inf
  for subset in range(1, 1 << features_NxF.shape[1]):
    chosen = [index for index in range(features_NxF.shape[1]) if subset >> index & 1]
    weights = np.zeros(features_NxF.shape[1])
    weights[chosen] = _reweighted(features_NxF[:, chosen], seconds_N)
    error = np.abs(features_NxF @ weights - seconds_N).sum()
    if (weights >= 0).all() and error < _GAIN * least:
      best, least = weights, error
  return tuple(best.tolist())


def _reweighted(features_NxF: np.ndarray, seconds_N: np.ndarray) -> np.ndarray:
  """Least absolute deviations by reweighted least squares, columns scaled to 1."""
  scale_F = np.maximum(np.abs(features_NxF).max(axis=0), 1e-300)
  scaled_NxF, weights_N = features_NxF / scale_F, np.ones(len(seconds_N))
  floor = 1e-6 * max(np.abs(seconds_N).max(), 1e-300)
  for _ in range(200):
    root_N = np.sqrt(weights_N)
    solution_F = np.linalg.lstsq(scaled_NxF * root_N[:, None], seconds_N * root_N, rcond=None)[0]
    weights_N = 1 / np.maximum(np.abs(scaled_NxF @ solution_F - seconds_N), floor)
  return solution_F / scale_F


def _compare(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
  ratios = np.array(predicted) / np.array(measured)
  return {
    "predicted": statistics.median(predicted),
    "measured": statistics.median(measured),
    "ratio": float(np.median(ratios)),
    "ratio_p10": float(np.quantile(ratios, 0.1)),
    "ratio_p90": float(np.quantile(ratios, 0.9)),
  }
