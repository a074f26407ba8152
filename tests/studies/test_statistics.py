"""Intervals over seeds, and the fit of the discrepancy's growth."""

import math

import numpy as np
import pytest

from ring_jax.studies.stability import slope
from ring_jax.studies.statistics import band, interval, paired, paired_ratio
from ring_jax.train.report.metrics import smoothed


def test_students_interval_by_hand():
  one = interval([1.0, 2.0, 3.0, 4.0, 5.0])  # s = sqrt(2.5), t(4, 0.975) = 2.776445
  assert one.mean == 3.0 and one.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
  assert one.excludes_zero and one.format(1) == "3.0 ± 2.0" and one.format(0, 100, "%") == "300 ± 196%"
  assert interval([7.0]).format(1) == "7.0" and not interval([7.0]).excludes_zero
  assert interval([]).format() == "none" and interval([math.nan, None, 2.0]).count == 1
  assert paired([1.0, 2.0, 9.0], [2.0, 4.0, 10.0]).mean == pytest.approx(4 / 3)
  assert paired_ratio([1.0, 4.0, 9.0], [2.0, 2.0, 9.0]).mean == pytest.approx(3.5 / 3)


def test_it_covers_the_mean_in_95_of_100_studies():
  rng = np.random.default_rng(0)
  found = [interval(rng.normal(3.0, 2.0, 5)) for _ in range(4000)]
  assert np.mean([abs(one.mean - 3.0) <= one.half for one in found]) == pytest.approx(0.95, abs=0.012)


def test_a_band_is_an_interval_a_step():
  mean, half = band([[1.0, 5.0], [3.0, 5.0]])
  assert mean.tolist() == [2.0, 5.0] and half[0] == interval([1.0, 3.0]).half and half[1] == 0.0


def test_smoothing_skips_what_is_missing():
  assert smoothed([1.0, None, 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]
  assert math.isnan(smoothed([None, 1.0], 3)[0])


@pytest.mark.parametrize("s, level", [(0.15, 1.0), (-0.3, 1.0)])
def test_the_slope_of_growth_and_of_return_is_found_under_noise(s, level):
  """Blocks follow d' = d + a + s d exactly; each step is measured with noise of a tenth of the level."""
  rng, covered = np.random.default_rng(1), []
  for _ in range(60):
    runs = []
    for _ in range(5):
      blocks = [rng.uniform(1.5, 2.5) if s < 0 else rng.uniform(0.3, 0.7)]
      for _ in range(15):
        blocks.append(blocks[-1] + (-s * level if s < 0 else 0.0) + s * blocks[-1])
      runs.append((np.repeat(blocks, 10) + rng.normal(0, 0.1 * level, 160)).tolist())
    found, a = slope(runs)
    covered.append(abs(found.mean - s) <= found.half)
    assert found.mean == pytest.approx(s, abs=0.05) and found.count == 5
    assert a == pytest.approx(-s * level if s < 0 else 0.0, abs=0.1)
  assert np.mean(covered) > 0.85


def test_no_slope_of_too_few_blocks_and_none_without_an_interval_of_one_run():
  assert slope([[1.0] * 40])[0].count == 0
  one, _ = slope([np.linspace(1, 2, 100).tolist()])
  assert one.count == 1 and math.isinf(one.half)
