"""The two schedules that C3PO++ is measured against, over the same slots and at the same prices.

    launch     groups begun earlier, oldest first, then new prompts, until `launched` groups are under way
    decode     continuous batching: the next waiting rollout takes a free slot
    stop       once `wanted` groups are complete, with whatever else ended in that dispatch
    abort      what is unfinished, by `on_abort`
    train      on the complete groups

`launched` = `wanted` is the synchronous batch: nothing is left to abort, and the longest answer is waited for.  More is
over-sampling: with `resume` what was aborted goes on under the next weights, as in APRIL; with `discard` it is lost, its
finished siblings included, and so are, mostly, the long answers.
"""

import collections
import heapq

from configs.schema import Enum, RolloutConfig
from rollout.simulator.clock import Clock
from rollout.simulator.costs import Costs
from rollout.simulator.lengths import Trace
from rollout.simulator.outcome import Outcome, Recorder, Runs


class OnAbort(Enum):
  RESUME = "resume"
  DISCARD = "discard"


def synchronous(trace: Trace, config: RolloutConfig, costs: Costs, groups: int) -> Outcome:
  """Batches of so many groups."""
  return _Batches("synchronous", trace, config, costs, groups, groups, OnAbort.RESUME).run()


def oversampled(
  trace: Trace, config: RolloutConfig, costs: Costs, wanted: int, launched: int, on_abort: OnAbort
) -> Outcome:
  """Batches of `wanted` groups out of `launched`."""
  return _Batches(f"oversample_{on_abort.value}", trace, config, costs, wanted, launched, on_abort).run()


class _Batches:
  def __init__(
    self,
    schedule: str,
    trace: Trace,
    config: RolloutConfig,
    costs: Costs,
    wanted: int,
    launched: int,
    on_abort: OnAbort,
  ):
    if not 1 <= wanted <= launched:
      raise ValueError(f"{wanted} groups wanted of {launched} launched: from 1 to as many as are launched")
    self._trace, self._config = trace, config
    self._wanted, self._launched, self._on_abort = wanted, launched, on_abort
    self._clock = Clock(config, costs)
    self._recorder = Recorder(schedule, config.slots, costs, self._clock)
    self._cursor = 0  # groups that have entered
    self._begun: list[int] = []  # groups that were aborted and will go on, oldest first
    self._runs: dict[int, Runs] = {}  # of rollouts that have tokens, by uid
    self._unfinished: dict[int, int] = {}  # members of a group under way that have not ended

  def run(self) -> Outcome:
    version, outcome, size, lost = 0, self._recorder.outcome, self._trace.group_size, 0
    while self._begun or self._cursor < self._trace.groups:
      launched = self._launch()
      if self._cursor == self._trace.groups and outcome.fed is None:
        outcome.fed = version
      complete, generated = self._decode(launched, version)
      left = sorted(self._unfinished)
      wasted = 0
      if self._on_abort is OnAbort.DISCARD:
        wasted = sum(self._forget(uid) for group in left for uid in self._members(group))
        lost += size * len(left)
        self._unfinished.clear()
        left = []
      self._begun = left
      trained = [(self._trace.lengths[uid], self._runs.pop(uid)) for group in complete for uid in self._members(group)]
      self._recorder.end(version, trained, generated, wasted, sum(self._unfinished.values()))
      version += 1
    return self._recorder.close(lost)

  def _members(self, group: int) -> range:
    return range(group * self._trace.group_size, (group + 1) * self._trace.group_size)

  def _forget(self, uid: int) -> int:
    return sum(tokens for _, tokens in self._runs.pop(uid, []))

  def _drawn(self, uid: int) -> int:
    return sum(tokens for _, tokens in self._runs.get(uid, []))

  def _launch(self) -> list[int]:
    """The groups of this iteration, in the order in which they get slots."""
    fresh = range(self._cursor, min(self._trace.groups, self._cursor + max(0, self._launched - len(self._begun))))
    self._cursor = fresh.stop if fresh else self._cursor
    self._unfinished.update(dict.fromkeys(fresh, self._trace.group_size))
    return [*self._begun, *fresh]

  def _decode(self, launched: list[int], version: int) -> tuple[list[int], int]:
    """Decodes until enough groups are complete; returns these, and how many tokens were drawn."""
    lengths, prompts, clock, k = self._trace.lengths, self._trace.prompts, self._clock, self._config.steps_per_dispatch
    drawn = {uid: self._drawn(uid) for group in launched for uid in self._members(group)}
    waiting = collections.deque(uid for uid, tokens in drawn.items() if tokens < lengths[uid])
    ends: list[tuple[int, int]] = []  # a heap: dispatch, uid
    since: dict[int, int] = {}  # of those in slots: the dispatch at which they began
    held = generated = 0  # held: sum of prompt + length - k since
    complete: list[int] = []
    target = min(self._wanted, len(launched))

    def stop(uid: int, tokens: int) -> None:
      nonlocal held, generated
      held -= prompts[uid] + drawn[uid] - k * since.pop(uid)
      generated += tokens
      if tokens:
        self._runs.setdefault(uid, []).append((version, tokens))

    while len(complete) < target:
      placed = [waiting.popleft() for _ in range(min(len(waiting), self._config.slots - len(since)))]
      if placed:
        self._prefill(placed, drawn)
      now = clock.dispatches
      for uid in placed:
        heapq.heappush(ends, (now - (drawn[uid] - lengths[uid]) // k, uid))
        since[uid] = now
        held += prompts[uid] + drawn[uid] - k * now
      moment = ends[0][0]
      clock.decode(moment - now, len(since), held + k * len(since) * now)
      while ends and ends[0][0] == moment:
        uid = heapq.heappop(ends)[1]
        stop(uid, lengths[uid] - drawn[uid])
        group = uid // self._trace.group_size
        self._unfinished[group] -= 1
        if not self._unfinished[group]:
          del self._unfinished[group]
          complete.append(group)
    for uid, begun in list(since.items()):
      stop(uid, k * (clock.dispatches - begun))
    return sorted(complete), generated

  def _prefill(self, placed: list[int], drawn: dict[int, int]) -> None:
    """One prefill a distinct sequence; siblings that begin together share the prompt's."""
    prompts, size = self._trace.prompts, self._trace.group_size
    fresh = {(uid // size, prompts[uid]) for uid in placed if not drawn[uid]}
    begun = [prompts[uid] + drawn[uid] for uid in placed if drawn[uid]]
    self._clock.prefill(len(fresh) + len(begun), sum(prompt for _, prompt in fresh) + sum(begun))
