"""Sampling by definition: all logits and all noise at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear_sample.noise import bits_of_ids, gumbel


class LinearSample(NamedTuple):
  """A token drawn from each distribution, [N] each."""

  token: jax.Array  # int32
  logp: jax.Array  # float32: its log-probability
  lse: jax.Array  # float32: log of the sum of exp(logits), after the temperature


def linear_sample_reference(hidden_NxH, weight_HxV, keys_Nx2, temperature_N, vocab_mask_V) -> LinearSample:
  """keys: int32."""
  x_NxV = jnp.dot(hidden_NxH.astype(jnp.float32), weight_HxV.astype(jnp.float32), precision=lax.Precision.HIGHEST)
  if temperature_N is not None:
    x_NxV = x_NxV / temperature_N[:, None]
  if vocab_mask_V is not None:
    x_NxV = jnp.where(vocab_mask_V, x_NxV, -jnp.inf)
  ids_V = jnp.arange(x_NxV.shape[1], dtype=jnp.int32)
  noise_NxV = gumbel(bits_of_ids(keys_Nx2[:, :1], keys_Nx2[:, 1:], ids_V))
  token_N = jnp.argmax(x_NxV + noise_NxV, axis=1).astype(jnp.int32)
  lse_N = jax.nn.logsumexp(x_NxV, axis=1)
  return LinearSample(token_N, jnp.take_along_axis(x_NxV, token_N[:, None], axis=1)[:, 0] - lse_N, lse_N)
