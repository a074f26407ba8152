"""Pictures of studies: curves with the confidence band of their mean, and bars with intervals."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ring_jax.studies.statistics import Interval, band

_COLOURS = ("#2563a8", "#d9731a", "#2f8f4e", "#a83250", "#7a4fa3", "#8a8f98", "#0f8b8d", "#b58900")
_STYLE = {
  "font.size": 9.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#8a8f98",
  "axes.grid": True,
  "grid.color": "#e6e8eb",
  "axes.axisbelow": True,
  "axes.titlelocation": "left",
  "axes.titleweight": "bold",
  "legend.frameon": False,
}
# Steps, and one curve a seed, all of the same steps.
Curves = tuple[Sequence[float], Sequence[Sequence[float]]]


@contextlib.contextmanager
def picture(
  rows: int = 1, columns: int = 1, width: float = 4.4, height: float = 3.2
) -> Iterator[tuple[Figure, list[Axes]]]:
  """A figure with its axes, row by row."""
  with plt.rc_context(_STYLE):
    figure, axes = plt.subplots(
      rows, columns, figsize=(width * columns, height * rows), layout="constrained", dpi=100, squeeze=False
    )
    try:
      yield figure, list(axes.flat)
    finally:
      plt.close(figure)


def png(figure: Figure) -> bytes:
  image = io.BytesIO()
  figure.savefig(image, format="png")
  return image.getvalue()


def colour(index: int) -> str:
  return _COLOURS[index % len(_COLOURS)]


def curves(
  axes: Axes, arms: Mapping[str, Curves], title: str, ylabel: str = "", xlabel: str = "RL steps", log: bool = False
) -> None:
  """The mean of each arm's curves, and its 95% interval as a band; an arm with one curve has none."""
  for index, (name, (steps, series)) in enumerate(arms.items()):
    mean, half = band(series)
    axes.plot(steps, mean, color=colour(index), linewidth=1.6, label=name)
    if len(series) > 1:
      low = mean - half
      if log:
        low = np.where(low > 0, low, np.nanmin(mean) / 2 if np.isfinite(mean).any() else 1e-9)
      axes.fill_between(steps, low, mean + half, color=colour(index), alpha=0.15, linewidth=0)
  if log:
    axes.set_yscale("log")
  axes.set(title=title, ylabel=ylabel, xlabel=xlabel)


def bars(axes: Axes, values: Mapping[str, Interval], title: str, xlabel: str = "") -> None:
  """One bar an arm, the first on top."""
  for index, (name, one) in enumerate(values.items()):
    half = one.half if np.isfinite(one.half) else 0.0
    axes.barh([name], [one.mean], xerr=[half], color=colour(index), height=0.6, error_kw={"linewidth": 1})
  axes.invert_yaxis()
  axes.set(title=title, xlabel=xlabel)


def legend_below(figure: Figure, axes: Axes) -> None:
  """One legend for all of a figure's axes."""
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=9)
