"""From events to what is drawn: a span for everything that a slot does, a mark for everything that happens in one.

    prefill   from the placement to the first decode step of the dispatch
    decode    from there, as long as the same rollout draws under the same weights: one span, however many dispatches
    waiting   the rollout has its slot, but the driver does something else: new weights, or training between two iterations

A rollout that is interrupted waits in the picture where it was, until the next iteration begins.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from configs.base import Enum
from rollout import events
from rollout.events import Entry


class Kind(Enum):
  PREFILL = "prefill"
  DECODE = "decode"
  WAITING = "waiting"


class Happened(Enum):
  """To a rollout, in its slot or, where it was waiting, in the one that it had last."""

  STOP = "stop"
  LENGTH = "length"
  CACHE = "cache"
  PURGED = "purged"
  EVICTED = "evicted"
  ABORTED = "aborted"
  LOST = "lost"  # its slot is gone


@dataclasses.dataclass
class Span:
  slot: int
  uid: int
  kind: Kind
  start: float  # seconds since the run began
  end: float
  version: int | None = None  # of the weights; None: WAITING
  tokens: int = 0  # drawn


@dataclasses.dataclass(frozen=True)
class Mark:
  seconds: float
  slot: int | None  # None: the rollout never had one
  uid: int
  what: Happened


@dataclasses.dataclass
class Iteration:
  number: int
  version: int
  start: float
  end: float | None = None  # None: the log ends before
  counted: int = 0


@dataclasses.dataclass
class Timeline:
  slots: list[int] = dataclasses.field(default_factory=list)  # all that there ever were
  spans: list[Span] = dataclasses.field(default_factory=list)
  marks: list[Mark] = dataclasses.field(default_factory=list)
  iterations: list[Iteration] = dataclasses.field(default_factory=list)
  in_use: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # from then on, how many slots


def build(entries: Sequence[Entry]) -> Timeline:
  """All of the log."""
  builder = _Builder()
  for seconds, event in entries:
    builder.hear(seconds, event)
  return builder.close()


def carried(timeline: Timeline, iteration: Iteration) -> dict[int, dict[int, int]]:
  """Tokens by weight version that rollouts came into an iteration with, by the slot in which each went on first."""
  start, end = iteration.start, math.inf if iteration.end is None else iteration.end
  restarted = {
    mark.uid: mark.seconds for mark in timeline.marks if mark.what is Happened.PURGED and mark.seconds <= start
  }
  before: dict[int, dict[int, int]] = {}
  found: dict[int, dict[int, int]] = {}
  for span in timeline.spans:  # by their beginning
    if span.kind is Kind.DECODE and restarted.get(span.uid, -math.inf) < span.end <= start:
      drawn = before.setdefault(span.uid, {})
      drawn[span.version] = drawn.get(span.version, 0) + span.tokens
    elif start <= span.start < end and span.uid in before and span.slot not in found:
      found[span.slot] = before.pop(span.uid)
  return found


class _Builder:
  def __init__(self):
    self._timeline = Timeline()
    self._slots: set[int] = set()
    self._in_slot: dict[int, int] = {}  # uid, by slot
    self._last_slot: dict[int, int] = {}  # by uid, of rollouts that have not ended
    self._placed: dict[int, tuple[float, Kind]] = {}  # by slot that has not decoded yet: since when it does what
    self._open: dict[int, Span] = {}  # by slot: what may still get longer
    self._held: dict[int, tuple[int, float]] = {}  # by slot: uid and since when, between two iterations
    self._turn = 0.0  # when the present dispatch began, or the last one ended

  def hear(self, seconds: float, event: events.Event) -> None:
    match event:
      case events.Begin():
        self._begin(seconds, event)
      case events.Place(placed):
        self._turn = seconds
        for slot, uid in placed:
          self._in_slot[slot], self._last_slot[uid], self._placed[slot] = uid, slot, (seconds, Kind.PREFILL)
        self._count(seconds)
      case events.Draw():
        self._draw(seconds, event)
      case events.Evict(evicted):
        self._leave(seconds, evicted, Happened.EVICTED)
      case events.Slots(slots):
        self._leave(seconds, [entry for entry in self._in_slot.items() if entry[0] not in slots], Happened.LOST)
        self._slots |= set(slots)
      case events.Abort(uids):
        self._end_of(seconds, uids, Happened.ABORTED)
      case events.End():
        self._end(seconds, event)

  def close(self) -> Timeline:
    timeline = self._timeline
    self._close_spans(list(self._open))
    timeline.slots = sorted(self._slots)
    timeline.spans.sort(key=lambda span: (span.start, span.slot))
    return timeline

  def _begin(self, seconds: float, event: events.Begin) -> None:
    self._slots |= set(event.slots)
    for slot, (uid, since) in self._held.items():
      self._timeline.spans.append(Span(slot, uid, Kind.WAITING, since, seconds))
    self._held = {}
    self._end_of(seconds, event.purged, Happened.PURGED)
    self._in_slot = {slot: uid for slot, uid in event.running}
    self._last_slot.update({uid: slot for slot, uid in event.running})
    self._placed = {slot: (seconds, Kind.WAITING) for slot, _ in event.running}  # with the keys and values that it has
    self._timeline.iterations.append(Iteration(event.iteration, event.version, seconds))
    self._turn = seconds
    self._count(seconds)

  def _draw(self, seconds: float, event: events.Draw) -> None:
    # An engine that is far away does not say how long it took for what.
    decoding = max(self._turn, seconds - event.decode_seconds) if event.decode_seconds else self._turn
    for slot, (since, what) in self._placed.items():
      uid = self._in_slot[slot]
      if decoding > since:
        self._timeline.spans.append(Span(slot, uid, what, since, decoding))
      self._open[slot] = Span(slot, uid, Kind.DECODE, decoding, decoding)
    self._placed = {}
    for slot, uid, count, version, reason in event.drawn:
      self._extend(slot, uid, count, version, decoding, seconds)
      if reason is not None:
        self._leave(seconds, [(slot, uid)], Happened(reason))
        self._last_slot.pop(uid, None)  # a log that contradicts itself is drawn as it stands; replay finds it
    self._turn = seconds
    self._count(seconds)

  def _extend(self, slot: int, uid: int, count: int, version: int, start: float, end: float) -> None:
    span = self._open.get(slot)
    if span is None or span.uid != uid or (span.version is not None and span.version != version):
      if span is not None and span.uid == uid and start > span.end:
        self._timeline.spans.append(Span(slot, uid, Kind.WAITING, span.end, start))
      self._close_spans([slot])
      span = self._open[slot] = Span(slot, uid, Kind.DECODE, start, end)
    span.version, span.end, span.tokens = version, end, span.tokens + count

  def _leave(self, seconds: float, left: Iterable[Sequence[int]], what: Happened) -> None:
    for slot, uid in list(left):
      self._timeline.marks.append(Mark(seconds, slot, uid, what))
      self._close_spans([slot])
      self._in_slot.pop(slot, None)
      self._placed.pop(slot, None)
    self._count(seconds)

  def _end_of(self, seconds: float, uids: Iterable[int], what: Happened) -> None:
    """Of rollouts that end wherever they are."""
    for uid in uids:
      slot = self._last_slot.get(uid)
      if slot is not None and self._in_slot.get(slot) == uid:
        self._leave(seconds, [(slot, uid)], what)
      else:
        self._timeline.marks.append(Mark(seconds, slot, uid, what))
      self._last_slot.pop(uid, None)

  def _end(self, seconds: float, event: events.End) -> None:
    iteration = self._timeline.iterations[-1]
    iteration.end, iteration.counted = seconds, event.counted
    self._held = {slot: (uid, seconds) for slot, uid in self._in_slot.items()}
    self._close_spans(list(self._open))
    self._in_slot = {}
    self._count(seconds)

  def _close_spans(self, slots: Iterable[int]) -> None:
    for slot in slots:
      span = self._open.pop(slot, None)
      if span is not None and span.tokens:
        self._timeline.spans.append(span)

  def _count(self, seconds: float) -> None:
    in_use, now = self._timeline.in_use, len(self._in_slot)
    if not in_use or in_use[-1][1] != now:
      in_use.append((seconds, now))
