"""Comparisons and the report: what fails is said first and by name; tails are shown; the page needs nothing else."""

import json
import math

import numpy as np
import pytest

from parity import report
from parity.compare import Suite, Tier, compare


def rows(error=0.0):
  rng = np.random.default_rng(0)
  found = []
  for layer in range(3):
    expected = rng.normal(size=(5, 7))
    got = expected + 1e-7 * rng.normal(size=(5, 7))
    if layer == 1:
      got[3, 2] += error
    found.append(compare("attention <out>", got, expected, tolerance=1e-5, case="groups & bias", layer=layer))
  return found


def test_a_difference_is_scaled_located_and_judged_by_its_largest_value():
  expected = np.full((4, 5), 200.0)
  got = expected.copy()
  got[2, 3] += 0.5
  row = compare("x", got, expected, tolerance=1e-3)
  assert row.max == pytest.approx(0.0025) and row.worst == (2, 3) and not row.passed
  assert row.p50 == 0.0 and row.p95 == 0.0, "the tail must be shown by max, not hidden in a quantile"
  assert compare("x", got, expected, tolerance=0.003).passed
  assert compare("x", got, expected, tolerance=0.3, scale=1.0).max == 0.5


def test_shapes_infinities_and_nans():
  assert not compare("x", np.zeros(3), np.zeros(4), tolerance=1.0).passed
  one = np.array([-np.inf, 1.0, np.nan])
  assert compare("x", one, one, tolerance=0.0).passed
  for other in ([0.0, 1.0, np.nan], [-np.inf, 1.0, 2.0], [np.inf, 1.0, np.nan]):
    row = compare("x", np.array(other), one, tolerance=1e9)
    assert not row.passed and math.isinf(row.max)
  assert compare("x", np.zeros((0, 3)), np.zeros((0, 3)), tolerance=0.0).passed


def test_the_first_failure_is_named_everywhere(tmp_path):
  good = Tier("router", "Both choose the same experts.", "JAX against PyTorch", rows())
  bad = Tier("one block", "A block gives the same.", "JAX against PyTorch", rows(error=0.1))
  suites = [Suite("model", [good, bad])]
  assert good.passed and not bad.passed and not suites[0].passed
  assert bad.first_failure.layer == 1 and bad.first_failure.worst == (3, 2)
  data = report.to_json(suites, {"jax": "1"})
  assert not data["passed"]
  assert "model, one block: attention <out> of layer 1" in data["first_failure"]
  assert "first difference: attention <out> of layer 1" in "\n".join(report.lines(suites))

  page = report.write(tmp_path / "out", suites, {"jax": "1"}).read_text()
  assert page.index("First difference") < page.index("<h2>")
  assert "attention &lt;out&gt; of layer 1, groups &amp; bias" in page and "<out>" not in page
  assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
  stored = json.loads((tmp_path / "out" / "report.json").read_text())
  assert stored["suites"][0]["tiers"][1]["rows"][1]["passed"] is False


def test_an_empty_suite_has_not_passed_and_measurements_have_no_limit(tmp_path):
  assert not Suite("model", []).passed
  row = compare("logp", np.ones(4), np.zeros(4), tolerance=math.inf, scale=1.0, extra={"masked": 0.25})
  suites = [Suite("engine", [Tier("int8", "Measured.", "engine against trainer", [row])])]
  assert suites[0].passed and "measured, no limit" in report.lines(suites)[0]
  page = report.write(tmp_path, suites, {}).read_text()
  assert "<th>masked</th>" in page and "<td>0.25</td>" in page
  json.loads((tmp_path / "report.json").read_text())
