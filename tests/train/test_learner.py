"""The learner under the objectives that IcePop is compared with: what it recomputes, replays and reports."""

import collections
import contextlib
import dataclasses
import types

import jax
import numpy as np
import optax
import pytest

from configs.ring_tiny import get_config
from configs.schema import OBJECTIVES, PackingConfig, RLConfig
from ring_jax import model as ring_model
from ring_jax.records import Rollout
from ring_jax.rl import replay
from ring_jax.train.experience import Experience
from ring_jax.train.learner import Learner
from ring_jax.train.programs import Programs
from ring_jax.train.roles import Weights
from sharding import planner

MODEL = dataclasses.replace(
  get_config().model, vocab_size=32, hidden_size=16, num_hidden_layers=2, intermediate_size=16, moe_intermediate_size=8
)
PACKING = PackingConfig(length=24, rows=2)
NOTHING = contextlib.nullcontext()


def rollouts():
  """Eight answers that the engine found more likely than any model of 32 ids does, with experts of its own."""
  rng, made = np.random.default_rng(0), []
  for uid in range(8):
    size = int(rng.integers(2, 9))
    answer = rng.integers(0, 32, size).tolist()
    picks = np.array([[rng.permutation(8)[:2]] for _ in range(size)], np.uint8)
    made.append(Rollout(uid, uid // 4, 0, rng.integers(0, 32, 5).tolist(), answer, [-3.0] * size, [0] * size))
    made[-1].experts = replay.encode(picks)
  return made


@pytest.mark.parametrize("name", ["gspo", "grpo_infer_old"])
def test_two_minibatches(name):
  config = get_config()
  phase = RLConfig(steps=1, minibatches=2, objective=OBJECTIVES[name])
  config = dataclasses.replace(config, model=MODEL, rl=phase)
  programs = Programs(config, np.ones(32, bool), {"rl": optax.sgd(0.05)})
  seen, passes = [], []

  def gradients(params, sums, tokens, *rest):
    seen.append(tokens.experts_LxRxTxK)
    return programs.rl_gradients(params, sums, tokens, *rest)

  def logprobs(params, tokens):
    passes.append(tokens.experts_LxRxTxK)
    return programs.logprobs(params, tokens)

  actor = types.SimpleNamespace(rl_gradients=gradients, logprobs=logprobs, apply=programs.apply)
  turns = types.SimpleNamespace(of=lambda role: NOTHING, together=lambda jobs: [job() for job in jobs.values()])
  learner = Learner("rl", phase, PACKING, 0, types.SimpleNamespace(actor=actor), turns, MODEL)
  params = ring_model.init_params(MODEL, 0)
  before = jax.device_get(params)
  weights = Weights(params, programs.init_optimizer(params, "rl"))
  made = rollouts()
  experience = Experience(made, collections.Counter())
  experience.advantages = [1.0, -1.0] * 4
  learner.begin(0)
  learner.learn(weights, experience, [np.arange(0, 8, 2), np.arange(1, 8, 2)], lambda kind: NOTHING)
  metrics, positions = learner.end()

  tokens = sum(len(rollout.tokens) for rollout in made)
  assert metrics["policy/tokens"] == tokens and positions == tokens + 5 * 8
  assert metrics["optimizer_steps"] == 2 and np.isfinite(list(metrics.values())).all()
  assert np.any(before["lm_head"]["kernel"] != weights.actor["lm_head"]["kernel"])
  # Theta_old is recomputed only where something reads it, and wherever the actor computes, it takes the given experts.
  engine = name == "grpo_infer_old"
  assert bool(passes) is not engine and planner.needs_logp(phase) is not engine
  for experts in (*seen, *passes):
    assert (experts >= 0).any() and (experts < 0).any()
  if engine:  # the mismatch is that of theta; both are near to log(1/32) + 3 a token
    assert metrics["mismatch/kl_k1"] == pytest.approx(-3 - metrics["policy/logp"], rel=1e-5)
    assert 0.3 < metrics["mismatch/kl_k1"] < 0.6 and 0.4 < metrics["policy/ratio_max"] < 1.1
  else:  # of a whole answer: nearer to 1 than of any token
    assert 1 < metrics["policy/ratio_max"] < 1.05
  assert metrics["policy/logp_infer"] == -3
