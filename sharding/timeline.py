"""Work on groups of devices, played through in time: what a queue a device makes of a graph of tasks.

    ready     a task whose `after` have all ended is put into the queue of every group that it needs, in the order of the list
    start     once it is the first in all of these queues: a queue never changes its order, as a device runs what was
              dispatched to it
    pace      tasks that run at the same time share `capacity` where their loads exceed it, in proportion; without a limit
              each takes its own seconds

The second line is what JAX does with asynchronous dispatch.  The third is for devices that are played by one processor:
work on disjoint meshes then takes turns after all.

A task's `cause` is what it waited for last, a task before it in the graph or in a queue; following causes back from the end
gives the critical path, whose parts touch each other and cover the whole time.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

_NOTHING = 1e-12  # of a task's seconds: less is left over by rounding only


@dataclasses.dataclass(frozen=True)
class Task:
  """One piece of work."""

  name: str
  seconds: float  # alone on the machine
  groups: frozenset[int]  # of devices; none: a host's own work
  after: tuple[str, ...] = ()
  load: float = 0.0  # of `capacity` while it runs alone


@dataclasses.dataclass(frozen=True)
class Span:
  """A task in its place."""

  task: Task
  start: float
  end: float
  cause: str | None


class Timeline:
  """All tasks, played through on construction.  `spans` are by name, in the order in which they ended.

  Raises:
    ValueError: two tasks of one name, an `after` that is none of them, or a circle.
  """

  def __init__(self, tasks: Sequence[Task], capacity: float = math.inf):
    self.spans: dict[str, Span] = {}
    self._tasks = {task.name: task for task in tasks}
    if len(self._tasks) < len(tasks):
      raise ValueError("timeline: two tasks of one name")
    self._capacity = capacity
    self._waits = {task.name: len(set(task.after)) for task in tasks}
    self._followers: dict[str, list[str]] = collections.defaultdict(list)
    for task in tasks:
      for name in dict.fromkeys(task.after):
        if name not in self._tasks:
          raise ValueError(f"timeline: {task.name} comes after {name}, which is no task")
        self._followers[name].append(task.name)
    self._order = {task.name: position for position, task in enumerate(tasks)}
    self._queues: dict[int, collections.deque[str]] = collections.defaultdict(collections.deque)
    self._last: dict[int, str] = {}  # by group: what ended there last
    self._left: dict[str, float] = {}  # of what runs: its seconds that remain
    self._starts: dict[str, tuple[float, str | None]] = {}
    self._now = 0.0
    self._play()

  @property
  def end(self) -> float:
    return max((span.end for span in self.spans.values()), default=0.0)

  def path(self, name: str) -> list[Span]:
    """What led to the end of a task, first to last."""
    found = [self.spans[name]]
    while (cause := found[-1].cause) is not None:
      found.append(self.spans[cause])
    return found[::-1]

  def busy(self, group: int, start: float, end: float) -> float:
    """Seconds between two moments in which a group works."""
    mine = (span for span in self.spans.values() if group in span.task.groups)
    return sum(max(min(span.end, end) - max(span.start, start), 0.0) for span in mine)

  def _play(self) -> None:
    self._dispatch([name for name, count in self._waits.items() if not count])
    while self._left:
      self._advance()
    if len(self.spans) < len(self._tasks):
      missing = next(name for name in self._tasks if name not in self.spans)
      raise ValueError(f"timeline: {missing} waits for itself")

  def _dispatch(self, ready: Iterable[str]) -> None:
    """Queues what is ready, and starts whatever is first everywhere; what takes no time ends at once."""
    for name in sorted(ready, key=self._order.get):
      groups = self._tasks[name].groups
      for group in groups:
        self._queues[group].append(name)
      if not groups:
        self._start(name)
    for name in [queue[0] for queue in self._queues.values() if queue]:
      if name not in self._starts and all(self._queues[group][0] == name for group in self._tasks[name].groups):
        self._start(name)

  def _start(self, name: str) -> None:
    task = self._tasks[name]
    before = [*task.after, *(self._last[group] for group in task.groups if group in self._last)]
    cause = max(before, key=lambda one: (self.spans[one].end, self._order[one]), default=None)
    self._starts[name] = (self._now, cause)
    self._left[name] = task.seconds

  def _advance(self) -> None:
    """To the next moment at which something ends."""
    load = sum(self._tasks[name].load for name in self._left)
    shared = min(1.0, self._capacity / load) if load else 1.0
    pace = {name: shared if self._tasks[name].load else 1.0 for name in self._left}
    step = min(left / pace[name] for name, left in self._left.items())
    self._now += step
    ended = []
    for name in self._left:
      self._left[name] -= step * pace[name]
      if self._left[name] <= _NOTHING * self._tasks[name].seconds:
        ended.append(name)
    ready = []
    for name in sorted(ended, key=self._order.get):
      del self._left[name]
      start, cause = self._starts[name]
      task = self._tasks[name]
      self.spans[name] = Span(task, start, self._now, cause)
      for group in task.groups:
        self._queues[group].popleft()
        self._last[group] = name
      for follower in self._followers[name]:
        self._waits[follower] -= 1
        if not self._waits[follower]:
          ready.append(follower)
    self._dispatch(ready)


def groups_of(parts: Mapping[str, range]) -> tuple[list[range], dict[str, frozenset[int]]]:
  """Devices that no part tells apart are one group; returns the groups, and those that each part consists of."""
  marks = sorted({mark for part in parts.values() for mark in (part.start, part.stop)})
  groups = [range(start, stop) for start, stop in itertools.pairwise(marks)]
  groups = [group for group in groups if any(group.start in part for part in parts.values())]
  return groups, {
    name: frozenset(index for index, group in enumerate(groups) if group.start in part) for name, part in parts.items()
  }
