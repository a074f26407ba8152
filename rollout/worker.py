"""What decodes: an engine and its slots, as a rollout driver or a server sees them.

Between two dispatches a worker is told what to do, and says what came of the last one:

    advance(jobs):  new jobs into their slots, each distinct token sequence computed once (filling.py)
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
from rollout import filling
from rollout.engine import RingEngine
from rollout.jobs import Job, Running
from rollout.paged import CacheUse, PagedSlots
from rollout.slots import DecodeState
from sharding import memory


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
    self._running: dict[int, Running] = {}  # by slot
    self._slots = frozenset(range(engine.config.slots))
    self._paged: PagedSlots | None = None
    if engine.page_size:
      self._paged = PagedSlots(
        slots=engine.config.slots, parts=engine.batch_parts, pages=engine.pages, page_size=engine.page_size,
        width=engine.page_width, steps=engine.config.steps_per_dispatch,
      )  # fmt: skip
    self._evicted: list[int] = []  # by new weights; to be told by the next `advance`

  @property
  def slots(self) -> Collection[int]:
    return self._slots

  @property
  def running(self) -> Collection[int]:
    """Slots in use."""
    return self._running.keys()

  @property
  def cache_use(self) -> CacheUse | None:
    """None where keys and values are not in pages."""
    return self._paged and self._paged.use()

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
    """A `kept_state` of before; `begin` says what of it runs."""
    self._state = state
    if self._paged is not None:
      self._paged.adopt(self.engine.page_table(state))

  def abstract_kept_state(self) -> Any:
    """What `kept_state` looks like; None where nothing is saved."""
    return self.engine.abstract_decode_state() if self._keep else None

  # ---- Worker

  def begin(self, params: Any, version: int, running: Sequence[Job]) -> None:
    self._params, self._version = params, version
    # What they have came, as far as is known, from other weights.
    self._running = {job.slot: self._watched(job, version=-1) for job in running}
    self._evicted = []
    with self._turn():
      self.prepare()
      if self._paged is not None:
        self._paged.renew(version, self._running)
      self._state = self.engine.release(self._state, self._running)

  def load(self, params: Any, version: int) -> None:
    self._params, self._version = params, version
    if self._keep:
      if self._paged is not None:
        self._paged.renew(version, self._running)
      return
    # The longest first: where not all fit, they are the last to give up.
    jobs = [running.rest() for running in sorted(self._running.values(), key=lambda one: (-one.length, one.job.uid))]
    self._running = {}
    if self._paged is not None:
      self._paged.renew(version, ())
    if jobs:
      with self._turn():
        self._evicted += self._place(jobs)

  def advance(self, jobs: Sequence[Job]) -> Events:
    events = Events()
    with self._turn():
      started = time.perf_counter()
      events.evicted, self._evicted = self._evicted, []
      events.evicted += self._place(jobs)
      placed = time.perf_counter()
      events.drawn = self._decode()
      events.prefill_seconds, events.decode_seconds = placed - started, time.perf_counter() - placed
    return events

  def release(self, slots: Collection[int]) -> None:
    for slot in slots:
      self._leave(slot)
    self._evicted = [slot for slot in self._evicted if slot not in slots]
    if slots and self._state is not None:
      with self._turn():
        self._state = self.engine.release(self._state, self._running)

  def end(self) -> None:
    self._params = None

  def _watched(self, job: Job, version: int) -> Running:
    """A sequence of n tokens that draws m writes n + m - 1 positions: the last token's are never needed."""
    longest = self.engine.max_prefill_length
    if not 0 < len(job.tokens) <= longest:
      raise ValueError(f"a job of {len(job.tokens)} tokens: from 1 to {longest} fit")
    room = longest - len(job.tokens) + 1
    if job.max_tokens <= room:
      return Running(job, job.max_tokens, FinishReason.LENGTH, version)
    return Running(job, room, FinishReason.CACHE, version)

  def _place(self, jobs: Sequence[Job]) -> list[int]:
    """Jobs into their slots; returns the slots, new or not, that give theirs back."""
    new = [self._watched(job, self._version) for job in jobs]
    if self._paged is None:
      self._state = filling.insert(self.engine, self._params, self._state, new)
      self._running |= {one.job.slot: one for one in new}
      return []
    evicted = self._paged.reserve(self._running)
    for slot in evicted:
      del self._running[slot]
    placed, refused = self._paged.admit(new, self._running)
    self._running |= {one.running.job.slot: one.running for one in placed}
    self._state = filling.fill(self.engine, self._params, self._state, self._paged, placed, self._running)
    return evicted + refused

  def _leave(self, slot: int) -> None:
    running = self._running.pop(slot, None)
    if running is not None and self._paged is not None:
      self._paged.leave(running)

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
        self._leave(slot)
    return found

  def _ended(self, running: Running) -> FinishReason | None:
    if running.drawn and running.drawn[-1] in self.engine.eos_ids:
      return FinishReason.STOP
    return running.reason if len(running.drawn) >= running.limit else None
