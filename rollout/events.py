"""The event log: every call that a driver makes to its scheduler and what came of it, in order.

    begin    an iteration opens: what is still in slots, what was purged
    admit    how many prompts were wanted, which came; fewer: there are no more
    place    which rollout went into which slot
    draw     one dispatch: how many tokens each slot drew, under which weights, and what ended
    evict    slots that gave their rollout back; slots, where some are gone or new; abort, what others gave up
    end      what is trained on

A scheduler has no clock and no randomness, so this is all it takes to do a run again (replay.py), whether its engine was of
this process or many far away: the order of arrival is the log's order.  It is also all it takes to see one (timeline/).

The file is JSON lines, {"event": "place", "t": seconds since the run began, ...}, and knows nothing of tokens' values.  A
resumed run cuts it back to the iterations that its scheduler has ended, and goes on: one history, whatever was lost.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from configs.base import ConfigError


@dataclasses.dataclass(frozen=True)
class Begin:
  iteration: int  # from 0
  version: int  # of the weights that draw
  slots: list[int]
  running: list[list[int]]  # [slot, uid], where keys and values are kept
  purged: list[int]  # uids


@dataclasses.dataclass(frozen=True)
class Admit:
  wanted: int  # groups
  prompts: list[list[int]]  # [problem, tokens of the prompt]; fewer than wanted: no more will come


@dataclasses.dataclass(frozen=True)
class Place:
  placed: list[list[int]]  # [slot, uid]


@dataclasses.dataclass(frozen=True)
class Draw:
  prefill_seconds: float  # of the dispatch that ends at this event's time
  decode_seconds: float
  drawn: list[list[Any]]  # [slot, uid, tokens, version of the weights, finish reason or null]


@dataclasses.dataclass(frozen=True)
class Evict:
  evicted: list[list[int]]  # [slot, uid]


@dataclasses.dataclass(frozen=True)
class Slots:
  slots: list[int]  # those that there are from now on


@dataclasses.dataclass(frozen=True)
class Abort:
  uids: list[int]


@dataclasses.dataclass(frozen=True)
class End:
  iteration: int
  version: int  # of the weights that are about to be updated
  done: bool  # by the scheduler's rules; else it was ended early
  counted: int  # C
  trained: list[int]  # uids
  in_flight: int
  buffered: int


Event = Begin | Admit | Place | Draw | Evict | Slots | Abort | End
_TYPES: dict[str, type[Event]] = {kind.__name__.lower(): kind for kind in Event.__args__}
_END = b'{"event":"end",'


class Entry(NamedTuple):
  seconds: float  # since the run began
  event: Event


class EventLog:
  """Appends to a file.

  Args:
    clock: seconds since the run began; None: this process's, which goes on from the last event that is there.
  """

  def __init__(self, path: pathlib.Path, clock: Callable[[], float] | None = None):
    self._path = path
    self._file = open(path, "a")  # noqa: SIM115 (it stays open from event to event)
    self._clock = clock or _clock_from(path)

  def truncate(self, iterations: int) -> None:
    """Cuts off what came after the first so many iterations."""
    kept = position = 0
    with open(self._path, "r+b") as file:
      for line in file:
        position += len(line)
        if line.startswith(_END) and line.endswith(b"\n"):
          if json.loads(line)["iteration"] >= iterations:
            break
          kept = position
      file.truncate(kept)

  def write(self, event: Event) -> None:
    record = {"event": type(event).__name__.lower(), "t": round(self._clock(), 6), **vars(event)}
    self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
    self._file.flush()

  def flush(self) -> None:
    """To the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def read(path: pathlib.Path) -> list[Entry]:
  """The complete events of a log, a running run's too.

  Raises:
    ConfigError: there is none, or a line in it is not an event.
  """
  try:
    text = path.read_text()
  except OSError as error:
    raise ConfigError(f"{path}: no event log ({error.strerror}); rollout.event_log=true writes one") from None
  entries = []
  for number, line in enumerate(text.split("\n")[:-1], 1):  # what a kill left of the last line is no event
    try:
      record = json.loads(line)
      kind, seconds = _TYPES[record.pop("event")], record.pop("t")
      entries.append(Entry(float(seconds), kind(**record)))
    except (ValueError, KeyError, TypeError, AttributeError):
      raise ConfigError(f"{path}: line {number} is not an event: {line[:80]!r}") from None
  return entries


def _clock_from(path: pathlib.Path) -> Callable[[], float]:
  origin = time.perf_counter() - max((entry.seconds for entry in read(path)), default=0.0)
  return lambda: time.perf_counter() - origin
