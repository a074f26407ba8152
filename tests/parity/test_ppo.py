"""The twin's RLHF in one process: rewards, GAE, the value loss, what the scalar models say, and which rollouts train."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from configs.schema import Advantage, ConfigError, PPOConfig, Reward, RLConfig, Role
from parity.suites import placement
from parity.torch_twin import ppo, step, weights
from ring_jax.records import Rollout

CONFIG = PPOConfig(kl_coef=0.1, reward_clip=0.4, gamma=0.9, lam=0.8, value_clip=0.1, value_coef=1.5)
MODEL = placement.MODEL
CRITIC = placement.scalar_params(MODEL, 5)


def rollouts_of(lengths, seed=0):
  random = np.random.default_rng(seed)
  draw = lambda n: random.integers(0, MODEL.config.vocab_size - 4, n).tolist()  # noqa: E731
  return [
    Rollout(i, i // 2, 0, draw(1 + i % 3), draw(n), random.normal(-4, 1, n).tolist(), [0] * n, reward=float(i % 2))
    for i, n in enumerate(lengths)
  ]


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_gae_is_the_sum_of_its_definition(n):
  random = np.random.default_rng(n)
  old, ref, values = random.normal(-1, 1, (3, n))
  rewards = ppo.rewards_of(5.0, old, ref, CONFIG)
  expected = [-0.1 * (old[t] - ref[t]) + 0.4 * (t == n - 1) for t in range(n)]  # 5 is clipped
  np.testing.assert_allclose(rewards, expected, atol=1e-15)
  advantages, returns = ppo.gae(rewards, values, CONFIG)
  after = [*values[1:], 0.0]
  for t in range(n):
    deltas = [rewards[s] + 0.9 * after[s] - values[s] for s in range(t, n)]
    assert advantages[t] == pytest.approx(sum(0.72**i * delta for i, delta in enumerate(deltas)), rel=1e-6)
    assert returns[t] == pytest.approx(advantages[t] + values[t], rel=1e-5, abs=1e-6)
  assert advantages.dtype == returns.dtype == np.float32 and len(returns) == n


def test_a_negative_score_is_clipped_and_no_reference_is_no_penalty():
  np.testing.assert_array_equal(ppo.rewards_of(-3.0, np.ones(3), None, CONFIG), [0, 0, -0.4])
  np.testing.assert_array_equal(ppo.rewards_of(0.25, np.ones(2), None, CONFIG), [0, 0.25])


def test_value_loss_takes_the_worse_of_two():
  #                 inside the clip; clipped, worse; clipped, better; not of the answer
  values = torch.tensor([[0.05, 0.5, 0.5, 9.0]], dtype=torch.float64, requires_grad=True)
  old, returns = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[1.0, 1.0, -1.0, 0.0]], dtype=torch.float64)
  loss = ppo.value_loss(values, old, returns, torch.tensor([[True, True, True, False]]), CONFIG)
  loss.backward()
  assert loss.item() == pytest.approx(0.75 * (0.95**2 + 0.9**2 + 1.5**2))
  np.testing.assert_allclose(values.grad[0], [1.5 * -0.95, 0.0, 1.5 * 1.5, 0.0])


def test_values_stand_before_tokens_and_scores_after_the_last():
  critic, rollouts = weights.build(MODEL.config, CRITIC), rollouts_of([3, 1, 5, 0])
  values, scores = ppo.answer_values(critic, rollouts, 3), ppo.scores_of(critic, rollouts, 3)
  for rollout, own, score in zip(rollouts, values, scores, strict=True):
    alone = critic(torch.tensor([rollout.prompt + rollout.tokens]))[0].detach().numpy()
    begin = len(rollout.prompt)
    np.testing.assert_allclose(own, alone[begin - 1 : -1], atol=2e-6)
    assert score == pytest.approx(alone[-1], abs=2e-6) and len(own) == len(rollout.tokens)
  assert ppo.answer_values(critic, [], 3) == ppo.scores_of(critic, [], 3) == []


def test_a_scalar_model_s_tree_comes_back():
  jax.tree.map(np.testing.assert_array_equal, weights.params_of(weights.build(MODEL.config, CRITIC)), CRITIC)
  short = CRITIC | {"head": {"kernel": CRITIC["head"]["kernel"][1:], "bias": CRITIC["head"]["bias"]}}
  with pytest.raises(ValueError, match=r"head\.weight"):
    weights.build(MODEL.config, short)


def test_gradients_of_parts_add_up():
  rollouts, random = rollouts_of([3, 1, 6]), np.random.default_rng(0)
  lessons = [ppo.Judged(r, *random.normal(size=(2, len(r.tokens))).astype(np.float32)) for r in rollouts]
  whole, parts = (weights.build(MODEL.config, CRITIC) for _ in range(2))
  expected = ppo.critic_gradients(whole, lessons, 10, CONFIG, rows=8)
  found = sum(ppo.critic_gradients(parts, part, 10, CONFIG, rows=8) for part in (lessons[:1], lessons[1:]))
  assert found == pytest.approx(expected, rel=1e-6)
  for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
    scale = max(one.grad.abs().max().item(), 1e-6)
    np.testing.assert_allclose(other.grad / scale, one.grad / scale, atol=2e-6, err_msg=name)


def test_groups_that_say_nothing_are_left_out():
  rollouts = rollouts_of([2, 3, 1, 4])
  config = RLConfig(steps=1, advantage=Advantage.MEAN_ONLY)
  rollouts[3].reward = rollouts[2].reward = 1.0
  experience = ppo.experience_of(rollouts, {"logp_old": [np.zeros(2)] * 4}, config)
  assert experience.trained == [0, 1] and list(map(len, experience.fields["logp_old"])) == [2, 2, 0, 0]
  assert [advantages.tolist() for advantages in experience.fields["advantages"][:2]] == [[-0.5] * 2, [0.5] * 3]
  rollouts[1].reward = None
  with pytest.raises(ConfigError, match=r"rollout 1 has no reward"):
    ppo.experience_of(rollouts, {}, config)


def test_a_minibatch_without_signal_takes_no_step():
  case = placement.record(MODEL, "one", dataclasses.replace(placement.FULL[-1][1], reward=Reward.VERIFIER))
  silent = [dataclasses.replace(rollout, reward=1.0) for rollout in case.steps[0][0]]
  case = dataclasses.replace(case, steps=[[silent, []]])
  found = ppo.run_alone(case)
  assert found.losses == {Role.ACTOR: []} and not found.experience[0]["advantages"].any()
  jax.tree.map(np.testing.assert_array_equal, found.params[Role.ACTOR], case.params[Role.ACTOR])


def test_head_and_trunk_learn():
  """The loss falls."""
  rollouts = rollouts_of([4, 6, 5])
  critic, optimizer = weights.build(MODEL.config, CRITIC), placement.QUICK[1][1].ppo.optimizer
  lessons = [ppo.Judged(r, v, v + 1) for r, v in zip(rollouts, ppo.answer_values(critic, rollouts, 8), strict=True)]
  adamw, losses = step.TwinOptimizer(critic, dataclasses.replace(optimizer, learning_rate=3e-3), 4), []
  for _ in range(4):
    losses.append(ppo.critic_gradients(critic, lessons, 15, PPOConfig(value_clip=5.0), 8))
    adamw.step()
  assert losses[0] == pytest.approx(0.5, rel=1e-4) and all(np.diff(losses) < 0)
  moved = weights.params_of(critic)["head"]
  assert (moved["kernel"] != CRITIC["head"]["kernel"]).all() and moved["bias"] > CRITIC["head"]["bias"]


def test_matrices_decay_but_neither_norms_nor_the_head_s_bias():
  critic = weights.build(MODEL.config, CRITIC)
  optimizer = dataclasses.replace(placement.QUICK[1][1].ppo.optimizer, learning_rate=0.5, warmup_steps=0)
  step.TwinOptimizer(critic, optimizer, 1).step()  # without a gradient
  left = 1 - optimizer.learning_rate * optimizer.weight_decay
  assert left < 1

  def check(path, now, before):
    fixed = path[-1].key in ("scale", "bias")
    np.testing.assert_allclose(now, np.multiply(before, 1.0 if fixed else left), rtol=1e-6, err_msg=str(path))

  jax.tree_util.tree_map_with_path(check, weights.params_of(critic), CRITIC)
