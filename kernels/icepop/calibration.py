"""Which tokens an objective leaves out: how far trainer and engine disagree about each (papers.md 1.4).

    band         alpha <= k <= beta                                   IcePop
    binary_kl    max(D(p, q), D(q, p)) <= max_binary_kl               KPop
                 D(p, q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),  p, q: the token's probability in either engine
    none         all

Bounds are inclusive.  The band's are compared with log k, as k itself carries the rounding error of exp.

A log-probability near 0 is a difference of two logits of size 10: its error is 1e-6, and so is that of 1 - p.  Below that
1 - p says nothing, but its logarithm would go to infinity, so it is cut off there.  (1 - exp(logp) would be 0 or 6e-8 in
float32, whatever is added to it or cut from it.)

`verdict` also runs on the host, with NumPy (`ring_jax.rl.metrics`): the same expressions, and the same float32 decision
but for the last bit of exp and expm1.
"""

import math
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import IcePopConfig, Masking

Array = jax.Array | np.ndarray
_RESOLUTION = 1e-6  # of 1 - p


class Verdict(NamedTuple):
  """Arrays of the tokens' shape.  A token in none of the three is kept."""

  log_k: Array
  low: Array  # bool: left out, and the trainer finds it less likely than the engine did
  high: Array  # bool: left out, and more likely
  nonfinite: Array  # bool: k or the PPO ratio is not a number, or infinite

  @property
  def kept(self) -> Array:
    return ~(self.low | self.high | self.nonfinite)


def verdict(
  logp: Array, logp_old: Array, logp_train: Array, logp_infer: Array, config: IcePopConfig, xp: ModuleType = jnp
) -> Verdict:
  """Args:
  logp, logp_old: of the PPO ratio.
  logp_train, logp_infer: of k.
  xp: whose arrays they are: jax.numpy or numpy.
  """
  log_k = logp_train - logp_infer
  finite = xp.isfinite(xp.exp(log_k)) & xp.isfinite(xp.exp(logp - logp_old))
  match config.masking:
    case Masking.BAND:
      low, high = finite & (log_k < _log(config.alpha)), finite & (log_k > _log(config.beta))
    case Masking.BINARY_KL:
      # NaN, of a probability that is exactly 0, is no agreement.
      apart = finite & ~(binary_kl(logp_train, logp_infer, xp) <= config.max_binary_kl)
      low, high = apart & (log_k < 0), apart & (log_k >= 0)
    case Masking.NONE:
      low = high = xp.zeros_like(finite)
  return Verdict(log_k, low, high, ~finite)


def binary_kl(logp: Array, logq: Array, xp: ModuleType = jnp) -> Array:
  """The larger of the two KL divergences between "this token, or another one" under two log-probabilities."""
  p, q = (xp.exp(xp.minimum(x, 0.0)) for x in (logp, logq))
  rest_p, rest_q = (xp.maximum(-xp.expm1(xp.minimum(x, 0.0)), _RESOLUTION) for x in (logp, logq))
  log_ratio, log_rest = logp - logq, xp.log(rest_p) - xp.log(rest_q)
  return xp.maximum(p * log_ratio + rest_p * log_rest, -(q * log_ratio + rest_q * log_rest))


def _log(bound: float) -> float:
  return math.log(bound) if bound > 0 else -math.inf
