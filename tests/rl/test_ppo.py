"""Rewards and advantages of PPO, against their definitions as sums."""

import dataclasses

import numpy as np
import pytest

from configs.schema import ConfigError, PPOConfig
from ring_jax.rl.ppo import gae, token_rewards

CONFIG = PPOConfig(kl_coef=0.3, reward_clip=0.7, gamma=0.9, lam=0.8)
LENGTHS = (5, 1, 9, 2, 1, 30, 9)


@pytest.fixture(scope="module")
def rollouts():
  rng = np.random.default_rng(0)
  draw = lambda: [rng.normal(size=n).astype(np.float32) for n in LENGTHS]  # noqa: E731
  return draw(), draw(), draw(), rng.normal(size=len(LENGTHS)) * 2


def sums(rewards, values, gamma, lam):
  """A_t as the sum over all later deltas, with plain Python floats."""
  advantages = []
  for reward, value in zip(rewards, values, strict=True):
    following = [*map(float, value[1:]), 0.0]
    delta = [float(r) + gamma * f - float(v) for r, f, v in zip(reward, following, value, strict=True)]
    n = len(delta)
    advantages.append([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])
  return advantages


def assert_ragged(got, expected, **tolerance):
  assert len(got) == len(expected)
  for ours, theirs in zip(got, expected, strict=True):
    assert ours.dtype == np.float32 and ours.shape == (len(theirs),)
    np.testing.assert_allclose(ours, theirs, **tolerance)


def test_rewards_by_hand(rollouts):
  logp_old, logp_ref, _, scores = rollouts
  got = token_rewards(logp_old, logp_ref, scores, CONFIG)
  expected = [-0.3 * (np.float64(old) - ref) for old, ref in zip(logp_old, logp_ref, strict=True)]
  for reward, score in zip(expected, scores, strict=True):
    reward[-1] += min(max(score, -0.7), 0.7)
  assert (np.abs(scores) > 0.7).any() and (np.abs(scores) < 0.7).any()
  assert_ragged(got, expected, rtol=1e-6)


def test_without_a_reference_only_the_last_token_is_rewarded(rollouts):
  logp_old, _, _, scores = rollouts
  got = token_rewards(logp_old, None, scores, dataclasses.replace(CONFIG, kl_coef=0.0, reward_clip=100.0))
  assert_ragged(got, [[0.0] * (n - 1) + [s] for n, s in zip(LENGTHS, scores, strict=True)], rtol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 0.95), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_advantages_are_sums_of_deltas(rollouts, gamma, lam):
  rewards, values, _, _ = rollouts
  advantages, returns = gae(rewards, values, dataclasses.replace(CONFIG, gamma=gamma, lam=lam))
  expected = sums(rewards, values, gamma, lam)
  assert_ragged(advantages, expected, rtol=1e-6, atol=1e-7)
  both = [np.add(a, np.float64(v)) for a, v in zip(expected, values, strict=True)]
  assert_ragged(returns, both, rtol=1e-6, atol=1e-7)


def test_closed_forms(rollouts):
  rewards, values, _, _ = rollouts
  # gamma = lam = 1: the return is the sum of the rewards to come, whatever the critic says.
  _, returns = gae(rewards, values, dataclasses.replace(CONFIG, gamma=1.0, lam=1.0))
  assert_ragged(returns, [np.cumsum(r[::-1], dtype=np.float64)[::-1] for r in rewards], rtol=1e-5, atol=1e-6)
  # lam = 0: one step ahead.
  advantages, _ = gae(rewards, values, dataclasses.replace(CONFIG, lam=0.0))
  following = [np.append(value[1:], 0.0) for value in values]
  assert_ragged(advantages, [r + 0.9 * f - v for r, f, v in zip(rewards, following, values, strict=True)], rtol=1e-5)
  # An exact critic of a certain reward has nothing to say.
  advantages, returns = gae([np.array([0.0, 0.0, 1.0])], [np.ones(3)], dataclasses.replace(CONFIG, gamma=1.0))
  np.testing.assert_array_equal(advantages[0], [0, 0, 0])
  np.testing.assert_array_equal(returns[0], [1, 1, 1])


def test_long_answers_lose_nothing_to_float32():
  rewards, values = [np.full(20_000, 1e-4, np.float32)], [np.zeros(20_000, np.float32)]
  _, returns = gae(rewards, values, dataclasses.replace(CONFIG, gamma=1.0, lam=1.0))
  np.testing.assert_allclose(returns[0][0], 20_000 * np.float64(np.float32(1e-4)), rtol=1e-7)


def test_nothing_in_nothing_out():
  assert token_rewards([], [], [], CONFIG) == []
  assert gae([], [], CONFIG) == ([], [])


@pytest.mark.parametrize(
  "call, says",
  [
    (lambda: token_rewards([np.zeros(2)], [np.zeros(2)], [1.0, 2.0], CONFIG), "2 scores but 1 rollouts"),
    (lambda: token_rewards([np.zeros(2), np.zeros(0)], None, [1.0, 2.0], CONFIG), "rollout 1 has no token"),
    (lambda: token_rewards([np.zeros(2)], [np.zeros(2)], [np.nan], CONFIG), "rollout 0 is nan"),
    (lambda: token_rewards([np.zeros(2)], None, [1.0], CONFIG), "kl_coef=0.3 needs log-probs of the reference"),
    (lambda: token_rewards([np.zeros(2)], [np.zeros(3)], [1.0], CONFIG), "logp_ref: 3 of rollout 0, which has 2"),
    (lambda: gae([np.zeros(2)], [], CONFIG), "values: of 0 rollouts, but there are 1"),
    (lambda: gae([np.zeros(2), np.zeros(1)], [np.zeros(2), np.zeros(2)], CONFIG), "values: 2 of rollout 1"),
  ],
)
def test_what_does_not_fit_together_is_said(call, says):
  with pytest.raises(ConfigError, match=says):
    call()
