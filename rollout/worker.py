"""What decodes: an engine and its slots, as a rollout driver or a server sees them.

Between two dispatches a worker is told what to do, and says what came of the last one:

    advance(jobs):  new jobs into their slots: one prefill a distinct token sequence, inserted wherever it is needed
                    a few decode steps for all slots in one dispatch
                    -> what was drawn; which slots ended, and why; which gave their job back

`Worker` is all that a driver knows.  `EngineWorker` is an engine of this process: what it does is a function of the weights
and the jobs it is given.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from configs.schema import KVPolicy
from ring_jax.records import FinishReason
from ring_jax.rl.replay import encode
from rollout.engine import DecodeState, Insertion, RingEngine, Sampling
from sharding import memory


@dataclasses.dataclass(frozen=True)
class Job:
  """A token sequence to go on with, in a slot that is free."""

  slot: int
  uid: int  # keys the samples, with the position
  tokens: Sequence[int]  # the prompt, and what has been drawn before
  max_tokens: int  # it may still draw, at least 1
  sampling: Sampling | None = None  # None: as the engine's config says


class Drawn(NamedTuple):
  """What one dispatch drew in one slot."""

  slot: int
  uid: int
  tokens: list[int]
  logps: list[float]
  version: int  # of the weights
  reason: FinishReason | None  # STOP, LENGTH or CACHE: the slot is free again
  experts: Sequence[bytes] = ()  # one a token (`ring_jax.rl.replay`); empty: they are not recorded


@dataclasses.dataclass
class Events:
  """What came of one `advance`."""

  drawn: list[Drawn] = dataclasses.field(default_factory=list)
  evicted: list[int] = dataclasses.field(default_factory=list)  # slots that gave their job back, for want of cache
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0


class Worker(Protocol):
  """Slots that decode."""

  @property
  def slots(self) -> Collection[int]:
    """Those that there are.  One that is missing now is gone with what ran in it, and one that is new is free."""
    ...

  def begin(self, params: Any, version: int, running: Sequence[Job]) -> None:
    """New weights; every slot but those of `running`, which are in their slots already, falls idle."""
    ...

  def load(self, params: Any, version: int) -> None:
    """New weights for what runs: its next token is drawn from them."""
    ...

  def advance(self, jobs: Sequence[Job]) -> Events:
    """Fills free slots and decodes."""
    ...

  def release(self, slots: Collection[int]) -> None:
    """Gives up what runs there."""
    ...

  def end(self) -> None:
    """The iteration is over: its weights are no longer needed."""
    ...


@dataclasses.dataclass
class _Running:
  job: Job
  drawn: list[int]
  limit: int  # tokens it may draw here
  reason: FinishReason  # why it ends at its limit


class EngineWorker:
  """Args:
  turn: entered for as long as the engine's devices are used; between two dispatches others may have them.
  """

  def __init__(
    self, engine: RingEngine, turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
  ):
    self.engine = engine
    self._turn = turn
    self._keep = engine.config.kv_policy is KVPolicy.KEEP
    self._state: DecodeState | None = engine.init_decode_state() if self._keep else None
    self._params: Any = None
    self._version = -1
    self._running: dict[int, _Running] = {}  # by slot
    self._slots = frozenset(range(engine.config.slots))

  @property
  def slots(self) -> Collection[int]:
    return self._slots

  @property
  def running(self) -> Collection[int]:
    """Slots in use."""
    return self._running.keys()

  # ---- the engine's cache, whose memory others may need

  @property
  def state(self) -> DecodeState | None:
    """The engine's cache and all that belongs to it; None while there is none."""
    return self._state

  def prepare(self) -> None:
    """Allocates it, where there is none."""
    if self._state is None:
      self._state = self.engine.init_decode_state()

  def free(self) -> None:
    """Gives the memory back until the next iteration; not where keys and values are kept."""
    if not self._keep:
      memory.free(self._state)
      self._state = None

  @property
  def kept_state(self) -> DecodeState | None:
    """What must be saved for an exact resume, beside the scheduler's state; None where nothing must."""
    return self._state if self._keep else None

  def restore(self, state: DecodeState) -> None:
    """A `kept_state` of before."""
    self._state = state

  def abstract_kept_state(self) -> Any:
    """What `kept_state` looks like; None where nothing is saved."""
    return self.engine.abstract_decode_state() if self._keep else None

  # ---- Worker

  def begin(self, params: Any, version: int, running: Sequence[Job]) -> None:
    self._params, self._version = params, version
    self._running = {job.slot: self._watched(job) for job in running}
    with self._turn():
      self.prepare()
      self._state = self.engine.release(self._state, self._running)

  def load(self, params: Any, version: int) -> None:
    self._params, self._version = params, version
    if self._running and not self._keep:
      jobs = [_rest(running) for _, running in sorted(self._running.items())]
      with self._turn():
        self._place(jobs)

  def advance(self, jobs: Sequence[Job]) -> Events:
    events = Events()
    with self._turn():
      started = time.perf_counter()
      self._place(jobs)
      placed = time.perf_counter()
      events.drawn = self._decode()
      events.prefill_seconds, events.decode_seconds = placed - started, time.perf_counter() - placed
    return events

  def release(self, slots: Collection[int]) -> None:
    for slot in slots:
      self._running.pop(slot, None)
    if slots and self._state is not None:
      with self._turn():
        self._state = self.engine.release(self._state, self._running)

  def end(self) -> None:
    self._params = None

  def _watched(self, job: Job) -> _Running:
    """A sequence of n tokens that draws m writes n + m - 1 positions: the last token's are never needed."""
    room = self.engine.max_prefill_length - len(job.tokens) + 1
    if job.max_tokens <= room:
      return _Running(job, [], job.max_tokens, FinishReason.LENGTH)
    return _Running(job, [], room, FinishReason.CACHE)

  def _place(self, jobs: Sequence[Job]) -> None:
    """Prefills each distinct sequence once and inserts it into all of its slots."""
    jobs_of: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
      self._running[job.slot] = self._watched(job)
      jobs_of.setdefault(tuple(job.tokens), []).append(job)
    # Of like length together, so that a short prompt is not padded to a long one's bucket.
    sequences = sorted(jobs_of, key=len)
    size = self.engine.config.prefill_batch
    for first in range(0, len(sequences), size):
      chunk = sequences[first : first + size]
      prefix = self.engine.prefill_batch(self._params, chunk)
      insertions = [
        Insertion(row, job.slot, job.uid, self._running[job.slot].limit, job.sampling)
        for row, sequence in enumerate(chunk)
        for job in jobs_of[sequence]
      ]
      self._state = self.engine.insert_batch(prefix, self._state, insertions)

  def _decode(self) -> list[Drawn]:
    """One dispatch; what ended leaves `_running`."""
    if not self._running:
      return []
    self._state, drawn = self.engine.decode(self._params, self._state, self.engine.config.steps_per_dispatch)
    token_NxB, logp_NxB, valid_NxB, experts_NxBxLxK = jax.device_get(drawn)
    counts_B = valid_NxB.sum(axis=0)
    found = []
    for slot in sorted(self._running):
      running, count = self._running[slot], int(counts_B[slot])
      tokens = token_NxB[:count, slot].tolist()
      running.drawn.extend(tokens)
      reason = self._ended(running)
      logps = logp_NxB[:count, slot].tolist()
      experts = () if experts_NxBxLxK is None else encode(experts_NxBxLxK[:count, slot])
      found.append(Drawn(slot, running.job.uid, tokens, logps, self._version, reason, experts))
      if reason is not None:
        del self._running[slot]
    return found

  def _ended(self, running: _Running) -> FinishReason | None:
    if running.drawn and running.drawn[-1] in self.engine.eos_ids:
      return FinishReason.STOP
    return running.reason if len(running.drawn) >= running.limit else None


def _rest(running: _Running) -> Job:
  """The same job, as it stands now."""
  job, drawn = running.job, running.drawn
  return dataclasses.replace(job, tokens=[*job.tokens, *drawn], max_tokens=job.max_tokens - len(drawn))
