"""A schedule over a trace: the scheduler of the live driver, and time instead of an engine.

    as rollout/driver.py:  begin_iteration; until the iteration is done: admit, place, decode, record, finish; end_iteration

The driver looks at its rollouts after every dispatch.  Nothing can change between two looks unless an answer ends or the
budget is spent, so the simulation goes from one such moment to the next and tells the scheduler of a rollout's tokens when
it ends, when the budget is spent, and when the iteration ends.  At every moment at which the scheduler is asked anything
that depends on tokens it has been told of all of them: decisions are those of the driver, dispatch by dispatch
(tests/rollout/test_simulator.py compares the two).
"""

import dataclasses
import heapq
import sys
from collections.abc import Sequence
from typing import Any

from configs.schema import BudgetCounts, RolloutConfig, RolloutSchedule, Unit
from ring_jax.records import FinishReason, Rollout
from rollout import events
from rollout.events import EventLog
from rollout.iteration import IterationResult
from rollout.scheduler import C3POScheduler
from rollout.simulator.clock import Clock
from rollout.simulator.costs import Costs
from rollout.simulator.lengths import Trace
from rollout.simulator.outcome import Outcome, Recorder, Runs


@dataclasses.dataclass
class CountedRollout(Rollout):
  """A rollout without content: how many tokens it has, and which version drew how many."""

  length: int = 0
  runs: Runs = dataclasses.field(default_factory=list)

  def extend(self, tokens: Sequence[int], logps: Sequence[float], version: int, experts: Sequence[bytes] = ()) -> None:
    count, runs = len(tokens), self.runs
    self.length += count
    if runs and runs[-1][0] == version:
      runs[-1] = (version, runs[-1][1] + count)
    else:
      runs.append((version, count))

  def restart(self) -> None:
    self.length, self.runs = 0, []

  def staleness(self, version: int) -> tuple[int, int]:
    runs = self.runs
    return sum((version - drawn_by) * count for drawn_by, count in runs), version - runs[0][0]


def in_batches(config: RolloutConfig, schedule: RolloutSchedule, groups: int, launched: int = 0) -> RolloutConfig:
  """The same slots under a schedule of batches; what is resumed is never purged."""
  return dataclasses.replace(
    config,
    schedule=schedule,
    batch_groups=groups,
    launch_groups=launched,
    pool=0,
    unit=Unit.GROUP,
    retention=sys.maxsize,
  )


def groups_of_budget(trace: Trace, config: RolloutConfig) -> int:
  """Groups of a batch that makes as many tokens an update as C3PO++'s budget."""
  return max(1, round(config.token_budget / (trace.mean * trace.group_size)))


class Simulation:
  """`iterate` runs one iteration; `run` all of them, to the end of the trace.

  Args:
    log: written as a driver's, on the clock of the simulation, but for one dispatch where many decide nothing; None: not.
  """

  def __init__(self, trace: Trace, config: RolloutConfig, costs: Costs, log: EventLog | None = None):
    if trace.group_size != config.group_size:
      raise ValueError(f"a trace of groups of {trace.group_size}, a scheduler of groups of {config.group_size}")
    self.scheduler = C3POScheduler(config, CountedRollout)
    self.clock = Clock(config, costs)
    self.ended: dict[int, int] = {}  # by uid: the dispatch after which it ended
    self._recorder = Recorder(config.schedule.value, config.slots, costs, self.clock)
    self._trace, self._config = trace, config
    self._by_tokens = config.schedule is RolloutSchedule.C3PO and config.budget_counts is BudgetCounts.GENERATED
    self._cursor = 0  # prompts that have entered
    # Of the rollouts in slots.  A rollout's tokens are recorded up to the dispatch in _since; with k steps a dispatch it
    # holds prompt + length + k (now - since) tokens by now.
    self._ends: list[tuple[int, int, CountedRollout]] = []  # a heap: dispatch, slot, rollout
    self._since: dict[int, int] = {}  # by uid
    self._since_sum = 0
    self._held = 0  # sum of prompt + length - k since
    self._log = log
    self._drawn: list[list[Any]] = []  # what the log has not been told of
    self._decoded = 0.0  # seconds of decoding that it has been told of

  def run(self) -> Outcome:
    outcome = self._recorder.outcome
    scheduler = self.scheduler
    while self._cursor < self._trace.groups or scheduler.in_flight:
      result = self.iterate()
      if scheduler.closed and outcome.fed is None:
        outcome.fed = result.iteration
      self._recorder.end(
        result.version,
        ((rollout.length, rollout.runs) for rollout in result.rollouts),
        result.counts.generated, result.counts.wasted, result.in_flight,
      )  # fmt: skip
    totals = scheduler.totals
    return self._recorder.close(totals.dropped + totals.aborted)

  def iterate(self) -> IterationResult:
    scheduler = self.scheduler
    version = scheduler.iteration
    purged = scheduler.begin_iteration()
    if self._log:
      running = [[slot, rollout.uid] for slot, rollout in scheduler.running().items()]
      slots = list(range(self._config.slots))
      self._log.write(events.Begin(version, version, slots, running, [rollout.uid for rollout in purged]))
    self._ends, self._since, self._since_sum, self._held = [], {}, 0, 0
    for slot, rollout in scheduler.running().items():  # none unless keys and values are kept
      self._start(slot, rollout)
    while not self._done(version):
      self._tell_drawn()
      self._admit()
      placed = scheduler.place()
      if self._log:
        self._log.write(events.Place([[slot, rollout.uid] for slot, rollout in placed]))
      if placed:
        self._prefill(placed)
        for slot, rollout in placed:
          self._start(slot, rollout)
      if self._ends:  # nothing is in a slot where the prompts have just run out
        self._advance(version)
    self._record_all(version)
    self._tell_drawn()
    done, result = scheduler.iteration_done, scheduler.end_iteration(version)
    if self._log:
      uids = [rollout.uid for rollout in result.rollouts]
      self._log.write(events.End(version, version, done, result.counted, uids, result.in_flight, result.buffered))
    return result

  def _done(self, version: int) -> bool:
    scheduler = self.scheduler
    if self._by_tokens and scheduler.counted < self._config.token_budget <= scheduler.counted + self._pending():
      self._record_all(version)
    return scheduler.iteration_done

  def _admit(self) -> None:
    wanted = self.scheduler.wanted_groups
    if wanted:
      end = min(self._cursor + wanted, self._trace.groups)
      self.scheduler.admit([(group, ()) for group in range(self._cursor, end)])
      if self._log:
        size, prompts = self._trace.group_size, self._trace.prompts
        self._log.write(events.Admit(wanted, [[group, prompts[group * size]] for group in range(self._cursor, end)]))
      if end < self._cursor + wanted:
        self.scheduler.close()
      self._cursor = end

  def _prefill(self, placed: list[tuple[int, CountedRollout]]) -> None:
    """One prefill a distinct sequence; siblings that begin together share the prompt's."""
    prompts = self._trace.prompts
    fresh: set[tuple[int, int]] = set()
    sequences = tokens = 0
    for _, rollout in placed:
      prompt = prompts[rollout.uid]
      if rollout.length:
        sequences += 1
        tokens += prompt + rollout.length
      elif (rollout.group, prompt) not in fresh:
        fresh.add((rollout.group, prompt))
        sequences += 1
        tokens += prompt
    self.clock.prefill(sequences, tokens)

  def _start(self, slot: int, rollout: CountedRollout) -> None:
    uid, now, k = rollout.uid, self.clock.dispatches, self._config.steps_per_dispatch
    left = self._trace.lengths[uid] - rollout.length
    heapq.heappush(self._ends, (now - (-left // k), slot, rollout))
    self._since[uid] = now
    self._since_sum += now
    self._held += self._trace.prompts[uid] + rollout.length - k * now

  def _pending(self) -> int:
    """Tokens in slots that the scheduler has not been told of; nothing ends before the present moment."""
    return self._config.steps_per_dispatch * (len(self._since) * self.clock.dispatches - self._since_sum)

  def _advance(self, version: int) -> None:
    """To the next dispatch after which an answer ended or, where tokens count as they are drawn, the budget is spent."""
    clock, scheduler, ends, k = self.clock, self.scheduler, self._ends, self._config.steps_per_dispatch
    active, now, target = len(self._since), clock.dispatches, ends[0][0]
    missing = self._config.token_budget - scheduler.counted
    if self._by_tokens and missing > 0:
      target = min(target, -(-(missing + k * self._since_sum) // (k * active)))
    clock.decode(target - now, active, self._held + k * active * now)
    while ends and ends[0][0] == target:  # in the order of slots, as in the driver
      _, slot, rollout = heapq.heappop(ends)
      uid = rollout.uid
      since = self._since.pop(uid)
      self._since_sum -= since
      self._held -= self._trace.prompts[uid] + rollout.length - k * since
      drawn = range(self._trace.lengths[uid] - rollout.length)
      scheduler.record(uid, drawn, drawn, version)
      scheduler.finish(uid, FinishReason.STOP)
      self.ended[uid] = target
      if self._log:
        self._drawn.append([slot, uid, len(drawn), version, FinishReason.STOP.value])

  def _record_all(self, version: int) -> None:
    """Tells the scheduler of everything drawn so far."""
    now, k = self.clock.dispatches, self._config.steps_per_dispatch
    if self._log:
      slot_of = {rollout.uid: slot for slot, rollout in self.scheduler.running().items()}
    for uid, since in self._since.items():
      drawn = range(k * (now - since))
      if drawn:
        self.scheduler.record(uid, drawn, drawn, version)
        self._since[uid] = now
        if self._log:
          self._drawn.append([slot_of[uid], uid, len(drawn), version, None])
    self._since_sum = now * len(self._since)

  def _tell_drawn(self) -> None:
    """One event for all that was drawn since the last placement."""
    decoded = self.clock.decode_seconds - self._decoded
    if self._log and (self._drawn or decoded):
      self._log.write(events.Draw(0.0, decoded, self._drawn))
      self._drawn, self._decoded = [], self.clock.decode_seconds
