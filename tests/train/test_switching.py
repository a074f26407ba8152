"""Rollouts and training take turns on the same memory: nothing stays behind, to the byte, and what does is named."""

import dataclasses
import gc
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import ConfigError, PlacementConfig, RolloutDtype
from ring_jax.model import init_params
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.programs import Programs
from ring_jax.train.roles import Weights
from ring_jax.train.switching import Switch
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler
from rollout.worker import EngineWorker
from sharding.memory import LedgerError, free
from tests.train import small_run

SLACK = 512  # bytes: this model is small
BASE = small_run.get_config()
CONFIG = dataclasses.replace(
  BASE,
  model=dataclasses.replace(BASE.model, vocab_size=48, num_hidden_layers=1, first_k_dense_replace=0),
  placement=PlacementConfig(switching="host"),
  rollout=dataclasses.replace(
    BASE.rollout, dtype=RolloutDtype.BFLOAT16, slots=8, pool=8, prefill_batch=2, max_tokens=12, token_budget=24
  ),
)
MASK_V = np.ones(CONFIG.model.vocab_size, bool)


@pytest.fixture(scope="module")
def shared():
  """What is compiled, and weights to copy."""
  programs = Programs(CONFIG, MASK_V, {"rl": make_optimizer(CONFIG.rl.optimizer, 10)})
  engine = RingEngine(CONFIG.model, CONFIG.rollout, eos_ids=(1,), vocab_mask_V=MASK_V, seed=0)
  params = init_params(CONFIG.model, 0)
  return types.SimpleNamespace(
    programs=programs, engine=engine, params=params, state=programs.init_optimizer(params, "rl")
  )


@pytest.fixture
def job(shared):
  gc.collect()
  copied = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
  weights = Weights(copied(shared.params), copied(shared.state))
  worker = EngineWorker(shared.engine)
  return Switch(CONFIG, "rl", worker, slack_bytes=SLACK), weights, shared.engine, worker


def kinds(tree):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_the_run_s_own_programs_leave_nothing_behind(job, shared):
  """Prefill, insertion and decode, then the optimizer's step; gradients that nobody freed are found at the next switch."""
  switch, weights, engine, worker = job
  prompts = ((i, [5 + i % 8] * (1 + i % 3)) for i in itertools.count())
  driver = RolloutDriver(worker, C3POScheduler(CONFIG.rollout), CONFIG.rollout.max_tokens)
  for version in range(2):
    stored = engine.load_params(weights.actor)
    before = jax.device_get(weights.actor_state)
    switch.to_rollout(weights, stored)
    assert kinds(weights.actor_state) == {"pinned_host"} and worker.state is not None
    result, _ = driver.iterate(stored, version, lambda count: list(itertools.islice(prompts, count)))
    assert result.rollouts and all(np.isfinite(rollout.logps).all() for rollout in result.rollouts)
    switch.to_training(weights, stored)
    assert kinds(weights.actor_state) == {jax.devices()[0].default_memory().kind} and worker.state is None
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stored))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(weights.actor_state), before)
    grads = jax.tree.map(lambda leaf: leaf * 0.01, weights.actor)
    weights.actor, weights.actor_state, _ = shared.programs.apply(weights.actor, weights.actor_state, grads, "rl")
    if version == 0:
      free(grads)
  stored = engine.load_params(weights.actor)
  with pytest.raises(LedgerError, match=r"belong to nobody .*\nrole"):
    switch.to_rollout(weights, stored)
  free(grads)
  switch.to_rollout(weights, stored)


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
  kept = jax.tree.map(jnp.copy, worker.state.cache)
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
  with pytest.raises(ConfigError, match="kv_policy=keep goes on with it"):
    dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, kv_policy="keep"))
  with pytest.raises(ConfigError, match="share no device"):
    dataclasses.replace(CONFIG, placement=PlacementConfig("disaggregated", switching="host"))
