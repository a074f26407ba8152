"""Roles on the same devices take turns, in the order of asking; roles on different ones do not wait for each other."""

import threading
import time

import pytest

from configs.schema import Role
from ring_jax.train.pipeline import stage
from ring_jax.train.turns import Turns
from sharding.placement import Placement

APART = Placement.explicit(
  range(4), {"actor": range(2), "rollout": range(2, 4), "critic": range(2), "reward": range(2, 3)}
)


def test_jobs_on_different_devices_meet_and_on_the_same_do_not():
  """Two that wait for each other end only if they run at the same time."""
  turns, barrier = Turns(APART), threading.Barrier(2, timeout=30)
  found = turns.together({Role.ACTOR: barrier.wait, Role.REWARD: barrier.wait})
  assert sorted(found.values()) == [0, 1]

  inside, most = [], []

  def job():
    inside.append(1)
    most.append(len(inside))
    time.sleep(0.02)
    inside.pop()
    return threading.get_ident()

  turns.together({Role.ROLLOUT: job, Role.REWARD: job})
  assert max(most) == 1
  alone = Turns(Placement.colocated(range(4), ["actor", "rollout", "critic"]))
  assert set(alone.together({Role.ACTOR: job, Role.CRITIC: job}).values()) == {threading.get_ident()}


def test_who_asks_first_goes_first():
  turns, order, begun = Turns(APART), [], []

  def worker(name, role):
    begun.append(name)
    with turns.of(role):
      order.append(name)

  with turns.of(Role.ROLLOUT):
    threads = []
    for name, role in (("reward", Role.REWARD), ("rollout", Role.ROLLOUT), ("actor", Role.ACTOR)):
      threads.append(threading.Thread(target=worker, args=(name, role)))
      threads[-1].start()
      while name not in begun:
        time.sleep(0.001)
      time.sleep(0.02)  # it asks right after it has begun
    threads[-1].join(30)
    assert order == ["actor"]
  for thread in threads:
    thread.join(30)
  assert order == ["actor", "reward", "rollout"]


def test_an_error_of_a_job_is_raised_and_leaves_no_turn_taken():
  turns = Turns(APART)

  def fail():
    raise ZeroDivisionError("in a role")

  for jobs in ({Role.ACTOR: fail, Role.REWARD: lambda: 1}, {Role.ACTOR: fail, Role.CRITIC: lambda: 1}):
    with pytest.raises(ZeroDivisionError, match="in a role"):
      turns.together(jobs)
  assert turns.together({Role.ACTOR: lambda: 1, Role.ROLLOUT: lambda: 2}) == {Role.ACTOR: 1, Role.ROLLOUT: 2}
  assert turns.together({}) == {}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stage_hands_on_what_it_makes_in_order(ahead):
  items, ended = stage(lambda emit: [emit(number) for number in range(5)] and "all", ahead=ahead)
  assert list(items) == [0, 1, 2, 3, 4] and ended() == "all"
  items, ended = stage(lambda emit: None, ahead=ahead)
  assert list(items) == [] and ended() is None


def test_a_stage_ahead_is_read_while_it_works():
  go = threading.Event()

  def produce(emit):
    emit(1)
    assert go.wait(30)
    emit(2)

  items, ended = stage(produce, ahead=True)
  items = iter(items)
  assert next(items) == 1
  go.set()
  assert list(items) == [2] and ended() is None


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_of_a_stage_is_raised_where_it_is_read(ahead):
  def produce(emit):
    emit(1)
    raise ZeroDivisionError("in a stage")

  with pytest.raises(ZeroDivisionError, match="in a stage"):
    items, _ = stage(produce, ahead=ahead)
    list(items)
