"""The router: sigmoid scores, selection bias, group-limited top-k (reference notes, bailing_moe_v2.md 3.6, 3.10).

    s = sigmoid(x W)                       scores, float32
    c = s + bias                           for selection only
    group score = sum of the best two c of a group; experts outside of the best groups get c = -inf
    ids = top-k of c;   w = s[ids] / (sum s[ids] + 1e-20) * routed_scaling_factor

The trainer and the engine call this one function, so that a token chooses the same experts in both, but for what their
rounding does to a close choice.  Router replay (R3, arXiv 2510.11370) takes that away: the engine records the ids, and the
trainer is given them.  It weighs them by its own scores, so that its router still learns.

Dimension key: N tokens, D hidden, E experts, K experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from configs.schema import ModelConfig


class Routing(NamedTuple):
  ids_NxK: jax.Array  # int32
  weights_NxK: jax.Array  # float32, differentiable


def route(
  x_NxD: jax.Array,
  kernel_DxE: jax.Array,
  bias_E: jax.Array,
  config: ModelConfig,
  given_NxK: jax.Array | None = None,
) -> Routing:
  """Chooses experts.  Gradients flow through the weights, never through the choice or the bias.

  Args:
    given_NxK: integers: the experts that were chosen elsewhere, all different; below 0: the token chooses.
  """
  wide = jnp.promote_types(x_NxD.dtype, jnp.float32)
  logits_NxE = jnp.dot(x_NxD.astype(wide), kernel_DxE.astype(wide), precision=jax.lax.Precision.HIGHEST)
  scores_NxE = jax.nn.sigmoid(logits_NxE)
  choice_NxE = jax.lax.stop_gradient(scores_NxE + bias_E.astype(wide))
  if config.n_group > 1:
    choice_NxE = _limit_to_groups(choice_NxE, config.n_group, config.topk_group)
  _, ids_NxK = jax.lax.top_k(choice_NxE, config.num_experts_per_tok)
  if given_NxK is not None:
    ids_NxK = jnp.where(given_NxK >= 0, given_NxK.astype(ids_NxK.dtype), ids_NxK)
  # A gather's backward pass would be a scatter, which a TPU does one element after the other.
  taken_NxKxE = ids_NxK[..., None] == jnp.arange(config.num_experts)
  weights_NxK = jnp.where(taken_NxKxE, scores_NxE[:, None], 0).sum(axis=-1)
  if config.norm_topk_prob and config.num_experts_per_tok > 1:
    weights_NxK = weights_NxK / (weights_NxK.sum(axis=-1, keepdims=True) + 1e-20)
  return Routing(ids_NxK.astype(jnp.int32), weights_NxK * config.routed_scaling_factor)


def _limit_to_groups(choice_NxE: jax.Array, n_group: int, topk_group: int) -> jax.Array:
  """-inf for experts outside of the `topk_group` best groups (not 0: biased scores may be negative)."""
  N, E = choice_NxE.shape
  grouped_NxGxe = choice_NxE.reshape(N, n_group, E // n_group)
  best_NxG = grouped_NxGxe.max(axis=-1)
  is_best_NxGxe = jnp.arange(E // n_group) == grouped_NxGxe.argmax(axis=-1)[..., None]
  score_NxG = best_NxG + jnp.where(is_best_NxGxe, -jnp.inf, grouped_NxGxe).max(axis=-1)
  # How many groups go before each; of equal ones the first, as in a top-k, which the TPU would do by sorting.
  earlier_GxG = jnp.tri(n_group, k=-1, dtype=bool)
  mine_NxGx1, theirs_Nx1xG = score_NxG[..., None], score_NxG[:, None]
  before_NxGxG = (theirs_Nx1xG > mine_NxGx1) | ((theirs_Nx1xG == mine_NxGx1) & earlier_GxG)
  keep_NxG = before_NxGxG.sum(axis=-1) < topk_group
  return jnp.where(keep_NxG[..., None], grouped_NxGxe, -jnp.inf).reshape(N, E)


def updated_bias(bias_LxE: jax.Array, counts_LxE: jax.Array, rate: float) -> jax.Array:
  """The loss-free balancing step of SFT: b += rate * (u - mean u), u = sign(mean load - load) (section 3.10)."""
  load = counts_LxE.astype(jnp.float32)
  u_LxE = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
  return bias_LxE + rate * (u_LxE - u_LxE.mean(axis=-1, keepdims=True))
