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
from jax.sharding import PartitionSpec

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
  inside_BxT, counted_BxT = (jnp.atleast_2d(x) for x in (inside, counted))
  sequence_P, ids = sequence_index(segment_ids)

  def per_sequence(x_BxT: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x_BxT.reshape(-1).astype(jnp.int32), sequence_P, ids)

  num_sequences = jnp.maximum(jnp.count_nonzero(per_sequence(inside_BxT)), 1)
  length_P = per_sequence(counted_BxT)[sequence_P]
  return (1.0 / (num_sequences * jnp.maximum(length_P, 1))).reshape(inside.shape)


def sequence_index(segment_ids: jax.Array) -> tuple[jax.Array, int]:
  """(a number [P] for every token, P of them, that only tokens of the same sequence share; a bound above them all)."""
  ids_BxT = jnp.atleast_2d(segment_ids)
  rows, ids_per_row = ids_BxT.shape[0], ids_BxT.shape[1] + 1
  return (jnp.arange(rows)[:, None] * ids_per_row + ids_BxT).reshape(-1), rows * ids_per_row


def sequence_mean(x: jax.Array, kept: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """x averaged over the kept tokens of each sequence, at every token of it; 0 where none is kept.

  Args:
    x: [B, T] or [N], 0 where not kept.
    segment_ids: as of `token_weights`.
  """
  if segment_ids is None:
    if x.ndim != 2:
      raise ConfigError("objective.level=sequence: arrays [N] need segment_ids, which say what a sequence is")
    return jnp.broadcast_to(_mean(x.sum(axis=1), jnp.count_nonzero(kept, axis=1))[:, None], x.shape)
  sequence_P, ids = sequence_index(_whole(segment_ids))
  total, count = (jax.ops.segment_sum(_whole(a).reshape(-1).astype(x.dtype), sequence_P, ids) for a in (x, kept))
  return _laid_out_as(x, _mean(total, count)[sequence_P].reshape(x.shape))


def _whole(x: jax.Array) -> jax.Array:
  """The same on every device of a mesh with explicit axes: a sum by index is one device's work, and these are numbers a
  token."""
  return jax.reshard(x, PartitionSpec()) if _explicit(x) else x


def _laid_out_as(like: jax.Array, x: jax.Array) -> jax.Array:
  return jax.reshard(x, jax.typeof(like).sharding.spec) if _explicit(like) else x


def _explicit(x: jax.Array) -> bool:
  mesh = jax.typeof(x).sharding.mesh
  return not mesh.empty and bool(mesh.explicit_axes)


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
  return total / jnp.maximum(count, 1)
