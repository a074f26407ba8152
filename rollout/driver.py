"""The live rollout driver: one C3PO++ iteration on one engine (Ring-1T Algorithm 1; the rules are in scheduler.py).

    until the scheduler says that the iteration is done:
        admit   new prompts while the pool has room
        place   waiting rollouts in free slots: one prefill a distinct token sequence, inserted wherever it is needed
        decode  a few steps for all slots in one dispatch
        record  tokens, log-probs and the weight version; finish what ended

The driver holds device state; every decision is the scheduler's.  What it does is a function of the weights, the
scheduler's state and the prompts it is given: that is what makes a resumed run exact.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from configs.schema import KVPolicy
from ring_jax.records import FinishReason, Rollout
from rollout.engine import DecodeState, Insertion, RingEngine
from rollout.iteration import IterationResult
from rollout.scheduler import C3POScheduler
from sharding import memory

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
  turn: entered for as long as the engine's devices are used; between two dispatches others may have them.
  """

  def __init__(
    self,
    engine: RingEngine,
    scheduler: C3POScheduler,
    turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
  ):
    self._engine, self._scheduler, self._turn = engine, scheduler, turn
    self._keep = engine.config.kv_policy is KVPolicy.KEEP
    self._state: DecodeState | None = engine.init_decode_state() if self._keep else None

  @property
  def state(self) -> DecodeState | None:
    """The engine's cache and all that belongs to it; None while there is none."""
    return self._state

  def prepare(self) -> None:
    """Allocates it, where there is none."""
    if self._state is None:
      self._state = self._engine.init_decode_state()

  @property
  def device_state(self) -> DecodeState | None:
    """What must be saved beside the scheduler's state for an exact resume; None where nothing must."""
    return self._state if self._keep else None

  def restore_device_state(self, state: DecodeState) -> None:
    self._state = state

  def free(self) -> None:
    """Gives the memory back until the next iteration; not where keys and values are kept."""
    if not self._keep:
      memory.free(self._state)
      self._state = None

  def abstract_device_state(self) -> Any:
    """What `device_state` looks like, for a restore; None where nothing is saved."""
    return self._engine.abstract_decode_state() if self._keep else None

  def iterate(
    self,
    params: dict[str, Any],
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
    scheduler.begin_iteration()
    running: dict[int, Rollout] = scheduler.running()  # by slot; empty unless keys and values are kept
    with self._turn():
      self.prepare()
      self._state = self._engine.release(self._state, running)
    while not scheduler.iteration_done:
      self._admit(prompts)
      with self._turn():
        self._dispatch(params, version, running, clock)
      on_ready(scheduler.ready)
      on_progress(clock)
    return scheduler.end_iteration(version if trained is None else trained), clock

  def _dispatch(self, params: dict[str, Any], version: int, running: dict[int, Rollout], clock: Clock) -> None:
    """Fills free slots and decodes a few steps."""
    started = time.perf_counter()
    placed = self._scheduler.place()
    self._place(params, placed)
    running.update(placed)
    clock.prefill += time.perf_counter() - started
    started = time.perf_counter()
    before = len(running)
    clock.tokens += self._decode(params, version, running)
    clock.finished += before - len(running)
    clock.decode += time.perf_counter() - started

  def _admit(self, prompts: PromptSource) -> None:
    wanted = self._scheduler.wanted_groups
    if wanted:
      found = prompts(wanted)
      self._scheduler.admit(found)
      if len(found) < wanted:
        self._scheduler.close()

  def _place(self, params: dict[str, Any], placed: Sequence[tuple[int, Rollout]]) -> None:
    """Prefills each distinct sequence once and inserts it into all of its slots."""
    slots_of: dict[tuple[int, ...], list[tuple[int, Rollout]]] = {}
    for slot, rollout in placed:
      slots_of.setdefault((*rollout.prompt, *rollout.tokens), []).append((slot, rollout))
    # Of like length together, so that a short prompt is not padded to a long one's bucket.
    sequences = sorted(slots_of, key=len)
    size = self._engine.config.prefill_batch
    for first in range(0, len(sequences), size):
      chunk = sequences[first : first + size]
      prefix = self._engine.prefill_batch(params, chunk)
      insertions = [
        Insertion(row, slot, rollout.uid, self._engine.config.max_tokens - len(rollout.tokens))
        for row, sequence in enumerate(chunk)
        for slot, rollout in slots_of[sequence]
      ]
      self._state = self._engine.insert_batch(prefix, self._state, insertions)

  def _decode(self, params: dict[str, Any], version: int, running: dict[int, Rollout]) -> int:
    """One dispatch; rollouts that ended leave `running`.  Returns how many tokens were drawn."""
    config = self._engine.config
    self._state, drawn = self._engine.decode(params, self._state, config.steps_per_dispatch)
    token_NxB, logp_NxB, valid_NxB = jax.device_get(drawn)
    counts_B = valid_NxB.sum(axis=0)
    for slot in sorted(running):
      rollout, count = running[slot], int(counts_B[slot])
      tokens = token_NxB[:count, slot].tolist()
      self._scheduler.record(rollout.uid, tokens, logp_NxB[:count, slot].tolist(), version)
      reason = self._finish_reason(rollout)
      if reason is not None:
        self._scheduler.finish(rollout.uid, reason)
        del running[slot]
    return int(counts_B.sum())

  def _finish_reason(self, rollout: Rollout) -> FinishReason | None:
    if rollout.tokens and rollout.tokens[-1] in self._engine.eos_ids:
      return FinishReason.STOP
    if len(rollout.tokens) >= self._engine.config.max_tokens:
      return FinishReason.LENGTH
    return None
