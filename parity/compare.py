"""What a parity check finds: rows of differences, tiers of rows, suites of tiers.

A tier compares one kind of quantity (router, one block, logits, ...) between two implementations, in the order in which
the quantities are computed, so that the first failing row is where the two part.  A row never holds a mean alone: one token
that is far off matters in reinforcement learning, and a mean hides it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
  """The difference between two arrays, `|got - expected| / scale`."""

  name: str  # of the tensor
  case: str  # of the model configuration
  layer: int | None  # where it has one
  count: int  # numbers compared
  scale: float  # what differences are divided by
  p50: float
  p95: float
  p99: float
  max: float
  tolerance: float  # of max
  worst: tuple[int, ...]  # index of the largest difference
  passed: bool
  extra: Mapping[str, float] = dataclasses.field(default_factory=dict)  # such as the share of tokens outside the band
  note: str = ""  # such as a difference in shape

  def describe(self) -> str:
    where = "" if self.layer is None else f" of layer {self.layer}"
    detail = self.note or f"largest difference {self.max:.3g} at {list(self.worst)} (p95 {self.p95:.3g})"
    return f"{self.name}{where}, {self.case}: {detail}, tolerance {self.tolerance:.3g}"


@dataclasses.dataclass
class Tier:
  """One kind of quantity, compared."""

  name: str
  proves: str  # one sentence
  pair: str  # "JAX against PyTorch"
  rows: list[Row]
  seconds: float = 0.0

  @property
  def passed(self) -> bool:
    return all(row.passed for row in self.rows)

  @property
  def first_failure(self) -> Row | None:
    """The first row, in the order of computation, that is out of tolerance."""
    return next((row for row in self.rows if not row.passed), None)


@dataclasses.dataclass
class Suite:
  name: str
  tiers: list[Tier]

  @property
  def passed(self) -> bool:
    return bool(self.tiers) and all(tier.passed for tier in self.tiers)


def compare(
  name: str,
  got: Any,
  expected: Any,
  *,
  tolerance: float,
  case: str = "",
  layer: int | None = None,
  scale: float | None = None,
  extra: Mapping[str, float] | None = None,
) -> Row:
  """Compares two arrays.

  Args:
    got, expected: anything that numpy reads; compared in float64.
    tolerance: what the largest difference over scale may be; 0 asks for equality.
    scale: default: the largest |expected|, at least 1e-6.  1 for quantities that have a scale of their own (log-probs).

  A shape that differs, or a value that is not finite on one side only, fails and says so.
  """
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  common = {"name": name, "case": case, "layer": layer, "tolerance": tolerance, "extra": dict(extra or {})}
  if got.shape != expected.shape:
    note = f"shapes {list(got.shape)} and {list(expected.shape)}"
    return Row(
      count=0,
      scale=1.0,
      p50=math.inf,
      p95=math.inf,
      p99=math.inf,
      max=math.inf,
      worst=(),
      passed=False,
      note=note,
      **common,
    )
  if scale is None:
    finite = np.abs(expected[np.isfinite(expected)])
    scale = max(float(finite.max(initial=0.0)), 1e-6)
  with np.errstate(invalid="ignore"):
    difference = np.asarray(np.abs(got - expected) / scale)  # of two numbers NumPy makes a number
  difference[(got == expected) | (np.isnan(got) & np.isnan(expected))] = 0.0  # infinities of one sign agree
  difference[np.isnan(difference)] = math.inf
  if not difference.size:
    return Row(count=0, scale=scale, p50=0.0, p95=0.0, p99=0.0, max=0.0, worst=(), passed=True, **common)
  worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(difference)), difference.shape))
  p50, p95, p99 = (float(value) for value in np.quantile(difference, (0.5, 0.95, 0.99), method="nearest"))
  largest = float(difference.max())
  return Row(
    count=difference.size, scale=scale, p50=p50, p95=p95, p99=p99, max=largest, worst=worst,
    passed=largest <= tolerance, **common,
  )  # fmt: skip
