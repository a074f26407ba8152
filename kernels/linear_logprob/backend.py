"""What an implementation of the linear log-probability provides, so that one differentiable op serves all.

    score(inputs) -> Scores
    score_to_train(inputs, combine) -> (Scores, kept)
    gradient(inputs, kept, scores, cotangents, sum_dtype) -> (dhidden [N, H], dweight [H, V])

`combine` turns the scores over one shard's vocabulary into those over all of it; the identity where there is one shard.
`kept` is whatever spares the backward pass work: one form an implementation.  With x the logits and p = softmax(x), the
cotangents (a, b, c) of (logp, lse, entropy) give the gradient of a token's logits,

    dx[j] = a 1[j = target] + p[j] ((b - a) - c (x[j] - mean)),     mean = E_p[x] = lse - entropy

A token whose cotangents are all zero contributes exactly nothing, even if its hidden state is not finite.

Dimension key: N tokens, H hidden width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Stands for -inf in sums of logits: its exp is exactly 0, and 0 times it is 0 and not NaN.
NEVER = -1e30


class Inputs(NamedTuple):
  hidden: jax.Array  # [N, H]
  weight: jax.Array  # [H, V]
  ids: jax.Array  # [N] int32: the target; -1 where it is masked or no id of this vocabulary
  temperature: jax.Array | None  # [N]
  mask: jax.Array | None  # [V] bool


class Scores(NamedTuple):
  """Float32 [N] each (float64 if hidden or weight is)."""

  target: jax.Array  # the target's logit, NEVER where it has none
  lse: jax.Array
  mean: jax.Array  # E_p[x]


class Cotangents(NamedTuple):
  """[N] each; None: zero by construction."""

  logp: jax.Array | None
  lse: jax.Array | None
  entropy: jax.Array | None

  @property
  def given(self) -> list[jax.Array]:
    return [cotangent for cotangent in self if cotangent is not None]

  def active(self) -> jax.Array:
    """bool [N]: the tokens that have a gradient."""
    return jnp.any(jnp.stack([cotangent != 0 for cotangent in self.given]), axis=0)


Combine = Callable[[Scores], Scores]


def active_first(active_N: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The order in which tokens with a gradient come first, in whole blocks.

  Returns:
    source [P]: which token stands at each place; N, which is none, where nothing with a gradient does.
    blocks: int32, the number of blocks that hold any gradient.
    place [N]: where each token went.
  """
  num_tokens = active_N.shape[0]
  order_N = jnp.argsort(~active_N, stable=True)
  count = jnp.count_nonzero(active_N)
  source_N = jnp.where(jnp.arange(num_tokens) < count, order_N, num_tokens)
  source_P = jnp.pad(source_N, (0, -num_tokens % block), constant_values=num_tokens)
  return source_P, ((count + block - 1) // block).astype(jnp.int32), jnp.argsort(order_N)


def take_rows(x: jax.Array, source_P: jax.Array) -> jax.Array:
  """Rows by `active_first`: zeros where nothing with a gradient stands."""
  return jnp.take(x, source_P, axis=0, mode="fill", fill_value=0)


def vary_together(inputs: Inputs) -> Inputs:
  """Inside of `shard_map`: each input as one that varies over the axes that any of them varies over.

  The gradient of a weight that is the same on all shards is then summed over them, by the transpose of this.
  """
  axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(inputs)))
  vary = lambda x: lax.pcast(x, tuple(axes - _varying(x)), to="varying")  # noqa: E731
  return jax.tree.map(vary, inputs)


def zeros(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.Array:
  """Zeros that vary, inside of `shard_map`, over the axes that an array varies over."""
  return lax.pcast(jnp.zeros(shape, dtype), tuple(_varying(like)), to="varying")


def _varying(x: jax.Array) -> frozenset[str]:
  return jax.typeof(x).manual_axis_type.varying
