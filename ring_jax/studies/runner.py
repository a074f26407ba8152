"""Measures the points of a study side by side: a core a point, the whole machine for one that is alone.

Points that take turns run side by side too, as they spend most of their time on what nobody times: tracing and compiling.
Whose turn it is has the machine to itself, as the others' processes are stopped meanwhile.

Each is a process (child.py) with its output in a file, and they share compiled programs, as seeds differ in no program.  A
point with a result is not measured again, and a training run that was stopped goes on where it stood, so that the same command
resumes a study.  A point that fails does not stop the others that do not need it.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from configs.schema import ConfigError
from configs.status import ExitStatus
from ring_jax.studies.child import BEGIN, END, GRANTED, RESULT
from ring_jax.studies.study import Point, Results, Settings, Study

_LOOK_SECONDS = 0.2
_NEWS_SECONDS = 15.0
_LOG = "log.txt"
_COMPILED = ".compiled"  # a folder of programs, where the environment names none
_LOG_LINES = 12  # of a failed point, shown


class StudyError(ConfigError):
  """A study that cannot go on; the message is one line."""


@dataclasses.dataclass
class _Running:
  point: Point
  process: subprocess.Popen
  cores: list[int]  # its own; none where it takes turns
  line: socket.socket
  waits: bool = False  # for its turn


class Runner:
  """Args:
  home: the study's folder; a folder a point.
  say: prints a line.
  """

  def __init__(self, study: Study, settings: Settings, home: pathlib.Path, say: Callable[[str], None] = print):
    self._study, self._settings, self._home, self._say = study, settings, home, say
    self._points = study.points(settings)
    self._free = sorted(os.sched_getaffinity(0))
    self._cores = len(self._free)
    self._running: list[_Running] = []
    self._turn: _Running | None = None
    self._failed: list[Point] = []
    self._started = self._told = time.monotonic()

  def run(self) -> None:
    """Until every point has a result.

    Raises:
      StudyError: a point failed; the others are done.
    """
    self._claim()
    waiting = [point for point in self._points if not self._result(point).is_file()]
    self._say(f"{self._study.name}: {len(self._points) - len(waiting)} of {len(self._points)} points are there")
    try:
      while waiting or self._running:
        for point in list(waiting):
          if self._blocked(point):
            waiting.remove(point)
            self._failed.append(point)
          elif self._ready(point):
            waiting.remove(point)
            self._start(point)
        self._collect()
        self._give_turns()
        self._tell(len(waiting))
        time.sleep(_LOOK_SECONDS)
    except BaseException:
      self._stop()
      raise
    if self._failed:
      names = ", ".join(point.name for point in self._failed)
      raise StudyError(
        f"{len(self._failed)} of {len(self._points)} points failed ({names}); their logs are in {self._home}"
      )

  def results(self) -> tuple[Results, float]:
    """Those that there are, and the minutes of processor time that they took."""
    found = {point: self._read(point) for point in self._points if self._result(point).is_file()}
    minutes = sum(one["cost"]["cpu_seconds"] for one in found.values()) / 60
    return Results({point: one["result"] for point, one in found.items()}), minutes

  # ---- one point

  def _start(self, point: Point) -> None:
    cores = [] if point.turns else [self._free.pop(0) for _ in range(self._wanted(point))]
    folder = self._home / point.name
    folder.mkdir(parents=True, exist_ok=True)
    kind, settings = type(self._study), json.dumps(dataclasses.asdict(self._settings))
    line, its_end = socket.socketpair()
    arguments = [kind.__module__, kind.__name__, point.name, str(self._home), settings, str(its_end.fileno())]
    with open(folder / _LOG, "a") as log, its_end:
      process = subprocess.Popen(
        [sys.executable, "-m", "ring_jax.studies.child", *arguments], stdout=log, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, env=self._environment(point), pass_fds=[its_end.fileno()],
      )  # fmt: skip
    os.sched_setaffinity(process.pid, cores or self._free)  # before it starts the threads of its computations
    line.setblocking(False)
    self._running.append(_Running(point, process, cores, line))

  def _environment(self, point: Point) -> dict[str, str]:
    compiled = {
      "JAX_COMPILATION_CACHE_DIR": str(self._home.absolute() / _COMPILED),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return compiled | os.environ | {"JAX_NUM_CPU_DEVICES": str(point.devices)}

  def _collect(self) -> None:
    for one in list(self._running):
      status = one.process.poll()
      if status is None:
        continue
      self._running.remove(one)
      one.line.close()
      if self._turn is one:
        self._end_turn()
      self._free = sorted(self._free + one.cores)
      if status in (ExitStatus.INTERRUPTED, ExitStatus.PREEMPTED):
        raise KeyboardInterrupt
      if status or not self._result(one.point).is_file():
        self._failed.append(one.point)
        log = (self._home / one.point.name / _LOG).read_text(errors="replace").splitlines()[-_LOG_LINES:]
        self._say("\n".join([f"{one.point.name} failed (status {status}):", *(f"  {line}" for line in log)]))
      else:
        self._say(f"{one.point.name}: done in {self._read(one.point)['cost']['seconds']:.0f} s")

  def _stop(self) -> None:
    """Lets the running ones save what they have."""
    for one in self._running:
      one.line.close()  # who waits for a turn waits no longer
      one.process.send_signal(signal.SIGTERM)
      one.process.send_signal(signal.SIGCONT)
    for one in self._running:
      one.process.wait()

  # ---- turns

  def _give_turns(self) -> None:
    for one in self._running:
      for asked in _received(one.line):
        if asked == BEGIN:
          one.waits = True
        elif asked == END and self._turn is one:
          self._end_turn()
    waiting = [one for one in self._running if one.waits]
    if self._turn is None and waiting:
      self._turn = waiting[0]
      self._turn.waits = False
      for other in self._others():
        other.process.send_signal(signal.SIGSTOP)
      with contextlib.suppress(OSError):  # it has just ended
        self._turn.line.send(GRANTED)

  def _end_turn(self) -> None:
    for other in self._others():
      other.process.send_signal(signal.SIGCONT)
    self._turn = None

  def _others(self) -> list[_Running]:
    return [one for one in self._running if one is not self._turn]

  # ---- what comes next

  def _wanted(self, point: Point) -> int:
    return self._cores if point.alone else 1

  def _ready(self, point: Point) -> bool:
    return self._fits(point) and all((self._home / name / RESULT).is_file() for name in point.needs)

  def _fits(self, point: Point) -> bool:
    """As many points that take turns as there are cores, and no other kind beside them; none starts in another's turn."""
    if point.turns:
      return self._turn is None and len(self._free) == self._cores > len(self._running)
    return len(self._free) >= self._wanted(point) and not any(one.point.turns for one in self._running)

  def _blocked(self, point: Point) -> bool:
    return any(failed.name in point.needs for failed in self._failed)

  def _result(self, point: Point) -> pathlib.Path:
    return self._home / point.name / RESULT

  def _read(self, point: Point) -> dict[str, Any]:
    try:
      return json.loads(self._result(point).read_text())
    except ValueError as error:
      raise StudyError(f"{self._result(point)}: is no result ({error}); remove it to measure the point again") from None

  def _claim(self) -> None:
    """Raises StudyError: the folder holds another form of the study, or another process works in it."""
    self._home.mkdir(parents=True, exist_ok=True)
    form = json.dumps({"study": self._study.name, "quick": self._settings.quick}) + "\n"
    self._file = open(self._home / "study.json", "a+")  # noqa: SIM115 (it stays open as long as the lock is held)
    try:
      fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise StudyError(
        f"{self._home}: another process measures this study; stop it, or give another --workdir"
      ) from None
    self._file.seek(0)
    if self._file.read() not in ("", form):
      raise StudyError(f"{self._home}: holds a study with quick={not self._settings.quick}; give another --workdir")
    self._file.truncate(0)
    self._file.write(form)
    self._file.flush()

  def _tell(self, waiting: int) -> None:
    now = time.monotonic()
    if now - self._told < _NEWS_SECONDS:
      return
    self._told = now
    done = len(self._points) - waiting - len(self._running) - len(self._failed)
    running = ", ".join(f"{one.point.name} ({_last_line(self._home / one.point.name / _LOG)})" for one in self._running)
    self._say(f"[{(now - self._started) / 60:.1f} min] {done} done, {waiting} to come; now {running}")


def _last_line(log: pathlib.Path, width: int = 48) -> str:
  lines = [line for line in log.read_text(errors="replace").splitlines()[-3:] if line.strip()]
  return " ".join(lines[-1].split())[:width] if lines else "starting"


def _received(line: socket.socket) -> list[bytes]:
  """What a point has asked for since the last look."""
  try:
    return [bytes([one]) for one in line.recv(64)]
  except OSError:  # nothing, or it has ended
    return []
