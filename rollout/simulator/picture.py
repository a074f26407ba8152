"""The picture of a comparison: slots over time, time by phase, staleness, and lengths."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from rollout.simulator.lengths import Trace
from rollout.simulator.outcome import Outcome

_COLOURS = ("#2563a8", "#8a8f98", "#d9731a", "#2f8f4e")
_BINS = 400  # of the time line
_SHOWN = 3  # synchronous batches that it shows
_STYLE = {
  "font.size": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#8a8f98",
  "legend.frameon": False,
  "axes.titlelocation": "left",
  "axes.titleweight": "bold",
}


def draw(trace: Trace, outcomes: Sequence[Outcome]) -> bytes:
  """A PNG; the second of the outcomes is the synchronous batch, which sets the time line's length."""
  with plt.rc_context(_STYLE):
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained", dpi=140)
    try:
      _slots(axes[0, 0], outcomes)
      _times(axes[0, 1], outcomes)
      _staleness(axes[1, 0], outcomes)
      _lengths(axes[1, 1], trace, outcomes)
      image = io.BytesIO()
      figure.savefig(image, format="png")
    finally:
      plt.close(figure)
  return image.getvalue()


def slots_in_use(outcome: Outcome, edges: np.ndarray) -> np.ndarray:
  """Mean number of slots in use between each two edges, as far as the clock's marks go; NaN beyond."""
  times, active = (np.array(values, float) for values in zip(*outcome.clock.marks, strict=True))
  area = np.concatenate([[0.0], np.cumsum(np.diff(times) * active[:-1])])
  means = np.diff(np.interp(edges, times, area)) / np.diff(edges)
  return np.where(edges[1:] <= times[-1], means, np.nan)


def _slots(axes: Axes, outcomes: Sequence[Outcome]) -> None:
  batches = outcomes[1].series[:_SHOWN]
  edges = np.linspace(0, sum(batch.rollout_seconds + batch.update_seconds for batch in batches), _BINS + 1)
  for outcome, colour, alpha in zip(outcomes[:2], _COLOURS, (0.35, 0.7), strict=False):
    percent = 100 * slots_in_use(outcome, edges) / outcome.slots
    axes.stairs(percent, edges, fill=True, color=colour, alpha=alpha, linewidth=0, label=outcome.schedule)
  axes.set(title="Slots in use", xlabel="seconds, updates included", ylabel="% of slots", ylim=(0, 105))
  axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), ncols=2)  # beside the title, off the data


def _times(axes: Axes, outcomes: Sequence[Outcome]) -> None:
  left = np.zeros(len(outcomes))
  names = [outcome.schedule.replace("_", ", ") for outcome in outcomes]
  parts = {
    "decode": [outcome.rollout_seconds - outcome.total("prefill_seconds") for outcome in outcomes],
    "prefill": [outcome.total("prefill_seconds") for outcome in outcomes],
    "sync and training": [outcome.total("update_seconds") for outcome in outcomes],
  }
  trained = np.array([max(outcome.tokens_trained, 1) for outcome in outcomes])
  for (part, seconds), colour in zip(parts.items(), ("#2563a8", "#7fb0e0", "#c9ccd1"), strict=True):
    width = 1e6 * np.array(seconds) / trained
    axes.barh(names, width, left=left, color=colour, label=part, height=0.6)
    left += width
  axes.set(title="Time of a trained token", xlabel="microseconds", ylim=(len(names), -0.5))  # a row for the legend
  axes.legend(loc="lower right", ncols=3)


def _staleness(axes: Axes, outcomes: Sequence[Outcome]) -> None:
  shown = [outcome for outcome in outcomes if set(outcome.staleness) - {0}] or outcomes[:1]
  width = 0.8 / len(shown)
  for index, outcome in enumerate(shown):
    ages = np.array(sorted(outcome.staleness))
    share = 100 * np.array([outcome.staleness[age] for age in ages]) / max(outcome.tokens_trained, 1)
    colour = _COLOURS[outcomes.index(outcome) % len(_COLOURS)]
    axes.bar(ages + (index - (len(shown) - 1) / 2) * width, share, width, color=colour, label=outcome.schedule)
  axes.set(title="Staleness of trained tokens", xlabel="versions", ylabel="% of tokens")
  axes.legend(loc="upper right")


def _lengths(axes: Axes, trace: Trace, outcomes: Sequence[Outcome]) -> None:
  """Complementary distribution: where a schedule leaves out long answers its line falls early."""
  axes.plot(*_upper(np.sort(trace.lengths)), color="black", linewidth=3, alpha=0.25, label="trace")
  for outcome, colour in zip(outcomes, _COLOURS, strict=False):
    if outcome.lengths:
      axes.plot(*_upper(np.sort(list(outcome.lengths.elements()))), color=colour, linewidth=1, label=outcome.schedule)
  axes.set(title="Lengths", xlabel="tokens", ylabel="share of trained rollouts as long", xscale="log", yscale="log")
  axes.legend(loc="lower left")


def _upper(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  share = 1 - np.arange(len(lengths)) / len(lengths)
  keep = np.unique(np.linspace(0, len(lengths) - 1, 2000).astype(int))
  return lengths[keep], share[keep]
