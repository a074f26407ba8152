"""Any runs in one picture: a curve a run, or the mean of a group of runs with the interval of 95%.

A group is written NAME=DIR+DIR+...; a single run is its folder.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from configs.schema import ConfigError
from ring_jax.studies import figures
from ring_jax.studies.statistics import interval
from ring_jax.studies.study import Table
from ring_jax.train.report import metrics

_COLUMNS = 3  # of the picture


@dataclasses.dataclass(frozen=True)
class Group:
  name: str
  runs: list[list[dict[str, Any]]]  # records of one phase, a run each


def read(texts: Sequence[str], phase: str) -> list[Group]:
  """Raises ConfigError: a folder without steps of the phase, or two groups of one name."""
  groups = []
  for text in texts:
    name, separator, folders = text.partition("=")
    paths = [pathlib.Path(one) for one in (folders if separator else text).split("+")]
    groups.append(Group(name if separator else paths[0].name, [_read(path, phase) for path in paths]))
  names = [group.name for group in groups]
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(f"--runs: two of them are called {name}; give names, as in first=DIR,second=DIR")
  return groups


def _read(path: pathlib.Path, phase: str) -> list[dict[str, Any]]:
  steps, timings = ([record for record in log if record["phase"] == phase] for log in metrics.read_logs(path))
  if not steps:
    raise ConfigError(f"--runs: {path} holds no steps of {phase}")
  timed = {record["step"]: record for record in timings}
  return [timed.get(record["step"], {}) | record for record in steps]


def known(groups: Sequence[Group]) -> list[str]:
  """Names of the numbers that there are."""
  return sorted({
    name for group in groups for run in group.runs for record in run for name, value in record.items()
    if isinstance(value, (int, float))
  })  # fmt: skip


def curves_of(group: Group, metric: str, window: int) -> figures.Curves | None:
  """Over the steps of the phase; None where no run has the metric.  Runs of a group are cut to the shortest."""
  found = []
  for run in group.runs:
    pairs = [(step, record[metric]) for step, record in enumerate(run, 1) if record.get(metric) is not None]
    if pairs:
      steps, values = zip(*pairs, strict=True)
      found.append((steps, metrics.smoothed(values, window if len(pairs) == len(run) else 1)))
  if not found:
    return None
  length = min(len(steps) for steps, _ in found)
  return found[0][0][:length], [values[:length] for _, values in found]


def draw(groups: Sequence[Group], names: Sequence[str], window: int) -> bytes:
  """A PNG, a panel a metric.

  Raises:
    ConfigError: a metric that no run has.
  """
  columns = min(len(names), _COLUMNS)
  with figures.picture(-(-len(names) // columns), columns) as (figure, axes):
    for name, place in zip(names, axes, strict=False):
      own = {group.name: curves for group in groups if (curves := curves_of(group, name, window))}
      if not own:
        raise ConfigError(f"--metrics={name}: no run has it; there are {', '.join(known(groups))}")
      figures.curves(place, own, name, xlabel="steps")
    for place in axes[len(names) :]:
      place.axis("off")
    figures.legend_below(figure, axes[0])
    return figures.png(figure)


def table(groups: Sequence[Group], names: Sequence[str], window: int) -> Table:
  """The last values, smoothed as in the picture."""
  rows = []
  for group in groups:
    cells = []
    for name in names:
      found = curves_of(group, name, window)
      cells.append(interval([run[-1] for run in found[1]]).format(4) if found else "")
    rows.append([group.name, str(min(map(len, group.runs))), *cells])
  return Table(f"Last values, means of {window} steps", ["run", "steps", *names], rows)
