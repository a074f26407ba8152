"""Equation 1 of Ring-1T and its variants (api.py) as loops over sequences and tokens, in float64 NumPy: what the tests
hold the loss against."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from configs.schema import (
  Aggregate,
  Calibration,
  Denominator,
  IcePopConfig,
  Masking,
  OldPolicy,
  RatioLevel,
  TokenWeight,
)


class _Token(NamedTuple):
  kept: bool
  m: float  # M(k)
  log_r: float  # of the token, 0 where it is not kept
  kl: float


def icepop_loss_reference(
  logp: Sequence[np.ndarray],
  logp_old: Sequence[np.ndarray] | None,
  logp_infer: Sequence[np.ndarray],
  advantages: Sequence[np.ndarray],
  config: IcePopConfig,
  logp_ref: Sequence[np.ndarray] | None = None,
) -> float:
  """The loss of a minibatch: a list with one array a sequence, of the tokens trained on."""
  old = logp if logp_old is None else logp_old
  if config.old is OldPolicy.ENGINE:
    old = logp_infer
  refs = logp if logp_ref is None else logp_ref
  sequences = []  # per sequence: its tokens, and what each adds to J
  for gains, *own in zip(advantages, logp, old, logp_infer, refs, strict=True):
    tokens = [_token(*map(float, numbers), config) for numbers in zip(*own, strict=True)]
    if tokens:
      sequences.append((tokens, _terms(tokens, gains, config)))

  def counted(tokens: list[_Token]) -> int:
    return sum(token.kept for token in tokens) if config.denominator is Denominator.KEPT else len(tokens)

  objective = 0.0
  for tokens, terms in sequences:
    match config.aggregate:
      case Aggregate.SEQUENCE_MEAN:
        denominator = len(sequences) * max(counted(tokens), 1)
      case Aggregate.TOKEN_MEAN:
        denominator = max(sum(counted(others) for others, _ in sequences), 1)
      case Aggregate.TOKEN_BUDGET:
        denominator = config.token_budget
    objective += sum(terms) / denominator
  return -objective


def _token(logp: float, old: float, infer: float, ref: float, config: IcePopConfig) -> _Token:
  train = old if config.calibration is Calibration.OLD else logp
  k, r = _exp(train - infer), _exp(logp - old)
  kept = math.isfinite(k) and math.isfinite(r) and not _left_out(k, train, infer, config)
  match config.weight:
    case TokenWeight.RATIO:
      m = k
    case TokenWeight.TRUNCATED:
      m = min(k, config.truncation)
    case TokenWeight.ONE:
      m = 1.0
  kl = _exp(ref - logp) - 1 - (ref - logp)
  return _Token(kept, m if kept else 0.0, logp - old if kept else 0.0, kl if math.isfinite(kl) else 0.0)


def _left_out(k: float, train: float, infer: float, config: IcePopConfig) -> bool:
  match config.masking:
    case Masking.BAND:
      return not config.alpha <= k <= config.beta
    case Masking.BINARY_KL:
      return not max(_binary_kl(train, infer), _binary_kl(infer, train)) <= config.max_binary_kl
    case Masking.NONE:
      return False


def _binary_kl(logp: float, logq: float) -> float:
  """With 1 - p known to 1e-6, see calibration.py."""
  if logp == -math.inf:
    p_term = 0.0 if logq > -math.inf else math.nan
  else:
    p_term = math.exp(min(logp, 0.0)) * (logp - logq)
  rest_p, rest_q = (max(1 - math.exp(min(x, 0.0)), 1e-6) for x in (logp, logq))
  return p_term + rest_p * math.log(rest_p / rest_q)


def _terms(tokens: list[_Token], advantages: np.ndarray, config: IcePopConfig) -> list[float]:
  num_kept = max(sum(token.kept for token in tokens), 1)
  mean = sum(token.log_r for token in tokens) / num_kept
  terms = []
  for token, advantage in zip(tokens, advantages, strict=True):
    surrogate = 0.0
    if token.kept:
      r = math.exp(mean if config.level is RatioLevel.SEQUENCE else token.log_r)
      clipped = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
      surrogate = min(r * advantage, clipped * advantage)
    terms.append(token.m * surrogate - config.kl_coef * token.kl)
  return terms


def _exp(x: float) -> float:
  try:
    return math.exp(x)
  except OverflowError:
    return math.inf
