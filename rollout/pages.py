"""Who has which page of keys and values: a pure state machine over page numbers, without arrays.

A page holds N positions of one sequence.  It is in exactly one place:

    free      nobody's, and holds nothing of use
    held      by one slot, or by several whose sequences begin alike (shared: nobody writes there any more)
    cached    held by no slot, but it still holds the keys and values of known tokens

A page whose N positions are all written is known by the tokens that led to it: its key is a hash over the weight version,
the key of the page before it and its own N tokens, so that equal keys mean equal keys and values.  A new sequence takes
over the pages that are known for its beginning, held or cached, and gets free ones for the rest; where none are free, the
cached pages that were used longest ago are given up.  Of one sequence the last pages go first: a page without those before
it is of no use.  (vLLM's automatic prefix caching is the same idea; reference notes, rl_practice.md.)

A sequence of n tokens needs the keys and values of its first n - 1: the last token is what the next step is given.  So the
page that holds position n - 1 is written by its slot and never shared; while a slot that began with the same sequence holds
its own, what stands before position n - 1 is copied from there.
"""

import collections
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Held(NamedTuple):
  """What a slot was given."""

  pages: list[int]  # in the order of positions
  known: int  # of them, how many held the beginning of the sequence already
  full: int  # of them, how many hold nothing but the sequence's first n - 1 tokens
  source: int  # a page that holds what the next one is to begin with; -1: none does


class Pages:
  """Pages that slots of one device share.

  Args:
    count: pages, numbered from 0.
    size: N, positions of a page.
  """

  def __init__(self, count: int, size: int):
    self.count, self.size = count, size
    self._held: dict[int, list[int]] = {}  # by slot
    self._holders = [0] * count
    self._free = list(reversed(range(count)))  # a stack
    self._key_of: dict[int, bytes] = {}  # of pages that are known
    self._page_of: dict[bytes, int] = {}
    self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()  # the longest unused first
    self._tail_of: dict[int, bytes] = {}  # the key of what a slot began with beyond its full pages
    self._slots_of: dict[bytes, list[int]] = collections.defaultdict(list)  # that have this tail
    self._root = b""

  # ---- what there is

  @property
  def held(self) -> Mapping[int, Sequence[int]]:
    """The pages of each slot."""
    return self._held

  @property
  def room(self) -> int:
    """Pages that can be had."""
    return len(self._free) + len(self._cached)

  @property
  def in_use(self) -> int:
    return self.count - self.room

  @property
  def shared(self) -> int:
    """Pages that several slots hold."""
    return sum(holders > 1 for holders in self._holders)

  @property
  def cached(self) -> int:
    return len(self._cached)

  def needed(self, positions: int) -> int:
    """How many pages that many positions fill or begin."""
    return -(-positions // self.size)

  # ---- what is done

  def renew(self, version: int) -> None:
    """New weights: nothing is known any more.  What slots hold stays theirs."""
    self._root = b"%d" % version
    self._free += reversed(self._cached)
    self._cached.clear()
    self._forget()

  def hold(self, slot: int, tokens: Sequence[int], positions: int, spare: int = 0) -> Held | None:
    """Pages for a sequence in a slot that has none; None, and nothing is changed, where there are not enough.

    Its full pages are known from now on: whoever calls sees to it that they are written before they are read.

    Args:
      tokens: of the sequence, at least one.
      positions: how many it may write before it is asked again, at least len(tokens) - 1.
      spare: pages that must be left afterwards.
    """
    if slot in self._held:
      raise ValueError(f"hold: slot {slot} has pages already")
    keys, tail = self._keys(tokens)
    known = []
    for key in keys:
      page = self._page_of.get(key)
      if page is None:
        break
      known.append(page)
    fresh = self.needed(positions) - len(known)
    idle = sum(page in self._cached for page in known)
    if fresh + spare > self.room - idle:
      return None
    for page in known:
      self._cached.pop(page, None)
      self._holders[page] += 1
    pages = self._held[slot] = [*known, *(self._take() for _ in range(fresh))]
    self._know(pages, keys)
    source = -1
    if tail:
      if len(known) == len(keys) and self._slots_of[tail]:
        source = self._held[self._slots_of[tail][0]][len(keys)]
      self._tail_of[slot] = tail
      self._slots_of[tail].append(slot)
    return Held(list(pages), len(known), len(keys), source)

  def grow(self, slot: int, positions: int) -> bool:
    """More pages for a slot, up to that many positions; False, and nothing is changed, where there are not enough."""
    more = self.needed(positions) - len(self._held[slot])
    if more > self.room:
      return False
    self._held[slot].extend(self._take() for _ in range(more))
    return True

  def drop(self, slot: int, tokens: Sequence[int] = ()) -> None:
    """Takes a slot's pages from it.

    Args:
      tokens: its sequence, all under the present weights: its full pages stay known while there is room.  Empty: what
        the slot has written itself is of no use to others.
    """
    pages, tail = self._held.pop(slot), self._tail_of.pop(slot, None)
    if tail:
      self._slots_of[tail].remove(slot)
      if not self._slots_of[tail]:
        del self._slots_of[tail]
    self._know(pages, self._keys(tokens)[0])
    for page in reversed(pages):
      self._holders[page] -= 1
      if self._holders[page]:
        continue
      if page in self._key_of:
        self._cached[page] = None
      else:
        self._free.append(page)

  def adopt(self, held: Mapping[int, Collection[int]]) -> None:
    """Starts again with what slots hold; nothing is known."""
    self._held = {slot: list(pages) for slot, pages in held.items()}
    self._holders = [0] * self.count
    for pages in self._held.values():
      for page in pages:
        self._holders[page] += 1
    self._free = [page for page in reversed(range(self.count)) if not self._holders[page]]
    self._cached.clear()
    self._forget()

  # ---- keys

  def _forget(self) -> None:
    for table in (self._key_of, self._page_of, self._tail_of, self._slots_of):
      table.clear()

  def _keys(self, tokens: Sequence[int]) -> tuple[list[bytes], bytes]:
    """Of the pages that the sequence's first n - 1 tokens fill, and of what is beyond them; empty where nothing is."""
    full = max(len(tokens) - 1, 0) // self.size
    token_S = np.asarray(tokens[:-1], np.int32)
    keys, key = [], self._root
    for first in range(0, len(token_S), self.size):
      key = hashlib.blake2b(key + b"|" + token_S[first : first + self.size].tobytes(), digest_size=16).digest()
      keys.append(key)
    return keys[:full], key if len(keys) > full else b""

  def _know(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
    for page, key in zip(pages, keys, strict=False):
      # Another page may hold the same: computed twice at the same time.  Only one of them is known.
      if page not in self._key_of and key not in self._page_of:
        self._key_of[page], self._page_of[key] = key, page

  def _take(self) -> int:
    if self._free:
      page = self._free.pop()
    else:
      page, _ = self._cached.popitem(last=False)
      del self._page_of[self._key_of.pop(page)]
    self._holders[page] = 1
    return page
