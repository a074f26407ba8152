"""Keys and values of new jobs, into their slots.

Each sequence is computed once, whatever the number of its slots:

    slots in one piece    one prefill, inserted into all of them
    slots in pages        of which nothing is known: one prefill, inserted on every device that needs it
                          whose beginning is in pages:  extended from there
                          that a slot began with too:   shares its pages; the partly filled last one is copied
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from rollout.engine import RingEngine
from rollout.jobs import Running
from rollout.paged import Follower, PagedSlots, Placed
from rollout.slots import DecodeState, Extension, Insertion, Joining


def insert(engine: RingEngine, params: Any, state: DecodeState, jobs: Iterable[Running]) -> DecodeState:
  """Prefills each distinct sequence once and inserts it into all of its slots."""
  jobs_of: dict[tuple[int, ...], list[Running]] = {}
  for one in jobs:
    jobs_of.setdefault(tuple(one.job.tokens), []).append(one)
  # Of like length together, so that a short prompt is not padded to a long one's bucket.
  sequences = sorted(jobs_of, key=len)
  size = engine.config.prefill_batch
  for first in range(0, len(sequences), size):
    chunk = sequences[first : first + size]
    prefix = engine.prefill_batch(params, chunk)
    insertions = [
      Insertion(row, one.job.slot, one.job.uid, one.limit, one.job.sampling)
      for row, sequence in enumerate(chunk)
      for one in jobs_of[sequence]
    ]
    state = engine.insert_batch(prefix, state, insertions)
  return state


def fill(
  engine: RingEngine,
  params: Any,
  state: DecodeState,
  paged: PagedSlots,
  placed: Sequence[Placed],
  running: Iterable[int],
) -> DecodeState:
  """Tells the devices who has which page, and computes what the new jobs lack.

  Args:
    running: slots in use, the new ones among them; all others fall idle.
  """
  if paged.changed:
    state, paged.changed = engine.release(state, running, paged.table()), False
  waves, followers = paged.plan(placed)
  for wave in waves:
    state = insert(engine, params, state, [one.running for one in wave if not one.held.known])
    state = _extend(engine, params, state, [one for one in wave if one.held.known])
  return engine.join_batch(state, [_joining(one) for one in followers]) if followers else state


def _extend(engine: RingEngine, params: Any, state: DecodeState, placed: Sequence[Placed]) -> DecodeState:
  """Of like length together, as many of each device as a call has rows for it."""
  extensions = [
    Extension(one.running.job.slot, one.held.known * engine.page_size, one.running.job.tokens) for one in placed
  ]
  of_part = collections.defaultdict(list)
  for one in sorted(extensions, key=Extension.count):
    of_part[one.slot * engine.batch_parts // engine.config.slots].append(one)
  rows = engine.config.prefill_batch // engine.batch_parts
  for first in range(0, max(map(len, of_part.values()), default=0), rows):
    chosen = [one for ones in of_part.values() for one in ones[first : first + rows]]
    state = engine.extend_batch(params, state, chosen)
  return state


def _joining(one: Follower) -> Joining:
  job = one.running.job
  position = len(job.tokens) - 1
  return Joining(job.slot, job.uid, one.running.limit, job.tokens[-1], position, one.source, one.target, job.sampling)
