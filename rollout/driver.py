"""The live rollout driver: one C3PO++ iteration (Ring-1T Algorithm 1; the rules are in scheduler.py).

    until the scheduler says that the iteration is done:
        hear    what others ask: pause, abort, new weights, drain (control.py)
        admit   new prompts while the pool has room
        place   waiting rollouts in free slots
        advance the worker: prefill, and a few decode steps of all slots in one dispatch (worker.py)
        record  tokens, log-probs and the weight version; finish what ended; take back what a slot could not hold

The worker holds device state; every decision is the scheduler's, and is written down as it is taken (events.py).  With an
engine of this process, what it does is a function of the weights, the scheduler's state and the prompts it is given: that is
what makes a resumed run exact.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ring_jax.records import FinishReason, Rollout
from rollout import events as history
from rollout.control import Abort, AbortGroup, Control, Update
from rollout.events import EventLog
from rollout.iteration import IterationResult
from rollout.jobs import Crowding
from rollout.scheduler import C3POScheduler
from rollout.worker import Drawn, Job, Worker

# Asked for n prompts; returns up to n (problem index, token ids), fewer only when there are no more.
PromptSource = Callable[[int], Sequence[tuple[int, list[int]]]]


@dataclasses.dataclass
class Clock:
  """Where an iteration's wall-clock time went, in seconds, and what came of it so far."""

  prefill: float = 0.0
  decode: float = 0.0
  tokens: int = 0  # drawn
  finished: int = 0  # rollouts that ended


class RolloutDriver:
  """Args:
  max_tokens: of an answer.
  control: what others ask of it; None: nobody does.
  log: of all that it asks the scheduler; None: nothing is written.
  """

  def __init__(
    self,
    worker: Worker,
    scheduler: C3POScheduler,
    max_tokens: int,
    control: Control | None = None,
    log: EventLog | None = None,
  ):
    self._worker, self._scheduler, self._max_tokens = worker, scheduler, max_tokens
    self._control = control or Control()
    self._tell = log.write if log else lambda event: None
    self._crowding = Crowding()

  def iterate(
    self,
    params: Any,
    version: int,
    prompts: PromptSource,
    on_progress: Callable[[Clock], None] = lambda clock: None,
    *,
    trained: int | None = None,
    on_ready: Callable[[Sequence[Rollout]], None] = lambda ready: None,
  ) -> tuple[IterationResult, Clock]:
    """Runs one iteration under packed weights `params` of the given version.

    Args:
      trained: the version that its rollouts will update; default: `version`.
      on_ready: called after each dispatch with all that can be trained on so far, in the order of its coming.
    """
    scheduler, clock = self._scheduler, Clock()
    self._crowding = Crowding()
    scheduler.set_slots(self._worker.slots)
    purged = scheduler.begin_iteration()
    running = scheduler.running()  # nothing, unless keys and values are kept
    self._tell(
      history.Begin(
        scheduler.iteration, version, sorted(scheduler.slots), _slots_of(running.items()), [one.uid for one in purged]
      )
    )
    self._worker.begin(params, version, [self._job(*entry) for entry in running.items()])
    while not scheduler.iteration_done:
      self._hear()
      if self._control.paused:
        continue
      if self._control.draining:
        if not scheduler.running():
          break
        placed = []
      else:
        self._admit(prompts)
        placed = self._place()
      self._advance(placed, clock)
      on_ready(scheduler.ready)
      on_progress(clock)
    self._control.end()
    return self._end(version if trained is None else trained), clock

  def _end(self, version: int) -> IterationResult:
    scheduler, done = self._scheduler, self._scheduler.iteration_done
    placed = scheduler.running()
    result = scheduler.end_iteration(version)
    uids = [rollout.uid for rollout in result.rollouts]
    self._tell(history.End(result.iteration, version, done, result.counted, uids, result.in_flight, result.buffered))
    # A worker of another process would go on with what the scheduler took back.
    self._worker.release(placed.keys() - scheduler.running().keys())
    self._worker.end()
    return result

  def _hear(self) -> None:
    """Does what was asked since the last dispatch."""
    released = []
    for wish in self._control.take():
      match wish:
        case Update(params, version):
          self._worker.load(params, version)
        case Abort() | AbortGroup():
          released += self._abort(wish)
    self._worker.release(released)
    self._crowding.after(False, bool(released))

  def _abort(self, wish: Abort | AbortGroup) -> list[int]:
    """Returns the slots that fell free."""
    chosen = lambda r: r.uid == wish.uid if isinstance(wish, Abort) else r.group == wish.group  # noqa: E731
    uids = [rollout.uid for rollout in self._scheduler.unfinished() if chosen(rollout)]
    slots = [slot for slot, rollout in self._scheduler.running().items() if rollout.uid in uids]
    for uid in uids:
      self._scheduler.finish(uid, FinishReason.ABORTED)
    if uids:
      self._tell(history.Abort(uids))
    return slots

  def _admit(self, prompts: PromptSource) -> None:
    wanted = self._scheduler.wanted_groups
    if wanted:
      found = prompts(wanted)
      self._scheduler.admit(found)
      self._tell(history.Admit(wanted, [[problem, len(ids)] for problem, ids in found]))
      if len(found) < wanted:
        self._scheduler.close()

  def _place(self) -> list[tuple[int, Rollout]]:
    if self._crowding.holds and self._scheduler.running():
      return []
    placed = self._scheduler.place()
    self._tell(history.Place(_slots_of(placed)))
    return placed

  def _advance(self, placed: Sequence[tuple[int, Rollout]], clock: Clock) -> None:
    """One dispatch, and what came of it."""
    scheduler = self._scheduler
    events = self._worker.advance([self._job(slot, rollout) for slot, rollout in placed])
    for drawn in events.drawn:
      scheduler.record(drawn.uid, drawn.tokens, drawn.logps, drawn.version, drawn.experts)
      clock.tokens += len(drawn.tokens)
      if drawn.reason is not None:
        scheduler.finish(drawn.uid, drawn.reason)
        clock.finished += 1
    seconds = (round(events.prefill_seconds, 6), round(events.decode_seconds, 6))
    self._tell(history.Draw(*seconds, [_told(drawn) for drawn in events.drawn]))
    if events.evicted:
      running = scheduler.running()
      for slot in events.evicted:
        scheduler.evict(running[slot].uid)
      self._tell(history.Evict([[slot, running[slot].uid] for slot in events.evicted]))
    ended = any(drawn.reason is not None for drawn in events.drawn)
    self._crowding.after(bool(events.evicted), ended)
    self._see_slots()
    clock.prefill += events.prefill_seconds
    clock.decode += events.decode_seconds

  def _see_slots(self) -> None:
    before = self._scheduler.slots
    self._scheduler.set_slots(self._worker.slots)
    if self._scheduler.slots != before:
      self._tell(history.Slots(sorted(self._scheduler.slots)))

  def _job(self, slot: int, rollout: Rollout) -> Job:
    tokens = rollout.prompt + rollout.tokens
    return Job(slot, rollout.uid, tokens, self._max_tokens - len(rollout.tokens))


def _slots_of(rollouts: Iterable[tuple[int, Rollout]]) -> list[list[int]]:
  return [[slot, rollout.uid] for slot, rollout in rollouts]


def _told(drawn: Drawn) -> list[Any]:
  """As the log has it."""
  reason = None if drawn.reason is None else drawn.reason.value
  return [drawn.slot, drawn.uid, len(drawn.tokens), drawn.version, reason]
