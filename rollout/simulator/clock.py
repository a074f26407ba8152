"""Slots that all draw one token a step, and the time that takes: the engine, as far as a schedule can tell.

The engine decodes in dispatches of k steps and the host looks between two of them, as the live driver does.  A slot whose
answer ends inside of a dispatch stays silent to the dispatch's end.  Where nothing ends, many dispatches are one addition:
with n sequences and c tokens in their caches at the start, M steps take

    M step(n) + kv (c M + n M (M - 1) / 2)
"""

import collections

from configs.schema import RolloutConfig
from rollout.simulator.costs import Costs

_MARKS = 50_000  # points of the time line, at most


class Clock:
  """Counts steps, dispatches, prefills and seconds of one schedule; `marks` is [(seconds, slots in use from then on)]."""

  def __init__(self, config: RolloutConfig, costs: Costs):
    self._costs = costs
    self._steps_per_dispatch = config.steps_per_dispatch
    self._prefill_batch = config.prefill_batch
    self._step_seconds = [costs.decode_seconds(active) for active in range(config.slots + 1)]
    self.seconds = 0.0  # since the run began, training included
    self.dispatches = 0
    self.steps = 0
    self.busy = 0  # slot-steps with a sequence, its silent ones included
    self.steps_by_active: collections.Counter[int] = collections.Counter()  # steps, by how many sequences they had
    self.cached = 0  # tokens in the caches of these sequences, summed over the steps
    self.prefill_seconds = 0.0
    self.prefill_calls = 0
    self.prefill_sequences = 0
    self.prefill_tokens = 0
    self.decode_seconds = 0.0
    self.marks: list[tuple[float, int]] = []

  def prefill(self, sequences: int, tokens: int) -> None:
    """`sequences` distinct ones of so many tokens together, at one moment."""
    calls = -(-sequences // self._prefill_batch)
    seconds = calls * self._costs.prefill_call + tokens * self._costs.prefill_per_token
    self.prefill_calls += calls
    self.prefill_sequences += sequences
    self.prefill_tokens += tokens
    self.prefill_seconds += seconds
    self._mark(0)
    self.seconds += seconds

  def decode(self, dispatches: int, active: int, context: int) -> None:
    """`dispatches` of `active` sequences that hold `context` tokens together at the start."""
    steps = dispatches * self._steps_per_dispatch
    cached = context * steps + active * (steps * (steps - 1) // 2)
    seconds = steps * self._step_seconds[active] + self._costs.decode_per_kv_token * cached
    self.steps_by_active[active] += steps
    self.cached += cached
    self.dispatches += dispatches
    self.steps += steps
    self.busy += steps * active
    self.decode_seconds += seconds
    self._mark(active)
    self.seconds += seconds

  def wait(self, seconds: float) -> None:
    """While the trainer has its turn."""
    self._mark(0)
    self.seconds += seconds

  def _mark(self, active: int) -> None:
    if len(self.marks) < _MARKS:
      self.marks.append((self.seconds, active))
