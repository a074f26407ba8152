"""Costs fitted to workdirs: a law that is known comes back, and what the files lack is said."""

import dataclasses
import json

import pytest

from configs.schema import ConfigError, MeshConfig, ParallelConfig, PlacementConfig, Strategy, Switching, to_dict
from ring_jax.planning import measured
from sharding.planner import Stage, search
from tests.planning import rlhf_run

STAGES = ("rollout", "score", "logp", "reference", "reward", "values", "train", "critic", "sync")


def laid_out(devices, axis="fsdp", placement=None, actor=0):
  config = rlhf_run.get_config()
  layout = ParallelConfig(MeshConfig(**{axis: actor or devices}))
  rollout = dataclasses.replace(config.rollout, parallel=ParallelConfig(MeshConfig(**{axis: devices})))
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, parallel=layout),
    rollout=rollout,
    placement=placement or PlacementConfig(),
  )


def write(folder, config, seconds, steps=8, **more):
  """A workdir of so many steps, the first three of them slow; what a run calls train has the critic's turn in it."""
  if "critic" in seconds and "train" in seconds:
    seconds = seconds | {"train": seconds["train"] + seconds["critic"]}
  (folder / "rollouts").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(to_dict(config)))
  timings = [
    {
      "phase": "rlhf",
      "step": step,
      **{f"seconds/{name}": value + 9 * (step < 4) for name, value in seconds.items()},
      **more,
    }
    for step in range(1, steps + 1)
  ]
  (folder / "timings.jsonl").write_text("\n".join(map(json.dumps, timings)))
  answer = json.dumps({"prompt_tokens": [5] * 20, "tokens": [6] * 12})
  for step in range(1, steps + 1):
    (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text("\n".join([answer] * 4))
  return measured.read_run(folder, "rlhf", [], timings)


def law(devices, cut):
  """Seconds of every stage: a share of work, and for the calls that a step makes a cost of each device and of each piece."""
  pieces = (devices - 1) * cut  # of the one model, to every device that lacks them
  found = {name: (index + 1) * (0.5 + 0.01 * devices + 0.02 * pieces) for index, name in enumerate(STAGES)}
  return found | {"score": 0.3}  # the host's own


@pytest.fixture
def runs(tmp_path):
  shapes = [(1, "data"), (4, "data"), (8, "data"), (4, "fsdp"), (8, "fsdp")]
  return [
    write(tmp_path / f"{axis}{devices}", laid_out(devices, axis), law(devices, axis == "fsdp"))
    for devices, axis in shapes
  ]


def test_a_known_law_comes_back_and_predicts_another_number_of_devices(runs, monkeypatch):
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
  costs = measured.Measured(runs, "rlhf")
  found = measured.compare(costs, runs, "rlhf")
  assert found.summary()["largest_error"] < 0.02 and found.summary()["right_winner"]
  other = laid_out(2, "fsdp")
  generation = costs.generation(other, 1)
  assert generation.price.seconds == pytest.approx(law(2, True)["rollout"], rel=0.02)
  for stage, name in ((Stage.TRAIN, "train"), (Stage.VALUES, "values"), (Stage.LOGP, "logp")):
    assert costs.price(other, stage).seconds == pytest.approx(law(2, True)[name], rel=0.02)


def test_every_placement_of_the_run_can_be_ranked(runs):
  """Only the config's own switching and slots: of others nothing was measured."""
  ranking = search(laid_out(8), "rlhf", 8, measured.Measured(runs, "rlhf"), may_change=False)
  assert {one.config.placement.strategy for one in ranking.estimates} == {
    Strategy.COLOCATED, Strategy.INTERLEAVING, Strategy.DISAGGREGATED,
  }  # fmt: skip
  assert {one.config.placement.switching for one in ranking.estimates} == {Switching.KEEP}


def test_devices_that_share_cores_gain_nothing_by_working_at_the_same_time(runs, monkeypatch):
  monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
  costs = measured.Measured(runs, "rlhf")
  apart = laid_out(
    4, "data", PlacementConfig(Strategy.DISAGGREGATED, critic=ParallelConfig(MeshConfig(data=2))), actor=2
  )
  found = measured.estimate(apart, "rlhf", costs)
  alone = sum(price.seconds for price in found.prices.values())
  assert found.seconds == pytest.approx(alone, rel=0.01)


def test_one_run_gives_work_alone_and_what_no_run_timed_is_an_error(tmp_path):
  run = write(
    tmp_path / "a", laid_out(2), {"rollout": 1.0, "score": 0.1, "train": 2.0, "sync": 0.0}, **{"seconds/step": 3.5}
  )
  costs = measured.Measured([run], "rlhf")
  assert not any(costs.laws[Stage.TRAIN][1:]) and run.step_seconds == 3.5
  assert costs.price(laid_out(8), Stage.TRAIN).seconds == pytest.approx(2.0, rel=1e-3)
  # What a step took beside its stages stays.
  assert costs.price(laid_out(8), Stage.SYNC).seconds == pytest.approx(0.4, abs=1e-3)
  with pytest.raises(ConfigError, match="no run has seconds/critic for critic"):
    costs.price(laid_out(8), Stage.CRITIC)


def test_what_cannot_be_fitted_says_so(tmp_path):
  apart = PlacementConfig(Strategy.DISAGGREGATED)
  run = write(tmp_path / "apart", laid_out(4, placement=apart, actor=4), law(4, True))
  with pytest.raises(ConfigError, match="apart is disaggregated"):
    measured.Measured([run], "rlhf")
  with pytest.raises(ConfigError, match="holds 2 timed rlhf steps after the first 3, needs 3"):
    write(tmp_path / "short", laid_out(4), law(4, True), steps=5)
  with pytest.raises(ConfigError, match=r"config.json cannot be read"):
    measured.read_run(tmp_path / "none", "rlhf", [], [])
  (tmp_path / "short" / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match=r"config.json is not a run's"):
    measured.read_run(tmp_path / "short", "rlhf", [], [])


def test_the_comparison_names_both_winners(runs):
  costs = measured.Measured(runs, "rlhf")
  slow = dataclasses.replace(runs[0], every_step=[1e3])
  found = measured.compare(costs, [slow, runs[2]], "rlhf")
  assert not found.summary()["right_winner"] and found.measured_winner is runs[2]
  assert "but data8 was measured to be" in found.lines()[-1] and found.lines()[0].startswith("data1  colocated")
