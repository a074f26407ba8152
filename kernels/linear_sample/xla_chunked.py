"""Sampling tile by tile in plain XLA: the sweep of `kernels.linear_logprob.xla_chunked`, with a race beside the sums.

Dimension key: N tokens, H hidden width, V vocabulary, T tokens of a chunk, C ids of a chunk.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear_logprob.backend import NEVER, zeros
from kernels.linear_logprob.xla_chunked import sweep_vocabulary, tile_logits, tile_shape
from kernels.linear_sample.backend import Draw, Inputs
from kernels.linear_sample.noise import bits_of_ids, gumbel


def draw(inputs: Inputs) -> Draw:
  num_tokens, vocab_size = inputs.hidden.shape[0], inputs.weight.shape[1]
  tokens, ids = tile_shape(num_tokens, vocab_size)

  def chunk(rows):
    hidden_TxH, keys_Tx2, temperature_T = rows

    def tile(first, weight_HxC, mask_C, carry):
      max_T, exp_T, best = carry
      x_TxC = tile_logits(hidden_TxH, weight_HxC, temperature_T, mask_C).astype(jnp.float32)
      ids_C = first + jnp.arange(x_TxC.shape[1], dtype=jnp.int32)
      race_TxC = x_TxC + gumbel(bits_of_ids(keys_Tx2[:, :1], keys_Tx2[:, 1:], inputs.first + ids_C))
      column_Tx1 = jnp.argmax(race_TxC, axis=1, keepdims=True)
      of_winner = lambda x_TxC: jnp.take_along_axis(x_TxC, column_Tx1, axis=1)[:, 0]  # noqa: E731
      ahead_T = of_winner(race_TxC) > best[0]  # the first of equals wins, here and in `argmax`
      winner = (of_winner(race_TxC), inputs.first + ids_C[column_Tx1[:, 0]], of_winner(x_TxC))
      best = jax.tree.map(lambda new, old: jnp.where(ahead_T, new, old), winner, best)
      grown_T = jnp.maximum(max_T, jnp.max(x_TxC, axis=1))
      exp_T = exp_T * jnp.exp(max_T - grown_T) + jnp.sum(jnp.exp(x_TxC - grown_T[:, None]), axis=1)
      return grown_T, exp_T, best

    zero_T = zeros((hidden_TxH.shape[0],), jnp.float32, hidden_TxH)
    start = (zero_T + NEVER, zero_T, (zero_T - jnp.inf, zero_T.astype(jnp.int32), zero_T))
    max_T, exp_T, best = sweep_vocabulary(vocab_size, ids, inputs.weight, inputs.mask, start, tile)
    return Draw(*best, max_T + jnp.log(exp_T))

  def chunked(x):
    padded = jnp.pad(x, [(0, -num_tokens % tokens)] + [(0, 0)] * (x.ndim - 1), constant_values=1)
    return padded.reshape(-1, tokens, *x.shape[1:])

  drawn = lax.map(chunk, jax.tree.map(chunked, (inputs.hidden, inputs.keys, inputs.temperature)))
  return jax.tree.map(lambda x: x.reshape(-1)[:num_tokens], drawn)
