"""Ends a run that hangs, and writes down where it stood.

A collective whose partner is stuck, a file system that does not answer, a device that is gone: none of these raises.
The run says what it is at (`beat`) whenever a phase begins and after each dispatch of the engine; if nothing is heard
for long enough, the stacks of all threads go to stderr and into the workdir, and the process ends with a status of its
own (`ExitStatus.HUNG`), so that who started it starts it again.

The limit must be longer than the longest that a healthy run is silent: compiling the largest program, or one phase of a
step on the machine at hand.  Time in which the whole process was stopped (Ctrl-Z, a laptop that slept) does not count.
"""

import faulthandler
import pathlib
import sys
import threading
import time
from typing import Self

from configs.status import ExitStatus
from sharding import processes

DEFAULT_SECONDS = 1800.0
_LONGEST_TICK = 5.0


class Watchdog:
  """Watches while its `with` block runs.

  Args:
    seconds: of silence; 0: does not watch.
    folder: the workdir, for the stacks.
  """

  def __init__(self, seconds: float, folder: pathlib.Path):
    self._seconds, self._folder = seconds, folder
    self._what, self._silent = "start-up", 0.0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> Self:
    if self._seconds > 0:
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._done.set()

  def beat(self, what: str | None = None) -> None:
    """The run moves; `what` is the phase that begins, if one does."""
    if what is not None:
      self._what = what
    self._silent = 0.0

  def _watch(self) -> None:
    tick = min(_LONGEST_TICK, self._seconds / 4)
    while self._silent < self._seconds:
      started = time.monotonic()
      if self._done.wait(tick):
        return
      if time.monotonic() - started < 2 * tick:  # else this very process was stopped
        self._silent += tick
    self._end()

  def _end(self) -> None:
    group = processes.group()
    path = self._folder / f"hang_process_{group.index}.txt"
    line = f"error: no progress for {self._seconds:g} s in phase {self._what!r}; all stacks are in {path}"
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    try:
      with open(path, "w") as file:
        file.write(line + "\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
      line += f" (which cannot be written: {error.strerror})"
    group.end(ExitStatus.HUNG, line)
