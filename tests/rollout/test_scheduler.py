"""C3PO++: Algorithm 1 as printed, the rules it leaves open, and what must hold on any trace."""

import collections
import itertools
import json

import pytest
from hypothesis import given, settings, stateful
from hypothesis import strategies as st

from configs.schema import BudgetCounts, KVPolicy, OnPurge, RetentionCounts, Unit
from ring_jax.records import FinishReason
from rollout.iteration import Counts
from rollout.scheduler import C3POScheduler, SchedulerError
from tests.rollout.player import Player, any_schedule, make_config


def algorithm_1(lengths, capacity, budget, sigma, iterations):
  """Ring-1T Algorithm 1, line by line, a token at a time; returns what each update trains on: [(uid, versions)]."""
  pool, trained, fresh = [], [], itertools.count()  # an entry of the pool: [uid, versions, retention]
  for theta in range(iterations):
    counted, queue = 0, []
    pool = [entry for entry in pool if not entry[2] > sigma]
    while counted < budget:
      while len(pool) < capacity:
        pool.append([next(fresh), [], 0])
      for entry in list(pool):
        entry[1].append(theta)
        if len(entry[1]) == lengths(entry[0]):
          counted += len(entry[1])
          queue.append((entry[0], list(entry[1])))
          pool.remove(entry)
    for entry in pool:
      entry[2] += 1
    trained.append(sorted(queue))
  return trained


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1 to the letter


LITERAL = {"unit": Unit.ROLLOUT, "group_size": 1}


def test_a_worked_example():
  """Two slots, Phi = 4, sigma = 0, lengths 3, 1, 2, 9, 1, 1, ...

  Iteration 0: step 1 ends uid 1 (C = 1), uid 2 comes; step 3 ends uid 0 (3 tokens) and uid 2 (2): C = 6 >= 4.
  Iteration 1: uids 3 and 4; 4 ends at step 1, then 5, 6, 7: C = 4.  uid 3 has 4 of its 9 tokens.
  Iteration 2: uid 3 has survived one update and sigma is 0: purged.
  """
  lengths = {0: 3, 1: 1, 2: 2, 3: 9}
  player = Player(make_config(**LITERAL, slots=2, token_budget=4, retention=0), lambda uid: lengths.get(uid, 1))

  first = player.iterate()
  assert [(rollout.uid, rollout.versions) for rollout in first.rollouts] == [(0, [0, 0, 0]), (1, [0]), (2, [0, 0])]
  assert (first.counted, first.counts.generated, first.in_flight, first.purged) == (6, 6, 0, [])

  second = player.iterate()
  assert [rollout.uid for rollout in second.rollouts] == [4, 5, 6, 7]
  assert (second.counted, second.counts.generated, second.in_flight) == (4, 8, 1)

  purged = player.scheduler.begin_iteration()
  assert [(rollout.uid, len(rollout.tokens), rollout.finish_reason) for rollout in purged] == [
    (3, 4, FinishReason.PURGED)
  ]
  assert player.scheduler.totals.wasted == 4 and player.scheduler.in_flight == 0


def test_an_interrupted_rollout_resumes_with_its_tokens_and_counts_in_full():
  player = Player(make_config(**LITERAL, slots=2, token_budget=3, retention=5), lambda uid: 5 if uid == 0 else 1)
  assert [rollout.uid for rollout in player.iterate().rollouts] == [1, 2, 3]
  result = player.iterate()
  assert [(rollout.uid, rollout.versions) for rollout in result.rollouts] == [
    (0, [0, 0, 0, 1, 1]),
    (4, [1]),
    (5, [1]),
  ]
  assert result.counted == 7 and result.counts.generated == 4  # |o| is the whole length, earlier versions' included
  assert (result.counts.max_staleness, result.counts.staleness_sum) == (1, 3)
  assert result.counts.mean_staleness == pytest.approx(3 / 7)


@settings(max_examples=150)
@given(
  lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
  slots=st.integers(1, 5),
  budget=st.integers(1, 30),
  sigma=st.integers(0, 3),
  ages=st.sampled_from(RetentionCounts),
)
def test_it_is_algorithm_1(lengths, slots, budget, sigma, ages):
  def length_of(uid):
    return lengths[uid % len(lengths)]

  # A budget that no rollout could meet before it is purged would make the algorithm (and us) turn in one iteration for
  # long, but never for ever: an iteration has no time limit.
  config = make_config(**LITERAL, slots=slots, token_budget=budget, retention=sigma, retention_counts=ages)
  player = Player(config, length_of)
  ours = [[(r.uid, r.versions) for r in player.iterate().rollouts] for _ in range(6)]
  assert ours == algorithm_1(length_of, slots, budget, sigma, 6)


# ---------------------------------------------------------------------------------------------------------------------
# What the paper leaves open, one rule a test


def test_a_group_is_trained_when_its_last_member_ended():
  lengths = {0: 1, 1: 6, 2: 1, 3: 1}
  player = Player(make_config(token_budget=2, retention=5), lambda uid: lengths.get(uid, 2))
  first = player.iterate()
  assert [rollout.uid for rollout in first.rollouts] == [2, 3]
  assert first.counted == 3 and first.buffered == 1  # uid 0 counts now and is trained on with its sibling
  later = [[rollout.uid for rollout in player.iterate().rollouts] for _ in range(4)]
  assert [uids[:2] for uids in later if 0 in uids] == [[0, 1]]


def test_a_spent_budget_waits_for_one_complete_group():
  player = Player(make_config(token_budget=1), lambda uid: 1 if uid % 2 == 0 else 5)
  result = player.iterate()
  assert [rollout.uid for rollout in result.rollouts] == [0, 1, 2, 3]


def test_finished_members_leave_room_in_the_pool_but_only_whole_groups_enter():
  scheduler = C3POScheduler(make_config(slots=4, group_size=2))
  scheduler.begin_iteration()
  assert scheduler.wanted_groups == 2
  scheduler.admit([(0, [1]), (1, [1])])
  scheduler.place()
  for uid, wanted in ((0, 0), (2, 1)):
    scheduler.record(uid, [5], [-1.0], 0)
    scheduler.finish(uid, FinishReason.STOP)
    assert scheduler.wanted_groups == wanted
  assert (scheduler.in_flight, scheduler.buffered) == (2, 2)


@pytest.mark.parametrize("counts, expected", [(BudgetCounts.COMPLETED, 3), (BudgetCounts.GENERATED, 10)])
def test_what_the_budget_counts(counts, expected):
  scheduler = C3POScheduler(make_config(budget_counts=counts, token_budget=100))
  scheduler.begin_iteration()
  scheduler.admit([(0, [1])])
  scheduler.place()
  scheduler.record(0, [1, 2, 3], [-1.0] * 3, 0)
  scheduler.record(1, [1] * 7, [-1.0] * 7, 0)
  scheduler.finish(0, FinishReason.LENGTH)
  assert scheduler.counted == expected


def test_generated_tokens_that_spend_the_budget_still_leave_something_to_train_on():
  config = make_config(**LITERAL, budget_counts=BudgetCounts.GENERATED, token_budget=3, slots=2)
  result = Player(config, lambda uid: 10).iterate()
  assert len(result.rollouts) == 2 and result.counted == 20


def interrupted_group(on_purge, **changes):
  """A group of two, sigma = 0: uid 0 ended, uid 1 has three tokens, and an update has passed."""
  scheduler = C3POScheduler(make_config(on_purge=on_purge, retention=0, slots=2, **changes))
  scheduler.begin_iteration()
  scheduler.admit([(9, [1, 2])])
  scheduler.place()
  scheduler.record(0, [1], [-0.5], 0)
  scheduler.record(1, [1, 2, 3], [-0.5] * 3, 0)
  scheduler.finish(0, FinishReason.STOP)
  scheduler.end_iteration(0)
  return scheduler, scheduler.begin_iteration()


def test_drop_forgets_the_rollout_and_completes_its_group_without_it():
  scheduler, purged = interrupted_group(OnPurge.DROP)
  assert [(rollout.uid, rollout.tokens) for rollout in purged] == [(1, [1, 2, 3])]
  result = scheduler.end_iteration(1)
  assert [rollout.uid for rollout in result.rollouts] == [0]
  assert (result.counts.dropped, result.counts.wasted, result.counts.lengths_wasted) == (1, 3, {3: 1})
  assert [rollout.uid for rollout in result.purged] == [1]


def test_a_group_whose_members_were_all_dropped_vanishes():
  scheduler = C3POScheduler(make_config(retention=0))
  scheduler.begin_iteration()
  scheduler.admit([(0, [1])])
  scheduler.place()
  scheduler.end_iteration(0)
  assert len(scheduler.begin_iteration()) == 2
  assert scheduler.end_iteration(1).rollouts == []
  assert scheduler.state_dict()["groups"] == []


def test_requeue_starts_again_from_the_prompt():
  scheduler, purged = interrupted_group(OnPurge.REQUEUE)
  assert [(rollout.uid, rollout.tokens, rollout.finish_reason) for rollout in purged] == [
    (1, [1, 2, 3], FinishReason.PURGED)
  ]
  ((_, again),) = scheduler.place()
  assert (again.uid, again.tokens, again.versions, again.retention) == (1, [], [], 0)
  assert again.finish_reason is None
  assert (scheduler.totals.requeued, scheduler.totals.wasted) == (1, 3)


def test_train_ends_the_rollout_where_it_is():
  scheduler, _ = interrupted_group(OnPurge.TRAIN)
  assert scheduler.counted == 3
  result = scheduler.end_iteration(1)
  assert [(r.uid, r.finish_reason) for r in result.rollouts] == [(0, FinishReason.STOP), (1, FinishReason.PURGED)]
  assert (result.counts.cut, result.counts.wasted, result.counts.max_staleness) == (1, 0, 1)


def test_train_drops_what_never_got_a_token():
  scheduler = C3POScheduler(make_config(retention=0, on_purge=OnPurge.TRAIN))
  scheduler.begin_iteration()
  scheduler.admit([(0, [1])])
  scheduler.end_iteration(0)
  scheduler.begin_iteration()
  result = scheduler.end_iteration(1)
  assert result.rollouts == [] and result.counts.dropped == 2


def test_slots_are_given_back_or_kept():
  for policy, kept in ((KVPolicy.RECOMPUTE, {}), (KVPolicy.KEEP, {0: 0, 1: 1, 2: 2, 3: 3})):
    scheduler = C3POScheduler(make_config(kv_policy=policy, pool=6, retention=3))
    scheduler.begin_iteration()
    scheduler.admit([(index, [1]) for index in range(3)])
    scheduler.place()
    scheduler.end_iteration(0)
    assert {slot: rollout.uid for slot, rollout in scheduler.running().items()} == kept
    scheduler.begin_iteration()
    assert [rollout.uid for _, rollout in scheduler.place()] == ([] if kept else [0, 1, 2, 3])


def test_a_requeued_rollout_loses_a_kept_slot_and_goes_behind_older_ones():
  scheduler = C3POScheduler(
    make_config(kv_policy=KVPolicy.KEEP, on_purge=OnPurge.REQUEUE, slots=2, pool=4, retention=0)
  )
  scheduler.begin_iteration()
  scheduler.admit([(0, [1])])
  scheduler.place()
  scheduler.end_iteration(0)
  scheduler.begin_iteration()
  assert scheduler.running() == {}
  scheduler.admit([(1, [1])])
  assert [(slot, rollout.uid) for slot, rollout in scheduler.place()] == [(0, 0), (1, 1)]


def test_age_goes_before_uid():
  """uid 0 starts again, so uid 2, which was admitted later, is the older one now."""
  scheduler = C3POScheduler(make_config(on_purge=OnPurge.REQUEUE, retention=1, slots=2, pool=4))
  for version, problems in ((0, [0]), (1, [1])):
    scheduler.begin_iteration()
    scheduler.admit([(problem, [1]) for problem in problems])
    scheduler.end_iteration(version)
  assert [rollout.uid for rollout in scheduler.begin_iteration()] == [0, 1]
  assert [rollout.uid for _, rollout in scheduler.place()] == [2, 3]


@pytest.mark.parametrize(
  "counts, ages, purged",
  [(RetentionCounts.ITERATIONS, [1, 1, 1, 1], [0, 1, 2, 3]), (RetentionCounts.PARTITIONS, [1, 0, 0, 0], [0])],
)
def test_what_makes_a_rollout_older(counts, ages, purged):
  """uid 0 has a token, uid 1 a slot and no token yet, uids 2 and 3 wait."""
  scheduler = C3POScheduler(make_config(slots=2, pool=4, retention=0, retention_counts=counts))
  scheduler.begin_iteration()
  scheduler.admit([(0, [1]), (1, [1])])
  scheduler.place()
  scheduler.record(0, [1], [-1.0], 0)
  scheduler.end_iteration(0)
  assert [entry["retention"] for entry in scheduler.state_dict()["pool"]] == ages
  assert [rollout.uid for rollout in scheduler.begin_iteration()] == purged
  assert [rollout.uid for _, rollout in scheduler.place()] == [uid for uid in range(4) if uid not in purged][:2]


def test_abort_takes_running_and_waiting_rollouts():
  scheduler = C3POScheduler(make_config(slots=1, pool=2))
  scheduler.begin_iteration()
  scheduler.admit([(0, [1])])
  scheduler.place()
  scheduler.record(0, [1, 2], [-1.0, -1.0], 0)
  scheduler.finish(1, FinishReason.ABORTED)  # waiting
  scheduler.finish(0, FinishReason.ABORTED)  # in a slot
  assert scheduler.place() == [] and scheduler.in_flight == 0
  assert (scheduler.totals.aborted, scheduler.totals.wasted) == (2, 2)


def test_a_finite_source_ends_when_nothing_is_left_in_flight():
  player = Player(make_config(token_budget=10**9), lambda uid: 1 + uid % 5, chunk=3, prompts=7)
  result = player.iterate()
  assert [rollout.uid for rollout in result.rollouts] == list(range(14))
  copy = C3POScheduler(player.config)
  copy.load_state_dict(player.scheduler.state_dict())
  for scheduler in (player.scheduler, copy):
    assert scheduler.closed and scheduler.wanted_groups == 0
  assert player.iterate().rollouts == []


def test_uids_and_groups():
  scheduler = C3POScheduler(make_config(group_size=2))
  scheduler.begin_iteration()
  admitted = scheduler.admit([(40, [1]), (41, [2])])
  assert [(r.uid, r.group, r.problem, r.prompt) for r in admitted] == [
    (0, 0, 40, [1]), (1, 0, 40, [1]), (2, 1, 41, [2]), (3, 1, 41, [2]),
  ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_are_one_line_and_name_the_rollout():
  scheduler = C3POScheduler(make_config(slots=1, pool=2))
  errors = []

  def fails(call, *arguments):
    before = scheduler.state_dict()
    with pytest.raises(SchedulerError) as caught:
      call(*arguments)
    assert scheduler.state_dict() == before, "a refused call must change nothing"
    errors.append(str(caught.value))

  fails(scheduler.admit, [])
  fails(scheduler.place)
  fails(scheduler.end_iteration, 0)
  scheduler.begin_iteration()
  fails(scheduler.begin_iteration)
  fails(scheduler.admit, [(0, [1]), (1, [1])])
  scheduler.admit([(0, [1])])
  fails(scheduler.record, 0, [1], [-1.0], 0)  # still waiting
  scheduler.place()
  fails(scheduler.record, 77, [1], [-1.0], 0)
  fails(scheduler.record, 0, [1, 2], [-1.0], 0)
  fails(scheduler.finish, 0, FinishReason.STOP)  # not a token yet
  fails(scheduler.finish, 0, FinishReason.PURGED)
  fails(scheduler.finish, 1, FinishReason.STOP)  # still waiting
  scheduler.record(0, [1], [-1.0], 0)
  scheduler.finish(0, FinishReason.STOP)
  fails(scheduler.finish, 0, FinishReason.STOP)
  fails(scheduler.record, 0, [1], [-1.0], 0)
  assert all("\n" not in error for error in errors)
  assert "rollout 77 was never admitted" in errors[6]
  assert "rollout 0 has ended already" in errors[-1]


def test_a_state_of_another_shape_is_refused():
  state = C3POScheduler(make_config()).state_dict()
  with pytest.raises(SchedulerError, match=r"saved with rollout.slots=4, not 8"):
    C3POScheduler(make_config(slots=8)).load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# On any trace

configs = st.builds(
  lambda slots, extra, group, **fields: make_config(
    slots=slots, pool=max(slots, group) + extra, group_size=group, **fields
  ),
  slots=st.integers(1, 6),
  extra=st.integers(0, 6),
  group=st.integers(1, 4),
  token_budget=st.integers(1, 40),
  retention=st.integers(0, 3),
  unit=st.sampled_from(Unit),
  budget_counts=st.sampled_from(BudgetCounts),
  retention_counts=st.sampled_from(RetentionCounts),
  # REQUEUE has a test of its own: a rollout longer than sigma + 1 iterations allow is started again for ever.
  on_purge=st.sampled_from([OnPurge.DROP, OnPurge.TRAIN]),
  kv_policy=st.sampled_from(KVPolicy),
)
lengths_lists = st.lists(st.integers(1, 20), min_size=1, max_size=15)


def check_invariants(player):
  """What must hold between any two calls."""
  scheduler, config = player.scheduler, player.config
  running = scheduler.running()
  assert scheduler.in_flight <= config.pool and len(running) <= config.slots
  assert all(0 <= slot < config.slots for slot in running)
  assert len({rollout.uid for rollout in running.values()}) == len(running)
  totals = scheduler.totals
  assert totals.generated == totals.trained + totals.wasted + player.held_tokens()


@settings(max_examples=100)
@given(config=any_schedule(configs), lengths=lengths_lists, chunk=st.integers(1, 4))
def test_no_token_is_lost_or_trained_twice(config, lengths, chunk):
  player = Player(config, lambda uid: lengths[uid % len(lengths)], chunk)
  trained, purged = [], []
  for _ in range(5):
    events = player.events()
    next(events)  # begin_iteration
    assert all(entry["retention"] <= config.retention for entry in player.scheduler.state_dict()["pool"])
    while True:
      check_invariants(player)
      try:
        next(events)
      except StopIteration as stop:
        result = stop.value
        break
    trained += result.rollouts
    purged += result.purged
    # A purge happens one update after the last one that was allowed, and it may be what completes a group.
    at_once = config.unit is Unit.ROLLOUT and config.on_purge is OnPurge.DROP
    # Siblings of one age reach the limit together; where waiting does not age them, the last may begin later.
    if config.unit is Unit.ROLLOUT or config.retention_counts is RetentionCounts.ITERATIONS:
      assert result.counts.max_staleness <= config.retention + (0 if at_once else 1)
    assert all(rollout.versions[-1] - rollout.versions[0] <= config.retention for rollout in result.rollouts)
    assert result.counts.trained == sum(len(rollout.tokens) for rollout in result.rollouts)
  uids = [rollout.uid for rollout in trained]
  assert len(set(uids)) == len(uids)
  for rollout in trained:
    cut = rollout.finish_reason is FinishReason.PURGED
    assert cut or len(rollout.tokens) == lengths[rollout.uid % len(lengths)]
    assert rollout.tokens == [rollout.uid * 1000 + index for index in range(len(rollout.tokens))]
    assert len(rollout.logps) == len(rollout.versions) == len(rollout.tokens)
    assert rollout.versions == sorted(rollout.versions)
  assert player.scheduler.totals.lengths_trained == collections.Counter(len(rollout.tokens) for rollout in trained)


@settings(max_examples=60)
@given(config=configs, lengths=lengths_lists, chunk=st.integers(1, 4))
def test_the_oldest_go_first(config, lengths, chunk):
  player = Player(config, lambda uid: lengths[uid % len(lengths)], chunk)
  for _ in range(3):
    player.scheduler.begin_iteration()
    while not player.scheduler.iteration_done:
      player.refill()
      running = {rollout.uid for rollout in player.scheduler.running().values()}
      pool = player.scheduler.state_dict()["pool"]
      free = config.slots - len(running)
      by_age = sorted((-entry["retention"], entry["uid"]) for entry in pool if entry["uid"] not in running)
      placed = player.scheduler.place()
      assert [rollout.uid for _, rollout in placed] == [uid for _, uid in by_age][:free]
      assert [slot for slot, _ in placed] == sorted(slot for slot, _ in placed)
      player.decode()
    player.scheduler.end_iteration(player.version)


@settings(max_examples=40)
@given(config=any_schedule(configs), lengths=lengths_lists, chunk=st.integers(1, 4), data=st.data())
def test_a_state_that_went_through_json_has_the_same_future(config, lengths, chunk, data):
  """Saved after any call; the copy then makes the same decisions to the end."""

  def play(break_at):
    player = Player(config, lambda uid: lengths[uid % len(lengths)], chunk)
    seen, event = [], 0
    for _ in range(4):
      events = player.events()
      while True:
        try:
          next(events)
        except StopIteration as stop:
          seen.append([rollout.to_dict() for rollout in [*stop.value.rollouts, *stop.value.purged]])
          seen.append([stop.value.counted, stop.value.counts.to_dict()])
          break
        event += 1
        if event == break_at:
          text = json.dumps(player.scheduler.state_dict(), sort_keys=True)
          player.scheduler = C3POScheduler(config)
          player.scheduler.load_state_dict(json.loads(text))
          assert json.dumps(player.scheduler.state_dict(), sort_keys=True) == text
    return seen, player.scheduler.state_dict(), event

  seen, state, events = play(break_at=None)
  seen_again, state_again, _ = play(break_at=data.draw(st.integers(1, events), label="break_at"))
  assert seen_again == seen
  assert state_again == state


def test_a_state_can_be_loaded_twice():
  player = Player(make_config(retention=9, token_budget=3), lambda uid: 1 + uid % 7)
  player.iterate()
  state = player.scheduler.state_dict()
  frozen = json.dumps(state, sort_keys=True)
  for _ in range(2):
    player.scheduler = C3POScheduler(player.config)
    player.scheduler.load_state_dict(state)
    player.iterate()
    assert json.dumps(state, sort_keys=True) == frozen


@settings(max_examples=40)
@given(config=configs, lengths=lengths_lists, prompts=st.integers(1, 12), chunk=st.integers(1, 4))
def test_no_length_bias(config, lengths, prompts, chunk):
  """With a window that is long enough every rollout is trained on exactly once, and at any moment what is missing from
  the trained distribution is what waits in the group buffer."""
  patient = make_config(**{**vars(config), "retention": 10**6, "on_purge": OnPurge.DROP})
  player = Player(patient, lambda uid: lengths[uid % len(lengths)], chunk, prompts=prompts)
  trained = []
  while not (player.scheduler.closed and player.scheduler.in_flight == 0):
    trained += player.iterate().rollouts
    totals = player.scheduler.totals
    waiting = collections.Counter(
      len(rollout["tokens"]) for group in player.scheduler.state_dict()["groups"] for rollout in group["finished"]
    )
    assert totals.lengths_finished == totals.lengths_trained + waiting
  expected = range(prompts * config.group_size)
  assert sorted(rollout.uid for rollout in trained) == list(expected)
  assert player.scheduler.totals.lengths_trained == collections.Counter(lengths[uid % len(lengths)] for uid in expected)
  assert player.scheduler.totals.wasted == 0


@settings(max_examples=60)
@given(config=configs, lengths=lengths_lists, prompts=st.integers(1, 12), chunk=st.integers(1, 4))
def test_what_is_missing_from_the_trained_lengths_was_beyond_the_window(config, lengths, prompts, chunk):
  """With a window that closes: every rollout is trained on whole, or was purged after sigma + 1 iterations unfinished."""
  player = Player(config, lambda uid: lengths[uid % len(lengths)], chunk, prompts=prompts)
  whole, purged, entered = {}, {}, {}
  while not (player.scheduler.closed and player.scheduler.in_flight == 0):
    events = player.events()
    while True:
      for entry in player.scheduler.state_dict()["pool"]:
        entered.setdefault(entry["uid"], player.version)
      try:
        next(events)
      except StopIteration as stop:
        result = stop.value
        break
    for rollout in result.purged:
      purged[rollout.uid] = result.iteration
    for rollout in result.rollouts:
      if rollout.finish_reason is FinishReason.STOP:
        whole[rollout.uid] = len(rollout.tokens)
  assert sorted([*whole, *purged]) == list(range(prompts * config.group_size))
  assert all(length == lengths[uid % len(lengths)] for uid, length in whole.items())
  for uid, iteration in purged.items():
    survived = iteration - entered[uid]
    assert survived > config.retention
    if config.retention_counts is RetentionCounts.ITERATIONS:
      assert survived == config.retention + 1


def test_requeue_keeps_the_books():
  """Lengths that come down under newer weights, as in life; else the long ones would start again for ever."""
  config = make_config(on_purge=OnPurge.REQUEUE, retention=0, token_budget=6, slots=4)
  player = Player(config, lambda uid: max(1, 12 - 3 * player.version) if uid % 4 == 0 else 2)
  trained = collections.Counter()
  for _ in range(8):
    trained.update(rollout.uid for rollout in player.iterate().rollouts)
    check_invariants(player)
  totals = player.scheduler.totals
  assert totals.requeued > 0 and totals.wasted > 0 and totals.dropped == 0
  assert set(trained.values()) == {1}


def test_counts_survive_json():
  player = Player(make_config(), lambda uid: 1 + uid % 9)
  for _ in range(5):
    player.iterate()
  totals = player.scheduler.totals
  assert Counts.from_dict(json.loads(json.dumps(totals.to_dict()))) == totals


def test_metrics_of_an_iteration():
  lengths = {0: 5, 1: 1, 2: 2, 3: 8}
  player = Player(make_config(**LITERAL, token_budget=16, slots=4, pool=4), lambda uid: lengths.get(uid, 50), chunk=50)
  metrics = player.iterate().metrics()
  assert metrics["scheduler/length_finished_mean"] == metrics["scheduler/length_trained_mean"] == 4.0
  assert [metrics[f"scheduler/length_trained_{name}"] for name in ("p50", "p95", "max")] == [2, 8, 8]
  assert metrics["scheduler/tokens_generated"] == metrics["scheduler/tokens_counted"] == 16
  assert json.loads(json.dumps(metrics)) == metrics


# ---------------------------------------------------------------------------------------------------------------------
# Any legal sequence of calls


class Machine(stateful.RuleBasedStateMachine):
  """Every call that the state allows, in any order: early ends, aborts, slots left empty, a restart at any point.

  The model is what the caller knows: the tokens it recorded, and where each rollout was seen to go.
  """

  @stateful.initialize(
    config=st.builds(
      lambda config, on_purge: make_config(**{**vars(config), "on_purge": on_purge}), configs, st.sampled_from(OnPurge)
    )
  )
  def start(self, config):
    self.config, self.scheduler = config, C3POScheduler(config)
    self.inside = False
    self.version = 0
    self.tokens = {}  # of unfinished rollouts and those that wait for siblings, by uid: [(token, version)]
    self.group_of = {}
    self.gone = set()  # trained on, dropped or aborted

  @stateful.precondition(lambda self: not self.inside)
  @stateful.rule()
  def begin(self):
    purged = self.scheduler.begin_iteration()
    self.inside = True
    for rollout in purged:
      assert [*zip(rollout.tokens, rollout.versions, strict=True)] == self.tokens[rollout.uid]
      if self.config.on_purge is OnPurge.REQUEUE:
        self.tokens[rollout.uid] = []
      elif self.config.on_purge is OnPurge.DROP or not rollout.tokens:
        self.forget(rollout.uid)
    assert self.scheduler.counted == sum(
      len(rollout.tokens)
      for rollout in purged
      if self.config.on_purge is OnPurge.TRAIN and self.config.budget_counts is BudgetCounts.COMPLETED
    )

  @stateful.precondition(lambda self: self.inside and self.scheduler.wanted_groups)
  @stateful.rule(data=st.data())
  def admit(self, data):
    count = data.draw(st.integers(1, self.scheduler.wanted_groups))
    for rollout in self.scheduler.admit([(7, [1, 2])] * count):
      self.tokens[rollout.uid], self.group_of[rollout.uid] = [], rollout.group

  @stateful.precondition(lambda self: self.inside and self.scheduler.in_flight)
  @stateful.rule()
  def place(self):
    pool, running = self.scheduler.state_dict()["pool"], self.scheduler.running()
    in_slots = {rollout.uid for rollout in running.values()}
    waiting = sorted((-entry["retention"], entry["uid"]) for entry in pool if entry["uid"] not in in_slots)
    free = sorted(set(range(self.config.slots)) - set(running))
    placed = self.scheduler.place()
    assert [(slot, rollout.uid) for slot, rollout in placed] == [
      (slot, uid) for slot, (_, uid) in zip(free, waiting, strict=False)
    ]

  @stateful.precondition(lambda self: self.inside and self.scheduler.running())
  @stateful.rule(data=st.data())
  def decode(self, data):
    """Some tokens for some of the rollouts in slots, and an end for some."""
    for uid in [rollout.uid for rollout in self.scheduler.running().values()]:
      count = data.draw(st.integers(0, 3))
      drawn = [(1000 * uid + len(self.tokens[uid]) + index, self.version) for index in range(count)]
      self.scheduler.record(uid, [token for token, _ in drawn], [-0.5] * count, self.version)
      self.tokens[uid] += drawn
      if self.tokens[uid] and data.draw(st.booleans()):
        self.scheduler.finish(uid, data.draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH])))

  @stateful.precondition(lambda self: self.inside)
  @stateful.rule(data=st.data())
  def turn(self, data):
    """What a driver does without a break, so that long sequences get somewhere."""
    if self.scheduler.wanted_groups:
      for rollout in self.scheduler.admit([(7, [1, 2])]):
        self.tokens[rollout.uid], self.group_of[rollout.uid] = [], rollout.group
    self.place()
    if self.scheduler.running():
      self.decode(data)

  @stateful.precondition(lambda self: self.inside and self.scheduler.in_flight)
  @stateful.rule(data=st.data())
  def abort(self, data):
    uid = data.draw(st.sampled_from([entry["uid"] for entry in self.scheduler.state_dict()["pool"]]))
    if data.draw(st.integers(0, 3)) < 3:  # seldom, or nothing would live to be trained on
      return
    self.scheduler.finish(uid, FinishReason.ABORTED)
    self.forget(uid)

  @stateful.precondition(lambda self: self.inside)
  @stateful.rule()
  def end(self):
    result = self.scheduler.end_iteration(self.version)
    self.inside = False
    assert [rollout.uid for rollout in result.rollouts] == sorted(rollout.uid for rollout in result.rollouts)
    for rollout in result.rollouts:  # whole, in order, and for the first time
      assert [*zip(rollout.tokens, rollout.versions, strict=True)] == self.tokens[rollout.uid]
      assert rollout.finish_reason is not None
      self.forget(rollout.uid)
    if self.config.unit is Unit.GROUP:  # nobody of a trained group comes later
      trained = {rollout.group for rollout in result.rollouts}
      assert not trained & {self.group_of[uid] for uid in self.tokens}
    self.version += 1

  @stateful.rule()
  def restart(self):
    state = self.scheduler.state_dict()
    text = json.dumps(state, sort_keys=True)
    self.scheduler = C3POScheduler(self.config)
    self.scheduler.load_state_dict(json.loads(text))
    assert json.dumps(self.scheduler.state_dict(), sort_keys=True) == text

  def forget(self, uid):
    assert uid not in self.gone
    self.gone.add(uid)
    del self.tokens[uid]

  @stateful.invariant()
  def books(self):
    scheduler, config = self.scheduler, self.config
    state, running = scheduler.state_dict(), scheduler.running()
    assert scheduler.in_flight <= config.pool and len(running) <= config.slots
    assert len({rollout.uid for rollout in running.values()}) == len(running)
    limit = config.retention if self.inside else config.retention + 1  # purged as the next iteration begins
    assert all(entry["retention"] <= limit for entry in state["pool"])
    held = {
      entry["uid"]: len(entry["tokens"])
      for entry in [*state["pool"], *state["ready"], *(one for group in state["groups"] for one in group["finished"])]
    }
    assert held == {uid: len(tokens) for uid, tokens in self.tokens.items()}
    totals = scheduler.totals
    assert totals.generated == totals.trained + totals.wasted + sum(held.values())
    assert scheduler.buffered == sum(len(group["finished"]) for group in state["groups"])


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=50)
test_any_legal_sequence_of_calls = Machine.TestCase


def test_a_restart_finds_other_slots_than_those_that_were_saved():
  """Remote workers' slots have other numbers then: what was kept in the old ones waits, with what it has."""
  config = make_config(kv_policy=KVPolicy.KEEP, slots=2)
  saved = C3POScheduler(config)
  saved.set_slots({8, 9})
  saved.begin_iteration()
  saved.admit([(0, [5])])
  assert [slot for slot, _ in saved.place()] == [8, 9]
  saved.record(0, [1], [-1.0], 0)
  saved.end_iteration(0)
  again = C3POScheduler(config)
  again.load_state_dict(json.loads(json.dumps(saved.state_dict())))
  again.set_slots({0, 1})
  assert not again.running() and again.totals.redispatched == 2
  again.begin_iteration()
  assert [(slot, rollout.length) for slot, rollout in again.place()] == [(0, 1), (1, 0)]
