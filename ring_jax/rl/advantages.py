"""Group-relative advantages (papers.md Part 3, equation 1): an answer against the other answers to the same prompt.

    grpo        A_i = (R_i - mean R) / std R      with the standard deviation of the group itself (divided by G)
    mean_only   A_i = R_i - mean R

A group whose rewards are all equal, or of one answer, says nothing: its advantages are 0.
"""

from collections.abc import Sequence

import numpy as np

from configs.schema import Advantage, ConfigError


def group_advantages(rewards: Sequence[float], groups: Sequence[int], kind: Advantage) -> np.ndarray:
  """Advantages of a batch of rollouts.

  Args:
    rewards: one a rollout, finite.
    groups: one a rollout: the uid of its group; members need not stand together.
    kind: how they are scaled.

  Returns:
    float32 [rollouts].

  Raises:
    ConfigError: rewards and groups of different lengths, or a reward that is not finite.
  """
  reward_R, member_R, first_R = _grouped(rewards, groups)
  count_G = np.bincount(member_R)
  # Relative to the group's first reward: equal rewards then give exactly 0, whatever their mean rounds to.
  offset_R = reward_R - reward_R[first_R][member_R]
  centred_R = offset_R - (np.bincount(member_R, offset_R) / count_G)[member_R]
  if kind is Advantage.GRPO:
    std_R = np.sqrt(np.bincount(member_R, centred_R**2) / count_G)[member_R]
    centred_R = np.divide(centred_R, std_R, out=np.zeros_like(centred_R), where=std_R > 0)
  return centred_R.astype(np.float32)


def has_signal(rewards: Sequence[float], groups: Sequence[int]) -> np.ndarray:
  """bool [rollouts]: whether the rollout's group has two different rewards, so that training on it does anything."""
  reward_R, member_R, first_R = _grouped(rewards, groups)
  differs_R = reward_R != reward_R[first_R][member_R]
  return (np.bincount(member_R, differs_R) > 0)[member_R]


def _grouped(rewards: Sequence[float], groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rewards in float64, the index of each rollout's group, and the first rollout of each group."""
  reward_R = np.asarray(rewards, np.float64).reshape(-1)
  group_R = np.asarray(groups).reshape(-1)
  if len(reward_R) != len(group_R):
    raise ConfigError(f"group_advantages: {len(reward_R)} rewards but {len(group_R)} groups: one of each a rollout")
  if not np.isfinite(reward_R).all():
    bad = int(np.flatnonzero(~np.isfinite(reward_R))[0])
    raise ConfigError(f"group_advantages: reward {bad} is {reward_R[bad]}: rewards must be finite")
  _, first_R, member_R = np.unique(group_R, return_index=True, return_inverse=True)
  return reward_R, member_R, first_R
