"""What RL minimises: the IcePop objective and those it is compared with, advantages, and what PPO adds for RLHF.

The objectives differ in four decisions, an enum each: which tokens are left out (`Masking`), what the others weigh
(`TokenWeight`), which policy is the old one of the PPO ratio (`OldPolicy`), and whether that ratio is a token's or a
sequence's (`RatioLevel`).  `OBJECTIVES` has the published combinations by name.

Sources: Ring-1T section 2.3.2 for IcePop (papers.md 1.4); Yao et al. 2025 for TIS (there too); GSPO, arXiv 2507.18071v2,
equation 5 and section 5.1; for KPop the public implementations that docs/objective.md names; Ring-lite for the aggregates
(papers.md Part 3); the PPO defaults are those of the placement paper's code (papers.md 2.5).
"""

import dataclasses
import math
from collections.abc import Mapping

from configs.base import Enum, coerce_enum, require
from configs.optimizer import OptimizerConfig


class Aggregate(Enum):
  """How per-token losses become one number (papers.md 1.4, Part 3)."""

  SEQUENCE_MEAN = "sequence_mean"  # mean over sequences of 1/|y| sum_t: equation 1 of Ring-1T
  TOKEN_MEAN = "token_mean"  # sum over tokens / number of tokens
  TOKEN_BUDGET = "token_budget"  # sum over tokens / Phi: C3PO, equation 2 of Ring-lite


class Masking(Enum):
  """Which tokens are left out, by how far trainer and engine disagree about them."""

  BAND = "band"  # those whose k is not from alpha to beta: IcePop, equation 2
  BINARY_KL = "binary_kl"  # those where the KL of "this token or another one" exceeds max_binary_kl either way: KPop
  NONE = "none"


class TokenWeight(Enum):
  """What a token that is not left out is multiplied by."""

  RATIO = "ratio"  # k itself: M(k) of equation 2
  TRUNCATED = "truncated"  # min(k, truncation): TIS
  ONE = "one"  # nothing


class OldPolicy(Enum):
  """The denominator of the PPO ratio."""

  RECOMPUTED = "recomputed"  # the trainer at theta_old
  ENGINE = "engine"  # the engine that sampled: its stored log-probs, so that k is 1 and there is nothing to recompute


class RatioLevel(Enum):
  """What a PPO ratio, and so its clip, belongs to."""

  TOKEN = "token"
  SEQUENCE = "sequence"  # the geometric mean over the sequence's tokens: GSPO


class Calibration(Enum):
  """Which policy is compared with the one that sampled."""

  OLD = "old_over_infer"  # pi_train(theta_old) / pi_infer: equation 1
  THETA = "theta_over_infer"  # pi_train(theta) / pi_infer, detached: two policies, no recomputation


class Denominator(Enum):
  ALL = "all"  # masked tokens still count: equation 1
  KEPT = "kept"  # only tokens that are not left out count


@dataclasses.dataclass(frozen=True)
class IcePopConfig:
  """The objective; the defaults are IcePop's, Ring-1T equations 1 and 2."""

  alpha: float = 0.5  # of masking=band
  beta: float = 5.0
  clip_low: float = 0.2
  clip_high: float = 0.2
  aggregate: Aggregate = Aggregate.SEQUENCE_MEAN
  weight: TokenWeight = TokenWeight.RATIO
  calibration: Calibration = Calibration.OLD
  denominator: Denominator = Denominator.ALL
  kl_coef: float = 0.0  # of D_KL(pi_theta || pi_ref), k3 estimate, outside the mask as in equation 1
  token_budget: int = 0  # Phi, for aggregate=token_budget
  masking: Masking = Masking.BAND
  max_binary_kl: float = 0.1  # of masking=binary_kl
  truncation: float = 2.0  # C, of weight=truncated
  old: OldPolicy = OldPolicy.RECOMPUTED
  level: RatioLevel = RatioLevel.TOKEN

  def __post_init__(self):
    for name, kind in _ENUMS_OF_ICEPOP.items():
      coerce_enum(self, name, kind, "objective")
    require(
      0.0 <= self.alpha <= self.beta and math.isfinite(self.alpha),
      f"objective.alpha={self.alpha}, beta={self.beta}: need 0 <= alpha <= beta",
    )
    require(self.max_binary_kl > 0.0, f"objective.max_binary_kl={self.max_binary_kl}: must be > 0")
    require(self.truncation > 0.0, f"objective.truncation={self.truncation}: must be > 0")
    require(0.0 <= self.clip_low <= 1.0, f"objective.clip_low={self.clip_low}: from 0 to 1")
    require(self.clip_high >= 0.0, f"objective.clip_high={self.clip_high}: must be at least 0")
    require(self.kl_coef >= 0.0, f"objective.kl_coef={self.kl_coef}: must be at least 0")
    self._check_what_is_read()
    self._check_denominator()

  def _check_what_is_read(self) -> None:
    """A number that has no influence may not be set: whoever sets it means another objective."""
    band, kl = self.masking is Masking.BAND, self.masking is Masking.BINARY_KL
    for name, used, where in (
      ("alpha", band, "masking=band"),
      ("beta", band, "masking=band"),
      ("max_binary_kl", kl, "masking=binary_kl"),
      ("truncation", self.weight is TokenWeight.TRUNCATED, "weight=truncated"),
    ):
      default = type(self).__dataclass_fields__[name].default
      require(
        used or getattr(self, name) == default, f"objective.{name}={getattr(self, name)}: is read with {where} only"
      )
    reads_k = self.masking is not Masking.NONE or self.weight is not TokenWeight.ONE
    require(
      self.old is OldPolicy.RECOMPUTED or not reads_k,
      f"objective.old=engine makes k 1: needs masking=none and weight=one, not masking={self.masking} and"
      f" weight={self.weight}",
    )
    require(
      self.calibration is Calibration.OLD or reads_k,
      "objective.calibration=theta_over_infer: with masking=none and weight=one nothing reads k",
    )

  def _check_denominator(self) -> None:
    require(
      self.aggregate is not Aggregate.TOKEN_BUDGET or self.token_budget > 0,
      "objective.aggregate=token_budget needs objective.token_budget (Phi) > 0",
    )
    if self.denominator is Denominator.ALL:
      return
    require(
      self.aggregate is not Aggregate.TOKEN_BUDGET,
      "objective.denominator=kept contradicts aggregate=token_budget, whose denominator is Phi",
    )
    require(
      self.calibration is Calibration.OLD,
      "objective.denominator=kept needs calibration=old_over_infer: what is kept must be known before the gradient",
    )
    require(
      self.masking is not Masking.NONE, "objective.denominator=kept contradicts masking=none, which leaves nothing out"
    )


_ENUMS_OF_ICEPOP = {
  "masking": Masking,
  "weight": TokenWeight,
  "calibration": Calibration,
  "old": OldPolicy,
  "level": RatioLevel,
  "aggregate": Aggregate,
  "denominator": Denominator,
}

# By name, so that a run says --config.rl.objective=tis.
OBJECTIVES: Mapping[str, IcePopConfig] = {
  "icepop": IcePopConfig(),
  "tis": IcePopConfig(masking=Masking.NONE, weight=TokenWeight.TRUNCATED),
  "grpo": IcePopConfig(masking=Masking.NONE, weight=TokenWeight.ONE),
  "grpo_infer_old": IcePopConfig(masking=Masking.NONE, weight=TokenWeight.ONE, old=OldPolicy.ENGINE),
  "gspo": IcePopConfig(
    masking=Masking.NONE, weight=TokenWeight.ONE, level=RatioLevel.SEQUENCE, clip_low=3e-4, clip_high=4e-4
  ),
  "kpop": IcePopConfig(masking=Masking.BINARY_KL),
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
