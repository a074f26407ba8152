"""Training runs that differ in one thing, side by side: accuracy, discrepancy of engine and trainer, and their curves.

`labels` are the arms with their names for a reader; the first one is what the others are compared with, seed by seed.
"""

from collections.abc import Mapping, Sequence
from math import nan

from ring_jax.studies import figures
from ring_jax.studies.statistics import Interval, interval, paired
from ring_jax.studies.study import Results, Table
from ring_jax.studies.training import accuracies
from ring_jax.train.report import metrics

METRICS = (
  "reward", "grad_norm", "mismatch/delta_mean", "mismatch/delta_max", "mismatch/kl_k3", "mismatch/masked_low",
  "mismatch/masked_high", "policy/entropy", "policy/entropy_masked", "policy/logp", "scheduler/length_finished_mean",
)  # fmt: skip
WINDOW = 10  # steps of a running mean
GAIN, LOSS = 0.15, 0.20  # of accuracy: what counts as learning, and as a collapse

Labels = Mapping[str, str]


def gains(results: Results, arm: str) -> list[float]:
  """Accuracy after - before, a seed each."""
  return [one["after"] - one["before"] for one in results.of(arm)]


def findings(results: Results, labels: Labels) -> list[str]:
  """Who learns, and who collapses."""
  found, steady = [], []
  for arm, label in labels.items():
    own = gains(results, arm)
    good, bad = sum(gain >= GAIN for gain in own), sum(gain <= -LOSS for gain in own)
    outcome = f"gains at least {100 * GAIN:.0f} points of accuracy in {good} of {len(own)} seeds"
    if bad:
      found.append(f"{label} {outcome}, and loses at least {100 * LOSS:.0f} in {bad}.")
    elif arm == next(iter(labels)):
      found.insert(0, f"{label} {outcome}.")
    else:
      steady.append(label)
  return found + ([f"None of these collapses in any seed: {', '.join(steady)}."] if steady else [])


def accuracy_table(results: Results, labels: Labels) -> Table:
  base, rows = next(iter(labels)), []
  for arm, label in labels.items():
    own = results.of(arm)
    rows.append([
      label,
      interval([one["before"] for one in own]).format(1, 100, "%"),
      interval([one["after"] for one in own]).format(1, 100, "%"),
      interval(gains(results, arm)).format(1, 100),
      "" if arm == base else _against(results, base, arm).format(1, 100),
      f"{sum(gain >= GAIN for gain in gains(results, arm))} / {sum(gain <= -LOSS for gain in gains(results, arm))} of {len(own)}",
    ])  # fmt: skip
  header = ["", "before", "after", "gain, points", f"against {labels[base]}, points", "seeds that gain 15 / lose 20"]
  return Table("Accuracy of the float32 weights on unseen problems", header, rows)


def _against(results: Results, base: str, arm: str) -> Interval:
  after = [dict(zip(results.seeds(one), [run["after"] for run in results.of(one)], strict=True)) for one in (base, arm)]
  shared = sorted(after[0].keys() & after[1].keys())
  return paired(*([of_arm[seed] for seed in shared] for of_arm in after))


def mismatch_table(results: Results, labels: Labels) -> Table:
  def last(arm: str, name: str) -> Interval:
    return interval([last_steps(one["series"][name]) for one in results.of(arm)])

  def first(arm: str, name: str) -> Interval:
    return interval([first_steps(one["series"][name]) for one in results.of(arm)])

  def largest(arm: str, name: str) -> Interval:
    return interval(
      [max((value for value in one["series"][name] if value is not None), default=nan) for one in results.of(arm)]
    )

  rows = [
    [
      label, first(arm, "mismatch/delta_mean").format(3), last(arm, "mismatch/delta_mean").format(3),
      last(arm, "mismatch/delta_max").format(2), last(arm, "mismatch/masked_low").format(2, 100, "%"),
      last(arm, "mismatch/masked_high").format(2, 100, "%"), largest(arm, "grad_norm").format(2),
      last(arm, "policy/entropy").format(3), last(arm, "policy/entropy_masked").format(3), last(arm, "policy/logp").format(3),
    ]
    for arm, label in labels.items()
  ]  # fmt: skip
  header = [
    "", "mean |Δlogp|, first", "last", "largest |Δlogp|, last", "masked low", "masked high", "grad norm, largest", "entropy",
    "entropy of masked", "mean logp",
  ]  # fmt: skip
  return Table(
    "Discrepancy of engine and trainer, and what goes with it", header, rows,
    f"First and last: means of the first and the last {WINDOW} steps. Entropy in nats a token; 0 where nothing is masked.",
  )  # fmt: skip


def panels(results: Results, labels: Labels) -> bytes:
  """A PNG: six curves over the steps."""

  def series(name: str) -> dict[str, figures.Curves]:
    found = {}
    for arm, label in labels.items():
      runs = [metrics.smoothed(one["series"][name], WINDOW) for one in results.of(arm)]
      found[label] = (range(1, len(runs[0]) + 1), runs)
    return found

  with figures.picture(2, 3) as (figure, axes):
    figures.curves(axes[0], accuracy_curves(results, labels), "Accuracy on unseen problems", "%")
    figures.curves(axes[1], series("mismatch/delta_mean"), "Mean |Δlogp|", log=True)
    figures.curves(axes[2], series("grad_norm"), "Gradient norm", log=True)
    figures.curves(axes[3], series("policy/entropy"), "Entropy", "nats a token")
    figures.curves(axes[4], series("policy/logp"), "Mean log-prob of the sampled tokens", "nats")
    figures.curves(axes[5], series("scheduler/length_finished_mean"), "Length of an answer", "tokens")
    figures.legend_below(figure, axes[0])
    return figures.png(figure)


def accuracy_curves(results: Results, labels: Labels) -> dict[str, figures.Curves]:
  """In percent, over the steps."""
  found = {}
  for arm, label in labels.items():
    measured = [accuracies(one) for one in results.of(arm)]
    found[label] = (measured[0][0], [[100 * value for value in values] for _, values in measured])
  return found


def with_results(results: Results, labels: Labels) -> Labels:
  """Those that have been measured."""
  return {arm: label for arm, label in labels.items() if arm in results.arms()}


def first_steps(values: Sequence[float | None]) -> float:
  """The mean of the first `WINDOW` values."""
  return metrics.smoothed(values[:WINDOW], WINDOW)[-1]


def last_steps(values: Sequence[float | None]) -> float:
  """The mean of the last `WINDOW` values."""
  return metrics.smoothed(values[-WINDOW:], WINDOW)[-1]


def ratio_of_ends(values: Sequence[float]) -> float:
  """Mean of the last steps / mean of the first ones; NaN where the first is 0."""
  first = first_steps(values)
  return last_steps(values) / first if first else nan
