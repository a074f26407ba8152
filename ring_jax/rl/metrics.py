"""What a step says about itself: how far engine and trainer disagree, and what the objective did about it.

From the per-token arrays of a whole step, on the host, so that quantiles are of all tokens and not means of means.
Notation of papers.md 1.4: k = pi_train / pi_infer, delta = log k; only tokens of the mask count.

    mismatch/masked             share of tokens that calibration drops; masked_low, masked_high, masked_nonfinite add up
                                to it
    mismatch/truncated          share of tokens whose weight k is cut to `truncation`, with weight=truncated
    mismatch/kl_k1, kl_k3       estimates of KL(infer || train) per token: mean of -delta; mean of k - 1 - delta
    mismatch/delta_*            |delta|: mean, quantiles p50, p95, p99, and max
    mismatch/ess                effective sample size (sum k)^2 / (n sum k^2) of the finite k, before any is dropped
    policy/entropy              mean entropy in nats; entropy_masked: of the dropped tokens alone
    policy/logp, logp_infer     mean log-probability of the sampled tokens, in the trainer and in the engine
    policy/clip_low, clip_high  share of tokens whose gradient the PPO clip cuts
    policy/ratio_max            largest finite PPO ratio
    policy/tokens               tokens in the mask

With old=engine, k is taken at theta: the objective's own is 1.  An average over no tokens is 0.  Tokens with a non-finite k
or r are in no average but of `masked` and `entropy`.
"""

import numpy as np

from configs.schema import Calibration, IcePopConfig, OldPolicy, RatioLevel, TokenWeight
from kernels.icepop import Verdict, verdict


def calibrate(logp: np.ndarray, logp_old: np.ndarray | None, logp_infer: np.ndarray, config: IcePopConfig) -> Verdict:
  """The decision of `kernels.icepop` on the host, in the same float32 arithmetic."""
  logp, logp_infer = np.asarray(logp, np.float32), np.asarray(logp_infer, np.float32)
  if config.old is OldPolicy.ENGINE:
    logp_old = logp_infer
  logp_old = logp if logp_old is None else np.asarray(logp_old, np.float32)
  at_theta = config.calibration is Calibration.THETA or config.old is OldPolicy.ENGINE
  with np.errstate(all="ignore"):
    return verdict(logp, logp_old, logp if at_theta else logp_old, logp_infer, config, np)


def step_metrics(
  *,
  logp: np.ndarray,
  logp_old: np.ndarray | None,
  logp_infer: np.ndarray,
  advantages: np.ndarray,
  entropy: np.ndarray,
  mask: np.ndarray,
  config: IcePopConfig,
  sequences: np.ndarray | None = None,
) -> dict[str, float]:
  """The scalars to publish for one step; arrays of one shape, any; keys as listed in the module's docstring.

  Args:
    logp_old: None: every minibatch was the only one of its batch, so the PPO ratio is 1.  Not read with old=engine.
    sequences: integers; tokens with the same one are a sequence.  Needed with level=sequence.
  """
  inside = np.asarray(mask, bool)
  pick = lambda x: np.asarray(x, np.float32)[inside]  # noqa: E731
  logp_N, logp_infer_N, advantage_N, entropy_N = map(pick, (logp, logp_infer, advantages, entropy))
  logp_old_N = logp_N if logp_old is None else pick(logp_old)
  if config.old is OldPolicy.ENGINE:
    logp_old_N = logp_infer_N
  verdict_N = calibrate(logp_N, logp_old_N, logp_infer_N, config)
  dropped_N, finite_N = ~verdict_N.kept, ~verdict_N.nonfinite
  # delta is -inf where k is exactly 0: a ratio too low, but no distance to average.
  delta_N = verdict_N.log_k[finite_N & np.isfinite(verdict_N.log_k)].astype(np.float64)
  truncates = config.weight is TokenWeight.TRUNCATED
  cut_N = verdict_N.kept & (np.exp(verdict_N.log_k, where=finite_N, out=np.zeros_like(logp_N)) > config.truncation)
  if config.level is RatioLevel.SEQUENCE:
    ratio_N = _sequence_ratio((logp_N - logp_old_N)[verdict_N.kept], np.asarray(sequences)[inside][verdict_N.kept])
    kept_ratio_N = ratio_N
  else:
    ratio_N = np.exp((logp_N[finite_N] - logp_old_N[finite_N]).astype(np.float32))
    kept_ratio_N = ratio_N[verdict_N.kept[finite_N]]
  kept_advantage_N = advantage_N[verdict_N.kept]
  share = lambda x: float(np.count_nonzero(x)) / max(len(logp_N), 1)  # noqa: E731
  return {
    "mismatch/masked": share(dropped_N),
    "mismatch/masked_low": share(verdict_N.low),
    "mismatch/masked_high": share(verdict_N.high),
    "mismatch/masked_nonfinite": share(verdict_N.nonfinite),
    "mismatch/truncated": share(cut_N) if truncates else 0.0,
    **_mismatch(delta_N),
    "policy/entropy": _mean(entropy_N),
    "policy/entropy_masked": _mean(entropy_N[dropped_N]),
    "policy/logp": _mean(logp_N[finite_N]),
    "policy/logp_infer": _mean(logp_infer_N[finite_N]),
    "policy/clip_low": share((kept_advantage_N < 0) & (kept_ratio_N < 1 - config.clip_low)),
    "policy/clip_high": share((kept_advantage_N > 0) & (kept_ratio_N > 1 + config.clip_high)),
    "policy/ratio_max": float(ratio_N.max(initial=0.0)),
    "policy/tokens": float(len(logp_N)),
  }


def _sequence_ratio(log_r_N: np.ndarray, sequence_N: np.ndarray) -> np.ndarray:
  """The ratio of each token's sequence, from the tokens that are kept."""
  _, index_N = np.unique(sequence_N, return_inverse=True)
  mean_S = np.bincount(index_N, log_r_N) / np.maximum(np.bincount(index_N), 1)
  return np.exp(mean_S[index_N])


def _mismatch(delta_N: np.ndarray) -> dict[str, float]:
  distance_N = np.abs(delta_N)
  p50, p95, p99 = np.quantile(distance_N, (0.5, 0.95, 0.99)) if len(delta_N) else (0.0, 0.0, 0.0)
  relative_k_N = np.exp(delta_N - delta_N.max(initial=-np.inf))  # ess does not change with the scale of k
  squares = float(np.sum(relative_k_N**2))
  return {
    "mismatch/kl_k1": _mean(-delta_N),
    "mismatch/kl_k3": _mean(np.expm1(delta_N) - delta_N),
    "mismatch/delta_mean": _mean(distance_N),
    "mismatch/delta_p50": float(p50),
    "mismatch/delta_p95": float(p95),
    "mismatch/delta_p99": float(p99),
    "mismatch/delta_max": float(distance_N.max(initial=0.0)),
    "mismatch/ess": float(np.sum(relative_k_N)) ** 2 / (len(delta_N) * squares) if squares else 0.0,
  }


def _mean(x_N: np.ndarray) -> float:
  finite_N = x_N[np.isfinite(x_N)]
  return float(np.mean(finite_N, dtype=np.float64)) if len(finite_N) else 0.0
