"""Programs for a TPU that the tests and the ledger compile.

Dimension key: N tokens, H hidden width, V vocabulary.
"""

import jax
import jax.numpy as jnp

import kernels.linear_sample
from kernels.icepop import IcePopConfig, policy_loss
from kernels.linear_logprob import pallas_tpu
from kernels.linear_logprob.backend import Cotangents, Inputs, Scores
from tests.kernels.compiled import abstract, compile_for

N, H, V = 4096, 2048, 157_184


def policy_gradient(chip: str, tokens: int = N, hidden: int = H, vocab: int = V, implementation=None):
  """Value and gradient of the IcePop loss, compiled for one device."""

  def value_and_grad(hidden_NxH, weight_HxV, targets_N, old_N, infer_N, advantages_N, mask_N):
    def loss(hidden_NxH, weight_HxV):
      return policy_loss(
        hidden_NxH, weight_HxV, targets_N, old_N, infer_N, advantages_N, mask_N,
        IcePopConfig(aggregate="token_mean"), implementation=implementation,
      )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden_NxH, weight_HxV)

  number = abstract((tokens,), jnp.float32)
  return compile_for(
    chip, value_and_grad, abstract((tokens, hidden), jnp.bfloat16), abstract((hidden, vocab), jnp.bfloat16),
    abstract((tokens,), jnp.int32), number, number, number, abstract((tokens,), jnp.bool_),
  )  # fmt: skip


def linear_logprob(chip: str) -> None:
  """All kernels of the linear log-probability: the three forward sweeps, dweight, dhidden."""
  number = abstract((N,), jnp.float32)
  inputs = Inputs(abstract((N, H), jnp.bfloat16), abstract((H, V), jnp.bfloat16), abstract((N,), jnp.int32), None, None)

  def run(inputs, difference_NxH, scores, dlogp_N, dentropy_N):
    kept, options = difference_NxH, {"interpret": False}
    return (
      pallas_tpu.score(inputs, **options),
      pallas_tpu.score_to_train(inputs, None, **options),
      pallas_tpu.score_to_train(inputs, lambda scores: scores, **options),  # as a shard of the vocabulary
      pallas_tpu.gradient(inputs, kept, scores, Cotangents(dlogp_N, None, None), jnp.bfloat16, **options),
      pallas_tpu.gradient(inputs, kept, scores, Cotangents(dlogp_N, None, dentropy_N), jnp.bfloat16, **options)[0],
    )

  compile_for(chip, run, inputs, inputs.hidden, Scores(number, number, number), number, number)


def linear_sample(chip: str, slots: int = 256, hidden: int = H, vocab: int = V, implementation=None):
  """A decode step's sampling, compiled for one device."""

  def draw(hidden_NxH, weight_HxV, keys_Nx2, temperature_N, mask_V):
    return kernels.linear_sample.linear_sample(
      hidden_NxH, weight_HxV, keys_Nx2, temperature=temperature_N, vocab_mask=mask_V, implementation=implementation
    )

  return compile_for(
    chip, draw, abstract((slots, hidden), jnp.bfloat16), abstract((hidden, vocab), jnp.bfloat16),
    abstract((slots, 2), jnp.uint32), abstract((slots,), jnp.float32), abstract((vocab,), jnp.bool_),
  )  # fmt: skip
