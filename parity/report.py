"""The report of a parity run: report.json for machines, report.html for people (one file, no server, no network).

The page opens on the verdict and, if something failed, on the first thing that differs.  Then one section a tier: what it
proves, how closely, its rows (largest differences first where there are many), and a picture by layer where rows have one.
"""

import base64
import dataclasses
import html
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from parity.compare import Row, Suite, Tier

_ROWS_SHOWN = 60  # of a tier; the JSON holds all
_LINES_SHOWN = 6  # tensors in a picture, those that differ most

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --pass: #1a7f37; --fail: #cf222e; --dim: #8a8f98; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { margin-top: 2.5rem } h3 { margin-bottom: .2rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right } th { font-weight: 600 }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; overflow-wrap: anywhere }
.pass { color: var(--pass) } .fail { color: var(--fail); font-weight: 600 } .dim { color: var(--dim) }
.first { border-left: 4px solid var(--fail); padding: .5rem 1rem; background: #cf222e14 }
img { max-width: 100% } summary { cursor: pointer }
"""


def to_json(suites: Sequence[Suite], versions: dict[str, str]) -> dict[str, Any]:
  """Everything, as plain data: {"passed", "first_failure", "versions", "suites": [...]}."""
  first = _first_failure(suites)
  return {
    "passed": all(suite.passed for suite in suites),
    "first_failure": None if first is None else f"{first[0].name}, {first[1].name}: {first[2].describe()}",
    "versions": versions,
    "suites": [
      {
        "name": suite.name,
        "passed": suite.passed,
        "tiers": [
          {
            "name": tier.name,
            "pair": tier.pair,
            "proves": tier.proves,
            "passed": tier.passed,
            "seconds": tier.seconds,
            "worst": max((row.max for row in tier.rows), default=0.0),
            "rows": [dataclasses.asdict(row) for row in tier.rows],
          }
          for tier in suite.tiers
        ],
      }
      for suite in suites
    ],
  }


def write(folder: str | pathlib.Path, suites: Sequence[Suite], versions: dict[str, str]) -> pathlib.Path:
  """Writes report.json and report.html into `folder`; returns the page's path."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  data = finite(to_json(suites, versions))
  (folder / "report.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
  page = folder / "report.html"
  page.write_text(_page(suites, versions))
  return page


def lines(suites: Sequence[Suite]) -> list[str]:
  """A line a tier, for a console."""
  out = []
  for suite in suites:
    for tier in suite.tiers:
      limited = [row for row in tier.rows if math.isfinite(row.tolerance)]
      nearest = max(limited, key=lambda row: row.max / row.tolerance if row.tolerance else row.max, default=None)
      verdict = "ok  " if tier.passed else "FAIL"
      measured = f"worst {nearest.max:.1e} of {nearest.tolerance:.0e}" if nearest else "measured, no limit"
      out.append(f"{verdict}  {suite.name:<10} {tier.name:<34} {tier.pair:<28} {measured}  ({tier.seconds:.1f} s)")
      if not tier.passed:
        out.append(f"      first difference: {tier.first_failure.describe()}")
  return out


def _first_failure(suites: Sequence[Suite]) -> tuple[Suite, Tier, Row] | None:
  return next(((suite, tier, tier.first_failure) for suite in suites for tier in suite.tiers if not tier.passed), None)


def _page(suites: Sequence[Suite], versions: dict[str, str]) -> str:
  first = _first_failure(suites)
  rows = sum(len(tier.rows) for suite in suites for tier in suite.tiers)
  numbers = sum(row.count for suite in suites for tier in suite.tiers for row in tier.rows)
  verdict = '<span class="pass">passed</span>' if first is None else '<span class="fail">failed</span>'
  parts = [
    "<!doctype html><html lang=en><meta charset=utf-8><title>ring-jax parity</title>",
    f"<style>{_STYLE}</style><h1>Parity {verdict}</h1>",
    f"<p class=dim>{rows:,} comparisons of {numbers:,} numbers. ",
    html.escape(", ".join(f"{name} {version}" for name, version in versions.items())) + "</p>",
  ]
  if first is not None:
    suite, tier, row = first
    parts.append(
      f"<div class=first><b>First difference</b>: {html.escape(suite.name)}, {html.escape(tier.name)}"
      f" ({html.escape(tier.pair)})<br>{html.escape(row.describe())}</div>"
    )
  for suite in suites:
    parts.append(f"<h2>{html.escape(suite.name)}</h2>")
    parts.extend(_tier(tier) for tier in suite.tiers)
  return "\n".join(parts) + "</html>\n"


def _tier(tier: Tier) -> str:
  state = "pass" if tier.passed else "fail"
  extras = list(dict.fromkeys(name for row in tier.rows for name in row.extra))
  head = "".join(
    f"<th>{html.escape(name)}</th>"
    for name in ("tensor", "case", "layer", "numbers", "p50", "p95", "p99", "max", "limit", *extras)
  )
  # What failed comes first, in the order of computation; the rest by how near the limit it is.
  failed = [row for row in tier.rows if not row.passed]
  good = sorted((row for row in tier.rows if row.passed), key=lambda row: -row.max)
  shown = (failed + good)[:_ROWS_SHOWN]
  body = "".join(_row(row, extras) for row in shown)
  more = (
    f"<p class=dim>and {len(tier.rows) - len(shown)} more in report.json</p>" if len(tier.rows) > len(shown) else ""
  )
  open_ = "" if tier.passed else " open"
  return (
    f"<h3>{html.escape(tier.name)} <span class={state}>{'ok' if tier.passed else 'differs'}</span></h3>"
    f"<p>{html.escape(tier.proves)} <span class=dim>{html.escape(tier.pair)}, {tier.seconds:.1f} s</span></p>"
    f"{_picture(tier)}<details{open_}><summary>{len(tier.rows)} rows</summary>"
    f"<table><tr>{head}</tr>{body}</table>{more}</details>"
  )


def _row(row: Row, extras: Sequence[str]) -> str:
  numbers = [row.p50, row.p95, row.p99, row.max]
  limit = "none" if math.isinf(row.tolerance) else f"{row.tolerance:.0e}"
  cells = [
    html.escape(row.name),
    html.escape(f"{row.case} {row.note}".strip()),
    "" if row.layer is None else str(row.layer),
    f"{row.count:,}",
    *(f"{number:.2e}" for number in numbers),
    limit,
    *(f"{row.extra[name]:.3g}" if name in row.extra else "" for name in extras),
  ]
  state = "" if row.passed else " class=fail"
  return f"<tr{state}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _picture(tier: Tier) -> str:
  """The largest difference of each layer, one line a tensor; empty where rows have no layers."""
  layers = sorted({row.layer for row in tier.rows if row.layer is not None})
  if len(layers) < 2:
    return ""
  figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained", dpi=110)
  by_size = sorted((row for row in tier.rows if row.layer is not None), key=lambda row: -row.max)
  for name in list(dict.fromkeys(row.name for row in by_size))[:_LINES_SHOWN]:
    worst = [
      max((row.max for row in tier.rows if row.name == name and row.layer == layer), default=math.nan)
      for layer in layers
    ]
    axes.plot(layers, [max(value, 1e-12) if math.isfinite(value) else math.nan for value in worst], "o-", label=name)
  limits = [row.tolerance for row in tier.rows if 0 < row.tolerance < math.inf]
  if limits:
    axes.axhline(max(limits), color="#cf222e", linewidth=1, linestyle="--", label="limit")
  axes.set(yscale="log", xlabel="layer", ylabel="largest difference", xticks=layers)
  axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
  image = io.BytesIO()
  figure.savefig(image, format="png")
  plt.close(figure)
  return f'<img alt="by layer" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'


def finite(value: Any) -> Any:
  """JSON has no infinities: an unlimited tolerance and an unbounded difference become null."""
  if isinstance(value, dict):
    return {name: finite(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
