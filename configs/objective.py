"""What RL minimises: the IcePop objective, advantages, and what PPO adds to it for RLHF.

Source: Ring-1T section 2.3.2 (papers.md 1.4); Ring-lite for the aggregates (papers.md Part 3); the PPO defaults are those of
the placement paper's code (papers.md 2.5).
"""

import dataclasses
import math

from configs.base import Enum, coerce_enum, require
from configs.optimizer import OptimizerConfig


class Aggregate(Enum):
  """How per-token losses become one number (papers.md 1.4, Part 3)."""

  SEQUENCE_MEAN = "sequence_mean"  # mean over sequences of 1/|y| sum_t: equation 1 of Ring-1T
  TOKEN_MEAN = "token_mean"  # sum over tokens / number of tokens
  TOKEN_BUDGET = "token_budget"  # sum over tokens / Phi: C3PO, equation 2 of Ring-lite


class TokenWeight(Enum):
  """What a token inside the calibration band is multiplied by."""

  RATIO = "ratio"  # k itself: M(k) of equation 2
  ONE = "one"  # a 0/1 mask


class Calibration(Enum):
  """Which policy is compared with the one that sampled."""

  OLD = "old_over_infer"  # pi_train(theta_old) / pi_infer: equation 1
  THETA = "theta_over_infer"  # pi_train(theta) / pi_infer, detached: two policies, no recomputation


class Denominator(Enum):
  ALL = "all"  # masked tokens still count: equation 1
  KEPT = "kept"  # only tokens inside the band count


@dataclasses.dataclass(frozen=True)
class IcePopConfig:
  """The IcePop objective, Ring-1T equations 1 and 2."""

  alpha: float = 0.5
  beta: float = 5.0
  clip_low: float = 0.2
  clip_high: float = 0.2
  aggregate: Aggregate = Aggregate.SEQUENCE_MEAN
  weight: TokenWeight = TokenWeight.RATIO
  calibration: Calibration = Calibration.OLD
  denominator: Denominator = Denominator.ALL
  kl_coef: float = 0.0  # of D_KL(pi_theta || pi_ref), k3 estimate, outside the mask as in equation 1
  token_budget: int = 0  # Phi, for aggregate=token_budget

  def __post_init__(self):
    for name, kind in _ENUMS_OF_ICEPOP.items():
      coerce_enum(self, name, kind, "objective")
    require(
      0.0 <= self.alpha <= self.beta and math.isfinite(self.alpha),
      f"objective.alpha={self.alpha}, beta={self.beta}: need 0 <= alpha <= beta",
    )
    require(0.0 <= self.clip_low <= 1.0, f"objective.clip_low={self.clip_low}: from 0 to 1")
    require(self.clip_high >= 0.0, f"objective.clip_high={self.clip_high}: must be at least 0")
    require(self.kl_coef >= 0.0, f"objective.kl_coef={self.kl_coef}: must be at least 0")
    require(
      self.aggregate is not Aggregate.TOKEN_BUDGET or self.token_budget > 0,
      "objective.aggregate=token_budget needs objective.token_budget (Phi) > 0",
    )
    require(
      self.denominator is Denominator.ALL or self.aggregate is not Aggregate.TOKEN_BUDGET,
      "objective.denominator=kept contradicts aggregate=token_budget, whose denominator is Phi",
    )
    require(
      self.denominator is Denominator.ALL or self.calibration is Calibration.OLD,
      "objective.denominator=kept needs calibration=old_over_infer: what is kept must be known before the gradient",
    )


_ENUMS_OF_ICEPOP = {
  "aggregate": Aggregate,
  "weight": TokenWeight,
  "calibration": Calibration,
  "denominator": Denominator,
}


class Advantage(Enum):
  """Where advantages come from."""

  GRPO = "grpo"  # (R - mean) / std of the group (papers.md Part 3, equation 1)
  MEAN_ONLY = "mean_only"  # R - mean of the group
  GAE = "gae"  # a critic's values, token by token (papers.md 2.4)


class Reward(Enum):
  """What scores an answer."""

  VERIFIER = "verifier"  # the task's own scorer
  MODEL = "model"  # the reward model


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """What PPO adds where advantages come from a critic (papers.md 2.4, 2.5).

  r_t = -kl_coef (logp_t - logp_ref_t)   + clip(score, +-reward_clip) at the last token
  A_t = sum_l (gamma lam)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t;   return_t = A_t + V_t
  value loss = value_coef / 2  mean_t max((V - return)^2, (clip(V, V_old +- value_clip) - return)^2)
  """

  kl_coef: float = 0.02  # 0: no reference model for this
  reward_clip: float = 0.2
  gamma: float = 1.0
  lam: float = 0.95
  value_clip: float = 0.2
  value_coef: float = 1.0
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-6)  # the critic's

  def __post_init__(self):
    require(self.kl_coef >= 0, f"ppo.kl_coef={self.kl_coef}: must be at least 0")
    require(0 <= self.gamma <= 1 and 0 <= self.lam <= 1, "ppo: gamma and lam must be from 0 to 1")
    for name in ("reward_clip", "value_clip", "value_coef"):
      require(getattr(self, name) > 0, f"ppo.{name}={getattr(self, name)}: must be > 0")
