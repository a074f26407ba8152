"""How the losses of tokens add up to one number: a weight for every token (papers.md 1.4 and Part 3).

    sequence_mean   1 / (sequences * tokens of its sequence)     Ring-1T, equation 1: 1/G sum_i 1/|y_i| sum_t
    token_mean      1 / tokens                                   every token counts the same
    token_budget    1 / Phi                                      C3PO, equation 2 of Ring-lite

`token_weights` computes them for one array.  A minibatch that is spread over several packed arrays has its sequences
and tokens counted on the host, and `sequence_weight` gives what each token of one sequence weighs.

With denominator=kept only tokens inside the calibration band count as tokens; sequences count either way.

Dimension key: B rows, T positions, N tokens.
"""

import jax
import jax.numpy as jnp

from configs.schema import Aggregate, ConfigError, IcePopConfig


def sequence_weight(length: int, num_sequences: int, num_tokens: int, config: IcePopConfig) -> float:
  """The weight of every token of one sequence, when a minibatch is spread over several arrays.

  Args:
    length: tokens of this sequence that count (trained on; with denominator=kept: and inside the band).
    num_sequences: sequences of the whole minibatch, those of all its arrays.
    num_tokens: tokens of the whole minibatch that count.
    config: aggregate and token_budget are read.

  Returns:
    The weight; 0 for a sequence without tokens.
  """
  if length == 0:
    return 0.0
  if not 0 < length <= num_tokens or num_sequences < 1:
    raise ValueError(
      f"sequence_weight: length={length}, num_sequences={num_sequences}, num_tokens={num_tokens}:"
      " the minibatch must contain the sequence"
    )
  match config.aggregate:
    case Aggregate.SEQUENCE_MEAN:
      return 1.0 / (num_sequences * length)
    case Aggregate.TOKEN_MEAN:
      return 1.0 / num_tokens
    case Aggregate.TOKEN_BUDGET:
      return 1.0 / config.token_budget


def token_weights(
  mask: jax.Array, config: IcePopConfig, segment_ids: jax.Array | None = None, kept: jax.Array | None = None
) -> jax.Array:
  """The weight of every token of one array that is a whole minibatch.

  Args:
    mask: bool or 0/1, [B, T] or [N]: the tokens trained on.
    config: aggregate, token_budget.
    segment_ids: integers of mask's shape, from 0 to T (or N): tokens of a row with the same id are one sequence.
      None: a row is a sequence.
    kept: bool of mask's shape: the tokens that count, for denominator=kept.  None: all of mask.

  Returns:
    float32 of mask's shape, 0 outside mask.

  Raises:
    ConfigError: sequence_mean over [N] without segment_ids, where nothing says what a sequence is.
  """
  inside = mask.astype(bool)
  counted = inside if kept is None else inside & kept
  match config.aggregate:
    case Aggregate.SEQUENCE_MEAN:
      weights = _sequence_mean(inside, counted, segment_ids)
    case Aggregate.TOKEN_MEAN:
      weights = 1.0 / jnp.maximum(jnp.count_nonzero(counted), 1)
    case Aggregate.TOKEN_BUDGET:
      weights = 1.0 / config.token_budget
  return jnp.where(inside, weights, 0.0).astype(jnp.float32)


def _sequence_mean(inside: jax.Array, counted: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  if segment_ids is None:
    if inside.ndim != 2:
      raise ConfigError(
        "objective.aggregate=sequence_mean: arrays [N] need segment_ids or weights, which say what a sequence is"
      )
    has_tokens_B = jnp.any(inside, axis=1)
    length_Bx1 = jnp.count_nonzero(counted, axis=1)[:, None]
    return 1.0 / (jnp.maximum(jnp.count_nonzero(has_tokens_B), 1) * jnp.maximum(length_Bx1, 1))
  inside_BxT, counted_BxT, ids_BxT = (jnp.atleast_2d(x) for x in (inside, counted, segment_ids))
  rows, ids_per_row = ids_BxT.shape[0], ids_BxT.shape[1] + 1
  sequence_P = (jnp.arange(rows)[:, None] * ids_per_row + ids_BxT).reshape(-1)

  def per_sequence(x_BxT: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x_BxT.reshape(-1).astype(jnp.int32), sequence_P, rows * ids_per_row)

  num_sequences = jnp.maximum(jnp.count_nonzero(per_sequence(inside_BxT)), 1)
  length_P = per_sequence(counted_BxT)[sequence_P]
  return (1.0 / (num_sequences * jnp.maximum(length_P, 1))).reshape(inside.shape)
