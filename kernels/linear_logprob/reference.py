"""Linear log-probabilities by definition: all logits at once, differentiated by JAX.

With

    x[n, j] = hidden[n] . weight[:, j] / temperature[n],  -inf where vocab_mask[j] is False
    lse[n] = log sum_j exp x[n, j]
    logp[n] = x[n, target[n]] - lse[n]
    entropy[n] = lse[n] - sum_j p[n, j] x[n, j],  p[n, j] = exp(x[n, j] - lse[n])
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class LinearLogprob(NamedTuple):
  """What is known of the distribution at each token; float32 [N] each."""

  logp: jax.Array  # of the target; -inf for a target that is masked or no id of the vocabulary
  lse: jax.Array  # log of the sum of exp(logits), after the temperature
  entropy: jax.Array  # nats


def linear_logprob_reference(
  hidden_NxH: jax.Array,
  weight_HxV: jax.Array,
  targets_N: jax.Array,
  temperature_N: jax.Array | None,
  vocab_mask_V: jax.Array | None,
) -> LinearLogprob:
  dtype = jnp.promote_types(jnp.result_type(hidden_NxH, weight_HxV), jnp.float32)
  logits_NxV = jnp.dot(hidden_NxH.astype(dtype), weight_HxV.astype(dtype), precision=lax.Precision.HIGHEST)
  if temperature_N is not None:
    logits_NxV = logits_NxV / temperature_N[:, None]
  vocab_size = weight_HxV.shape[1]
  possible_V = jnp.ones(vocab_size, bool) if vocab_mask_V is None else vocab_mask_V
  lse_N = jax.nn.logsumexp(logits_NxV, axis=1, where=possible_V)
  probs_NxV = jnp.where(possible_V, jnp.exp(jnp.where(possible_V, logits_NxV, lse_N[:, None]) - lse_N[:, None]), 0)
  entropy_N = lse_N - jnp.sum(probs_NxV * logits_NxV, axis=1)

  id_N = jnp.clip(targets_N, 0, vocab_size - 1)
  drawable_N = (id_N == targets_N) & possible_V[id_N]
  target_logit_N = jnp.take_along_axis(logits_NxV, id_N[:, None], axis=1)[:, 0]
  return LinearLogprob(jnp.where(drawable_N, target_logit_N, -jnp.inf) - lse_N, lse_N, entropy_N)
