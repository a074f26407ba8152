"""Log-probs, group advantages and IcePop in torch autograd (papers.md 1.4, equations 1 and 2; Part 3 for C3PO's aggregate).

    J = 1/G sum_i 1/|y_i| sum_t [ M(k) min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coef KL ]

    k = pi_train(theta_old) / pi_infer      a constant
    r = pi_train(theta) / pi_train(theta_old)

and the objectives that IcePop is compared with: TIS (M = min(k, C)), GRPO (M = 1), GRPO with the engine as the old policy
(r = pi_train(theta) / pi_infer), GSPO (r the geometric mean over a sequence), KPop (M = k where neither direction of the
binary KL exceeds a bound); docs/objective.md has their sources.

Arrays are [S, T]: one sequence a row, and a mask of the tokens to train on.  Written from the equations, apart from
`kernels.icepop`.

Dimension key: S sequences, T positions, D hidden, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from configs.schema import (
  Advantage,
  Aggregate,
  Calibration,
  Denominator,
  IcePopConfig,
  Masking,
  OldPolicy,
  RatioLevel,
  TokenWeight,
)
from parity.torch_twin.model import RingTwin


class Scores(NamedTuple):
  logp: torch.Tensor  # of the targets; -inf for one that cannot be drawn
  entropy: torch.Tensor  # nats, without gradient


class Loss(NamedTuple):
  loss: torch.Tensor  # to minimise
  kept: torch.Tensor  # bool [S, T]: tokens of the mask that are not left out


def token_scores(
  model: RingTwin, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, vocab_mask_V: torch.Tensor | None
) -> Scores:
  """Scores targets under softmax(logits / temperature) over the ids that can be drawn."""
  logits = model.logits(hidden) / temperature
  if vocab_mask_V is not None:
    logits = logits.masked_fill(~vocab_mask_V, -math.inf)
  table = logits.log_softmax(-1)
  with torch.no_grad():
    entropy = torch.special.entr(table.exp()).sum(-1)
  return Scores(table.gather(-1, targets.long()[..., None])[..., 0], entropy)


def advantages_of(rewards: Sequence[float], groups: Sequence[int], kind: Advantage) -> np.ndarray:
  """(R - mean) / std, or R - mean, within each group; 0 where all rewards of a group are equal."""
  rewards_R, groups_R = np.asarray(rewards, np.float64), np.asarray(groups)
  out_R = np.zeros(len(rewards_R))
  for group in np.unique(groups_R):
    own = rewards_R[groups_R == group]
    if own.min() < own.max():
      out_R[groups_R == group] = (own - own.mean()) / (own.std() if kind is Advantage.GRPO else 1.0)
  return out_R.astype(np.float32)


def judged(logp: torch.Tensor, logp_old: torch.Tensor, logp_infer: torch.Tensor, config: IcePopConfig):
  """(k, bool: not left out): both without gradient.  A token whose k or r is no finite number is left out."""
  with torch.no_grad():
    train = logp_old if config.calibration is Calibration.OLD else logp
    log_k = train - logp_infer
    finite = log_k.exp().isfinite() & (logp - logp_old).exp().isfinite()
    match config.masking:
      case Masking.BAND:
        low = math.log(config.alpha) if config.alpha > 0 else -math.inf
        high = math.log(config.beta) if config.beta > 0 else -math.inf
        inside = (log_k >= low) & (log_k <= high)
      case Masking.BINARY_KL:
        both = torch.maximum(_binary_kl(train, logp_infer), _binary_kl(logp_infer, train))
        inside = both <= config.max_binary_kl
      case Masking.NONE:
        inside = torch.ones_like(finite)
    return log_k.exp(), finite & inside


def _binary_kl(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
  """KL of "this token, or another one"; 1 - p is known to 1e-6 only, the rounding error of a log-probability."""
  logp, logq = logp.double(), logq.double()
  rest = [(1 - x.clamp(max=0).exp()).clamp(min=1e-6) for x in (logp, logq)]
  return logp.clamp(max=0).exp() * (logp - logq) + rest[0] * (rest[0] / rest[1]).log()


def weights_of(counted: torch.Tensor, num_sequences: int, num_tokens: int, config: IcePopConfig) -> torch.Tensor:
  """[S, 1]: what a token of each sequence weighs in the minibatch.

  Args:
    counted: bool [S, T], the tokens that count in |y|.
    num_sequences, num_tokens: of the whole minibatch, of which these sequences may be a part.
  """
  lengths_Sx1 = counted.sum(-1, keepdim=True)
  match config.aggregate:
    case Aggregate.SEQUENCE_MEAN:
      weight = 1.0 / (num_sequences * lengths_Sx1.clamp(min=1))
    case Aggregate.TOKEN_MEAN:
      weight = torch.full_like(lengths_Sx1, 1.0 / max(num_tokens, 1), dtype=torch.float32)
    case Aggregate.TOKEN_BUDGET:
      weight = torch.full_like(lengths_Sx1, 1.0 / config.token_budget, dtype=torch.float32)
  return torch.where(lengths_Sx1 > 0, weight, 0.0)


def counted_tokens(mask, logp_old, logp_infer, config: IcePopConfig) -> torch.Tensor:
  """bool [S, T]: all tokens of the mask, or (denominator=kept) those that are not left out."""
  if config.denominator is Denominator.ALL:
    return mask
  return mask & judged(logp_old, logp_old, logp_infer, config)[1]


def icepop(
  logp: torch.Tensor,
  logp_old: torch.Tensor,
  logp_infer: torch.Tensor,
  advantages: torch.Tensor,
  mask: torch.Tensor,
  weights: torch.Tensor,
  config: IcePopConfig,
  logp_ref: torch.Tensor | None = None,
) -> Loss:
  """-J, differentiable in logp; arrays that broadcast to [S, T].

  Raises:
    ValueError: kl_coef > 0 without logp_ref.
  """
  if config.kl_coef > 0 and logp_ref is None:
    raise ValueError(f"objective.kl_coef={config.kl_coef}: needs the reference policy's log-probabilities")
  if config.old is OldPolicy.ENGINE:
    logp_old = logp_infer
  k, inside = judged(logp, logp_old, logp_infer, config)
  kept = mask & inside
  # What is left out is replaced before exp: 0 times infinity would be NaN in the backward pass.
  log_r = torch.where(kept, logp - logp_old.detach(), 0.0)
  if config.level is RatioLevel.SEQUENCE:
    log_r = (log_r.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)).expand_as(log_r)
  r = log_r.exp()
  gain = torch.where(kept, advantages.expand_as(logp), 0.0)
  surrogate = torch.minimum(r * gain, r.clamp(1 - config.clip_low, 1 + config.clip_high) * gain)
  match config.weight:
    case TokenWeight.RATIO:
      weight = k
    case TokenWeight.TRUNCATED:
      weight = k.clamp(max=config.truncation)
    case TokenWeight.ONE:
      weight = torch.ones_like(k)
  m = torch.where(kept, weight, 0.0)
  objective = m * surrogate
  if config.kl_coef > 0:
    difference = logp_ref.detach() - logp
    usable = mask & difference.detach().isfinite() & difference.detach().exp().isfinite()
    difference = torch.where(usable, difference, 0.0)
    objective = objective - config.kl_coef * (torch.expm1(difference) - difference)
  return Loss(-(objective * torch.where(mask, weights.expand_as(logp), 0.0)).sum(), kept)
