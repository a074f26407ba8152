"""What stays in memory when rollouts and training change places is found at the switch, by name."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.schema import ConfigError, PlacementConfig, RolloutDtype
from ring_jax.model import init_params
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.roles import Weights
from ring_jax.train.switching import Switch
from rollout.engine import RingEngine
from rollout.worker import EngineWorker
from sharding.memory import LedgerError
from tests.train import small_run

SLACK = 1024  # bytes: this model is small


@pytest.fixture
def job():
  base = small_run.get_config()
  config = dataclasses.replace(
    base,
    placement=PlacementConfig(switching="host"),
    rollout=dataclasses.replace(base.rollout, dtype=RolloutDtype.BFLOAT16),
  )
  params = init_params(config.model, 0)
  mask_V = np.ones(config.model.vocab_size, bool)
  engine = RingEngine(config.model, config.rollout, eos_ids=(1,), vocab_mask_V=mask_V, seed=0)
  worker = EngineWorker(engine)
  weights = Weights(params, make_optimizer(config.rl.optimizer, 1).init(params))
  return Switch(config, "rl", worker, slack_bytes=SLACK), weights, engine, worker


def kinds(tree):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_optimizer_state_and_cache_take_turns(job):
  switch, weights, engine, worker = job
  before = jax.device_get(weights.actor_state)
  for _ in range(2):
    stored = engine.load_params(weights.actor)
    switch.to_rollout(weights, stored)
    assert kinds(weights.actor_state) == {"pinned_host"} and worker.state is not None
    switch.to_training(weights, stored)
    assert kinds(weights.actor_state) == {jax.devices()[0].default_memory().kind} and worker.state is None
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stored))
  for leaf, other in zip(jax.tree.leaves(jax.device_get(weights.actor_state)), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(leaf, other)


def test_a_cache_that_stays_is_named(job):
  switch, weights, engine, worker = job
  stored = engine.load_params(weights.actor)
  switch.to_rollout(weights, stored)
  worker.free = lambda: None
  with pytest.raises(LedgerError, match="memory in phase training: rollout cache should be freed, and is not"):
    switch.to_training(weights, stored)


def test_a_copy_that_somebody_keeps_is_found(job):
  switch, weights, engine, worker = job
  stored = engine.load_params(weights.actor)
  switch.to_rollout(weights, stored)
  kept = jax.tree.map(lambda leaf: leaf + 0, worker.state.cache)
  with pytest.raises(LedgerError, match="belong to nobody"):
    switch.to_training(weights, stored)
  assert kept


def test_an_optimizer_state_that_does_not_leave_is_named(job, monkeypatch):
  switch, weights, engine, _ = job
  monkeypatch.setattr("ring_jax.train.switching.to_host", lambda tree: tree)
  with pytest.raises(LedgerError, match="memory in phase rollout: actor optimizer should be host, and is not"):
    switch.to_rollout(weights, engine.load_params(weights.actor))


def test_the_very_same_arrays_are_not_freed_under_the_actor(job):
  """Where the engine stores what the trainer has, both hold the same arrays."""
  switch, weights, *_ = job
  switch.to_rollout(weights, weights.actor)
  switch.to_training(weights, weights.actor)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights.actor))


def test_contradictions_are_refused():
  base = small_run.get_config()
  with pytest.raises(ConfigError, match="kv_policy=keep goes on with it"):
    dataclasses.replace(
      base, placement=PlacementConfig(switching="host"), rollout=dataclasses.replace(base.rollout, kv_policy="keep")
    )
  with pytest.raises(ConfigError, match="share no device"):
    dataclasses.replace(base, placement=PlacementConfig("disaggregated", switching="host"))
