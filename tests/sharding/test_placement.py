"""Parts of a device list: contiguous, disjoint or nested, for any shares and any number of devices."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import (
  ConfigError,
  MeshConfig,
  ParallelConfig,
  PlacementConfig,
  RewardModelConfig,
  RLConfig,
  Role,
  Strategy,
)
from sharding.placement import Placement, split
from tests.configs import small_run

SHARES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


@given(st.data())
def test_a_split_is_contiguous_and_within_one_device_of_the_shares(data):
  shares = data.draw(SHARES)
  count = data.draw(st.integers(len(shares), 300))
  parts = split(count, shares)
  assert [device for part in parts for device in part] == list(range(count))
  exact = [count * share / sum(shares) for share in shares]
  assert all(len(part) >= 1 for part in parts)
  if min(exact) >= 1:
    assert all(abs(len(part) - size) < 1 + 1e-9 for part, size in zip(parts, exact, strict=True))


def test_the_ratios_at_which_the_papers_code_overlaps():
  assert split(10, (0.4, 0.4, 0.1, 0.1)) == [range(4), range(4, 8), range(8, 9), range(9, 10)]
  assert split(3, (0.98, 0.01, 0.01)) == [range(1), range(1, 2), range(2, 3)]
  with pytest.raises(ConfigError, match="2 parts of 1 device: each needs at least one"):
    split(1, (0.5, 0.5))
  with pytest.raises(ConfigError, match="must be > 0"):
    split(4, (0.5, 0.0))


def test_the_strategies_of_the_paper_on_eight_devices():
  devices = [f"d{number}" for number in range(8)]
  together = Placement.colocated(devices)
  assert all(together.devices_of(role) == devices for role in together.roles)
  halves = Placement.interleaving(devices)
  assert halves.devices_of("reference") == devices[:4] and halves.devices_of("reward") == devices[4:]
  assert all(halves.devices_of(role) == devices for role in ("actor", "critic", "rollout"))
  assert not halves.share("reference", "reward") and halves.share("actor", "reward")
  apart = Placement.disaggregated(devices, shares={"actor": 0.4, "critic": 0.2, "rollout": 0.3, "reward": 0.1})
  assert [apart.parts[role] for role in (Role.ACTOR, Role.CRITIC, Role.ROLLOUT, Role.REWARD)] == [
    range(3), range(3, 5), range(5, 7), range(7, 8),
  ]  # fmt: skip
  assert apart.parts[Role.SHADOW_CRITIC] == apart.parts[Role.REFERENCE] == apart.parts[Role.ROLLOUT]
  assert apart.picture().splitlines()[1:4] == [
    "actor          ###.....  0-2",
    "critic         ...##...  3-4",
    "rollout        .....##.  5-6",
  ]


@given(st.integers(5, 200), st.sets(st.sampled_from([Role.CRITIC, Role.REFERENCE, Role.REWARD])))
def test_default_shares_fit_any_number_of_devices(count, roles):
  placement = Placement.disaggregated(range(count), {Role.ACTOR, Role.ROLLOUT} | roles)
  assert sorted({device for part in placement.parts.values() for device in part}) == list(range(count))
  assert not placement.share("actor", "rollout")
  assert (Role.SHADOW_CRITIC in placement.parts) == (Role.CRITIC in roles)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: Placement.interleaving(range(8), ["actor", "rollout"]), "needs a reference and a reward model"),
    (lambda: Placement.interleaving(range(8), reference=1.5), "between 0 and 1"),
    (lambda: Placement.disaggregated(range(8), shares={"actor": 1}), "rollout needs a share"),
    (lambda: Placement.disaggregated(range(8), ["actor", "rollout"], {"actor": 1, "rollout": 1, "reward": 1}), "reward, which is not placed"),
    (lambda: Placement.colocated(range(8), ["actor"]), "at least an actor and a rollout"),
    (lambda: Placement.colocated(range(8), ["actor", "teacher"]), "'teacher' is no role: actor, critic"),
    (lambda: Placement.explicit(range(4), {"actor": range(3), "rollout": range(2, 4)}), "overlap in part"),
    (lambda: Placement.explicit(range(4), {"actor": range(4), "rollout": range(4, 6)}), "rollout on devices 4:6, but there are 4"),
  ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


# ---------------------------------------------------------------------------------------------------------------------
# As a run's config says it


def fsdp(count):
  return ParallelConfig(MeshConfig(fsdp=count))


def run(placement, *, actor=4, rollout=4):
  base = small_run.get_config()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, parallel=fsdp(actor)),
    rollout=dataclasses.replace(base.rollout, parallel=fsdp(rollout)),
    reward_model=RewardModelConfig(steps=1),
    rlhf=RLConfig(steps=1, advantage="gae", reward="model"),
    placement=placement,
  )


def parts(config):
  return {str(role): (seat.devices.start, seat.devices.stop) for role, seat in config.seats.items()}


def test_seats_follow_from_the_strategy_and_the_meshes():
  assert set(parts(run(PlacementConfig())).values()) == {(0, 4)}
  halves = parts(run(PlacementConfig(Strategy.INTERLEAVING)))
  assert (halves["reference"], halves["reward"], halves["critic"]) == ((0, 2), (2, 4), (0, 4))
  apart = run(PlacementConfig(Strategy.DISAGGREGATED, critic=fsdp(2), reference=fsdp(1)), rollout=2)
  assert parts(apart) == {
    "actor": (0, 4), "critic": (4, 6), "rollout": (6, 8), "shadow_critic": (6, 8), "reference": (8, 9), "reward": (8, 9),
  }  # fmt: skip
  devices = {"actor": "0:4", "rollout": "4:8", "reward": "4:6"}
  mapped = parts(run(PlacementConfig(Strategy.EXPLICIT, devices=devices)))
  assert (mapped["critic"], mapped["reference"], mapped["reward"]) == ((0, 4), (4, 8), (4, 6))


def test_a_run_places_only_the_roles_that_it_needs():
  base = run(PlacementConfig())
  assert dataclasses.replace(base, rlhf=RLConfig(steps=0)).roles == {Role.ACTOR, Role.ROLLOUT}
  grpo = RLConfig(steps=1, reward="model")
  assert dataclasses.replace(base, rlhf=grpo).roles == {Role.ACTOR, Role.ROLLOUT, Role.REWARD}
  assert base.roles == {Role.ACTOR, Role.ROLLOUT, Role.CRITIC, Role.REFERENCE, Role.REWARD}
  assert Role.SHADOW_CRITIC in run(PlacementConfig("disaggregated")).roles


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: run(PlacementConfig(), rollout=2), r"rollout.parallel.mesh has 2 devices, but there are 4"),
    (lambda: run(PlacementConfig(Strategy.INTERLEAVING), actor=1, rollout=1), "1 devices, which have no halves"),
    (lambda: run(PlacementConfig(Strategy.INTERLEAVING, reward=fsdp(4))), "placement.reward.mesh has 4 devices"),
    (lambda: run(PlacementConfig(devices={"actor": "0:4"})), "needs placement.strategy=explicit"),
    (lambda: run(PlacementConfig("explicit", devices={"actor": "0-4"})), "first:stop, such as 0:4"),
    (lambda: run(PlacementConfig("explicit", devices={"teacher": "0:4"})), "'teacher' is no role"),
    (lambda: run(PlacementConfig("explicit", devices={"actor": "0:4"})), "says nothing of rollout"),
    (lambda: run(PlacementConfig("explicit", devices={"actor": "0:4", "rollout": "5:9"})), "nobody uses device 4"),
    (lambda: run(PlacementConfig("explicit", devices={"actor": "0:2", "rollout": "4:8"})), "model.parallel.mesh has 4"),
    (lambda: run(PlacementConfig("disaggregated", critic=fsdp(3))), "cannot be cut into 3 equal parts"),
    (lambda: dataclasses.replace(run(PlacementConfig()), reward_model=RewardModelConfig()), "reward_model.steps > 0"),
  ],
)  # fmt: skip
def test_contradictions_of_a_config_are_named(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
