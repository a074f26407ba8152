"""Who uses which devices when: roles on the same devices take turns, roles on different devices work at the same time.

    with turns.of(role): ...             waits until nobody who asked earlier uses any of the role's devices
    turns.together({role: job, ...})     runs all jobs, side by side where their devices allow it

JAX would queue programs by itself.  Turns are for what it does not see: a host loop between two programs, and the CPU
backend, where two programs with collectives over the same devices can starve each other of threads and hang.

In several processes everything runs in the order that is written, since collectives must come in one order everywhere.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

from configs.schema import Role
from sharding import processes
from sharding.placement import Placement


class Turns:
  def __init__(self, placement: Placement):
    self._placement = placement
    self._changed = threading.Condition()
    self._tickets: list[tuple[int, Role]] = []  # of those who wait or work, in the order of asking
    self._numbers = itertools.count()

  @contextlib.contextmanager
  def of(self, role: Role) -> Iterator[None]:
    with self._redeemed(self._ask(role)):
      yield

  def together(self, jobs: Mapping[Role, Callable[[], Any]]) -> dict[Role, Any]:
    """What each job returns.  The first error, in the order of jobs, is raised when all have ended."""
    if processes.group().count > 1 or not self._any_apart(list(jobs)):
      found = {}
      for role, job in jobs.items():
        with self.of(role):
          found[role] = job()
      return found
    with futures.ThreadPoolExecutor(len(jobs), "role") as pool:
      begun = {role: pool.submit(self._work, self._ask(role), job) for role, job in jobs.items()}
    return {role: one.result() for role, one in begun.items()}

  def _any_apart(self, roles: list[Role]) -> bool:
    return any(not self._placement.share(one, other) for one, other in itertools.combinations(roles, 2))

  def _work(self, ticket: tuple[int, Role], job: Callable[[], Any]) -> Any:
    with self._redeemed(ticket):
      return job()

  def _ask(self, role: Role) -> tuple[int, Role]:
    with self._changed:
      ticket = (next(self._numbers), role)
      self._tickets.append(ticket)
      return ticket

  @contextlib.contextmanager
  def _redeemed(self, ticket: tuple[int, Role]) -> Iterator[None]:
    with self._changed:
      self._changed.wait_for(lambda: not self._blocked(ticket))
    try:
      yield
    finally:
      with self._changed:
        self._tickets.remove(ticket)
        self._changed.notify_all()

  def _blocked(self, ticket: tuple[int, Role]) -> bool:
    earlier = itertools.takewhile(lambda one: one != ticket, self._tickets)
    return any(self._placement.share(ticket[1], role) for _, role in earlier)
