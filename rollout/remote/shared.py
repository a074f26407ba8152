"""Rollout workers of a job that trains in several processes: process 0 has the pool, all others hear what it heard.

Every process takes the scheduler's decisions itself, from the same events in the same order; so the events, whose order is
a matter of time, must come from one of them.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from ring_jax.records import FinishReason
from rollout.remote.pool import WorkerPool
from rollout.worker import Drawn, Events, Job
from sharding.processes import Group


class SharedPool:
  """A `Worker`; all processes make the same calls in the same order.

  Args:
    pool: of process 0; None elsewhere.
    group: the processes.
  """

  def __init__(self, pool: WorkerPool | None, group: Group):
    self._pool, self._group = pool, group
    self._slots: frozenset[int] = frozenset()

  @property
  def slots(self) -> Collection[int]:
    return self._slots

  def begin(self, params: Any, version: int, running: Sequence[Job]) -> None:
    if self._pool is not None:
      self._pool.begin(params, version, running)
    self._hear(Events())

  def load(self, params: Any, version: int) -> None:
    if self._pool is not None:
      self._pool.load(params, version)
    self._hear(Events())

  def advance(self, jobs: Sequence[Job]) -> Events:
    return self._hear(Events() if self._pool is None else self._pool.advance(jobs))

  def release(self, slots: Collection[int]) -> None:
    if self._pool is not None:
      self._pool.release(slots)

  def end(self) -> None:
    if self._pool is not None:
      self._pool.end()

  def close(self) -> None:
    if self._pool is not None:
      self._pool.close()

  def _hear(self, events: Events) -> Events:
    """Process 0's events, and the slots that it has."""

    def told() -> dict[str, Any]:
      return {"slots": sorted(self._pool.slots), "events": dataclasses.asdict(events)}

    heard = self._group.from_first("rollouts", told)
    self._slots = frozenset(heard["slots"])
    drawn = [Drawn(*one[:5], one[5] and FinishReason(one[5])) for one in heard["events"].pop("drawn")]
    return Events(drawn=drawn, **heard["events"])
