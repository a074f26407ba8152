"""An engine that serves many: one thread decodes, anyone submits, listens, aborts and hands in new weights.

    submit   -> a queue, first come first served -> a free slot -> tokens to the listener after every dispatch
    abort    takes effect before the next dispatch: the slot is free for the next request at once
    update   new weights between two dispatches; each token comes with the version that drew it

Fronts (HTTP, gRPC, remote rollouts) speak to this class and share one engine.  A listener that fails loses its own request
and nothing else; if the engine fails, every listener is told and nothing more is taken in.
"""

import collections
import dataclasses
import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ring_jax.records import FinishReason
from rollout.engine import RingEngine, Sampling
from rollout.jobs import Crowding
from rollout.paged import CacheUse
from rollout.worker import Drawn, EngineWorker, Job

_LOG = logging.getLogger(__name__)


class Busy(RuntimeError):
  """The queue is full: come back later."""


class Unavailable(RuntimeError):
  """The service takes nothing in: it is closed, drains, or its engine failed."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One sequence to go on with."""

  tokens: Sequence[int]  # at least one
  max_tokens: int  # at least 1
  uid: int  # keys the samples, with the position
  sampling: Sampling | None = None  # None: as the engine's config says


@dataclasses.dataclass(frozen=True)
class Update:
  """What one dispatch drew for a request."""

  tokens: list[int]
  logps: list[float]
  version: int
  reason: FinishReason | None  # None while it goes on; ABORTED also where the engine failed (`error` says how)
  error: str = ""


Listener = Callable[[Update], None]  # called in the service's thread: must be quick


@dataclasses.dataclass(frozen=True)
class Stats:
  """Counters since the start, and gauges of now."""

  slots: int
  running: int
  waiting: int
  version: int  # of the weights
  requests: int  # taken in
  finished: int
  aborted: int
  refused: int
  prompt_tokens: int
  drawn_tokens: int
  dispatches: int
  prefill_seconds: float
  decode_seconds: float
  paused: bool
  error: str  # of the engine; empty: it lives
  cache: CacheUse | None  # None where keys and values are not in pages


@dataclasses.dataclass
class _Ticket:
  request: Request
  listener: Listener
  drawn: list[int] = dataclasses.field(default_factory=list)


class EngineService:
  """Args:
  worker: with its engine; nobody else may use it.
  params: as the engine stores them.
  max_waiting: requests in the queue beyond which `submit` raises `Busy`.
  """

  def __init__(self, worker: EngineWorker, params: Any, version: int, *, max_waiting: int):
    self._worker, self._max_waiting = worker, max_waiting
    self._version = version
    self._changed = threading.Condition()
    self._numbers = itertools.count()
    self._tickets: dict[int, _Ticket] = {}
    self._waiting: collections.deque[int] = collections.deque()  # tickets without a slot; some may have left
    self._in_slot: dict[int, int] = {}  # the ticket in a slot
    self._free = sorted(worker.slots)  # a heap
    self._aborted: list[int] = []
    self._updates: list[tuple[Any, int, threading.Event]] = []
    self._crowding = Crowding()
    self._paused = self._draining = self._closed = False
    self._error = ""
    self._counts: collections.Counter[str] = collections.Counter()
    worker.begin(params, version, [])
    self._thread = threading.Thread(target=self._run, name="engine-service", daemon=True)
    self._thread.start()

  # ---- of any thread

  def submit(self, request: Request, listener: Listener) -> int:
    """Takes a request in; returns the number by which it can be aborted.

    Raises:
      ValueError: the engine could never do it.
      Busy: the queue is full.
      Unavailable: see there.
    """
    length = self._worker.engine.max_prefill_length
    if not 0 < len(request.tokens) <= length:
      raise ValueError(f"{len(request.tokens)} tokens: from 1 to {length} fit")
    if request.max_tokens < 1:
      raise ValueError(f"max_tokens={request.max_tokens}: must be at least 1")
    with self._changed:
      if self._closed or self._draining or self._error:
        raise Unavailable(self._error or "the service is closing")
      if len(self._tickets) - len(self._in_slot) >= self._max_waiting + len(self._free):
        self._counts["refused"] += 1
        raise Busy(f"{self._max_waiting} requests are waiting already")
      number = next(self._numbers)
      self._tickets[number] = _Ticket(request, listener)
      self._waiting.append(number)
      self._counts["requests"] += 1
      self._counts["prompt_tokens"] += len(request.tokens)
      self._changed.notify_all()
      return number

  def abort(self, number: int) -> None:
    """Gives a request up, wherever it is; its listener hears ABORTED.  One that has ended is left alone."""
    with self._changed:
      if number in self._tickets:
        self._aborted.append(number)
        self._changed.notify_all()

  def update(self, params: Any, version: int, timeout: float | None = None) -> None:
    """New weights, from the next dispatch on; returns when they are in use.

    Raises:
      Unavailable: the service ended before.
    """
    done = threading.Event()
    with self._changed:
      if self._closed or self._error:
        raise Unavailable(self._error or "the service is closed")
      self._updates.append((params, version, done))
      self._changed.notify_all()
    # Not `self._version`: another trainer's may be the higher one.
    if not done.wait(timeout) or any(waiting is done for _, _, waiting in self._updates):
      raise Unavailable(self._error or f"weights {version} are not in use after {timeout} s")

  def pause(self) -> None:
    """No dispatch begins; what runs keeps its slot, and requests are still taken in."""
    with self._changed:
      self._paused = True

  def resume(self) -> None:
    with self._changed:
      self._paused = False
      self._changed.notify_all()

  def drain(self, timeout: float | None = None) -> bool:
    """Takes nothing in any more; waits until all that was taken in has ended, and says whether it has."""
    with self._changed:
      self._draining, self._paused = True, False
      self._changed.notify_all()
      return self._changed.wait_for(lambda: not self._tickets or bool(self._error), timeout)

  def close(self) -> None:
    """Ends the thread; what runs is aborted."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
    self._thread.join()

  @property
  def engine(self) -> RingEngine:
    return self._worker.engine

  @property
  def version(self) -> int:
    return self._version

  def stats(self) -> Stats:
    with self._changed:
      counts = self._counts
      running = len(self._in_slot)
      return Stats(
        slots=len(self._worker.slots), running=running, waiting=len(self._tickets) - running, version=self._version,
        requests=counts["requests"], finished=counts["finished"], aborted=counts["aborted"], refused=counts["refused"],
        prompt_tokens=counts["prompt_tokens"], drawn_tokens=counts["drawn_tokens"], dispatches=counts["dispatches"],
        prefill_seconds=counts["prefill_seconds"], decode_seconds=counts["decode_seconds"], paused=self._paused,
        error=self._error, cache=self._worker.cache_use,
      )  # fmt: skip

  # ---- of the thread

  def _run(self) -> None:
    try:
      while self._turn():
        pass
      ending = "the service was closed"
    except Exception as error:  # whatever an engine may raise: every listener must hear of it
      _LOG.exception("the engine failed")
      ending = f"the engine failed: {error}"
      self._error = ending
    with self._changed:
      tickets, self._tickets = self._tickets, {}
      for _, _, done in self._updates:
        done.set()
      self._changed.notify_all()
    for ticket in tickets.values():
      _tell(ticket.listener, Update([], [], self._version, FinishReason.ABORTED, ending))

  def _turn(self) -> bool:
    """Does what was asked, then one dispatch; False when the service is closed."""
    with self._changed:
      self._changed.wait_for(self._something_to_do)
      if self._closed:
        return False
      aborted, self._aborted = self._aborted, []
    self._give_up(aborted)
    while self._updates:
      params, version, done = self._updates[0]
      self._worker.load(params, version)
      self._version = version
      del self._updates[0]  # not before: whoever waits for it must hear of an engine that fails
      done.set()
    if self._paused:
      return True
    jobs = self._placed()
    # Not what the worker runs: it may have requests to hand back that new weights took out of their slots.
    if jobs or self._in_slot:
      self._dispatch(jobs)
    return True

  def _something_to_do(self) -> bool:
    work = bool(self._tickets) and not self._paused
    return work or bool(self._aborted or self._updates) or self._closed

  def _placed(self) -> list[Job]:
    """Requests into free slots, in the order of their coming."""
    with self._changed:
      jobs = []
      while self._free and self._waiting and not (self._crowding.holds and self._worker.running):
        number = self._waiting.popleft()
        ticket = self._tickets.get(number)
        if ticket is not None:  # else it was aborted while it waited
          slot, request = heapq.heappop(self._free), ticket.request
          self._in_slot[slot] = number
          left = request.max_tokens - len(ticket.drawn)
          jobs.append(Job(slot, request.uid, [*request.tokens, *ticket.drawn], left, request.sampling))
      return jobs

  def _dispatch(self, jobs: Sequence[Job]) -> None:
    events = self._worker.advance(jobs)
    with self._changed:
      self._counts["dispatches"] += 1
      self._counts["prefill_seconds"] += events.prefill_seconds
      self._counts["decode_seconds"] += events.decode_seconds
    for drawn in events.drawn:
      self._deliver(drawn)
    ended = any(drawn.reason is not None for drawn in events.drawn)
    self._crowding.after(bool(events.evicted), ended)
    with self._changed:
      for slot in sorted(events.evicted, key=self._in_slot.get, reverse=True):
        self._waiting.appendleft(self._vacate(slot))

  def _deliver(self, drawn: Drawn) -> None:
    number = self._in_slot[drawn.slot]
    ticket = self._tickets[number]
    ticket.drawn.extend(drawn.tokens)
    with self._changed:
      self._counts["drawn_tokens"] += len(drawn.tokens)
      if drawn.reason is not None:
        self._counts["finished"] += 1
        self._vacate(drawn.slot)
        del self._tickets[number]
        self._changed.notify_all()
    if not _tell(ticket.listener, Update(drawn.tokens, drawn.logps, drawn.version, drawn.reason)):
      self.abort(number)

  def _give_up(self, numbers: Sequence[int]) -> None:
    with self._changed:
      numbers = [number for number in dict.fromkeys(numbers) if number in self._tickets]
      slots = [slot for slot, number in self._in_slot.items() if number in numbers]
    self._worker.release(slots)  # first: who still has a ticket hears of an engine that fails
    self._crowding.after(False, bool(slots))
    with self._changed:
      for slot in slots:
        self._vacate(slot)
      listeners = [self._tickets.pop(number).listener for number in numbers]
      self._counts["aborted"] += len(numbers)
      self._changed.notify_all()
    for listener in listeners:
      _tell(listener, Update([], [], self._version, FinishReason.ABORTED))

  def _vacate(self, slot: int) -> int:
    """Returns whose it was."""
    heapq.heappush(self._free, slot)
    return self._in_slot.pop(slot)


def _tell(listener: Listener, update: Update) -> bool:
  """Whether the listener took it."""
  try:
    listener(update)
  except Exception:  # a front's fault must not end the others' requests
    _LOG.exception("a listener failed; its request is aborted")
    return False
  return True
