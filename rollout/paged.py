"""Slots whose keys and values are in pages: who starts, who goes on, who must give up, and how pages are filled.

Before every dispatch, for the slots of each device:

    reserve   everything that runs gets the pages that the dispatch may write.  Where there are not enough, the slot with
              the fewest tokens is evicted (least must be computed again; among equals the highest uid), until there are.
    admit     new jobs in the order given: the pages of their tokens and of a first dispatch, and beyond these one free
              page for every slot that will need another one.  So nobody is evicted before everything that runs has gone on
              for a page, and what was evicted does not come back into the same want.  From the first job that does not
              fit on, all of that device are handed back: a long one is not overtaken for ever.
    fill      keys and values that no page holds yet are computed, each once on a device:
                  a sequence of which nothing is known     one prefill, inserted on every device that needs it
                  one whose beginning is known             extended from there
                  one that came beside its equal           shares its pages; the partly filled last one is copied
              A sequence that begins with pages that are only now to be filled waits for them: one wave after another.

The slot with the most tokens is never evicted while it has company, and alone it has all pages: somebody always goes on,
and nothing ever asks the devices for more memory.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rollout.engine import RingEngine
from rollout.jobs import Running
from rollout.pages import Held, Pages
from rollout.slots import DecodeState, Extension, Insertion, Joining


@dataclasses.dataclass(frozen=True)
class CacheUse:
  """Gauges of now, and counters since the start."""

  pages: int
  page_size: int
  in_use: int  # pages that slots hold
  shared: int  # of them, those that several hold
  cached: int  # pages that nobody holds and whose content is known
  peak: int  # the most that were in use at once
  asked: int  # tokens whose keys and values new jobs needed
  saved: int  # of them, those that were there or were computed for a sibling
  evicted: int  # slots that gave their job back so that others could go on
  refused: int  # jobs that found no room, each time that they were tried

  @property
  def hit_rate(self) -> float:
    return self.saved / self.asked if self.asked else 0.0


class _Placed(NamedTuple):
  running: Running
  held: Held


class PagedSlots:
  """The pages of an engine's slots, on all of its devices."""

  def __init__(self, engine: RingEngine):
    self._engine = engine
    self._steps = engine.config.steps_per_dispatch
    self._own = engine.config.slots // engine.batch_parts
    self._parts = [Pages(engine.pages, engine.page_size) for _ in range(engine.batch_parts)]
    self._version = -1
    self._changed = True  # since the devices were told
    self._want: set[int] = set()  # devices on which somebody was evicted in this turn
    self._peak = self._asked = self._saved = self._evicted = self._refused = 0

  def use(self) -> CacheUse:
    total = lambda name: sum(getattr(part, name) for part in self._parts)  # noqa: E731
    return CacheUse(
      total("count"), self._engine.page_size, total("in_use"), total("shared"), total("cached"), self._peak,
      self._asked, self._saved, self._evicted, self._refused,
    )  # fmt: skip

  # ---- between dispatches

  def renew(self, version: int, running: Iterable[int]) -> None:
    """New weights: nothing computed before is handed to anybody else; slots but those that run give their pages back."""
    running = set(running)
    for part in self._parts:
      part.renew(version)
      for slot in [slot for slot in part.held if slot not in running]:
        part.drop(slot)
    self._version, self._changed = version, True

  def adopt(self, page_table_BxW: np.ndarray) -> None:
    """Goes on with what a table says; all slots with pages count as running until `renew`."""
    for index, part in enumerate(self._parts):
      first = index * self._own
      rows = {slot: page_table_BxW[slot] for slot in range(first, first + self._own)}
      held = {slot: row[row < part.count].tolist() for slot, row in rows.items()}
      part.adopt({slot: pages for slot, pages in held.items() if pages})
    self._changed = True

  def leave(self, running: Running) -> None:
    """A job has ended or is given up: its pages are free at once, and known while there is room."""
    # What other weights computed is of no use under these.
    tokens = running.tokens if running.version == self._version else ()
    self._part(running.job.slot).drop(running.job.slot, tokens)
    self._changed = True

  def reserve(self, running: Mapping[int, Running]) -> list[int]:
    """Pages for the next dispatch of all that runs; returns the slots that must give up, already without theirs."""
    evicted: list[int] = []
    self._want = set()
    for index, part in enumerate(self._parts):
      # The last gives up first.
      order = sorted(
        (one for slot, one in running.items() if slot // self._own == index),
        key=lambda one: (-one.length, one.job.uid, one.job.slot),
      )
      while order:
        short = next((one for one in order if not self._grow(part, one)), None)
        if short is None:
          break
        last = order.pop()
        self.leave(last)
        evicted.append(last.job.slot)
        self._want.add(index)
    self._evicted += len(evicted)
    return evicted

  def admit(self, new: Sequence[Running], running: Mapping[int, Running]) -> tuple[list[_Placed], list[int]]:
    """Pages for new jobs; returns those that got them, and the slots of the others.

    Args:
      running: what runs already.
    """
    placed, refused, full = [], [], set(self._want)
    company = collections.Counter(slot // self._own for slot in running)
    growing = collections.Counter(slot // self._own for slot, one in running.items() if self._will_grow(slot, one))
    for one in new:
      slot, index = one.job.slot, one.job.slot // self._own
      part = self._parts[index]
      ahead = one.ahead(self._steps)
      grows = part.needed(one.most) > part.needed(ahead)
      spare = growing[index] + grows if company[index] else 0
      held = None if index in full else part.hold(slot, one.job.tokens, ahead, spare)
      if held is None:
        full.add(index)
        refused.append(slot)
        continue
      placed.append(_Placed(one, held))
      company[index] += 1
      growing[index] += grows
      self._changed = True
    self._refused += len(refused)
    self._peak = max(self._peak, sum(part.in_use for part in self._parts))
    return placed, refused

  def _part(self, slot: int) -> Pages:
    return self._parts[slot // self._own]

  def _grow(self, part: Pages, one: Running) -> bool:
    before = len(part.held[one.job.slot])
    fits = part.grow(one.job.slot, one.ahead(self._steps))
    self._changed |= len(part.held[one.job.slot]) != before
    return fits

  def _will_grow(self, slot: int, one: Running) -> bool:
    part = self._part(slot)
    return part.needed(one.most) > len(part.held[slot])

  def table(self) -> np.ndarray:
    """int32 [B, W]; entries without a page name one beyond the last."""
    table_BxW = np.full((self._engine.config.slots, self._engine.page_width), self._engine.pages, np.int32)
    for part in self._parts:
      for slot, pages in part.held.items():
        table_BxW[slot, : len(pages)] = pages
    return table_BxW

  # ---- on the devices

  def fill(self, params: Any, state: DecodeState, placed: Sequence[_Placed], running: Iterable[int]) -> DecodeState:
    """Tells the devices who has which page, and computes what the new jobs lack."""
    if self._changed:
      state, self._changed = self._engine.release(state, running, self.table()), False
    waves, joinings = self._plan(placed)
    for wave in waves:
      cold = [one for one in wave if not one.held.known]
      warm = [one for one in wave if one.held.known and self._rest(one) > 0]
      state = self._extend(params, self._insert(params, state, cold), warm)
    return self._engine.join_batch(state, joinings) if joinings else state

  def _plan(self, placed: Sequence[_Placed]) -> tuple[list[list[_Placed]], list[Joining]]:
    """Who computes, in which order; and who begins with what others have computed."""
    size = self._engine.page_size
    leaders: dict[tuple[int, tuple[int, ...]], _Placed] = {}
    written: dict[tuple[int, int], int] = {}  # the wave that fills a page
    waves: list[list[_Placed]] = []
    joinings = []
    for one in placed:
      job, (pages, known, full) = one.running.job, one.held
      index, past = job.slot // self._own, len(job.tokens) - 1
      leader = leaders.setdefault((index, tuple(job.tokens)), one)
      self._asked += past
      if leader is not one:
        self._saved += past
        partly = past % size > 0
        source, target = (leader.held.pages[full], pages[full]) if partly else (0, -1)
        joinings.append(self._joining(one.running, source, target))
        continue
      self._saved += known * size
      wave = max((written.get((index, page), -1) for page in pages[:known]), default=-1) + 1
      written.update({(index, page): wave for page in pages[known:full]})
      waves.extend([] for _ in range(wave + 1 - len(waves)))
      waves[wave].append(one)
      if known:
        joinings.append(self._joining(one.running))
    return waves, joinings

  def _joining(self, running: Running, source: int = 0, target: int = -1) -> Joining:
    job = running.job
    position = len(job.tokens) - 1
    return Joining(job.slot, job.uid, running.limit, job.tokens[-1], position, source, target, job.sampling)

  def _rest(self, one: _Placed) -> int:
    return len(one.running.job.tokens) - 1 - one.held.known * self._engine.page_size

  def _insert(self, params: Any, state: DecodeState, cold: Sequence[_Placed]) -> DecodeState:
    """One prefill for a sequence, whatever the devices that need it."""
    by_tokens: dict[tuple[int, ...], list[Running]] = {}
    for one in cold:
      by_tokens.setdefault(tuple(one.running.job.tokens), []).append(one.running)
    return insert_all(self._engine, params, state, by_tokens)

  def _extend(self, params: Any, state: DecodeState, warm: Sequence[_Placed]) -> DecodeState:
    """Of like length together, as many of each device as a call has rows for it."""
    rows = self._engine.config.prefill_batch // self._engine.batch_parts
    of_part = collections.defaultdict(list)
    for one in sorted(warm, key=self._rest):
      of_part[one.running.job.slot // self._own].append(one)
    for first in range(0, max(map(len, of_part.values()), default=0), rows):
      chosen = [one for ones in of_part.values() for one in ones[first : first + rows]]
      size = self._engine.page_size
      extensions = [Extension(one.running.job.slot, one.held.known * size, one.running.job.tokens) for one in chosen]
      state = self._engine.extend_batch(params, state, extensions)
    return state


def insert_all(
  engine: RingEngine, params: Any, state: DecodeState, by_tokens: Mapping[tuple[int, ...], Sequence[Running]]
) -> DecodeState:
  """Prefills each distinct sequence once and inserts it into all of its slots."""
  # Of like length together, so that a short prompt is not padded to a long one's bucket.
  sequences = sorted(by_tokens, key=len)
  size = engine.config.prefill_batch
  for first in range(0, len(sequences), size):
    chunk = sequences[first : first + size]
    prefix = engine.prefill_batch(params, chunk)
    insertions = [
      Insertion(row, one.job.slot, one.job.uid, one.limit, one.job.sampling)
      for row, sequence in enumerate(chunk)
      for one in by_tokens[sequence]
    ]
    state = engine.insert_batch(prefix, state, insertions)
  return state
