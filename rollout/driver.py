"""The live rollout driver: one C3PO++ iteration (Ring-1T Algorithm 1; the rules are in scheduler.py).

    until the scheduler says that the iteration is done:
        hear    what others ask: pause, abort, new weights, drain (control.py)
        admit   new prompts while the pool has room
        place   waiting rollouts in free slots
        advance the worker: prefill, and a few decode steps of all slots in one dispatch (worker.py)
        record  tokens, log-probs and the weight version; finish what ended; take back what a slot could not hold

The worker holds device state; every decision is the scheduler's.  With an engine of this process, what it does is a function
of the weights, the scheduler's state and the prompts it is given: that is what makes a resumed run exact.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ring_jax.records import FinishReason, Rollout
from rollout.control import Abort, AbortGroup, Control, Update
from rollout.iteration import IterationResult
from rollout.scheduler import C3POScheduler
from rollout.worker import Job, Worker

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
  """

  def __init__(self, worker: Worker, scheduler: C3POScheduler, max_tokens: int, control: Control | None = None):
    self._worker, self._scheduler, self._max_tokens = worker, scheduler, max_tokens
    self._control = control or Control()
    self._crowded = False  # the worker handed a job back, and nothing has ended since

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
    self._crowded = False
    scheduler.set_slots(self._worker.slots)
    scheduler.begin_iteration()
    # Nothing is running, unless keys and values are kept.
    self._worker.begin(params, version, [self._job(*entry) for entry in scheduler.running().items()])
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
        placed = [] if self._crowded and scheduler.running() else scheduler.place()
      self._advance(placed, clock)
      on_ready(scheduler.ready)
      on_progress(clock)
    self._control.end()
    return scheduler.end_iteration(version if trained is None else trained), clock

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
    self._crowded &= not released

  def _abort(self, wish: Abort | AbortGroup) -> list[int]:
    """Returns the slots that fell free."""
    chosen = lambda r: r.uid == wish.uid if isinstance(wish, Abort) else r.group == wish.group  # noqa: E731
    uids = [rollout.uid for rollout in self._scheduler.unfinished() if chosen(rollout)]
    slots = [slot for slot, rollout in self._scheduler.running().items() if rollout.uid in uids]
    for uid in uids:
      self._scheduler.finish(uid, FinishReason.ABORTED)
    return slots

  def _admit(self, prompts: PromptSource) -> None:
    wanted = self._scheduler.wanted_groups
    if wanted:
      found = prompts(wanted)
      self._scheduler.admit(found)
      if len(found) < wanted:
        self._scheduler.close()

  def _advance(self, placed: Sequence[tuple[int, Rollout]], clock: Clock) -> None:
    """One dispatch, and what came of it."""
    scheduler = self._scheduler
    events = self._worker.advance([self._job(slot, rollout) for slot, rollout in placed])
    for drawn in events.drawn:
      scheduler.record(drawn.uid, drawn.tokens, drawn.logps, drawn.version)
      clock.tokens += len(drawn.tokens)
      if drawn.reason is not None:
        scheduler.finish(drawn.uid, drawn.reason)
        clock.finished += 1
    if events.evicted:
      running = scheduler.running()
      for slot in events.evicted:
        scheduler.evict(running[slot].uid)
    ended = any(drawn.reason is not None for drawn in events.drawn)
    self._crowded = (self._crowded or bool(events.evicted)) and not ended
    scheduler.set_slots(self._worker.slots)
    clock.prefill += events.prefill_seconds
    clock.decode += events.decode_seconds

  def _job(self, slot: int, rollout: Rollout) -> Job:
    tokens = rollout.prompt + rollout.tokens
    return Job(slot, rollout.uid, tokens, self._max_tokens - len(rollout.tokens))
