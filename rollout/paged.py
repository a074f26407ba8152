"""Slots whose keys and values are in pages: who starts, who goes on, who must give up.

Before every dispatch, for the slots of each device:

    reserve   everything that runs gets the pages that the dispatch may write.  Where there are not enough, the slot with
              the fewest tokens is evicted (least must be computed again; among equals the highest uid), until there are.
    admit     new jobs in the order given: the pages of their tokens and of a first dispatch, and beyond these one free
              page for every slot that will need another one.  So nobody is evicted before everything that runs has gone on
              for a page, and what was evicted does not come back into the same want.  From the first job that does not
              fit on, all of that device are handed back: a long one is not overtaken for ever.
    plan      who computes what no page holds yet, each sequence once on a device; filling.py does it

The slot with the most tokens is never evicted while it has company, and alone it has all pages: somebody always goes on,
and nothing ever asks the devices for more memory.

No arrays of a device and no clock: a trace of lengths can be played without a model (pages_trace.py).
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rollout.jobs import Running
from rollout.pages import Held, Pages


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


class Placed(NamedTuple):
  """A job that starts."""

  running: Running
  held: Held


class Follower(NamedTuple):
  """A job whose keys and values others have, or will have once a page of theirs is copied."""

  running: Running
  source: int = 0
  target: int = -1  # -1: nothing is copied


class PagedSlots:
  """The pages of all slots.

  Args:
    parts: devices that have slots and pages of their own.
    pages: of each of them.
    width: W, pages of a slot at full length.
    steps: of a dispatch.
  """

  def __init__(self, *, slots: int, parts: int, pages: int, page_size: int, width: int, steps: int):
    self.page_size = page_size
    self._shape, self._pages, self._steps = (slots, width), pages, steps
    self._own = slots // parts
    self._parts = [Pages(pages, page_size) for _ in range(parts)]
    self._version = -1
    self.changed = True  # since the devices were told; whoever tells them says so
    self._want: set[int] = set()  # devices on which somebody was evicted in this turn
    self._peak = self._asked = self._saved = self._evicted = self._refused = 0

  def use(self) -> CacheUse:
    total = lambda name: sum(getattr(part, name) for part in self._parts)  # noqa: E731
    return CacheUse(
      total("count"), self.page_size, total("in_use"), total("shared"), total("cached"), self._peak,
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
    self._version, self.changed = version, True

  def adopt(self, page_table_BxW: np.ndarray) -> None:
    """Goes on with what a table says; all slots with pages count as running until `renew`."""
    for index, part in enumerate(self._parts):
      first = index * self._own
      rows = {slot: page_table_BxW[slot] for slot in range(first, first + self._own)}
      held = {slot: row[row < part.count].tolist() for slot, row in rows.items()}
      part.adopt({slot: pages for slot, pages in held.items() if pages})
    self.changed = True

  def leave(self, running: Running) -> None:
    """A job has ended or is given up: its pages are free at once, and known while there is room."""
    # What other weights computed is of no use under these.
    tokens = running.tokens if running.version == self._version else ()
    self._part(running.job.slot).drop(running.job.slot, tokens)
    self.changed = True

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

  def admit(self, new: Sequence[Running], running: Mapping[int, Running]) -> tuple[list[Placed], list[int]]:
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
      placed.append(Placed(one, held))
      company[index] += 1
      growing[index] += grows
      self.changed = True
    self._refused += len(refused)
    self._peak = max(self._peak, sum(part.in_use for part in self._parts))
    return placed, refused

  def _part(self, slot: int) -> Pages:
    return self._parts[slot // self._own]

  def _grow(self, part: Pages, one: Running) -> bool:
    before = len(part.held[one.job.slot])
    fits = part.grow(one.job.slot, one.ahead(self._steps))
    self.changed |= len(part.held[one.job.slot]) != before
    return fits

  def _will_grow(self, slot: int, one: Running) -> bool:
    part = self._part(slot)
    return part.needed(one.most) > len(part.held[slot])

  def table(self) -> np.ndarray:
    """int32 [B, W]; entries without a page name one beyond the last."""
    table_BxW = np.full(self._shape, self._pages, np.int32)
    for part in self._parts:
      for slot, pages in part.held.items():
        table_BxW[slot, : len(pages)] = pages
    return table_BxW

  def plan(self, placed: Sequence[Placed]) -> tuple[list[list[Placed]], list[Follower]]:
    """Who computes, and who begins with what is there.

    Returns:
      Waves of those that compute, of which a later one may begin with pages that an earlier one fills; and those that
      start when all of that is done.  One that computes only the end of its sequence is in both.
    """
    written: dict[tuple[int, int], int] = {}  # the wave that fills a page
    waves: list[list[Placed]] = []
    followers = []
    for one in placed:
      job, (pages, known, full, source) = one.running.job, one.held
      part, past = job.slot // self._own, len(job.tokens) - 1
      self._asked += past
      if source >= 0 or past == known * self.page_size:
        self._saved += past
        copied = (source, pages[full]) if source >= 0 else ()
        followers.append(Follower(one.running, *copied))
        continue
      self._saved += known * self.page_size
      wave = max((written.get((part, page), -1) for page in pages[:known]), default=-1) + 1
      written.update({(part, page): wave for page in pages[known:full]})
      waves.extend([] for _ in range(wave + 1 - len(waves)))
      waves[wave].append(one)
      if known:
        followers.append(Follower(one.running))
    return waves, followers
