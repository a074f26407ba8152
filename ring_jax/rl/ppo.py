"""PPO's rewards and advantages, token by token: what a critic adds (papers.md 2.4; Schulman et al. 2016, equation 16).

    r_t = -kl_coef (logp_old_t - logp_ref_t)   + clip(score, -reward_clip, +reward_clip) at the last token
    delta_t = r_t + gamma V_{t+1} - V_t        V_{n+1} = 0: an answer's end is the episode's
    A_t = delta_t + gamma lam A_{t+1}          return_t = A_t + V_t

Nothing is whitened.  Rollouts are ragged: a list with one array [n] a rollout, one number for each of its n tokens.  All
rollouts are computed at once, from their last tokens backwards, in float64; what comes out is float32.

Dimension key: B rollouts, N tokens of all rollouts one after the other.
"""

from collections.abc import Sequence

import numpy as np

from configs.schema import ConfigError, PPOConfig, require


def token_rewards(
  logp_old: Sequence[np.ndarray], logp_ref: Sequence[np.ndarray] | None, scores: Sequence[float], config: PPOConfig
) -> list[np.ndarray]:
  """The reward of every token.

  Args:
    logp_old: the trainer's log-probs at theta_old.
    logp_ref: the reference model's; None where `config.kl_coef` is 0.
    scores: one a rollout, finite.

  Returns:
    float32 [n] for each rollout.

  Raises:
    ConfigError: lists or rollouts of different lengths, a rollout without tokens, a score that is not finite, or no
      log-probs of the reference where they count.
  """
  score_B, lengths_B = np.asarray(scores, np.float64).reshape(-1), _lengths(logp_old)
  require(
    len(score_B) == len(lengths_B), f"token_rewards: {len(score_B)} scores but {len(lengths_B)} rollouts: one of each"
  )
  for bad in np.flatnonzero(lengths_B == 0):
    raise ConfigError(f"token_rewards: rollout {bad} has no token to reward")
  for bad in np.flatnonzero(~np.isfinite(score_B)):
    raise ConfigError(f"token_rewards: the score of rollout {bad} is {score_B[bad]}: scores must be finite")
  reward_N = np.zeros(lengths_B.sum())
  if config.kl_coef > 0:
    require(logp_ref is not None, f"token_rewards: ppo.kl_coef={config.kl_coef} needs log-probs of the reference")
    _check_lengths("logp_ref", logp_ref, lengths_B)
    reward_N -= config.kl_coef * (_flat(logp_old) - _flat(logp_ref))
  reward_N[np.cumsum(lengths_B) - 1] += np.clip(score_B, -config.reward_clip, config.reward_clip)
  return _ragged(reward_N, lengths_B)


def gae(
  rewards: Sequence[np.ndarray], values: Sequence[np.ndarray], config: PPOConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Advantages and returns of every token.

  Args:
    rewards: of `token_rewards`.
    values: the critic's, each of the state that predicts the token.

  Returns:
    (advantages, returns), each float32 [n] for each rollout.

  Raises:
    ConfigError: lists or rollouts of different lengths.
  """
  lengths_B = _lengths(rewards)
  _check_lengths("values", values, lengths_B)
  value_N, ends_B = _flat(values), np.cumsum(lengths_B)
  next_N = np.append(value_N[1:], 0.0)[: len(value_N)]
  next_N[ends_B[lengths_B > 0] - 1] = 0.0
  delta_N = _flat(rewards) + config.gamma * next_N - value_N

  order_B = np.argsort(-lengths_B, kind="stable")
  ends_B = ends_B[order_B]
  advantage_N, carry_B = np.zeros_like(delta_N), np.zeros(len(lengths_B))
  left_T = len(lengths_B) - np.cumsum(np.bincount(lengths_B, minlength=1))  # rollouts of more than t tokens
  for back, left in enumerate(left_T.tolist()):
    at = ends_B[:left] - 1 - back
    carry_B[:left] = delta_N[at] + config.gamma * config.lam * carry_B[:left]
    advantage_N[at] = carry_B[:left]
  return _ragged(advantage_N, lengths_B), _ragged(advantage_N + value_N, lengths_B)


def _lengths(ragged: Sequence[np.ndarray]) -> np.ndarray:
  return np.array([len(one) for one in ragged], np.int64)


def _check_lengths(name: str, ragged: Sequence[np.ndarray], lengths_B: np.ndarray) -> None:
  found_B = _lengths(ragged)
  require(len(found_B) == len(lengths_B), f"{name}: of {len(found_B)} rollouts, but there are {len(lengths_B)}")
  for bad in np.flatnonzero(found_B != lengths_B):
    raise ConfigError(f"{name}: {found_B[bad]} of rollout {bad}, which has {lengths_B[bad]} tokens")


def _flat(ragged: Sequence[np.ndarray]) -> np.ndarray:
  return np.concatenate([np.zeros(0), *(np.asarray(one, np.float64) for one in ragged)])


def _ragged(values_N: np.ndarray, lengths_B: np.ndarray) -> list[np.ndarray]:
  """float32, one array a rollout."""
  return np.split(values_N.astype(np.float32), np.cumsum(lengths_B)[:-1]) if len(lengths_B) else []
