"""Drawing tokens, and the log-probability of the distribution they were drawn from.

    logits = hidden @ lm_head / temperature, float32; ids that may not be drawn get -inf
    top-k, then top-p, where a slot asks for them: what they cut gets -inf too
    logp = log softmax of what is left

Temperature 0 is greedy: the likeliest token (of several the one with the least id), with its log-probability at
temperature 1 before any cut.

With neither top-k nor top-p this is the distribution that `kernels.linear_logprob` scores, with the same mask and the
same temperature (architecture decision 4).

On a mesh the vocabulary is cut: each device has the logits of its part, and what they exchange is a maximum, a sum and
the masses of the blocks, [B, V / 128] numbers.  Only truncation needs all logits in one place.

A token's randomness is one uniform number keyed by (seed, rollout uid, position), and the token is found by inverting
the distribution function: a rollout's samples do not depend on its slot, on the batch around it, or on a restart
(architecture decision 6).  The inversion works in two levels, blocks first, which is faster than Gumbel noise over the
vocabulary and loses less to rounding than one long cumulative sum (cpu_speed.md section 4).

Dimension key: B slots, D hidden, V vocabulary, C blocks, W block width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.parallel import AXES, ShardingRules
from sharding import rules

_BLOCK = 128
_DEFAULT_RULES = ShardingRules()


class SamplingParams(NamedTuple):
  """One entry a slot."""

  temperature_B: jax.Array  # float32, 0: greedy
  top_p_B: jax.Array  # float32, 1: off
  top_k_B: jax.Array  # int32, 0: off
  seeds_B: jax.Array  # uint32


def sample(
  hidden_BxD: jax.Array,
  lm_head_DxV: jax.Array,
  vocab_mask_V: jax.Array,
  params: SamplingParams,
  uids_B: jax.Array,
  positions_B: jax.Array,
  sharding: ShardingRules = _DEFAULT_RULES,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token a slot; returns (tokens [B] int32, logps [B] float32).

  Args:
    vocab_mask_V: bool; False for ids that can never be drawn.
    uids_B: uint32 rollout uids.
    positions_B: the position in its sequence that the token will take.
    sharding: how a mesh, where there is one, cuts slots and vocabulary.
  """
  slots = ("batch",)
  draw = rules.manual(
    lambda *arguments: _draw(sharding.vocab, *arguments),
    sharding,
    (("batch", None), (None, "vocab"), ("vocab",), SamplingParams(slots, slots, slots, slots), slots, slots),
    (slots, slots),
  )
  return draw(hidden_BxD, lm_head_DxV.astype(hidden_BxD.dtype), vocab_mask_V, params, uids_B, positions_B)


def _draw(axes: tuple[str, ...], hidden_BxD, lm_head_DxV, mask_V, params: SamplingParams, uids_B, positions_B):
  """One device's slots, and its part V of the vocabulary, which is cut over the mesh axes `axes`."""
  # HIGHEST: float32 as float32, which neither a GPU nor a TPU would do by itself; bfloat16 is exact in any case.
  logits_BxV = jnp.dot(hidden_BxD, lm_head_DxV, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
  greedy_B = params.temperature_B == 0.0
  temperature_B = jnp.where(greedy_B, 1.0, params.temperature_B)
  logits_BxV = jnp.where(mask_V, logits_BxV / temperature_B[:, None], -jnp.inf)
  top_p_B, top_k_B = jnp.where(greedy_B, 1.0, params.top_p_B), jnp.where(greedy_B, 0, params.top_k_B)
  cut = (top_p_B < 1.0) | (top_k_B > 0)

  def truncated(logits_BxV):
    lowest_B = _lowest(rules.all_gather(logits_BxV, axes, 1), top_p_B, top_k_B)
    return jnp.where(logits_BxV >= lowest_B[:, None], logits_BxV, -jnp.inf)

  # The same branch on every device, as one of them exchanges.
  any_cut = rules.pmax(cut.any().astype(jnp.int32), AXES) > 0
  logits_BxV = jax.lax.cond(any_cut, truncated, lambda logits: logits, logits_BxV)
  shifted_BxV = logits_BxV - rules.pmax(logits_BxV.max(axis=-1), axes)[:, None]
  logps_BxV = shifted_BxV - jnp.log(rules.psum(jnp.exp(shifted_BxV).sum(axis=-1), axes))[:, None]
  mass_BxV = jnp.where(greedy_B[:, None] & (shifted_BxV < 0.0), 0.0, jnp.exp(logps_BxV))
  uniform_B = jnp.where(greedy_B, 0.0, _uniform(params.seeds_B, uids_B, positions_B))
  token_B, mine_B = _invert(mass_BxV, uniform_B, axes)
  logp_B = jnp.take_along_axis(logps_BxV, token_B[:, None], axis=-1)[:, 0]
  token_B = token_B + rules.axis_index(axes) * logits_BxV.shape[1]
  return rules.psum(jnp.where(mine_B, token_B, 0), axes), rules.psum(jnp.where(mine_B, logp_B, 0.0), axes)


def _uniform(seeds_B, uids_B, positions_B):
  def one(seed, uid, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), uid), position)
    return jax.random.uniform(key, dtype=jnp.float32)

  return jax.vmap(one)(seeds_B, uids_B, positions_B)


def _lowest(logits_BxV, top_p_B, top_k_B):
  """The least logit within the top-k and then the smallest set whose mass reaches top-p (its best token always stays)."""
  V = logits_BxV.shape[-1]
  sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
  k_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, V), V)
  sorted_BxV = jnp.where(jnp.arange(V) < k_B[:, None], sorted_BxV, -jnp.inf)
  probs_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
  mass_before_BxV = jnp.cumsum(probs_BxV, axis=-1) - probs_BxV
  inside_BxV = (mass_before_BxV < top_p_B[:, None]) & jnp.isfinite(sorted_BxV)
  return jnp.min(jnp.where(inside_BxV, sorted_BxV, jnp.inf), axis=-1)


def _invert(probs_BxV: jax.Array, uniform_B: jax.Array, axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array]:
  """The first token whose distribution function exceeds the uniform number; never one of probability 0.

  Returns: (its index in this device's part, whether it is there).
  """
  B, V = probs_BxV.shape
  blocks_BxCxW = jnp.pad(probs_BxV, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
  own = blocks_BxCxW.shape[1]
  mass_BxC = rules.all_gather(blocks_BxCxW.sum(axis=-1), axes, 1)
  block_B, rest_B = _first_above(mass_BxC, uniform_B * mass_BxC.sum(axis=-1))
  block_B = block_B - rules.axis_index(axes) * own
  mine_B = (block_B >= 0) & (block_B < own)
  block_B = jnp.where(mine_B, block_B, 0)
  inside_BxW = jnp.take_along_axis(blocks_BxCxW, block_B[:, None, None], axis=1)[:, 0]
  token_B, _ = _first_above(inside_BxW, rest_B)
  return jnp.minimum(block_B * _BLOCK + token_B, V - 1).astype(jnp.int32), mine_B


def _first_above(mass_BxN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(first index with mass whose cumulative mass exceeds the target, what is left of the target there).

  Rounding may leave the target at or above the total: then the last index that has mass is meant.
  """
  cdf_BxN = jnp.cumsum(mass_BxN, axis=-1)
  N = mass_BxN.shape[-1]
  last_B = N - 1 - jnp.argmax(mass_BxN[:, ::-1] > 0, axis=-1)
  above_BxN = (cdf_BxN > target_B[:, None]) & (mass_BxN > 0)
  index_B = jnp.where(above_BxN.any(axis=-1), jnp.argmax(above_BxN, axis=-1), last_B)
  picked = lambda values: jnp.take_along_axis(values, index_B[:, None], axis=-1)[:, 0]  # noqa: E731
  return index_B, jnp.maximum(target_B - (picked(cdf_BxN) - picked(mass_BxN)), 0.0)
