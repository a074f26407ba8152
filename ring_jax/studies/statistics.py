"""Means over seeds, and how sure they are.

    mean +- t(n - 1, 0.975) s / sqrt(n)       Student's interval: it covers the mean of all seeds in 95 of 100 studies

A seed decides initial weights, order of the problems and samples, so that arms of one seed share their cold start: what is
compared is the difference or the ratio within a seed (`paired`, `paired_ratio`), in which that part cancels.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean with half the width of its confidence interval; infinite for a single value, NaN for none."""

  mean: float
  half: float
  count: int

  def format(self, digits: int = 1, scale: float = 1.0, unit: str = "") -> str:
    """As in a table."""
    if not self.count:
      return "none"
    shown = f"{scale * self.mean:.{digits}f}"
    return shown + unit if math.isinf(self.half) else f"{shown} ± {scale * self.half:.{digits}f}{unit}"

  @property
  def excludes_zero(self) -> bool:
    return math.isfinite(self.half) and abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
  """Of the finite ones."""
  finite = np.array([value for value in values if value is not None and math.isfinite(value)], float)
  count = len(finite)
  if count < 2:
    return Interval(float(finite[0]) if count else math.nan, math.inf, count)
  half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * float(finite.std(ddof=1)) / math.sqrt(count)
  return Interval(float(finite.mean()), half, count)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
  """Of the differences second - first within a seed."""
  return interval([b - a for a, b in zip(first, second, strict=True)])


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
  """Of the ratios above / below within a seed."""
  return interval([a / b for a, b in zip(above, below, strict=True)])


def band(series: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
  """Mean and half width, step by step, of curves of one length; NaN where a value is."""
  values_SxT = np.array(series, float)
  found = [interval(column) for column in values_SxT.T]
  return np.array([one.mean for one in found]), np.array([one.half for one in found])
