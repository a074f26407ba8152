"""From rollouts to experience: what every role says of them, and the advantages that follow.

    verifier or reward model -> score        reference -> logp_ref        critic (or its shadow) -> value

None of these depends on another, so they are dispatched together; roles on different devices work at the same time.

    grpo, mean_only    one advantage a rollout, relative to its group; groups whose scores are all alike are left out
    gae                one a token, from the critic's values and the rewards of every token (ring_jax/rl/ppo.py)
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from configs.schema import Advantage, PackingConfig, Reward, RLConfig, Role
from ring_jax.records import Rollout
from ring_jax.rewards.pool import Kind
from ring_jax.rl.advantages import group_advantages, has_signal
from ring_jax.rl.ppo import gae, token_rewards
from ring_jax.train.batches import rl_minibatches
from ring_jax.train.report.trace import Span
from ring_jax.train.roles import Roles, Weights
from ring_jax.train.turns import Turns

Score = Callable[[Sequence[Rollout]], Counter[Kind]]  # sets the reward of every rollout
Spans = Callable[[str], contextlib.AbstractContextManager[Span]]


@dataclasses.dataclass
class Experience:
  """Rollouts with their rewards, and one entry a rollout of all else."""

  rollouts: list[Rollout]
  kinds: Counter[Kind]  # how the verifier's scores came about
  logp_ref: list[np.ndarray] | None = None  # of each token of the answer
  values: list[np.ndarray] | None = None  # before each token of the answer

  def take(self, chosen: Sequence[int]) -> "Experience":
    pick = lambda values: None if values is None else [values[i] for i in chosen]  # noqa: E731
    return Experience(pick(self.rollouts), self.kinds, pick(self.logp_ref), pick(self.values))


class Judges:
  """Asks all roles that have something to say in a phase.

  Args:
    phase: what it needs.
    score: the verifier.
  """

  def __init__(self, phase: RLConfig, packing: PackingConfig, roles: Roles, turns: Turns, score: Score):
    self._phase, self._packing, self._roles, self._turns, self._score = phase, packing, roles, turns, score

  def __call__(self, rollouts: Sequence[Rollout], weights: Weights, shadow, span: Spans) -> Experience:
    """Judges rollouts.

    Args:
      shadow: the critic's weights as its judge lays them out; None: there is no critic.
      span: times a role's work.
    """
    found = Experience(list(rollouts), Counter())
    batches = rl_minibatches(found.rollouts, self._packing)
    if not batches:
      return found
    (batch,) = batches
    roles, judge = self._roles, self._roles.judge

    def timed(name: str, work):
      def job():
        with span(name):
          return work()

      return job

    jobs = {}
    if weights.reference is not None:
      jobs[Role.REFERENCE] = timed("reference", lambda: roles.reference_logps(weights.reference, batch))
    if self._phase.reward is Reward.MODEL:
      jobs[Role.REWARD] = timed("reward", lambda: roles.values(Role.REWARD, weights.reward, batch))
    if shadow is not None:
      jobs[judge] = timed("values", lambda: roles.values(judge, shadow, batch))
    said = self._turns.together(jobs)
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
  experience: Experience, phase: RLConfig, logp_old: Sequence[np.ndarray] | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """(advantages, returns) of each token of each rollout.

  Args:
    logp_old: of each rollout's answer at theta_old; needed where the rewards have a KL term.
  """
  scores = [rollout.reward for rollout in experience.rollouts]
  lengths = [len(rollout.tokens) for rollout in experience.rollouts]
  rewards = token_rewards(lengths, logp_old, experience.logp_ref, scores, phase.ppo)
  return gae(rewards, experience.values, phase.ppo)
