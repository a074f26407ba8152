"""The IcePop objective (Ring-1T, section 2.3.2; papers.md 1.4), and those it is compared with.

    J(theta) = 1/G sum_i 1/|y_i| sum_t [ M(k_it) min(r_it A_it, clip(r_it, 1 - clip_low, 1 + clip_high) A_it)
                                         - kl_coef KL_it ]                                              (equation 1)
    M(k) = k if alpha <= k <= beta, else 0                                                              (equation 2)

    k_it = pi_train(theta_old) / pi_infer       the same weights in two engines: how far they disagree; a constant
    r_it = pi_train(theta) / pi_train(theta_old)    the same engine at two weights: where the gradient flows

The loss is -J.  A token outside the band adds nothing to the sum but, with denominator=all, still counts in |y_i|.
A token whose k or r is not a finite number gets weight 0 and is counted apart, whatever the objective; no NaN reaches a
result.  The KL term is the estimate k3 = exp(d) - 1 - d with d = log pi_ref - log pi_theta; it is outside M, as printed.

Two policies instead of three: calibration=theta_over_infer compares the policy being trained with the one that sampled.
logp_old=None says that the minibatch is the only one of its batch: theta_old = theta, so r is 1 and has a gradient.

What the other objectives change:

    M(k)    masking: another rule for what M leaves out, or none (calibration.py)
            weight:  truncated is min(k, truncation) (TIS, Yao et al. 2025), one is 1
    r_it    old=engine:      pi_train(theta) / pi_infer; k is then 1
            level=sequence:  s_i = exp(mean_t log r_it), the same at every token of y_i, with a gradient to all of them
                             (GSPO, arXiv 2507.18071v2, equations 5 to 7).  The mean is over the tokens that M keeps,
                             so that a token left out gets no gradient this way either

Dimension key: B rows, T positions, N tokens, H hidden width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from configs.schema import Calibration, ConfigError, Denominator, IcePopConfig, OldPolicy, RatioLevel, TokenWeight
from kernels.icepop.calibration import verdict
from kernels.icepop.weights import sequence_mean, token_weights
from kernels.linear_logprob import Implementation, Partition, linear_logprob

Metrics = dict[str, jax.Array]


def icepop_loss(
  logp: jax.Array,
  logp_old: jax.Array | None,
  logp_infer: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  config: IcePopConfig,
  *,
  weights: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  logp_ref: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """The loss to minimise, differentiable in logp alone.

  Args:
    logp: log-probabilities under theta, [B, T] or [N] floating point, as all arrays here.
    logp_old: under theta_old by the training engine; None: theta_old is theta.  Not read with old=engine.
    logp_infer: by the engine that sampled the token.
    advantages: one a token.
    mask: bool or 0/1; True: a token to train on.  Whatever stands elsewhere, NaN included, has no influence.
    config: the objective.
    weights: what each token's loss is multiplied by, already normalised (see `sequence_weight`), for a minibatch that
      is spread over several calls.  None: this call is a whole minibatch, see `token_weights`.
    segment_ids: which tokens are one sequence, see `token_weights`.  None: a row is one.  With level=sequence a call
      must hold all tokens of a sequence.
    logp_ref: under the reference policy; needed if kl_coef > 0.

  Returns:
    (loss, metrics).  Summed over the calls of a minibatch, these are the minibatch's; all but the last are scalars:
    `loss`, `policy_loss`, `kl_loss` (the terms, weighted), `tokens` (in mask), `masked_low`, `masked_high`,
    `masked_nonfinite` (tokens that k or r rules out), `clipped_low`, `clipped_high` (tokens whose gradient the PPO clip
    cuts), `kl_nonfinite`, and `logp` (as given, one a token, without gradient).  Counts are int32.

  Raises:
    ConfigError: the config asks for what the arguments do not say.
    ValueError: arrays of different shapes.
  """
  _check(logp, logp_old, logp_infer, advantages, mask, config, weights, segment_ids, logp_ref)
  mask = mask.astype(bool)
  fixed = jax.lax.stop_gradient(logp)
  logp_old = _old(fixed, logp_old, logp_infer, config)
  logp_train = logp_old if config.calibration is Calibration.OLD else fixed
  judged = jax.lax.stop_gradient(verdict(fixed, logp_old, logp_train, logp_infer, config))
  kept = mask & judged.kept

  # Replaced before any arithmetic that is differentiated: the gradient of a branch not taken must be finite as well.
  log_r = jnp.where(kept, logp - logp_old, 0.0)
  if config.level is RatioLevel.SEQUENCE:
    log_r = sequence_mean(log_r, kept, segment_ids)
  r = jnp.exp(log_r)
  advantages = jnp.where(kept, advantages, 0.0)
  clipped_high = kept & (advantages > 0) & (r > 1.0 + config.clip_high)
  clipped_low = kept & (advantages < 0) & (r < 1.0 - config.clip_low)
  bound = jnp.where(clipped_high, 1.0 + config.clip_high, 1.0 - config.clip_low)
  surrogate = jnp.where(clipped_high | clipped_low, bound, r) * advantages
  m = jnp.where(kept, _weight(judged.log_k, config), 0.0)

  if weights is None:
    counted = kept if config.denominator is Denominator.KEPT else None
    weights = token_weights(mask, config, segment_ids, counted)
  weights = jnp.where(mask, weights, 0.0)
  policy_loss_ = -jnp.sum(weights * m * surrogate)
  kl, kl_nonfinite = _kl(logp, logp_ref, mask)
  kl_loss = config.kl_coef * jnp.sum(weights * kl)
  loss = policy_loss_ + kl_loss

  count = lambda x: jnp.count_nonzero(x).astype(jnp.int32)  # noqa: E731
  metrics = {
    "loss": loss,
    "policy_loss": policy_loss_,
    "kl_loss": kl_loss,
    "tokens": count(mask),
    "masked_low": count(mask & judged.low),
    "masked_high": count(mask & judged.high),
    "masked_nonfinite": count(mask & judged.nonfinite),
    "clipped_low": count(clipped_low),
    "clipped_high": count(clipped_high),
    "kl_nonfinite": count(kl_nonfinite),
    "logp": jnp.where(mask, logp, 0.0),
  }
  return loss, jax.lax.stop_gradient(metrics)


def policy_loss(
  hidden_NxH: jax.Array,
  lm_head_HxV: jax.Array,
  targets_N: jax.Array,
  logp_old_N: jax.Array | None,
  logp_infer_N: jax.Array,
  advantages_N: jax.Array,
  mask_N: jax.Array,
  config: IcePopConfig,
  *,
  temperature: float | jax.Array = 1.0,
  vocab_mask: jax.Array | None = None,
  weights: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  logp_ref_N: jax.Array | None = None,
  implementation: Implementation | str | None = None,
  partition: Partition | None = None,
) -> tuple[jax.Array, Metrics]:
  """The IcePop loss from hidden states, without logits of tokens times vocabulary: arguments as of `linear_logprob`
  and `icepop_loss`, differentiable in hidden and lm_head.

  Only the log-probability gets a cotangent, and a token that M or the clip rules out gets exactly 0: its row costs
  nothing in the backward pass.

  The metrics are those of `icepop_loss` and `entropy`, float32 [N], 0 outside mask.
  """
  scored = linear_logprob(
    hidden_NxH, lm_head_HxV, targets_N,
    temperature=temperature, vocab_mask=vocab_mask, implementation=implementation, partition=partition,
  )  # fmt: skip
  loss, metrics = icepop_loss(
    scored.logp, logp_old_N, logp_infer_N, advantages_N, mask_N, config,
    weights=weights, segment_ids=segment_ids, logp_ref=logp_ref_N,
  )  # fmt: skip
  entropy_N = jnp.where(mask_N.astype(bool), jax.lax.stop_gradient(scored.entropy), 0.0)
  return loss, metrics | {"entropy": entropy_N}


def _old(fixed: jax.Array, logp_old: jax.Array | None, logp_infer: jax.Array, config: IcePopConfig) -> jax.Array:
  if config.old is OldPolicy.ENGINE:
    return jax.lax.stop_gradient(logp_infer)
  return fixed if logp_old is None else jax.lax.stop_gradient(logp_old)


def _weight(log_k: jax.Array, config: IcePopConfig) -> jax.Array | float:
  match config.weight:
    case TokenWeight.RATIO:
      return jnp.exp(log_k)
    case TokenWeight.TRUNCATED:
      return jnp.minimum(jnp.exp(log_k), config.truncation)
    case TokenWeight.ONE:
      return 1.0


def _kl(logp: jax.Array, logp_ref: jax.Array | None, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """k3 of KL(theta || reference) at each token of mask, 0 where it is not finite; and where that is."""
  if logp_ref is None:
    return jnp.zeros_like(logp), jnp.zeros_like(mask)
  d = jax.lax.stop_gradient(logp_ref) - logp
  finite = jnp.isfinite(jnp.exp(d)) & jnp.isfinite(d)
  d = jnp.where(mask & finite, d, 0.0)
  return jnp.expm1(d) - d, mask & ~finite


def _check(logp, logp_old, logp_infer, advantages, mask, config, weights, segment_ids, logp_ref) -> None:
  if logp.ndim not in (1, 2):
    raise ValueError(f"icepop_loss: logp {list(logp.shape)}: expected [B, T] or [N]")
  others = {
    "logp_old": logp_old, "logp_infer": logp_infer, "advantages": advantages, "mask": mask,
    "weights": weights, "segment_ids": segment_ids, "logp_ref": logp_ref,
  }  # fmt: skip
  for name, array in others.items():
    if array is not None and array.shape != logp.shape:
      raise ValueError(f"icepop_loss: {name} {list(array.shape)}: expected the shape of logp, {list(logp.shape)}")
  if config.kl_coef > 0 and logp_ref is None:
    raise ConfigError(f"objective.kl_coef={config.kl_coef}: needs logp_ref, the reference policy's log-probabilities")
