"""The linear log-probability: (hidden, output matrix, target) -> log-probability, log-sum-exp, entropy (decision 10).

Sampling and training share it, with the same temperature and the same mask of ids that can never be drawn, so that the
log-probability of a token means the same on both sides.

Dimension key: N tokens, H hidden width, V vocabulary.
"""

import numbers

import jax
import jax.numpy as jnp

from kernels.choice import choose
from kernels.linear_logprob import dispatch, partitioned
from kernels.linear_logprob.backend import Inputs, vary_together
from kernels.linear_logprob.dispatch import Implementation
from kernels.linear_logprob.op import Plan, linear_logprob_op
from kernels.linear_logprob.partitioned import Partition
from kernels.linear_logprob.reference import LinearLogprob, linear_logprob_reference


def linear_logprob(
  hidden_NxH: jax.Array,
  weight_HxV: jax.Array,
  targets_N: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  vocab_mask: jax.Array | None = None,
  implementation: Implementation | str | None = None,
  partition: Partition | None = None,
) -> LinearLogprob:
  """Scores target tokens; differentiable in hidden and weight through all three results.

  Args:
    hidden_NxH: final hidden states, floating point.
    weight_HxV: the output matrix (lm_head, transposed to [hidden, vocabulary]), floating point.
    targets_N: integer ids.  An id outside the vocabulary gets logp -inf, like one that is masked.
    temperature: > 0, a number or one a token [N]; the logits are divided by it.  Not differentiated.
    vocab_mask: bool [V]; False: an id that can never be drawn.  It has no part in lse and entropy, and its column of
      weight gets zero gradient.  At least one id must be True.
    implementation: None: the TPU kernels in programs compiled for a TPU, `xla_chunked` elsewhere.
    partition: the axes of a mesh that tokens and vocabulary are spread over.  None: on a mesh with explicit axes, as the
      arguments are; else one device, or the caller's shard inside of `shard_map`.  A vocabulary that does not divide
      by the number of its shards is padded here, which copies the weight: pad it beforehand, with `padded_vocab`.

  Returns:
    LinearLogprob(logp, lse, entropy), float32 [N] each (float64 if hidden or weight is), of the distribution after
    temperature and mask.  Logits are float32 whatever the dtype of the arguments.

  Raises:
    ConfigError: unknown implementation, or one that does not take these arguments.
    ValueError: shapes or dtypes that do not fit together, a temperature that is not positive.
  """
  chosen = None if implementation is None else choose(implementation, Implementation.XLA_CHUNKED, "linear_logprob")
  _check(hidden_NxH, weight_HxV, targets_N, vocab_mask)
  temperature_N = temperature_of("linear_logprob", temperature, hidden_NxH.shape[0])
  if chosen is Implementation.REFERENCE:
    return linear_logprob_reference(hidden_NxH, weight_HxV, targets_N, temperature_N, vocab_mask)
  known_N = (targets_N >= 0) & (targets_N < weight_HxV.shape[1])
  ids_N = jnp.where(known_N, targets_N, -1).astype(jnp.int32)
  inputs = vary_together(Inputs(hidden_NxH, weight_HxV, ids_N, temperature_N, vocab_mask))
  dispatch.check("linear_logprob", chosen, hidden_NxH, weight_HxV)
  partition = partition or partitioned.of_arguments(hidden_NxH, weight_HxV)
  if partition is not None:
    inputs = partitioned.place(partition, inputs)
  return linear_logprob_op(Plan(chosen, partition), inputs)


def _check(hidden_NxH, weight_HxV, targets_N, vocab_mask) -> None:
  check_arrays("linear_logprob", hidden_NxH, weight_HxV, vocab_mask)
  num_tokens = hidden_NxH.shape[0]
  if targets_N.shape != (num_tokens,) or not jnp.issubdtype(targets_N.dtype, jnp.integer):
    raise ValueError(
      f"linear_logprob: targets {targets_N.dtype}{list(targets_N.shape)}: expected integers [{num_tokens}]"
    )


def check_arrays(op: str, hidden_NxH, weight_HxV, vocab_mask) -> None:
  """Raises ValueError where shapes do not fit together."""
  if hidden_NxH.ndim != 2 or weight_HxV.ndim != 2 or hidden_NxH.shape[1] != weight_HxV.shape[0]:
    raise ValueError(f"{op}: hidden {hidden_NxH.shape} and weight {weight_HxV.shape}: expected [N, H] and [H, V]")
  vocab_size = weight_HxV.shape[1]
  if vocab_mask is not None and (vocab_mask.shape != (vocab_size,) or vocab_mask.dtype != bool):
    raise ValueError(f"{op}: vocab_mask {vocab_mask.dtype}{list(vocab_mask.shape)}: expected bool [{vocab_size}]")


def temperature_of(op: str, temperature: float | jax.Array, num_tokens: int) -> jax.Array | None:
  """One temperature a token, or None where there is nothing to divide by."""
  if isinstance(temperature, numbers.Real):
    if not temperature > 0:
      raise ValueError(f"{op}: temperature={temperature}: must be > 0")
    if temperature == 1:
      return None
  temperature = jnp.asarray(temperature, jnp.float32)
  if temperature.shape not in ((), (num_tokens,)):
    raise ValueError(f"{op}: temperature {list(temperature.shape)}: a number or one a token [{num_tokens}]")
  return jax.lax.stop_gradient(jnp.broadcast_to(temperature, (num_tokens,)))
