"""From rollouts to experience: what every role says of them, and the advantages that follow.

    verifier or reward model -> score        reference -> logp_ref        critic (or its shadow) -> value

None of these depends on another, so they are dispatched together; roles on different devices work at the same time.

    grpo, mean_only    one advantage a rollout, relative to its group; groups whose scores are all alike are left out
    gae                one a token, from the critic's values and the rewards of every token (ring_jax/rl/ppo.py)
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from configs.schema import Advantage, PPOConfig, Reward, Role, RunConfig
from ring_jax.model import Params
from ring_jax.records import Rollout
from ring_jax.rewards.pool import Kind
from ring_jax.rl.advantages import group_advantages, has_signal
from ring_jax.rl.ppo import gae, token_rewards
from ring_jax.train.batches import model_tokens, rl_minibatches
from ring_jax.train.report.trace import Span
from ring_jax.train.roles import Roles, Weights
from ring_jax.train.turns import Turns
from sharding.processes import fetch
from sharding.rules import Program

Score = Callable[[Sequence[Rollout]], Counter[Kind]]  # sets the reward of every rollout
Spans = Callable[[str], contextlib.AbstractContextManager[Span]]


@dataclasses.dataclass
class Experience:
  """Rollouts with their rewards, and one entry a rollout of all else."""

  rollouts: list[Rollout]
  kinds: Counter[Kind]  # how the verifier's scores came about
  logp_ref: list[np.ndarray] | None = None  # of each token of the answer
  values: list[np.ndarray] | None = None  # before each token of the answer
  # Of those that are trained on, once they are; the others' stay empty.
  logp_old: list[np.ndarray] = dataclasses.field(init=False)
  advantages: list[Any] = dataclasses.field(init=False)  # a number, or one a token
  returns: list[np.ndarray] = dataclasses.field(init=False)

  def __post_init__(self):
    for name in ("logp_old", "advantages", "returns"):
      setattr(self, name, [np.zeros(0, np.float32) for _ in self.rollouts])


class Judges:
  """Asks all roles that have something to say in a phase.

  Args:
    name: of the phase.
    score: the verifier.
  """

  def __init__(self, config: RunConfig, name: str, roles: Roles, turns: Turns, score: Score):
    self._name, self._phase, self._packing = name, config.phase(name), config.packing
    self._roles, self._turns, self._score = roles, turns, score

  def __call__(self, rollouts: Sequence[Rollout], weights: Weights, shadow, span: Spans) -> Experience:
    """Judges rollouts.

    Args:
      shadow: the critic's weights as its judge lays them out; None: there is no critic.
      span: times a role's work.
    """
    found = Experience(list(rollouts), Counter())
    if not found.rollouts:
      return found
    roles, judge = self._roles, self._roles.judge
    asked: dict[Role, tuple[str, Program, Params]] = {}
    if weights.reference is not None:
      asked[Role.REFERENCE] = ("reference", roles.reference.logprobs, weights.reference)
    if self._phase.reward is Reward.MODEL:
      asked[Role.REWARD] = ("reward", roles.reward.values, weights.reward)
    if shadow is not None:
      asked[judge] = ("values", roles.critic(self._name, judge).values, shadow)
    said = {}
    if asked:
      (batch,) = rl_minibatches(found.rollouts, self._packing)

      def says(name: str, program: Program, params: Params) -> list[np.ndarray]:
        with span(name):
          return [fetch(program(params, model_tokens(one))) for one in batch.microbatches]

      said = self._turns.together({role: functools.partial(says, *what) for role, what in asked.items()})
    if Role.REWARD in said:
      for rollout, score in zip(found.rollouts, batch.last(said[Role.REWARD]), strict=True):
        rollout.reward = float(score)
    else:
      with span("score"):
        found.kinds = self._score(found.rollouts)
    if Role.REFERENCE in said:
      found.logp_ref = batch.gather(said[Role.REFERENCE])
    if judge in said:
      found.values = batch.gather(said[judge])
    return found


def relative(experience: Experience, kind: Advantage) -> tuple[np.ndarray, np.ndarray]:
  """(advantage, whether its group has a signal) of each rollout, against its group."""
  rewards = [rollout.reward for rollout in experience.rollouts]
  groups = [rollout.group for rollout in experience.rollouts]
  return group_advantages(rewards, groups, kind), has_signal(rewards, groups)


def by_critic(
  experience: Experience, chosen: Sequence[int], config: PPOConfig, logp_old: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """(advantages, returns) of each token of the chosen rollouts.

  Args:
    logp_old: of their answers at theta_old; what stands there has no influence without a KL term.
  """
  pick = lambda values: None if values is None else [values[i] for i in chosen]  # noqa: E731
  scores = [rollout.reward for rollout in pick(experience.rollouts)]
  rewards = token_rewards(logp_old, pick(experience.logp_ref), scores, config)
  return gae(rewards, pick(experience.values), config)
