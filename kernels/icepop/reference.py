"""Equation 1 of Ring-1T as a loop over sequences and tokens, in float64 NumPy: what the tests hold the loss against."""

import math
from collections.abc import Sequence

import numpy as np

from configs.schema import Aggregate, Calibration, Denominator, IcePopConfig, TokenWeight


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
  sequences = []  # per sequence: its tokens as (M(k), surrogate, kl)
  for i in range(len(logp)):
    tokens = []
    for t in range(len(logp[i])):
      train = old[i][t] if config.calibration is Calibration.OLD else logp[i][t]
      k = _exp(train - logp_infer[i][t])
      r = _exp(logp[i][t] - old[i][t])
      kept = math.isfinite(k) and math.isfinite(r) and config.alpha <= k <= config.beta
      m = (k if config.weight is TokenWeight.RATIO else 1.0) if kept else 0.0
      clipped = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
      surrogate = min(r * advantages[i][t], clipped * advantages[i][t]) if kept else 0.0
      kl = 0.0
      if logp_ref is not None:
        d = logp_ref[i][t] - logp[i][t]
        kl = _exp(d) - 1 - d
      tokens.append((m, surrogate, kl if math.isfinite(kl) else 0.0, kept))
    if tokens:
      sequences.append(tokens)

  def counted(tokens: list[tuple]) -> int:
    return sum(token[3] for token in tokens) if config.denominator is Denominator.KEPT else len(tokens)

  objective = 0.0
  for tokens in sequences:
    match config.aggregate:
      case Aggregate.SEQUENCE_MEAN:
        denominator = len(sequences) * max(counted(tokens), 1)
      case Aggregate.TOKEN_MEAN:
        denominator = max(sum(map(counted, sequences)), 1)
      case Aggregate.TOKEN_BUDGET:
        denominator = config.token_budget
    objective += sum(m * surrogate - config.kl_coef * kl for m, surrogate, kl, _ in tokens) / denominator
  return -objective


def _exp(x: float) -> float:
  try:
    return math.exp(x)
  except OverflowError:
    return math.inf
