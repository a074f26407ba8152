"""Where the time goes: a trace of the phases that Perfetto (ui.perfetto.dev) and chrome://tracing open.

The file is one JSON array in the Trace Event format, one event a line, written as it happens.  The format allows the
closing bracket to be missing, so the trace of a killed run opens too; a clean `close` makes it valid JSON.

A run that is resumed goes on in the same file.  Time then continues where the killed process wrote its last event,
without the hours between, and an instant event marks the place.  Steps that were lost and repeated appear twice: they
took that time.
"""

import contextlib
import dataclasses
import datetime
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from ring_jax.train.workdir import write_atomic

_TRACKS = ("rollout", "score", "logp", "train", "sync", "checkpoint", "eval")
_PROCESS = 1


@dataclasses.dataclass
class Span:
  """One stretch of work."""

  args: dict[str, Any]  # shown beside it; may be added to until it ends
  seconds: float = 0.0  # once it has ended


class Trace:
  """Appends events to `path`; see the module's docstring.  Usable as a context manager."""

  def __init__(self, path: pathlib.Path):
    events = read(path)
    self._tracks = {
      event["args"]["name"]: event["tid"]
      for event in events
      if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    write_atomic(path, "[\n" + ",\n".join(json.dumps(event) for event in events))
    self._empty = not events
    self._lock = threading.Lock()  # roles that work at the same time write from threads of their own
    self._file = open(path, "a")  # noqa: SIM115 (it stays open from event to event)
    last = max((event["ts"] + event.get("dur", 0.0) for event in events if "ts" in event), default=0.0)
    self._origin = time.perf_counter() - last / 1e6
    if self._empty:
      self._emit({"name": "process_name", "ph": "M", "pid": _PROCESS, "args": {"name": "ring-jax"}})
    else:
      now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
      event = {"name": "resumed", "ph": "i", "s": "g", "pid": _PROCESS, "tid": 0, "ts": self._now()}
      self._emit(event | {"args": {"at": now}})
    for kind in _TRACKS:
      self._track(kind)

  @contextlib.contextmanager
  def span(self, kind: str, **args: Any) -> Iterator[Span]:
    """Marks what happens inside on the track of `kind` (rollout, score, logp, train, sync, checkpoint, eval, ...)."""
    span, start = Span(args), self._now()
    try:
      yield span
    finally:
      duration = self._now() - start
      span.seconds = duration / 1e6
      self._emit(
        {
          "name": kind,
          "ph": "X",
          "pid": _PROCESS,
          "tid": self._track(kind),
          "ts": start,
          "dur": duration,
          "args": span.args,
        }
      )

  def counter(self, name: str, **values: float) -> None:
    """Puts values on the curve `name` from now on, such as `tokens/s`, rollout=..., train=...."""
    self._emit({"name": name, "ph": "C", "pid": _PROCESS, "ts": self._now(), "args": values})

  def seconds(self) -> float:
    """Since the run began, without the time between a kill and the resume."""
    return time.perf_counter() - self._origin

  def close(self) -> None:
    if not self._file.closed:
      self._file.write("\n]\n")
      self._file.close()

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _now(self) -> float:
    """In microseconds, as the format has it."""
    return self.seconds() * 1e6

  def _track(self, kind: str) -> int:
    if kind not in self._tracks:
      track = self._tracks[kind] = len(self._tracks) + 1
      for name, args in (("thread_name", {"name": kind}), ("thread_sort_index", {"sort_index": track})):
        self._emit({"name": name, "ph": "M", "pid": _PROCESS, "tid": track, "args": args})
    return self._tracks[kind]

  def _emit(self, event: dict[str, Any]) -> None:
    with self._lock:
      self._file.write(("" if self._empty else ",\n") + json.dumps(event))
      self._file.flush()
      self._empty = False


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The complete events of a trace, also of a running or killed run; empty where there is none."""
  events = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      event = json.loads(line.removesuffix(","))
    except ValueError:
      continue  # a bracket, or an event that was cut
    if isinstance(event, dict):
      events.append(event)
  return events
