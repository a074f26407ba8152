"""A study's page: Markdown, its pictures beside it, and how to make it again."""

import datetime
import os
import pathlib
from collections.abc import Sequence

import jax

from ring_jax.studies.study import Report, Settings, Study, Table
from ring_jax.train.workdir import write_atomic
from rollout.bench.host import processor


def write(folder: pathlib.Path, study: Study, settings: Settings, report: Report, minutes: float) -> pathlib.Path:
  """`NAME.md` and `NAME_FIGURE.png` in the folder.

  Args:
    minutes: of processor time, of all points together.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    f"# {study.title}",
    "",
    f"**The claim.** {study.claim}",
    "",
    *_facts(study, settings, minutes),
    "",
    "## Found",
    "",
    *(f"* {finding}" for finding in report.findings),
  ]
  for table in report.tables:
    lines += ["", *markdown(table)]
  for figure in report.figures:
    file = f"{study.name}_{figure.name}.png"
    write_atomic(folder / file, figure.image)
    lines += ["", f"![{figure.caption}]({file})", "", f"*{figure.caption}*"]
  lines += ["", "## Not shown", "", *(f"* {line}" for line in report.not_shown), ""]
  page = folder / f"{study.name}.md"
  write_atomic(page, "\n".join(lines))
  return page


def markdown(table: Table) -> list[str]:
  return [
    f"**{table.title}**",
    "",
    _row(table.header),
    _row(["---"] * len(table.header)),
    *map(_row, table.rows),
    *(["", table.note] if table.note else []),
  ]


def _row(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _facts(study: Study, settings: Settings, minutes: float) -> list[str]:
  flags = " --quick" if settings.quick else f" --seeds={settings.seeds}"
  return [
    f"    python -m ring_jax.launch.study --name={study.name} --workdir=runs/studies{flags}",
    "",
    f"{_seeds(settings)}; {minutes:.0f} minutes of processor time on {machine()}; JAX {jax.__version__};"
    f" {datetime.date.today().isoformat()}. Intervals are of 95% (Student's t).",
  ]


def _seeds(settings: Settings) -> str:
  if settings.quick:
    return "The quick form, which shows that the study works and not what it says"
  return f"{settings.seeds} seeds" if settings.seeds > 1 else "One seed"


def machine() -> str:
  """Processor and cores, in words."""
  return f"{len(os.sched_getaffinity(0))} cores of {processor()}"
