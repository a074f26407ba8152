"""Tasks on groups of devices against schedules worked out by hand."""

import itertools
import random

import pytest

from sharding.timeline import Task, Timeline, groups_of


def task(name, seconds, groups, after=(), load=0.0):
  return Task(name, seconds, frozenset(groups), tuple(after), load)


def times(timeline):
  return {name: (span.start, span.end) for name, span in timeline.spans.items()}


def test_tasks_that_share_a_group_take_turns_and_others_overlap():
  found = Timeline([task("a", 3, {0}), task("b", 2, {0}), task("c", 4, {1}), task("d", 1, {0, 1}, ["a"])])
  assert times(found) == {"a": (0, 3), "c": (0, 4), "b": (3, 5), "d": (5, 6)}
  assert found.end == 6
  assert [span.task.name for span in found.path("d")] == ["a", "b", "d"]


def test_a_queue_keeps_its_order_even_where_that_leaves_a_group_idle():
  """b waits for group 0 and is before c on group 1, as what was dispatched first runs first."""
  found = Timeline([task("a", 5, {0}), task("b", 1, {0, 1}), task("c", 1, {1})])
  assert times(found) == {"a": (0, 5), "b": (5, 6), "c": (6, 7)}
  assert found.busy(1, 0, 7) == 2 and found.busy(0, 4, 5.5) == 1.5


def test_the_host_s_own_work_needs_no_group_and_no_time_is_no_obstacle():
  found = Timeline(
    [task("a", 1, {0}), task("score", 2, (), ["a"]), task("nothing", 0, {0}, ["score"]), task("b", 1, {0}, ["nothing"])]
  )
  assert times(found)["b"] == (3, 4)
  assert [span.task.name for span in found.path("b")] == ["a", "score", "nothing", "b"]


def test_one_processor_behind_all_devices_is_shared():
  """Two cores: alone each task keeps two busy, together they take twice as long until the shorter one ends."""
  tasks = [task("a", 2, {0}, load=2.0), task("b", 3, {1}, load=2.0)]
  assert times(Timeline(tasks, capacity=2.0)) == {"a": (0, 4), "b": (0, 5)}
  assert times(Timeline(tasks, capacity=4.0)) == {"a": (0, 2), "b": (0, 3)}
  light = [task("a", 2, {0}, load=1.0), task("b", 3, {1}, load=1.0)]
  assert times(Timeline(light, capacity=2.0)) == {"a": (0, 2), "b": (0, 3)}


def test_random_graphs_keep_order_and_their_paths_cover_the_time():
  rng = random.Random(0)
  for _ in range(30):
    tasks = []
    for index in range(25):
      after = rng.sample(range(index), min(index, rng.randrange(3)))
      groups = rng.sample(range(4), rng.randrange(4))
      tasks.append(task(str(index), rng.choice([0.0, 0.3, 1.7, 2.2]), groups, map(str, after), rng.choice([0, 1, 2])))
    found = Timeline(tasks, capacity=rng.choice([1.5, float("inf")]))
    spans = found.spans
    for span in spans.values():
      assert all(spans[name].end <= span.start for name in span.task.after)
      assert span.end - span.start >= span.task.seconds - 1e-9
    for group in range(4):
      mine = sorted(
        (span for span in spans.values() if group in span.task.groups), key=lambda one: (one.start, one.end)
      )
      assert all(one.end <= other.start for one, other in itertools.pairwise(mine))
    path = found.path(max(spans, key=lambda name: spans[name].end))
    assert path[0].start == 0 and path[-1].end == found.end
    assert all(one.end == other.start for one, other in itertools.pairwise(path))


def test_mistakes_and_nothing_to_do():
  assert Timeline([]).end == 0
  with pytest.raises(ValueError, match="two tasks of one name"):
    Timeline([task("a", 1, {0}), task("a", 1, {0})])
  with pytest.raises(ValueError, match="a comes after b, which is no task"):
    Timeline([task("a", 1, {0}, ["b"])])
  with pytest.raises(ValueError, match="a waits for itself"):
    Timeline([task("a", 1, {0}, ["b"]), task("b", 1, {0}, ["a"])])


def test_devices_that_no_part_tells_apart_are_one_group():
  groups, of_part = groups_of({"all": range(8), "first": range(4), "second": range(4, 8), "two": range(4, 6)})
  assert groups == [range(4), range(4, 6), range(6, 8)]
  assert of_part == {"all": {0, 1, 2}, "first": {0}, "second": {1, 2}, "two": {1}}
