"""The differentiable op: one hand-written VJP over the implementations, on one device or over a mesh.

The VJP stands outside of `shard_map`: inside, a result that is the same on all shards of the vocabulary would get its
cotangent divided by their number (pallas.md section 5).

Dimension key: N tokens, H hidden width, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from kernels.linear_logprob import dispatch, partitioned
from kernels.linear_logprob.backend import NEVER, Cotangents, Inputs, Scores
from kernels.linear_logprob.dispatch import Implementation
from kernels.linear_logprob.partitioned import Partition
from kernels.linear_logprob.reference import LinearLogprob


@dataclasses.dataclass(frozen=True)
class Plan:
  implementation: Implementation | None  # None: by platform
  partition: Partition | None = None  # None: one device, or one shard of the caller's


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_logprob_op(plan: Plan, inputs: Inputs) -> LinearLogprob:
  if plan.partition is None:
    return _result(dispatch.score(plan.implementation, inputs))
  return _result(partitioned.score(plan.implementation, plan.partition, inputs))


def _result(scores: Scores) -> LinearLogprob:
  logp_N = jnp.where(scores.target == NEVER, -jnp.inf, scores.target - scores.lse)
  return LinearLogprob(logp_N, scores.lse, scores.lse - scores.mean)


def _forward(plan: Plan, inputs):
  inputs = jax.tree.map(lambda primal: primal.value, inputs)
  if plan.partition is None:
    scores, kept = dispatch.score_to_train(plan.implementation, inputs)
  else:
    scores, kept = partitioned.score_to_train(plan.implementation, plan.partition, inputs)
  return _result(scores), (inputs, kept, scores)


def _backward(plan: Plan, residuals, cotangents: LinearLogprob):
  inputs, kept, scores = residuals
  # A cotangent that is zero by construction costs nothing: with logp alone, the entropy is not needed here.
  given = Cotangents(*(None if isinstance(c, SymbolicZero) else c for c in cotangents))
  if plan.partition is None:
    arguments = (inputs, kept, scores, given)
    dhidden_NxH, dweight_HxV = dispatch.gradient(plan.implementation, *arguments, inputs.hidden.dtype)
  else:
    dhidden_NxH, dweight_HxV = partitioned.gradient(plan.implementation, plan.partition, inputs, kept, scores, given)
  none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (inputs.ids, inputs.mask))
  no_temperature = jax.tree.map(jnp.zeros_like, inputs.temperature)
  return (Inputs(dhidden_NxH, dweight_HxV, none[0], no_temperature, none[1]),)


linear_logprob_op.defvjp(_forward, _backward, symbolic_zeros=True)
