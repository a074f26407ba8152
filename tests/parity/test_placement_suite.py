"""Every strategy gives the same experience, losses and parameters on either path; and what would break that is noticed."""

import contextlib
import dataclasses
import pathlib
import pickle

import jax
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from configs.schema import ConfigError, Role, Strategy
from parity import rlhf
from parity.suites import placement
from parity.torch_twin import placed, ppo, sharded
from sharding.placement import Placement
from tests.devices import QUICK_TO_COMPILE

CRITIC_PHASE = placement.QUICK[1]


def test_every_strategy_on_either_path(monkeypatch):
  # The process that plays eight devices spends its time in XLA.
  monkeypatch.setenv("XLA_FLAGS", QUICK_TO_COMPILE)
  suite = placement.run()
  assert suite.passed, [tier.first_failure.describe() for tier in suite.tiers if not tier.passed]
  kinds = [(tier.name, tier.pair) for tier in suite.tiers]
  assert kinds == [(n, p) for n in ("experience", "losses", "parameters") for p in (placement.TORCH, placement.JAX)]
  for tier in suite.tiers:
    assert any(row.max > 0 for row in tier.rows), "compared with itself"
    cases = {row.case for row in tier.rows}
    assert cases == {f"{name}, {one}" for name, phase in placement.QUICK for one in rlhf.strategies_of(phase)}
  names = {row.name for tier in suite.tiers for row in tier.rows if row.case.startswith("IcePop, critic")}
  assert {"values of step 2", "returns of step 0", "critic loss", "critic head.bias", "actor gradient norm"} <= names


@pytest.fixture(scope="module")
def case():
  recorded = placement.record(placement.MODEL, *CRITIC_PHASE)
  return dataclasses.replace(recorded, steps=recorded.steps[:2])


@pytest.fixture(scope="module")
def alone(case):
  return ppo.run_alone(case)


def test_what_is_recorded_exercises_the_objective(case, alone):
  rollouts = [rollout for minibatches in case.steps for part in minibatches for rollout in part]
  uids = [rollout.uid for rollout in rollouts]
  assert len(set(uids)) == len(uids)
  log_k = np.concatenate([one["logp_old"] - one["logp_infer"] for one in alone.experience])
  assert 0.02 < np.mean(abs(log_k) > 1) < 0.3  # far from IcePop's band
  clip = case.phase.ppo.reward_clip
  scores = np.abs(np.concatenate([one["scores"] for one in alone.experience]))
  assert (scores < clip).any() and (scores > clip).any()
  groups = ppo.run_alone(placement.record(placement.MODEL, *placement.QUICK[0]))
  assert any(len(one["logp_old"]) < len(one["logp_infer"]) for one in groups.experience)  # some have no signal
  last = alone.experience[-1]
  assert np.abs(last["logp_old"] - last["logp_ref"]).max() > 1e-3  # the actor has moved, the reference has not


@contextlib.contextmanager
def one_rank(case, folder, strategy=Strategy.COLOCATED):
  """A worker in this process, which is all there is."""
  dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
  try:
    roles = [*case.phase.roles, *([Role.SHADOW_CRITIC] if strategy is Strategy.EXPLICIT else [])]
    parts = Placement.explicit((0,), dict.fromkeys(roles, range(1)))
    yield placed.Worker(placed.Job(case, parts), 0, torch.device("cpu"))
  finally:
    dist.destroy_process_group()


def test_one_rank_with_shadow_models_is_the_twin_alone_bit_for_bit(case, alone, tmp_path):
  with one_rank(case, tmp_path, Strategy.EXPLICIT) as worker:
    experience = [worker.step(version) for version in range(2)]
    assert worker.losses == alone.losses and worker.norms == alone.norms
    for own, other in zip(experience, alone.experience, strict=True):
      assert own.keys() == other.keys()
      assert all(np.array_equal(own[name], other[name]) for name in own)
    for role, tree in worker.params().items():
      jax.tree.map(np.testing.assert_array_equal, tree, alone.params[role])


def test_weights_of_another_version_stop_the_step(case, tmp_path):
  with one_rank(case, tmp_path) as worker, pytest.raises(sharded.VersionError, match=r"step 1: .* version 0"):
    worker.step(1)


def test_a_shadow_that_was_not_synchronised_shows(case, alone, tmp_path, monkeypatch):
  monkeypatch.setattr(sharded.Bridge, "cross", lambda self, source, target, version: version)
  with one_rank(case, tmp_path) as worker:
    found = dataclasses.replace(alone, experience=[worker.step(version) for version in range(2)])
  rows = placement.experience_rows(found, alone, placement.MODEL, "")
  assert [row.name for row in rows if not row.passed] == ["logp_rollout of step 1"]


def averaged(rank, folder):
  """A rank of two whose gradients are the mean over ranks."""
  build = sharded.build

  def broken(config, params, part):
    model = build(config, params, part)
    for module in model.modules():
      if isinstance(module, sharded.FSDPModule):
        module.set_gradient_divide_factor(2.0)
    return model

  sharded.build = broken
  placed._process(rank, 2, folder)


def test_an_averaged_gradient_shows_in_its_norm(case, alone, tmp_path):
  """Clipping and AdamW hide it from the parameters."""
  one = dataclasses.replace(case, steps=case.steps[:1])
  job = placed.Job(one, rlhf.placement_of(Strategy.INTERLEAVING, range(2), one.run))
  (tmp_path / "jobs").write_bytes(pickle.dumps([job]))
  multiprocessing.spawn(averaged, (str(tmp_path),), nprocs=2)
  found = placed._merged(pathlib.Path(tmp_path), 0)
  expected = ppo.run_alone(one)
  rows = placement.loss_rows(found, expected, placement.MODEL, "")
  assert {row.name for row in rows if not row.passed} == {"actor gradient norm", "critic gradient norm"}
  np.testing.assert_allclose(found.norms[Role.ACTOR], np.divide(expected.norms[Role.ACTOR], 2), rtol=1e-5)


def test_a_placement_that_does_not_fit_is_one_line(case):
  with pytest.raises(ConfigError, match="no devices for critic"):
    placed.Job(case, Placement.colocated(range(2), case.phase.roles - {Role.CRITIC}))
  with pytest.raises(ConfigError, match="the ranks from 0 on"):
    placed.Job(case, Placement.colocated((4, 5), case.phase.roles))
  jobs = [placed.Job(case, Placement.colocated(range(n), case.phase.roles)) for n in (1, 2)]
  with pytest.raises(ConfigError, match=r"jobs for \[1, 2\] ranks"):
    placed.run(jobs)
  with pytest.raises(ConfigError, match="no parameters for the critic"):
    dataclasses.replace(case, params={Role.ACTOR: case.params[Role.ACTOR], Role.REWARD: case.params[Role.REWARD]})
  first, second = case.steps[0]
  with pytest.raises(ConfigError, match=r"step 0: group 0 is in two minibatches"):
    dataclasses.replace(case, steps=[[first[:1], [*first[1:], *second]]])


def test_a_part_deals_every_rank_as_many_rows():
  for ranks, count in ((3, 7), (4, 3), (2, 0), (1, 5)):
    parts = [sharded.Part(tuple(range(ranks)), rank, torch.device("cpu"), None) for rank in range(ranks)]
    dealt = [part.deal(list(range(count)), -1) for part in parts]
    assert {len(rows) for rows in dealt} == {-(-count // ranks)}
    assert sorted(row for rows in dealt for row in rows if row >= 0) == list(range(count))
