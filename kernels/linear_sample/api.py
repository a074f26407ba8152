"""Sampling from hidden states without logits: (hidden, output matrix, key) -> token, log-probability, log-sum-exp.

The distribution is that of `kernels.linear_logprob`: the same temperature, the same mask, float32 logits.  The noise is
counted, not drawn in order (noise.py): a token depends on its own hidden state and key alone, not on its slot, on the batch
around it, on how the vocabulary is cut up, or on the implementation, up to the rounding of the logits.

Dimension key: N tokens, H hidden width, V vocabulary, S shards of the vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from kernels.choice import choose
from kernels.linear_logprob import partitioned
from kernels.linear_logprob.api import check_arrays, temperature_of
from kernels.linear_logprob.dispatch import Implementation, by_platform, check, interpreted
from kernels.linear_logprob.partitioned import Partition
from kernels.linear_sample import pallas_tpu, xla_chunked
from kernels.linear_sample.backend import Draw, Inputs
from kernels.linear_sample.reference import LinearSample, linear_sample_reference


def linear_sample(
  hidden_NxH: jax.Array,
  weight_HxV: jax.Array,
  keys_Nx2: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  vocab_mask: jax.Array | None = None,
  implementation: Implementation | str | None = None,
  partition: Partition | None = None,
) -> LinearSample:
  """Draws one token from each distribution.  Not differentiable; no top-k and no top-p.

  Args:
    hidden_NxH: final hidden states, bfloat16 or float32, as weight.
    weight_HxV: the output matrix.
    keys_Nx2: uint32, see `token_keys`.
    temperature: > 0, a number or one a token [N].
    vocab_mask: bool [V]; False: an id that is never drawn.  At least one must be True.
    implementation, partition: as of `linear_logprob`.

  Returns:
    LinearSample(token, logp, lse), of the distribution after temperature and mask.

  Raises:
    ConfigError: unknown implementation, or one that does not take these arguments.
    ValueError: shapes or dtypes that do not fit together, a temperature that is not positive.
  """
  chosen = None if implementation is None else choose(implementation, Implementation.XLA_CHUNKED, "linear_sample")
  check_arrays("linear_sample", hidden_NxH, weight_HxV, vocab_mask)
  check("linear_sample", chosen, hidden_NxH, weight_HxV)
  num_tokens = hidden_NxH.shape[0]
  if keys_Nx2.shape != (num_tokens, 2) or keys_Nx2.dtype != jnp.uint32:
    raise ValueError(f"linear_sample: keys {keys_Nx2.dtype}{list(keys_Nx2.shape)}: expected uint32 [{num_tokens}, 2]")
  temperature_N = temperature_of("linear_sample", temperature, num_tokens)
  keys_Nx2 = lax.bitcast_convert_type(keys_Nx2, jnp.int32)
  if chosen is Implementation.REFERENCE:
    return linear_sample_reference(hidden_NxH, weight_HxV, keys_Nx2, temperature_N, vocab_mask)
  partition = partition or partitioned.of_arguments(hidden_NxH, weight_HxV)
  inputs = Inputs(hidden_NxH, weight_HxV, keys_Nx2, temperature_N, vocab_mask, first=0)
  drawn = _draw(chosen, inputs) if partition is None else _draw_over(partition, chosen, inputs)
  return LinearSample(drawn.token, drawn.logit - drawn.lse, drawn.lse)


def _draw(implementation: Implementation | None, inputs: Inputs) -> Draw:
  if inputs.hidden.shape[0] == 0:
    none = jnp.zeros(0, jnp.float32)
    return Draw(none, none.astype(jnp.int32), none, none)
  if (interpret := interpreted(implementation)) is not None:
    return pallas_tpu.draw(inputs, interpret=interpret)
  if not by_platform(implementation, inputs.hidden, inputs.weight):
    return xla_chunked.draw(inputs)
  first, arrays = inputs.first, inputs._replace(first=None)  # a number that the program knows must not become an array
  with_first = lambda arrays: arrays._replace(first=first)  # noqa: E731
  on_tpu = lambda arrays: pallas_tpu.draw(with_first(arrays), interpret=False)  # noqa: E731
  elsewhere = lambda arrays: xla_chunked.draw(with_first(arrays))  # noqa: E731
  return lax.platform_dependent(arrays, tpu=on_tpu, default=elsewhere)


def _draw_over(partition: Partition, implementation: Implementation | None, inputs: Inputs) -> Draw:
  partitioned.check_tokens(partition, inputs.hidden.shape[0], "linear_sample")
  weight_HxV, mask_V = partitioned.divisible(partition, inputs.weight, inputs.mask)
  arrays = inputs._replace(weight=weight_HxV, mask=mask_V, first=None)
  rows, vocab = P(partition.rows), P(partition.vocab)
  optional = lambda x, spec: None if x is None else spec  # noqa: E731
  specs = Inputs(
    P(partition.rows, None), P(None, partition.vocab), P(partition.rows, None),
    optional(inputs.temperature, rows), optional(mask_V, vocab), None,
  )  # fmt: skip

  def shard(arrays):
    first = lax.axis_index(partition.vocab) * arrays.weight.shape[1] if partition.vocab else 0
    drawn = _draw(implementation, arrays._replace(first=first))
    if not partition.vocab:
      return drawn
    by_shard = lax.all_gather(drawn, partition.vocab)  # [S, N]: a few numbers a token
    winner_N = jnp.argmax(by_shard.race, axis=0)  # of equals the first, which has the smaller id
    of_winner = lambda x_SxN: jnp.take_along_axis(x_SxN, winner_N[None], axis=0)[0]  # noqa: E731
    return Draw(*map(of_winner, by_shard[:3]), jax.nn.logsumexp(by_shard.lse, axis=0))

  arrays = partitioned.spread(partition, arrays, specs)
  return partitioned.over(partition, shard, (specs,), Draw(*[rows] * 4))(arrays)
