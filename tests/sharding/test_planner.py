"""The planner against steps worked out by hand, and its candidates against the config's own checks."""

import dataclasses

import pytest

from configs import loading
from configs.placement import num_devices
from configs.schema import ConfigError, Memory, MeshConfig, ParallelConfig, PlacementConfig, Role, Strategy, Switching
from sharding import candidates, planner
from sharding.placement import Placement
from sharding.planner import Generation, Holdings, Price, Stage
from tests.planning import rlhf_run

SECONDS = {
  Stage.SYNC: 1.0, Stage.SYNC_CRITIC: 0.5, Stage.GENERATE: 40.0, Stage.SCORE: 2.0, Stage.LOGP: 3.0,
  Stage.REFERENCE: 4.0, Stage.REWARD: 6.0, Stage.VALUES: 5.0, Stage.TRAIN: 20.0, Stage.CRITIC: 16.0,
  Stage.TO_HOST: 0.25, Stage.FROM_HOST: 0.75,
}  # fmt: skip


HELD = {
  Role.ACTOR: Holdings(10, optimizer=20, working=12),
  Role.CRITIC: Holdings(9, optimizer=18, working=11),
  Role.ROLLOUT: Holdings(5, cache=30, working=2),
  Role.SHADOW_CRITIC: Holdings(9, working=1),
  Role.REFERENCE: Holdings(10, working=3),
  Role.REWARD: Holdings(8, working=3),
}


class Fixed:
  """The same seconds and bytes whatever the layout."""

  capacity, limit = float("inf"), 100.0

  def __init__(self, seconds=SECONDS, rollouts=32.0):
    self._seconds, self._rollouts = seconds, rollouts

  def generation(self, config, parts):
    ended = tuple((part + 1) / parts for part in range(parts))
    return Generation(Price(self._seconds[Stage.GENERATE], "hbm"), ended, self._rollouts, 1000.0)

  def price(self, config, stage):
    return Price(self._seconds[stage], "flops")

  def holdings(self, config, role):
    return HELD[role]


def on(mesh):
  return ParallelConfig(MeshConfig(data=mesh))


def placed(placement, actor=8, engine=8, **rlhf):
  config = rlhf_run.get_config()
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, parallel=on(actor)),
    rollout=dataclasses.replace(config.rollout, parallel=on(engine)),
    placement=placement,
    rlhf=dataclasses.replace(config.rlhf, **rlhf),
  )


def apart(**own):
  return PlacementConfig(Strategy.DISAGGREGATED, **{role: on(size) for role, size in own.items()})


def seconds(config, costs=None):
  return planner.estimate(config, "rlhf", costs or Fixed()).seconds


def test_colocated_every_stage_has_its_turn():
  found = planner.estimate(placed(PlacementConfig()), "rlhf", Fixed())
  assert found.seconds == pytest.approx(1 + 40 + 3 + 4 + 6 + 5 + 20 + 16)
  assert found.bottleneck is Stage.GENERATE and found.mean_idle == pytest.approx(0)
  assert sum(found.path.values()) == pytest.approx(found.seconds) and found.tokens_per_second == pytest.approx(
    1000 / 95
  )


def test_interleaving_reference_and_reward_at_the_same_time():
  found = planner.estimate(placed(PlacementConfig(Strategy.INTERLEAVING)), "rlhf", Fixed())
  assert found.seconds == pytest.approx(1 + 40 + 3 + max(4, 6) + 5 + 20 + 16)
  assert found.idle == {range(4): pytest.approx(2 / found.seconds), range(4, 8): pytest.approx(0)}


def test_state_at_the_host_costs_two_moves():
  kept, moved = placed(PlacementConfig()), placed(PlacementConfig(switching=Switching.HOST))
  assert seconds(moved) == pytest.approx(seconds(kept) + 0.25 + 0.75)
  # Weights of all roles; at one moment the cache and no state, at the other state and gradients and no cache.
  weights, state = 10 + 9 + 5 + 10 + 8, 20 + 18
  assert planner.tightest(kept, "rlhf", Fixed()).bytes == weights + max(30 + 2 + state, 12 + state + 30)
  assert planner.tightest(moved, "rlhf", Fixed()).bytes == weights + max(30 + 2, 12 + state)


def test_disaggregated_trains_actor_and_critic_at_the_same_time():
  """The critic's hand-over is behind the actor's; log-probs beside the judges, which take turns on the engine's devices."""
  found = planner.estimate(placed(apart(critic=2), actor=2, engine=4), "rlhf", Fixed())
  assert found.seconds == pytest.approx(1 + 40 + (4 + 6 + 5) + 20)
  assert set(found.idle) == {range(2), range(2, 4), range(4, 8)}
  assert found.idle[range(4, 8)] == pytest.approx((20 - 0.5) / found.seconds)
  judges = placed(apart(critic=2, reference=2), actor=2, engine=2)
  assert seconds(judges) == pytest.approx(1 + 40 + (4 + 6) + 20)


def test_streamed_parts_are_trained_on_while_others_are_drawn():
  """Two parts of 20 s, between them the shadow critic's values of the first; the second is judged in 5 s."""
  config = placed(apart(critic=2, reference=2), actor=2, engine=2, stream=16)
  assert planner.parts_of(config.rlhf, 32.0) == 2
  assert seconds(config) == pytest.approx(1 + 20 + 2.5 + 20 + max(2 + 3, 2.5) + 10)
  slow = Fixed(SECONDS | {Stage.TRAIN: 60.0})
  # The first part's 30 s begin after 1 + 20 + 5 and end after the second part is there: then its log-probs, then its own.
  assert seconds(config, slow) == pytest.approx(1 + 20 + 5 + 30 + 1.5 + 30)
  assert seconds(placed(PlacementConfig(), stream=16)) == pytest.approx(seconds(placed(PlacementConfig())))


def test_one_step_off_policy_the_slower_pipeline_decides():
  config = placed(apart(critic=2, reference=2), actor=2, engine=2, staleness=1)
  # The engine's devices: two hand-overs, the rollouts and the shadow critic's values.
  assert seconds(config) == pytest.approx(1 + 0.5 + 40 + 5)
  trains = Fixed(SECONDS | {Stage.TRAIN: 90.0})
  # The actor's devices: log-probs and training, then the hand-over, which waits for the engine.
  assert 90 + 3 + 1 <= seconds(config, trains) < 90 + 3 + 1 + 40
  assert planner.estimate(config, "rlhf", trains).bottleneck is Stage.TRAIN


def test_the_tightest_device_is_found():
  found = planner.tightest(placed(apart(critic=2), actor=2, engine=4), "rlhf", Fixed())
  assert found.devices == range(4, 8) and found.bytes == 5 + 9 + 10 + 8 + 30 + 3
  assert set(found.roles) == {Role.ROLLOUT, Role.SHADOW_CRITIC, Role.REFERENCE, Role.REWARD}


def test_without_critic_reference_and_reward_model_their_stages_are_gone():
  config = placed(PlacementConfig())
  config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, steps=1))
  assert set(planner.work(config, "rl")) == {Stage.SYNC, Stage.GENERATE, Stage.SCORE, Stage.TRAIN}
  assert planner.estimate(config, "rl", Fixed()).seconds == pytest.approx(1 + 40 + 2 + 20)
  assert planner.needs_logp(dataclasses.replace(config.rl, minibatches=2))


@pytest.mark.parametrize("devices", [1, 2, 6, 8])
def test_every_candidate_is_a_run_and_covers_the_devices(devices):
  base = rlhf_run.get_config()
  found = list(candidates.candidates(base, devices, may_change=True))
  strategies = {one.placement.strategy for one in found}
  assert Strategy.COLOCATED in strategies and (Strategy.INTERLEAVING in strategies) == (devices % 2 == 0)
  assert (Strategy.DISAGGREGATED in strategies) == (devices > 1)
  for one in found:
    assert num_devices(one.seats) == devices
    assert Placement.of_seats(one.placement.strategy, one.seats, range(devices)).roles == planner.placing.ordered(
      one.roles
    )
    assert {position for seat in one.seats.values() for position in seat.devices} == set(range(devices))
    assert one.rollout.token_budget == base.rollout.token_budget and one.rlhf == base.rlhf
  assert len({repr(one) for one in found}) == len(found)
  for one in found[:: max(len(found) // 10, 1)]:
    assert loading.override(base, loading.differences(base, one)) == one


def test_splits_give_roles_devices_of_their_own():
  found = list(candidates.candidates(rlhf_run.get_config(), 8, may_change=False))
  own = {
    tuple(role for role in (Role.CRITIC, Role.REFERENCE) if getattr(one.placement, role))
    for one in found
    if one.placement.strategy is Strategy.DISAGGREGATED
  }
  assert {one.placement.switching for one in found} == {Switching.KEEP}
  assert own == {(), (Role.CRITIC,), (Role.REFERENCE,), (Role.CRITIC, Role.REFERENCE)}
  assert {len(one.seats[Role.ACTOR].devices) for one in found} >= {1, 2, 4, 6, 8}


def test_slots_go_down_until_they_fit_and_state_goes_to_the_host_last():
  class Tight(Fixed):
    limit = 90.0

    def holdings(self, config, role):
      held = super().holdings(config, role)
      if role is Role.ROLLOUT:
        return dataclasses.replace(held, cache=config.rollout.slots)
      return dataclasses.replace(held, optimizer=0) if config.rlhf.optimizer.memory == "host" else held

  config = rlhf_run.get_config()
  found = planner.search(config, "rlhf", 8, Tight(), may_change=True)
  assert all(one.tightest.bytes <= 90 for one in found.estimates)
  slots = {one.config.rollout.slots for one in found.estimates}
  assert max(slots) < 100 and len(slots) > 3
  moved = [one.config for one in found.estimates if one.config.rlhf.optimizer.memory is Memory.HOST]
  assert 0 < len(moved) < len(found.estimates)
  assert found.estimates == planner.rank(found.estimates)
  fixed = planner.search(config, "rlhf", 8, Tight(), may_change=False)
  assert fixed.discarded[Strategy.COLOCATED][1].startswith("the nearest needs")
  one = planner.search(
    dataclasses.replace(config, rlhf=dataclasses.replace(config.rlhf, reward="verifier")), "rlhf", 1, Fixed(), False
  )
  assert one.discarded[Strategy.INTERLEAVING][0] == 0 and one.discarded[Strategy.DISAGGREGATED][0] == 0


def test_the_naive_candidate_gathers_its_weights_at_each_token():
  found = candidates.naive(rlhf_run.get_config(), 8)
  assert found.seats[Role.ROLLOUT] == found.seats[Role.ACTOR] == found.seats[Role.REWARD]
  assert found.model.parallel.mesh == MeshConfig(fsdp=8)
  with pytest.raises(ConfigError, match="cannot be cut into 64 equal parts"):
    candidates.naive(rlhf_run.get_config(), 64)
  assert planner.naive_estimate(rlhf_run.get_config(), "rlhf", 64, Fixed(), False) is None
