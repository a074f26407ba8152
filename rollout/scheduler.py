"""C3PO++: which rollouts run, wait, are trained on or are given up (Ring-1T section 2.3.3, Algorithm 1).

    P_infer <- {};  Q_train <- {}
    while not converged:                                          one turn: begin_iteration ... end_iteration
      C <- 0
      P_infer <- P_infer \\ {o : retention(o) > sigma}             begin_iteration
      while C < Phi:                                              iteration_done
        refill P_infer with new prompts up to Omega_infer         wanted_groups, admit
        decode for all o in P_infer                               place, record
        if terminal(o):  C <- C + |o|,  Q_train <- Q_train + o,  P_infer <- P_infer \\ o         finish
      theta <- Update(theta, Q_train);  Q_train <- {}             end_iteration returns Q_train
      retention(o) <- retention(o) + 1 for what is left in P_infer

The schedules that it is compared with are other rules for the same states (`configs.schema.RolloutSchedule`): a batch is let
in at once, the iteration ends with so many complete groups, and what is unfinished then goes on or is lost.

What the algorithm leaves open is settled by the enums of `configs.schema.RolloutConfig`; docs/scheduler.md gives the
reasons.  A prompt always enters as a group of G rollouts, since advantages are relative to siblings.

This is a pure state machine: no clock, no randomness, no arrays.  The live driver and the simulator run the same code
and so take the same decisions.  Work is O(log slots) an event plus O(pool) an iteration, never O(all rollouts).
"""

import collections
import dataclasses
import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from configs.schema import BudgetCounts, KVPolicy, OnPurge, RetentionCounts, RolloutConfig, RolloutSchedule, Unit
from ring_jax.records import FinishReason, Rollout
from rollout.iteration import Counts, IterationResult, dump


class SchedulerError(ValueError):
  """A call that the scheduler's state does not allow; the message is one line."""


@dataclasses.dataclass
class _Group:
  """A prompt's rollouts, from admission until the last one ended."""

  unfinished: int
  finished: list[Rollout]


class C3POScheduler:
  """Algorithm 1 as a state machine; every method raises `SchedulerError` when it is called out of turn.

  A rollout is in exactly one place: in the pool (waiting or in a slot), in the group buffer (ended, a sibling has not),
  in Q_train, or gone (trained on, dropped, aborted).

  Args:
    config: the rules.
    rollout_type: what a rollout is; the simulator's has a length and no content.
  """

  def __init__(self, config: RolloutConfig, rollout_type: type[Rollout] = Rollout):
    self._config = config
    self._rollout_type = rollout_type
    self._iteration = 0  # iterations that have ended
    self._inside = False  # between begin_iteration and end_iteration
    self._closed = False  # no more prompts will come
    self._next_uid = 0
    self._next_group = 0
    self._counted = 0  # C
    self._to_launch = 0  # prompts that a batch still lets in, in this iteration
    self._ready_groups = 0  # groups in Q_train
    self._pool: dict[int, Rollout] = {}  # P_infer, in the order of uids
    self._waiting: collections.deque[int] = collections.deque()  # uids without a slot, oldest first; some may have left
    self._slot_of: dict[int, int] = {}
    self._slots: frozenset[int] = frozenset(range(config.slots))
    self._free: list[int] = sorted(self._slots)  # a heap
    self._groups: dict[int, _Group] = {}  # Unit.GROUP only
    self._ready: list[Rollout] = []  # Q_train
    self._purged: list[Rollout] = []  # by the iteration's begin
    self._counts = Counts()  # of the iteration
    self._totals = Counts()  # of those that have ended

  # -------------------------------------------------------------------------------------------------------------------
  # What the caller asks

  @property
  def iteration(self) -> int:
    """How many iterations have ended."""
    return self._iteration

  @property
  def counted(self) -> int:
    """C: tokens counted against the budget in this iteration."""
    return self._counted

  @property
  def in_flight(self) -> int:
    """|P_infer|: unfinished rollouts, in slots and waiting."""
    return len(self._pool)

  @property
  def buffered(self) -> int:
    """Finished rollouts that wait, outside of the pool, for a sibling to end."""
    return sum(len(group.finished) for group in self._groups.values())

  @property
  def closed(self) -> bool:
    return self._closed

  @property
  def totals(self) -> Counts:
    """Counts of the whole run up to now."""
    totals = Counts()
    totals.add(self._totals)
    totals.add(self._counts)
    return totals

  @property
  def ready(self) -> Sequence[Rollout]:
    """Q_train so far, in the order in which rollouts came to it."""
    return self._ready

  @property
  def iteration_done(self) -> bool:
    """Whether the budget is spent and there is something to train on, or nothing is left to do."""
    if self._closed and not self._pool:
      return True
    if self._in_batches:
      nothing_left = not self._pool and not self._to_launch  # where others aborted it
      return self._ready_groups >= self._config.batch_groups or nothing_left
    return self._counted >= self._config.token_budget and bool(self._ready)

  @property
  def wanted_groups(self) -> int:
    """How many prompts fit: whole groups only, so that the pool never exceeds its capacity."""
    if self._closed:
      return 0
    room = (self._config.pool - len(self._pool)) // self._config.group_size
    return min(room, self._to_launch) if self._in_batches else room

  def running(self) -> dict[int, Rollout]:
    """The rollouts in slots, by slot, in the order of slots."""
    return {slot: self._pool[uid] for slot, uid in sorted((slot, uid) for uid, slot in self._slot_of.items())}

  @property
  def slots(self) -> frozenset[int]:
    """Those that there are."""
    return self._slots

  def unfinished(self) -> list[Rollout]:
    """P_infer, by uid of admission."""
    return list(self._pool.values())

  # -------------------------------------------------------------------------------------------------------------------
  # An iteration

  def begin_iteration(self) -> list[Rollout]:
    """Opens an iteration: C <- 0, and rollouts with retention > sigma are purged.

    Returns:
      The purged rollouts by uid, as they were.  Under REQUEUE these are copies: the rollouts themselves start again.
    """
    if self._inside:
      raise SchedulerError(f"begin_iteration: iteration {self._iteration} has not ended")
    self._inside = True
    self._counted = self._ready_groups = 0
    expired = [rollout for rollout in self._pool.values() if rollout.retention > self._config.retention]
    self._purged = [self._purge(rollout) for rollout in expired]
    self._rebuild_waiting()
    self._to_launch = max(0, self._config.launched - len(self._groups)) if self._in_batches else 0
    return list(self._purged)

  def admit(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> list[Rollout]:
    """Takes prompts into the pool, `group_size` rollouts each.

    Args:
      prompts: (problem index, token ids), at most `wanted_groups` of them.

    Returns:
      The new rollouts, in the order of prompts.
    """
    self._require_inside("admit")
    if len(prompts) > self.wanted_groups:
      raise SchedulerError(f"admit: {len(prompts)} prompts, but wanted_groups is {self.wanted_groups}")
    admitted = []
    for problem, prompt in prompts:
      group, self._next_group = self._next_group, self._next_group + 1
      ids = list(prompt)  # one list for the whole group: nobody writes to a prompt
      if self._config.unit is Unit.GROUP:
        self._groups[group] = _Group(self._config.group_size, [])
      for _ in range(self._config.group_size):
        rollout = self._rollout_type(uid=self._next_uid, group=group, problem=problem, prompt=ids)
        self._pool[rollout.uid] = rollout
        self._waiting.append(rollout.uid)  # the youngest of all: the queue stays in order
        admitted.append(rollout)
        self._next_uid += 1
    if self._in_batches:
      self._to_launch -= len(prompts)
    return admitted

  def close(self) -> None:
    """Says that no more prompts will come: what is in flight runs to its end."""
    self._closed = True

  def place(self) -> list[tuple[int, Rollout]]:
    """Puts waiting rollouts into free slots: highest retention first, then lowest uid; lowest slot first.

    Returns:
      (slot, rollout) of those placed now.  One that was interrupted comes with the tokens that it has.
    """
    self._require_inside("place")
    placed = []
    while self._free and self._waiting:
      uid = self._waiting.popleft()
      if uid in self._pool:  # else it was aborted while it waited
        slot = self._slot_of[uid] = heapq.heappop(self._free)
        placed.append((slot, self._pool[uid]))
    return placed

  def record(
    self, uid: int, tokens: Sequence[int], logps: Sequence[float], version: int, experts: Sequence[bytes] = ()
  ) -> None:
    """Appends tokens that the weights `version` sampled, with their log-probs, and their experts where those are recorded."""
    rollout = self._require_running("record", uid)
    if len(tokens) != len(logps):
      raise SchedulerError(f"record: rollout {uid} got {len(tokens)} tokens but {len(logps)} log-probs")
    if experts and len(experts) != len(tokens):
      raise SchedulerError(f"record: rollout {uid} got {len(tokens)} tokens but the experts of {len(experts)}")
    rollout.extend(tokens, logps, version, experts)
    self._counts.generated += len(tokens)
    if self._config.budget_counts is BudgetCounts.GENERATED:
      self._counted += len(tokens)

  def finish(self, uid: int, reason: FinishReason) -> None:
    """Ends a rollout and frees its slot.

    Args:
      uid: of a rollout in a slot; with ABORTED also of a waiting one.
      reason: STOP, LENGTH or CACHE: it goes on to training.  ABORTED: it is forgotten, and its group completes without it.
    """
    if reason is FinishReason.PURGED:
      raise SchedulerError(f"finish: rollout {uid} cannot be purged by the caller; begin_iteration does that")
    if reason is FinishReason.ABORTED:
      rollout = self._require_unfinished("finish", uid)
      self._counts.aborted += 1
      self._forget(rollout, reason)
      return
    rollout = self._require_running("finish", uid)
    if not rollout.length:
      raise SchedulerError(f"finish: rollout {uid} has no token (abort it instead)")
    self._complete(rollout, reason)

  def evict(self, uid: int) -> None:
    """Takes a rollout out of its slot; it waits for another one with what it has, in its turn by age."""
    self._require_running("evict", uid)
    self._counts.evicted += 1
    self._free_slot(uid)
    self._rebuild_waiting()

  def set_slots(self, slots: Collection[int]) -> None:
    """Says which slots there are.  Those that are new are free; what ran in one that is gone waits for another.

    A rollout goes on once: one that loses a second slot is aborted, as it may be what ends the workers.
    """
    slots = frozenset(slots)
    if slots == self._slots:
      return
    gone = self._slots - slots
    self._slots = slots
    for uid in [uid for uid, slot in self._slot_of.items() if slot in gone]:
      rollout = self._pool[uid]
      rollout.losses += 1
      if rollout.losses > 1:
        self._counts.aborted += 1
        self._forget(rollout, FinishReason.ABORTED)
      else:
        self._counts.redispatched += 1
        self._slot_of.pop(uid)
    self._free = sorted(slots - set(self._slot_of.values()))
    self._rebuild_waiting()

  def end_iteration(self, version: int) -> IterationResult:
    """Closes the iteration and hands over Q_train; what is unfinished ages by one and stays in the pool.

    It may be called before `iteration_done`: the iteration is then a short one.

    Args:
      version: of the weights that are about to be updated; a token's staleness is this minus its own version.
    """
    self._require_inside("end_iteration")
    rollouts = sorted(self._ready, key=lambda rollout: rollout.uid)
    self._count_trained(rollouts, version)
    if self._config.schedule is RolloutSchedule.OVERSAMPLE_DISCARD:
      self._discard_unfinished()
    every = self._config.retention_counts is RetentionCounts.ITERATIONS
    for rollout in self._pool.values():
      if every or rollout.length:
        rollout.retention += 1
    if self._config.kv_policy is KVPolicy.RECOMPUTE:
      self._slot_of = {}
      self._free = sorted(self._slots)
    result = IterationResult(
      iteration=self._iteration,
      version=version,
      rollouts=rollouts,
      purged=self._purged,
      counted=self._counted,
      counts=self._counts,
      in_flight=self.in_flight,
      buffered=self.buffered,
    )
    self._totals.add(self._counts)
    self._counts, self._ready, self._purged = Counts(), [], []
    self._iteration += 1
    self._inside = False
    return result

  # -------------------------------------------------------------------------------------------------------------------
  # State

  def state_dict(self) -> dict[str, Any]:
    """Everything that decides the future, as plain JSON data that shares nothing with the scheduler.

    What is derived is left out: the waiting queue (the pool's rollouts without a slot, by age) and the free slots.
    """
    return {
      "shape": self._shape(),
      "iteration": self._iteration,
      "inside": self._inside,
      "closed": self._closed,
      "next_uid": self._next_uid,
      "next_group": self._next_group,
      "counted": self._counted,
      "to_launch": self._to_launch,
      "pool": dump(self._pool.values()),
      "slots": sorted([slot, uid] for uid, slot in self._slot_of.items()),
      "groups": [
        {"group": group, "unfinished": state.unfinished, "finished": dump(state.finished)}
        for group, state in self._groups.items()
      ],
      "ready": dump(self._ready),
      "purged": dump(self._purged),
      "counts": self._counts.to_dict(),
      "totals": self._totals.to_dict(),
    }

  def load_state_dict(self, state: Mapping[str, Any]) -> None:
    """Continues from a saved state; every later decision is the one that the saved scheduler would have taken."""
    for name, value in self._shape().items():
      if state["shape"][name] != value:
        raise SchedulerError(f"load_state_dict: saved with rollout.{name}={state['shape'][name]}, not {value}")
    self._iteration, self._inside, self._closed = state["iteration"], state["inside"], state["closed"]
    self._next_uid, self._next_group = state["next_uid"], state["next_group"]
    self._counted, self._to_launch = state["counted"], state["to_launch"]
    self._pool = {rollout.uid: rollout for rollout in self._load(state["pool"])}
    self._slot_of = {uid: slot for slot, uid in state["slots"]}
    self._slots |= set(self._slot_of.values())  # until `set_slots` says that they are gone
    self._free = sorted(self._slots - set(self._slot_of.values()))
    self._groups = {
      entry["group"]: _Group(entry["unfinished"], self._load(entry["finished"])) for entry in state["groups"]
    }
    self._ready, self._purged = self._load(state["ready"]), self._load(state["purged"])
    self._ready_groups = len({rollout.group for rollout in self._ready})
    self._counts, self._totals = Counts.from_dict(state["counts"]), Counts.from_dict(state["totals"])
    self._rebuild_waiting()

  def _load(self, entries: Iterable[Mapping[str, Any]]) -> list[Rollout]:
    """Rollouts with lists of their own, so that one saved state can be loaded twice."""
    return [
      self._rollout_type.from_dict(
        {name: list(value) if isinstance(value, list) else value for name, value in entry.items()}
      )
      for entry in entries
    ]

  def _shape(self) -> dict[str, Any]:
    """What a state depends on: one that was saved under other values does not fit."""
    config = self._config
    return {"slots": config.slots, "pool": config.pool, "group_size": config.group_size, "unit": config.unit.value}

  # -------------------------------------------------------------------------------------------------------------------
  # The rules

  @property
  def _in_batches(self) -> bool:
    return self._config.schedule is not RolloutSchedule.C3PO

  def _discard_unfinished(self) -> None:
    """What is late for its batch is lost, and its finished siblings with it."""
    late = list(self._pool.values())
    for rollout in late:
      self._leave_pool(rollout, FinishReason.ABORTED)
    late += [rollout for group in self._groups.values() for rollout in group.finished]
    self._groups.clear()
    for rollout in late:
      self._counts.aborted += 1
      self._waste(rollout)

  def _purge(self, rollout: Rollout) -> Rollout:
    """Applies `on_purge`; returns the rollout as it was."""
    policy = self._config.on_purge
    if policy is OnPurge.REQUEUE:
      before = dataclasses.replace(rollout, finish_reason=FinishReason.PURGED)
      self._counts.requeued += 1
      self._waste(rollout)
      rollout.restart()
      rollout.retention = 0
      self._free_slot(rollout.uid)
      return before
    if policy is OnPurge.TRAIN and rollout.length:  # one that never got a slot has nothing to train on
      self._counts.cut += 1
      self._complete(rollout, FinishReason.PURGED)
      return rollout
    self._counts.dropped += 1
    self._forget(rollout, FinishReason.PURGED)
    return rollout

  def _complete(self, rollout: Rollout, reason: FinishReason) -> None:
    """To Q_train, or to the group buffer until the last sibling has ended."""
    self._leave_pool(rollout, reason)
    self._counts.finished += 1
    self._counts.lengths_finished[rollout.length] += 1
    if self._config.budget_counts is BudgetCounts.COMPLETED:
      self._counted += rollout.length
    if self._config.unit is Unit.ROLLOUT:
      self._ready.append(rollout)
    else:
      self._leave_group(rollout.group, [rollout])

  def _forget(self, rollout: Rollout, reason: FinishReason) -> None:
    self._leave_pool(rollout, reason)
    self._waste(rollout)
    if self._config.unit is Unit.GROUP:
      self._leave_group(rollout.group, [])

  def _leave_pool(self, rollout: Rollout, reason: FinishReason) -> None:
    rollout.finish_reason = reason
    del self._pool[rollout.uid]
    self._free_slot(rollout.uid)

  def _free_slot(self, uid: int) -> None:
    slot = self._slot_of.pop(uid, None)
    if slot is not None:
      heapq.heappush(self._free, slot)

  def _leave_group(self, uid: int, finished: list[Rollout]) -> None:
    """One more member has ended; a group without unfinished members is complete, with those that it still has."""
    group = self._groups[uid]
    group.unfinished -= 1
    group.finished.extend(finished)
    if group.unfinished == 0:
      self._ready.extend(group.finished)
      self._ready_groups += bool(group.finished)
      del self._groups[uid]

  def _waste(self, rollout: Rollout) -> None:
    self._counts.wasted += rollout.length
    self._counts.lengths_wasted[rollout.length] += 1

  def _count_trained(self, rollouts: list[Rollout], version: int) -> None:
    counts = self._counts
    counts.trained_rollouts = len(rollouts)
    counts.trained_groups = len({rollout.group for rollout in rollouts})
    for rollout in rollouts:
      staleness, oldest = rollout.staleness(version)
      counts.trained += rollout.length
      counts.lengths_trained[rollout.length] += 1
      counts.staleness_sum += staleness
      counts.max_staleness = max(counts.max_staleness, oldest)

  def _rebuild_waiting(self) -> None:
    """Once an iteration, since ageing may change the order; admissions keep it."""
    waiting = (rollout for rollout in self._pool.values() if rollout.uid not in self._slot_of)
    self._waiting = collections.deque(
      rollout.uid for rollout in sorted(waiting, key=lambda rollout: (-rollout.retention, rollout.uid))
    )

  def _require_inside(self, call: str) -> None:
    if not self._inside:
      raise SchedulerError(f"{call}: no iteration is open; begin_iteration comes first")

  def _require_unfinished(self, call: str, uid: int) -> Rollout:
    self._require_inside(call)
    rollout = self._pool.get(uid)
    if rollout is None:
      known = "has ended already" if 0 <= uid < self._next_uid else "was never admitted"
      raise SchedulerError(f"{call}: rollout {uid} {known}")
    return rollout

  def _require_running(self, call: str, uid: int) -> Rollout:
    rollout = self._require_unfinished(call, uid)
    if uid not in self._slot_of:
      raise SchedulerError(f"{call}: rollout {uid} is waiting; place() gives it a slot")
    return rollout
