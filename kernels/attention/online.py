"""A softmax over keys that come block by block (FlashAttention, arXiv 2205.14135, section 3.1).

Kept are the largest score so far, the sum of exp(score - largest), and the values so weighted.  A block with a larger score
shrinks what was kept.

Dimension key: R queries, N keys of a block, d head dim; in front of them whatever goes side by side.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Weights [..., R, N] -> values so weighted [..., R, d], in the dtype of the weights.
Weigh = Callable[[jax.Array], jax.Array]


class OnlineSoftmax(NamedTuple):
  """Of some queries; a loop's carry.  Scores are float32 or float64, masked ones the least finite number."""

  max_Rx1: jax.Array
  sum_Rx1: jax.Array
  value_Rxd: jax.Array

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "OnlineSoftmax":
    """Before the first block; `shape` is that of the values, [..., R, d]."""
    zeros_Rx1 = jnp.zeros((*shape[:-1], 1), dtype)
    return cls(zeros_Rx1 + jnp.finfo(dtype).min, zeros_Rx1, jnp.zeros(shape, dtype))

  @classmethod
  def of(cls, scores_RxN: jax.Array, weigh: Weigh) -> "OnlineSoftmax":
    """Of the first block."""
    max_Rx1 = scores_RxN.max(axis=-1, keepdims=True)
    probs_RxN = jnp.exp(scores_RxN - max_Rx1)
    return cls(max_Rx1, probs_RxN.sum(axis=-1, keepdims=True), weigh(probs_RxN))

  def add(self, scores_RxN: jax.Array, weigh: Weigh) -> "OnlineSoftmax":
    """With one more block."""
    max_Rx1 = jnp.maximum(self.max_Rx1, scores_RxN.max(axis=-1, keepdims=True))
    probs_RxN = jnp.exp(scores_RxN - max_Rx1)
    shrink_Rx1 = jnp.exp(self.max_Rx1 - max_Rx1)
    sum_Rx1 = shrink_Rx1 * self.sum_Rx1 + probs_RxN.sum(axis=-1, keepdims=True)
    return OnlineSoftmax(max_Rx1, sum_Rx1, shrink_Rx1 * self.value_Rxd + weigh(probs_RxN))

  @property
  def result_Rxd(self) -> jax.Array:
    return self.value_Rxd / self.sum_Rx1

  @property
  def lse_Rx1(self) -> jax.Array:
    """log sum exp of all scores."""
    return self.max_Rx1 + jnp.log(self.sum_Rx1)
