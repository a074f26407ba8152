"""What a person sees while a run works.

On a terminal: the current phase as a progress bar with its latest values below, redrawn in place; phases that ended,
notes and tables scroll up above it.  Anywhere else (a pipe, a file, CI): plain lines without escape codes, one every
few steps, flushed.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from configs.schema import RunConfig

_PERCENT = frozenset({"accuracy", "masked", "solved"})
_QUIET = 2.0  # seconds between two plain lines, at least


class Console:
  """Args:
  stream: where to write; standard output if not given.
  live: redraw in place; decided by the stream if not given.
  every: steps between two plain lines, at least.
  clock: seconds, monotonic.
  """

  def __init__(
    self,
    stream: TextIO | None = None,
    *,
    live: bool | None = None,
    every: int = 10,
    clock: Callable[[], float] = time.monotonic,
  ):
    stream = sys.stdout if stream is None else stream
    self._stream, self._every, self._clock = stream, every, clock
    self._rich = RichConsole(file=stream, highlight=False, markup=False, emoji=False, force_terminal=live)
    self._is_live = self._rich.is_terminal and not self._rich.is_dumb_terminal if live is None else live
    self._live: Live | None = None
    self._phase: _Phase | None = None
    self._printed = (0, float("-inf"))  # step and time of the last plain line

  def opening(self, config: RunConfig, step: int = 0, minutes: float | None = None) -> None:
    """Says what will happen and roughly how long it takes.

    Args:
      step: where the run stands; above 0 it resumes.
      minutes: expected in all, where the caller knows.
    """
    plan = []
    if config.sft.steps:
      plan.append(f"SFT until {config.sft.target_accuracy:.0%} accuracy (at most {config.sft.steps} steps)")
    if config.rl.steps:
      plan.append(f"RL for {config.rl.steps} steps of about {config.rollout.token_budget:,} tokens")
    plan.append(f"measured on {config.eval.problems} unseen problems, {config.eval.samples} answers each")
    tail = "the time left shows after a few steps" if minutes is None else f"about {minutes:.0f} minutes in all"
    resumed = f" (resuming after step {step})" if step else ""
    self.note(f"{config.name}{resumed}: {'; then '.join(plan[:-1])}{'; ' if plan[:-1] else ''}{plan[-1]}; {tail}")

  def start(self, phase: str, total: int, initial: int = 0) -> None:
    """Begins a phase of `total` steps of which `initial` are done; the one before it has ended."""
    self._end_phase()
    self._phase = _Phase(phase, total, initial, self._clock)
    self._printed = (initial, float("-inf"))
    if self._is_live:
      # Asked for anew at every refresh, so that the time runs on while a step takes long.
      self._live = Live(get_renderable=self._phase.render, console=self._rich, refresh_per_second=4, transient=True)
      self._live.start()

  def update(self, step: int, **values: Any) -> None:
    """Shows that `step` steps of the phase are done.

    Args:
      values: shown in the order given; a later call without one, or with None, keeps it.  `accuracy`, `masked` and
        `solved` are shares; `tokens_per_second` maps kinds of work to rates; other numbers are shown as they are.
    """
    if self._phase is None:
      raise ValueError("Console.update: no phase was started")
    self._phase.update(step, values)
    due = step - self._printed[0] >= self._every and self._clock() - self._printed[1] >= _QUIET
    if not self._is_live and (due or step == self._phase.total):
      self._print_progress()

  def note(self, text: str) -> None:
    """A line of its own."""
    self._print(text)

  def table(self, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """A table; the columns are the keys of the first row, and texts stand as they are given."""
    names = list(rows[0]) if rows else []
    cells = [[str(row.get(name, "")) for name in names] for row in rows]
    if self._is_live:
      table = Table(title=title or None, title_justify="left")
      for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
      for row in cells:
        table.add_row(*row)
      self._rich.print(table)
      return
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for row in [[title]] * bool(title) + [names, *cells]:
      padded = [
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=False))
      ]
      self._print("  ".join(padded).rstrip())

  def close(self) -> None:
    """Ends the phase and gives the terminal back."""
    self._end_phase()

  def _end_phase(self) -> None:
    if self._live is not None:
      self._live.stop()
      self._live = None
    if self._phase is not None and self._phase.begun and (self._is_live or self._printed[0] != self._phase.step):
      self._print_progress()
    self._phase = None

  def _print_progress(self) -> None:
    self._printed = (self._phase.step, self._clock())
    self._print(self._phase.line())

  def _print(self, text: str) -> None:
    if self._is_live:
      self._rich.print(Text(text), soft_wrap=True)
    else:
      print(text, file=self._stream, flush=True)


class _Phase:
  """Progress of one phase, and how it is written."""

  def __init__(self, name: str, total: int, initial: int, clock: Callable[[], float]):
    self.name, self.total, self.step = name, total, initial
    self.begun = False
    self._clock, self._started = clock, clock()
    self._first: tuple[int, float] | None = None  # after the first update, which holds the compilation
    self._values: dict[str, Any] = {}
    self._progress = Progress(
      TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[count]}"), auto_refresh=False
    )
    self._task = self._progress.add_task(name, total=total, completed=initial, count=self._count())

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    self.step, self.begun = step, True
    self._values |= {name: value for name, value in values.items() if value is not None}
    if self._first is None:
      self._first = (step, self._clock())

  def render(self) -> Group:
    self._progress.update(self._task, completed=self.step, count=self._count())
    return Group(self._progress, Text("  " + self._describe(), style="dim", no_wrap=True, overflow="ellipsis"))

  def line(self) -> str:
    return "  ".join(part for part in (self.name, self._count(), self._describe()) if part)

  def _count(self) -> str:
    now = self._clock()
    text = f"{self.step}/{self.total}  {_duration(now - self._started)}"
    if self._first and self._first[0] < self.step < self.total:
      done, since = self._first
      text += f", {_duration((now - since) / (self.step - done) * (self.total - self.step))} left"
    return text

  def _describe(self) -> str:
    return "  ".join(_format(name, value) for name, value in self._values.items())


def _format(name: str, value: Any) -> str:
  if isinstance(value, Mapping):
    return f"{name.replace('tokens_per_second', 'tokens/s')} " + " ".join(
      f"{kind} {_short(rate)}" for kind, rate in value.items()
    )
  if name in _PERCENT:
    return f"{name} {value:.1%}" if value >= 0.001 or value == 0 else f"{name} {value:.3%}"
  return f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"


def _short(rate: float) -> str:
  for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if rate >= limit:
      return f"{rate / limit:.3g}{unit}"
  return f"{rate:.3g}"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
