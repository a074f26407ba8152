"""RLHF in PyTorch: a critic, a reward model, a reference, and one step of the actor and the critic in one process.

With a critic (papers.md 2.4; advantage=gae), for an answer of n tokens whose t-th has the value V_t before it:

    r_t     = -kl_coef (logp_old_t - logp_ref_t),   plus clip(score, +-reward_clip) at t = n
    delta_t = r_t + gamma V_{t+1} - V_t,            V_{n+1} = 0
    A_t     = delta_t + gamma lam A_{t+1},          return_t = A_t + V_t
    critic  = value_coef / 2  mean_t max((V - return)^2, (clip(V, V_old +- value_clip) - return)^2)

The mean is over all answer tokens of the minibatch.  Without a critic an advantage is relative to the rollout's group, and
groups whose scores do not differ are left out, so that nothing is known of their theta_old; a minibatch of which nothing is
left takes no step.  The actor's objective is IcePop in both (objective.py).

`placed.py` does the same across processes, from the same parts.

Dimension key: S sequences, T positions, n tokens of an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from configs.schema import Advantage, ConfigError, PPOConfig, Reward, RLConfig, Role
from parity import rlhf
from parity.rlhf import RLHFCase, Steps
from parity.torch_twin import objective, step, weights
from parity.torch_twin.model import ScalarTwin, Trunk, device_of
from parity.torch_twin.step import Lesson, Scorer, batched, sequences_of
from ring_jax.records import Rollout

# ---------------------------------------------------------------------------------------------------------------------
# What the scalar models say


def answer_values(critic: ScalarTwin, rollouts: Sequence[Rollout], rows: int) -> list[np.ndarray]:
  """[n] of each rollout: the value of the state that each token of the answer was drawn in."""
  found, device = [], device_of(critic)
  for chosen in batched(rollouts, rows):
    batch = sequences_of(chosen, device)
    with torch.no_grad():
      found += batch.gather(critic(batch.tokens, batch.segments))
  return found


def scores_of(model: ScalarTwin, rollouts: Sequence[Rollout], rows: int) -> list[float]:
  """A number a rollout: what the reward model says at its last token."""
  found, device = [], device_of(model)
  for chosen in batched(rollouts, rows):
    batch = sequences_of(chosen, device)
    last_Sx1 = batch.segments.sum(-1, keepdim=True) - 1
    with torch.no_grad():
      found += model(batch.tokens, batch.segments).gather(-1, last_Sx1)[:, 0].tolist()
  return found


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def rewards_of(score: float, logp_old_n: np.ndarray, logp_ref_n: np.ndarray | None, config: PPOConfig) -> np.ndarray:
  """float64 [n]."""
  rewards_n = np.zeros(len(logp_old_n))
  if logp_ref_n is not None:
    rewards_n -= config.kl_coef * (np.asarray(logp_old_n, np.float64) - logp_ref_n)
  rewards_n[-1:] += np.clip(score, -config.reward_clip, config.reward_clip)  # an empty answer has no last token
  return rewards_n


def gae(rewards_n: np.ndarray, values_n: np.ndarray, config: PPOConfig) -> tuple[np.ndarray, np.ndarray]:
  """(advantages, returns), float32 [n]."""
  values = np.append(np.asarray(values_n, np.float64), 0.0)
  advantages_n, following = np.zeros(len(rewards_n)), 0.0
  for t in reversed(range(len(rewards_n))):
    delta = rewards_n[t] + config.gamma * values[t + 1] - values[t]
    advantages_n[t] = following = delta + config.gamma * config.lam * following
  return advantages_n.astype(np.float32), (advantages_n + values[:-1]).astype(np.float32)


class Experience(NamedTuple):
  """Of one minibatch.  Fields as `rlhf.EXPERIENCE`, an array or a number a rollout; None: there is no such role."""

  fields: dict[str, list[Any] | None]
  trained: list[int]  # which rollouts have a part in the update


def experience_of(rollouts: Sequence[Rollout], judged: Mapping[str, list[Any]], config: RLConfig) -> Experience:
  """Adds scores, where the verifier gives them, advantages and returns; keeps `logp_old` of what trains.

  Args:
    judged: `logp_old`, and `logp_ref`, `values`, `scores` where there is a role for it.

  Raises:
    ConfigError: scores from the verifier, and a rollout without one.
  """
  fields = {"logp_infer": [rollout.logps for rollout in rollouts], **judged}
  if config.reward is Reward.VERIFIER:
    unscored = [rollout.uid for rollout in rollouts if rollout.reward is None]
    if unscored:
      raise ConfigError(f"rl.reward=verifier: rollout {unscored[0]} has no reward; score it, or use rl.reward=model")
    fields["scores"] = [rollout.reward for rollout in rollouts]
  if config.advantage is not Advantage.GAE:
    groups = [rollout.group for rollout in rollouts]
    per_rollout = objective.advantages_of(fields["scores"], groups, config.advantage)
    fields["advantages"] = [np.full(len(r.tokens), a) for r, a in zip(rollouts, per_rollout, strict=True)]
    trained = [i for i in range(len(rollouts)) if _differs(i, groups, fields["scores"])]
    fields["logp_old"] = [old if i in trained else np.zeros(0) for i, old in enumerate(fields["logp_old"])]
    return Experience(fields, trained)
  refs = judged.get("logp_ref") if config.ppo.kl_coef > 0 else None
  pairs = [
    gae(rewards_of(score, old, ref, config.ppo), values, config.ppo)
    for score, old, ref, values in zip(
      fields["scores"], fields["logp_old"], refs or [None] * len(rollouts), fields["values"], strict=True
    )
  ]
  fields["advantages"], fields["returns"] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
  return Experience(fields, list(range(len(rollouts))))


def _differs(index: int, groups: Sequence[int], scores: Sequence[float]) -> bool:
  """Whether another member of the rollout's group has another score."""
  return any(group == groups[index] and score != scores[index] for group, score in zip(groups, scores, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


class Judged(NamedTuple):
  """One rollout, and what the critic learns from it; arrays are [n]."""

  rollout: Rollout
  values: np.ndarray  # at the beginning of the step
  returns: np.ndarray


def actor_lessons(rollouts: Sequence[Rollout], experience: Experience) -> list[Lesson]:
  fields = experience.fields
  refs = fields.get("logp_ref") or [None] * len(rollouts)
  return [Lesson(rollouts[i], fields["advantages"][i], fields["logp_old"][i], refs[i]) for i in experience.trained]


def critic_lessons(rollouts: Sequence[Rollout], experience: Experience) -> list[Judged]:
  fields = experience.fields
  return [Judged(rollouts[i], fields["values"][i], fields["returns"][i]) for i in experience.trained]


def value_loss(values, values_old, returns, mask, config: PPOConfig) -> torch.Tensor:
  """The sum over the mask; arrays [S, T]."""
  near = values_old + (values - values_old).clamp(-config.value_clip, config.value_clip)
  worse = torch.maximum((values - returns).square(), (near - returns).square())
  return config.value_coef / 2 * torch.where(mask, worse, 0.0).sum()


def critic_gradients(critic: ScalarTwin, lessons: Sequence[Judged], tokens: int, config: PPOConfig, rows: int) -> float:
  """Adds the gradients of a minibatch, or of a part of one; returns its share of the loss.

  Args:
    tokens: of all answers of the whole minibatch.
  """
  device, total = device_of(critic), 0.0
  for chosen in batched(lessons, rows):
    rollouts, old, returns = zip(*chosen, strict=True)
    batch = sequences_of(rollouts, device)
    values = critic(batch.tokens, batch.segments)
    loss = value_loss(values, batch.spread(old), batch.spread(returns), batch.mask, config) / max(tokens, 1)
    loss.backward()
    total += loss.item()
  return total


def answer_tokens(rollouts: Sequence[Rollout]) -> int:
  return sum(len(rollout.tokens) for rollout in rollouts)


# ---------------------------------------------------------------------------------------------------------------------
# The phase, in one process


def scorer_of(case: RLHFCase, rows: int) -> Scorer:
  return Scorer(case.run.rollout.temperature, case.vocab_mask_V, rows)


def optimizer_config(role: Role, config: RLConfig):
  return config.optimizer if role is Role.ACTOR else config.ppo.optimizer


def run_alone(case: RLHFCase, rows: int = 5) -> Steps:
  """All steps of a case in this process, on the CPU.

  Args:
    rows: sequences of one forward pass.
  """
  config = case.phase
  models: dict[Role, Trunk] = {role: weights.build(case.run.model, tree) for role, tree in case.params.items()}
  if Role.REFERENCE in config.roles:
    models[Role.REFERENCE] = weights.build(case.run.model, case.params[Role.ACTOR])
  optimizers = {
    role: step.TwinOptimizer(models[role], optimizer_config(role, config), case.optimizer_steps)
    for role in rlhf.LEARNERS if role in config.roles
  }  # fmt: skip
  losses, norms = ({role: [] for role in optimizers} for _ in range(2))
  experience = []
  for minibatches in case.steps:
    experience.append(rl_step(models, optimizers, minibatches, config, scorer_of(case, rows), losses, norms))
  return Steps(case.steps, experience, losses, norms, {role: weights.params_of(models[role]) for role in optimizers})


def rl_step(
  models: Mapping[Role, Any],
  optimizers: Mapping[Role, step.TwinOptimizer],
  minibatches: Sequence[Sequence[Rollout]],
  config: RLConfig,
  scorer: Scorer,
  losses: Mapping[Role, list[float]],
  norms: Mapping[Role, list[float]],
) -> dict[str, np.ndarray]:
  """One step; returns its experience and appends to `losses` and `norms`."""
  actor, critic = models[Role.ACTOR], models.get(Role.CRITIC)
  judged: list[dict[str, list[Any]]] = []
  for rollouts in minibatches:
    fields = {"logp_rollout": step.answer_logps(actor, rollouts, scorer)}
    fields["logp_old"] = fields["logp_rollout"]
    if Role.REFERENCE in config.roles:
      fields["logp_ref"] = step.answer_logps(models[Role.REFERENCE], rollouts, scorer)
    if Role.CRITIC in config.roles:
      fields["values"] = answer_values(critic, rollouts, scorer.rows)
    if Role.REWARD in config.roles:
      fields["scores"] = scores_of(models[Role.REWARD], rollouts, scorer.rows)
    judged.append(fields)
  done = []
  for rollouts, fields in zip(minibatches, judged, strict=True):
    if config.stream:
      fields["logp_old"] = step.answer_logps(actor, rollouts, scorer)
    experience = experience_of(rollouts, fields, config)
    done.append(experience.fields)
    lessons = actor_lessons(rollouts, experience)
    if not lessons:
      continue
    totals = step.totals_of(lessons, config.objective)
    losses[Role.ACTOR].append(step.actor_gradients(actor, lessons, totals, config.objective, scorer)[0])
    norms[Role.ACTOR].append(optimizers[Role.ACTOR].step())
    if Role.CRITIC in config.roles:
      valued, tokens = critic_lessons(rollouts, experience), answer_tokens(rollouts)
      losses[Role.CRITIC].append(critic_gradients(critic, valued, tokens, config.ppo, scorer.rows))
      norms[Role.CRITIC].append(optimizers[Role.CRITIC].step())
  return rlhf.flat(done)
