"""The schedules that C3PO++ is compared with, in the same scheduler: a batch, over-sampling that resumes, that discards."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError, KVPolicy, RolloutSchedule
from ring_jax.records import FinishReason
from rollout.scheduler import C3POScheduler
from tests.rollout.player import Player, make_config

SYNCHRONOUS = {"schedule": RolloutSchedule.SYNCHRONOUS, "batch_groups": 2}
RESUME = {"schedule": RolloutSchedule.OVERSAMPLE_RESUME, "batch_groups": 1, "launch_groups": 2, "retention": 9}
DISCARD = RESUME | {"schedule": RolloutSchedule.OVERSAMPLE_DISCARD}


def trained(result):
  return [(rollout.uid, rollout.versions) for rollout in result.rollouts]


def test_a_batch_is_let_in_once_and_waited_for():
  """Groups of two, lengths 1, 1, 1, 5: the slots of the short ones stay empty."""
  player = Player(make_config(**SYNCHRONOUS, slots=4, token_budget=1), lambda uid: 5 if uid % 4 == 3 else 1)
  for version in range(2):
    events, places = player.events(), []
    place = player.scheduler.place
    player.scheduler.place = lambda place=place, places=places: places.append(len(found := place())) or found
    while True:
      try:
        next(events)
      except StopIteration as stop:
        result = stop.value
        break
    player.scheduler.place = place
    first = 4 * version
    lengths = (1, 1, 1, 5)
    assert trained(result) == [(first + index, [version] * length) for index, length in enumerate(lengths)]
    assert places == [4, 0, 0, 0, 0] and result.in_flight == result.buffered == 0
    assert result.counts.max_staleness == result.counts.wasted == 0


def test_a_batch_larger_than_the_slots_waits_in_the_pool():
  player = Player(make_config(**SYNCHRONOUS | {"batch_groups": 5}, slots=3), lambda uid: 1 + uid % 3)
  assert player.config.pool == 10
  assert [uid for uid, _ in trained(player.iterate())] == list(range(10))
  assert [uid for uid, _ in trained(player.iterate())] == list(range(10, 20))


def test_oversampling_resumes_what_was_late():
  """Group 0 takes 5 tokens, group 1 takes 2: the first batch is group 1; group 0 goes on beside a new one."""
  player = Player(make_config(**RESUME, slots=4), lambda uid: {0: 5, 1: 5}.get(uid, 2 if uid < 4 else 9))
  first = player.iterate()
  assert trained(first) == [(2, [0, 0]), (3, [0, 0])] and (first.in_flight, first.counts.wasted) == (2, 0)
  second = player.iterate()
  assert trained(second) == [(0, [0, 0, 1, 1, 1]), (1, [0, 0, 1, 1, 1])]
  assert second.in_flight == 2 and second.counts.max_staleness == 1  # of one new group: two are under way at once


def test_oversampling_discards_what_was_late_and_its_finished_siblings():
  """Group 0: one member ends after a token, the other would take 9.  Group 1 takes 2."""
  player = Player(make_config(**DISCARD, slots=4), lambda uid: {0: 1, 1: 9}.get(uid, 2))
  result = player.iterate()
  assert trained(result) == [(2, [0, 0]), (3, [0, 0])]
  assert (result.in_flight, result.buffered, result.counts.aborted) == (0, 0, 2)
  assert result.counts.wasted == 1 + 2 and result.counts.lengths_wasted == {1: 1, 2: 1}
  assert result.counts.generated == result.counts.trained + result.counts.wasted
  assert [uid for uid, _ in trained(player.iterate())][:2] == [4, 5]  # and it is not begun again


def test_a_kept_slot_is_free_after_its_rollout_was_discarded():
  player = Player(make_config(**DISCARD, slots=4, kv_policy=KVPolicy.KEEP), lambda uid: {0: 1, 1: 9}.get(uid, 2))
  player.iterate()
  assert player.scheduler.running() == {}
  player.scheduler.begin_iteration()
  player.refill()
  assert [(slot, rollout.uid) for slot, rollout in player.scheduler.place()] == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_a_batch_that_others_aborted_ends():
  scheduler = C3POScheduler(make_config(**SYNCHRONOUS | {"batch_groups": 1}))
  scheduler.begin_iteration()
  scheduler.admit([(0, [1])])
  scheduler.place()
  scheduler.finish(0, FinishReason.ABORTED)
  assert not scheduler.iteration_done
  scheduler.finish(1, FinishReason.ABORTED)
  assert scheduler.iteration_done and scheduler.end_iteration(0).rollouts == []


@settings(max_examples=60)
@given(
  lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
  batch=st.integers(1, 4),
  more=st.integers(0, 4),
  slots=st.integers(1, 8),
  prompts=st.integers(1, 14),
)
def test_every_prompt_is_trained_on_once_unless_it_is_discarded(lengths, batch, more, slots, prompts):
  for schedule in RolloutSchedule:
    if schedule is RolloutSchedule.C3PO:
      continue
    launch = 0 if schedule is RolloutSchedule.SYNCHRONOUS else batch + more
    config = make_config(schedule=schedule, batch_groups=batch, launch_groups=launch, slots=slots, retention=10**6)
    player, uids = Player(config, lambda uid: lengths[uid % len(lengths)], prompts=prompts), []
    while not (player.scheduler.closed and not player.scheduler.in_flight):
      result = player.iterate()
      uids += [rollout.uid for rollout in result.rollouts]
      assert result.counts.trained_groups >= min(batch, prompts) or player.scheduler.closed
      if schedule is RolloutSchedule.SYNCHRONOUS:
        assert result.counts.trained_groups <= batch
    lost = player.scheduler.totals.aborted
    assert len(set(uids)) == len(uids) and len(uids) + lost == 2 * prompts
    assert not lost or schedule is RolloutSchedule.OVERSAMPLE_DISCARD


@pytest.mark.parametrize(
  "changes, text",
  [
    ({"batch_groups": 2}, "schedule=c3po has a budget and no batches"),
    ({"schedule": "synchronous"}, "rollout.batch_groups=0: rollout.schedule=synchronous needs at least 1"),
    (SYNCHRONOUS | {"launch_groups": 3}, "launches rollout.batch_groups"),
    (RESUME | {"launch_groups": 0}, "needs at least batch_groups=1"),
    (DISCARD | {"unit": "rollout"}, "a batch is of whole groups"),
    (SYNCHRONOUS | {"batch_groups": 9, "pool": 8}, "rollout.pool=8: 9 prompts at once are 18 rollouts"),
    ({"schedule": "sync"}, "one of c3po, synchronous"),
  ],
)
def test_what_contradicts_is_refused(changes, text):
  with pytest.raises(ConfigError, match=text):
    make_config(**changes)


def test_a_schedule_can_be_changed_between_iterations():
  """A run's state does not depend on it: what C3PO++ left over is part of the next batch."""
  player = Player(make_config(token_budget=4, retention=9), lambda uid: 7 if uid == 1 else 2)
  player.iterate()
  held = player.scheduler.in_flight
  batch = C3POScheduler(dataclasses.replace(player.config, **SYNCHRONOUS))
  batch.load_state_dict(player.scheduler.state_dict())
  player.scheduler = batch
  result = player.iterate()
  assert held and result.in_flight == 0 and 1 in [rollout.uid for rollout in result.rollouts]
