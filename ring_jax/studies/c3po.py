"""C3PO++ against batches of prompts, at equal trained tokens: on the live engine, and simulated at the paper's scale.

**Live.**  The tiny run on short and long words with the schedules of `rollout.schedule`: a synchronous batch, over-sampling with
abort, and C3PO++.  A step trains on about the same tokens in all of them.  Seconds are of one core a run, medians of the steps
after the first ones, which compile; they are compared within a seed.  What a toy can learn in a minute has no long tail: this
shows what C3PO++ does to learning.

**Forced.**  The same engine with answers as long as a long-tailed trace says (rollout/measured.py): this shows what it does to
time.

**Simulated.**  480 prompts x 8 answers of at most 65,536 tokens an update (Ring-1T, section 2.4.2), log-normal lengths.  What the
paper does not say is chosen so that the synchronous batch spends the share of its time in rollouts that the paper's two
factors imply (papers.md 1.5: 2.5x and 1.5x give 0.556), and then nothing is left to fit: how much C3PO++ gains end to end
follows.
"""

import dataclasses
import statistics
from collections.abc import Mapping

from configs import ring_tiny
from configs.schema import RolloutConfig, RolloutSchedule, RunConfig, TaskConfig, TaskSource
from ring_jax.studies import comparing, figures
from ring_jax.studies.statistics import Interval, interval, paired_ratio
from ring_jax.studies.study import Figure, Place, Point, Report, Result, Results, Settings, Study, Table
from ring_jax.studies.training import COLD, cold_start, from_cold_starts, quick, train
from ring_jax.train.report import metrics
from rollout.measured import Measurement, compare
from rollout.simulator import calibration
from rollout.simulator.costs import Costs
from rollout.simulator.lengths import Generator, Shape
from rollout.simulator.outcome import Outcome
from rollout.simulator.simulation import Simulation, groups_of_budget, in_batches

LIVE: Mapping[str, str] = {
  "synchronous": "synchronous batch",
  "oversample": "over-sample and abort",
  "c3po": "C3PO++",
}
_FORCED, _CALIBRATED = "forced", "calibrated"
_MEANS = {"simulated_8k": 8192, "simulated_16k": 16_384}  # tokens of an answer
_ROLLOUT_SHARE = (1 - 1 / 1.5) / (1 - 1 / 2.5)  # of the synchronous step: share / 2.5 + 1 - share = 1 / 1.5
_PROMPTS, _ANSWERS, _CAP, _UPDATES = 480, 8, 65_536, 12
_WARM_UP = 15  # steps that compile: shapes of prefills come up one by one
_METRICS = (
  "reward", "mismatch/delta_mean", "scheduler/tokens_generated", "scheduler/tokens_trained", "scheduler/tokens_wasted",
  "scheduler/staleness_mean", "scheduler/staleness_max", "scheduler/length_finished_mean", "scheduler/length_trained_mean",
)  # fmt: skip


def config_of(settings: Settings) -> RunConfig:
  """Spelling short and long words backwards; a batch is 16 prompts x 8 answers, a slot for each."""
  base = ring_tiny.get_config()
  spell = lambda low, high, weight: TaskSource(  # noqa: E731
    name="spell_backward", weight=weight, options={"min_word_len": low, "max_word_len": high}, prompt="{word}"
  )
  config = dataclasses.replace(
    base,
    name="c3po",
    task=TaskConfig(mixture=(spell(3, 6, 4.0), spell(10, 20, 1.0))),
    rl=dataclasses.replace(base.rl, steps=100),
    rollout=dataclasses.replace(
      base.rollout, slots=128, pool=0, token_budget=900, max_prompt_tokens=24, max_tokens=24, steps_per_dispatch=2,
      retention=6,
    ),
    eval=dataclasses.replace(base.eval, samples=4),
    checkpoint=dataclasses.replace(base.checkpoint, every=50),
  )  # fmt: skip
  return quick(config, steps=8) if settings.quick else config


def with_schedule(config: RunConfig, arm: str) -> RunConfig:
  batch, rollout = 16, config.rollout
  if arm == "synchronous":
    rollout = in_batches(rollout, RolloutSchedule.SYNCHRONOUS, batch)
  elif arm == "oversample":
    rollout = in_batches(rollout, RolloutSchedule.OVERSAMPLE_DISCARD, batch, 2 * batch)
  return dataclasses.replace(config, rollout=rollout)


class C3PO(Study):
  name = "c3po"
  title = "C3PO++ against batches"
  claim = (
    "Ring-1T, section 2.4.2, figures 7 and 8: C3PO++ makes the rollout phase about 2.5 times as fast and a step about 1.5 times,"
    " with the reward curve and the benchmarks of the baseline."
  )

  def points(self, settings: Settings) -> list[Point]:
    seeds, live = settings.all_seeds, from_cold_starts(settings, LIVE)
    calibrated = [Point(_CALIBRATED, one.seed, needs=(one.name,)) for one in live if one.arm == "c3po"]
    simulated = [Point(arm, seed) for seed in seeds for arm in (list(_MEANS)[:1] if settings.quick else _MEANS)]
    forced = [Point(_FORCED, seed, alone=True) for seed in seeds]
    return live + calibrated + simulated + forced

  def measure(self, point: Point, settings: Settings, place: Place) -> Result:
    if point.arm in _MEANS:
      return _simulate(_MEANS[point.arm], point.seed, settings)
    if point.arm == _FORCED:
      return _forced(point.seed, settings)
    if point.arm == _CALIBRATED:
      workdir = place.of(point.needs[0]) / "run"
      return calibration.fit(calibration.read_run(workdir, *metrics.read_logs(workdir))).summary()
    config = config_of(settings)
    if point.arm == COLD:
      return cold_start(config, point.seed, place)
    return train(with_schedule(config, point.arm), point.seed, place, _METRICS)

  def report(self, settings: Settings, results: Results) -> Report:
    live = comparing.with_results(results, LIVE)
    return Report(
      findings=_findings(results, live),
      tables=[*([_live_table(results, live), comparing.accuracy_table(results, live)] if live else []),
              *([_forced_table(results)] if _FORCED in results.arms() else []),
              *([_simulated_table(results)] if set(_MEANS) & set(results.arms()) else [])],
      figures=[_picture(results, live)] if live else [],
      not_shown=[
        "The paper's figures themselves: their lengths, slots, budget and prices are not published.",
        "A learning curve under a long tail: answers of the live runs are at most twice as long as their mean, so that a batch leaves"
        " few slots empty and there is little to gain; on the forced lengths nothing is trained.",
        "Equal quality on benchmarks: one toy task.",
      ],
    )  # fmt: skip


# ---- live


def _totals(results: Results, arm: str) -> list[dict[str, float]]:
  """Of the runs, a seed each; `rollout` and `step` are seconds a trained token."""
  found = []
  for one in results.of(arm):
    series = {name.removeprefix("scheduler/"): values for name, values in one["series"].items()}
    trained = series["tokens_trained"]
    weighted = [age * count for age, count in zip(series["staleness_mean"], trained, strict=True)]
    found.append({
      "tokens": sum(trained),
      "rollout": _median(one["seconds"]["rollout"], trained),
      "step": _median(one["seconds"]["step"], trained),
      "wasted": sum(series["tokens_wasted"]) / sum(series["tokens_generated"]),
      "staleness": sum(weighted) / sum(trained),
      "oldest": max(series["staleness_max"]),
      "bias": _mean(series["length_trained_mean"]) / _mean(series["length_finished_mean"]),
    })  # fmt: skip
  return found


def _median(seconds, tokens) -> float:
  """Seconds a token of the median step, without the first steps where there are enough."""
  rates = [time / count for time, count in zip(seconds, tokens, strict=True) if count]
  return statistics.median(rates[_WARM_UP:] or rates)


def _mean(values) -> float:
  there = [value for value in values if value is not None]
  return sum(there) / len(there)


def _speedups(results: Results, arm: str, what: str) -> Interval:
  """Of seconds a trained token over the synchronous batch, within a seed."""
  return paired_ratio(*([one[what] for one in _totals(results, name)] for name in ("synchronous", arm)))


def _live_table(results: Results, live: comparing.Labels) -> Table:
  rows = []
  for arm, label in live.items():
    own = _totals(results, arm)
    of = lambda name, own=own: interval([one[name] for one in own])  # noqa: E731
    rows.append([
      label, of("tokens").format(0), _speedups(results, arm, "rollout").format(2, unit="x"),
      _speedups(results, arm, "step").format(2, unit="x"), of("wasted").format(1, 100, "%"), of("staleness").format(2),
      of("oldest").format(1), of("bias").format(3),
    ])  # fmt: skip
  header = [
    "live engine", "tokens trained on", "rollout, a trained token", "step, a trained token", "wasted", "mean staleness", "largest",
    "mean length trained / finished",
  ]  # fmt: skip
  return Table("The live engine: as many times as fast as the synchronous batch", header, rows)


def _picture(results: Results, live: comparing.Labels) -> Figure:
  by_tokens, by_seconds = {}, {}
  for arm, label in live.items():
    rewards, tokens, seconds = [], [], []
    for one in results.of(arm):
      rewards.append(metrics.smoothed(one["series"]["reward"], comparing.WINDOW))
      tokens.append(_running(one["series"]["scheduler/tokens_trained"]))
      seconds.append(_running(one["seconds"]["step"][1:]))
    by_tokens[label] = ([_mean(column) / 1000 for column in zip(*tokens, strict=True)], rewards)
    by_seconds[label] = ([_mean(column) for column in zip(*seconds, strict=True)], [one[1:] for one in rewards])
  with figures.picture(1, 3) as (figure, axes):
    figures.curves(axes[0], by_tokens, "Reward by trained tokens", xlabel="thousand tokens")
    figures.curves(axes[1], by_seconds, "Reward by time", xlabel="seconds, without the first step")
    figures.curves(axes[2], comparing.accuracy_curves(results, live), "Accuracy on unseen problems", "%")
    figures.legend_below(figure, axes[0])
    return Figure("live", "Three schedules on the live engine: mean of the seeds, band of 95%", figures.png(figure))


def _running(values) -> list[float]:
  found, total = [], 0.0
  for value in values:
    total += value or 0
    found.append(total)
  return found


# ---- forced


def _forced(seed: int, settings: Settings) -> Result:
  """Both schedules on the real engine, log-normal lengths with sigma 1.2."""
  prompts, mean, cap = (8, 8, 40) if settings.quick else (64, 24, 224)
  trace = Generator(Shape.LOGNORMAL, mean=mean, sigma=1.2, cap=cap, prompt_tokens=8, seed=seed).draw(prompts, 8)
  config = RolloutConfig(
    slots=32,
    token_budget=round(32 * trace.mean),
    retention=12,
    max_prompt_tokens=8,
    max_tokens=cap,
    steps_per_dispatch=1,
  )
  measurement = Measurement(ring_tiny.get_config().model, config, trace, groups_of_budget(trace, config))
  return compare(measurement, repeats=1 if settings.quick else 2)


def _forced_table(results: Results) -> Table:
  own = results.of(_FORCED)
  of = lambda name: interval([one[name] for one in own])  # noqa: E731
  rows = [[
    "C3PO++ over the synchronous batch", of("rollout_speedup").format(2, unit="x"), of("dispatch_speedup").format(2, unit="x"),
    interval([one["c3po"]["prefill_seconds"] / one["c3po"]["seconds"] for one in own]).format(0, 100, "%"),
    interval([one["c3po"]["max_staleness"] for one in own]).format(1),
  ]]  # fmt: skip
  return Table(
    "The real engine on forced lengths: 32 slots, groups of 8, log-normal with sigma 1.2, mean 24, at most 224 tokens",
    ["", "rollout, a trained token", "dispatches", "prefill in it", "largest staleness"], rows,
  )  # fmt: skip


# ---- simulated


def _simulate(mean: float, seed: int, settings: Settings) -> Result:
  """All schedules over one trace."""
  prompts = _PROMPTS // 8 if settings.quick else _PROMPTS
  trace = Generator(Shape.LOGNORMAL, mean=mean, sigma=1.2, cap=_CAP, seed=seed).draw(_UPDATES * prompts, _ANSWERS)
  slots = prompts * _ANSWERS
  config = RolloutConfig(
    slots=slots, token_budget=round(slots * trace.mean), group_size=_ANSWERS, retention=2 * round(_CAP / trace.mean)
  )
  batch = in_batches(config, RolloutSchedule.SYNCHRONOUS, prompts)
  schedules = {
    "synchronous": batch,
    "oversample_discard": in_batches(config, RolloutSchedule.OVERSAMPLE_DISCARD, prompts, 2 * prompts),
    "oversample_resume": in_batches(config, RolloutSchedule.OVERSAMPLE_RESUME, prompts, 2 * prompts),
    "c3po": config,
  }
  # A full step is twice as long as an empty one, and prefilling a token costs a quarter of decoding it in a full batch: the
  # proportions of rollout/simulator/costs.py, for as many engines as it takes.
  free = Costs(
    decode_step=0.01, decode_per_slot=0.01 / slots, prefill_per_token=0.005 / slots, sync=0.0, train_per_token=0.0
  )
  rollout = Simulation(trace, batch, free).run().rollout_seconds
  training = rollout * (1 / _ROLLOUT_SHARE - 1) / sum(trace.lengths)  # seconds a token
  costs = dataclasses.replace(free, train_per_token=training)
  outcomes = {name: Simulation(trace, one, costs).run() for name, one in schedules.items()}
  base = outcomes["synchronous"]
  return {name: _summary(trace, outcome, base) for name, outcome in outcomes.items()}


def _summary(trace, outcome: Outcome, base: Outcome) -> dict[str, float]:
  found = outcome.summary(trace)
  kept = (
    "utilisation",
    "utilisation_while_fed",
    "mean_staleness",
    "max_staleness",
    "tokens_wasted",
    "tokens_generated",
  )
  return {name: found[name] for name in kept} | {
    "rollout_speedup": outcome.speedup_over(base, "rollout_seconds"),
    "end_to_end_speedup": outcome.speedup_over(base, "seconds"),
    "length_bias": found["length_bias"]["mean_trained"] / found["length_bias"]["mean_generated"],
  }


def _simulated_table(results: Results) -> Table:
  rows = []
  for arm in (arm for arm in results.arms() if arm in _MEANS):
    for schedule in results.of(arm)[0]:
      own = [one[schedule] for one in results.of(arm)]
      of = lambda name, own=own: interval([one[name] for one in own])  # noqa: E731
      wasted = interval([one["tokens_wasted"] / one["tokens_generated"] for one in own])
      rows.append([
        f"{_MEANS[arm]:,}", schedule.replace("_", ", "), of("rollout_speedup").format(2, unit="x"),
        of("end_to_end_speedup").format(2, unit="x"), of("utilisation_while_fed").format(1, 100, "%"), wasted.format(1, 100, "%"),
        of("mean_staleness").format(2), of("max_staleness").format(1), of("length_bias").format(3),
      ])  # fmt: skip
  header = [
    "mean length", "schedule", "rollout", "end to end", "slots in use", "wasted", "mean staleness", "largest",
    "mean length trained / generated",
  ]  # fmt: skip
  return Table(
    f"Simulated: {_PROMPTS} prompts x {_ANSWERS} answers, at most {_CAP:,} tokens, log-normal with sigma 1.2", header, rows,
    f"Prices: rollouts are {_ROLLOUT_SHARE:.1%} of the synchronous step, which the paper's 2.5x and 1.5x imply; a decode step of"
    " full slots takes twice as long as one of empty slots.",
  )  # fmt: skip


def _findings(results: Results, live: comparing.Labels) -> list[str]:
  found = []
  if _FORCED in results.arms():
    rollout = interval([one["rollout_speedup"] for one in results.of(_FORCED)]).format(2, unit="x")
    found.append(
      f"Measured on the real engine with answers of a long tail: C3PO++'s rollouts are {rollout} as fast a trained token."
    )
  if {"synchronous", "c3po"} <= set(live):
    rollout, step = (_speedups(results, "c3po", what).format(2, unit="x") for what in ("rollout", "step"))
    found.append(
      f"In training without a long tail it neither gains nor learns otherwise: rollouts {rollout}, a step {step}, accuracy as in the"
      " table."
    )
  for arm in (arm for arm in _MEANS if arm in results.arms()):
    own = [one["c3po"] for one in results.of(arm)]
    rollout, whole = (
      interval([one[name] for one in own]).format(2, unit="x") for name in ("rollout_speedup", "end_to_end_speedup")
    )
    found.append(
      f"Simulated at the paper's scale, mean length {_MEANS[arm]:,}: rollout {rollout}, end to end {whole}; the paper says 2.5x and 1.5x."
    )
  if _CALIBRATED in results.arms():
    ratios = interval([one["prediction"]["rollout"]["ratio"] for one in results.of(_CALIBRATED)])
    exact = sum(one["replayed_exactly"] for one in results.of(_CALIBRATED))
    total = sum(one["iterations"] for one in results.of(_CALIBRATED))
    found.append(
      f"The simulator, calibrated by the first iterations of each C3PO++ run, takes the decisions of {exact} of {total} iterations"
      f" as they were, and predicts the time of the others' rollouts at {ratios.format(2)} of what was measured."
    )
  return found
