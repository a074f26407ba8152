"""The jitted programs of training: gradients of a packed microbatch, log-probs, and the optimizer's step.

A step may need any number of microbatches.  Each has the same fixed shape, so that every program compiles once; the
gradients of one optimizer step are summed over them, with per-token weights that already hold the denominators of the
whole minibatch.

Dimension key: R rows of a microbatch, T tokens of a row, N = R * T, D hidden, V vocabulary, L MoE layers, E experts,
K experts a token.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from configs.schema import IcePopConfig, ParallelConfig, RatioLevel, RunConfig
from kernels.icepop import policy_loss
from kernels.linear_logprob import linear_logprob
from ring_jax.model import ForwardOutput, Params, forward, is_router_bias, updated_bias
from ring_jax.train.updates import Update, added, gradients
from sharding import rules


class Tokens(NamedTuple):
  """A packed microbatch: what the model reads."""

  tokens_RxT: np.ndarray  # int32
  positions_RxT: np.ndarray  # int32, restart with each sequence
  segments_RxT: np.ndarray  # int32, 0: padding
  targets_RxT: np.ndarray  # int32: the next token of the same sequence
  experts_LxRxTxK: np.ndarray | None = None  # int16: which experts a token takes, below 0: it chooses; None: all do


class RLFields(NamedTuple):
  """What the objective needs for each target; 0 where a position has none."""

  logp_infer_RxT: np.ndarray
  logp_old_RxT: np.ndarray
  advantages_RxT: np.ndarray
  mask_RxT: np.ndarray
  weights_RxT: np.ndarray  # what the token's loss is multiplied by; sums the minibatch up to its aggregate
  logp_ref_RxT: np.ndarray | None = None  # where the objective has a KL term


class Gradients(NamedTuple):
  """Sums over the microbatches of one optimizer step."""

  params: Params
  loss: jax.Array  # float32
  counts_LxE: jax.Array  # int32: tokens each expert got


class Programs:
  """All programs of one run; each compiles on first use.

  Args:
    config: the run.
    vocab_mask_V: bool; the ids that may be drawn.  The engine masks the same ones.
    optimizers: of the phases, by name.
    mesh: of the axes in `configs.parallel`; None: one device.
    parallel: the layout on it; None: the actor's.
  """

  def __init__(
    self,
    config: RunConfig,
    vocab_mask_V: np.ndarray,
    optimizers: dict[str, optax.GradientTransformation],
    mesh: Mesh | None = None,
    parallel: ParallelConfig | None = None,
  ):
    self._config = config
    self._model = dataclasses.replace(config.model, parallel=parallel or config.model.parallel)
    self._rules = self._model.parallel.rules
    self._mask_V = jnp.asarray(vocab_mask_V)
    self._updates = {
      phase: Update(optimizer, getattr(config, phase).optimizer) for phase, optimizer in optimizers.items()
    }
    on_mesh = functools.partial(rules.Program, mesh)
    self.sft_gradients = on_mesh(self._sft_gradients, donate_argnums=1)
    self.logprobs = on_mesh(self._logprobs)
    self.rl_gradients = on_mesh(self._rl_gradients, donate_argnums=1, static_argnums=(4, 5))
    self.init_optimizer = on_mesh(self._init_optimizer, static_argnums=1)
    self.apply = on_mesh(self._apply, donate_argnums=(0, 1), static_argnums=3)
    self.balance = on_mesh(self._balance, donate_argnums=0)

  def _accumulate(self, sums: Gradients | None, loss_of, params: Params):
    loss, (counts_LxE, out), grads = gradients(loss_of, params)
    return added(sums, Gradients(grads, loss, counts_LxE)), out

  def _forward(self, params: Params, batch: Tokens) -> ForwardOutput:
    return forward(
      self._model, params, batch.tokens_RxT, batch.positions_RxT, batch.segments_RxT,
      experts_LxBxTxK=batch.experts_LxRxTxK, mtp=False,
    )  # fmt: skip

  def _logprob(self, params: Params, hidden_RxTxD, targets_RxT, temperature):
    return linear_logprob(
      *self._head(params, hidden_RxTxD), self._rows(targets_RxT), temperature=temperature, vocab_mask=self._mask_V
    )

  def _rows(self, field_RxT: jax.Array) -> jax.Array:
    """A field of the microbatch as the loss takes it, [N], cut like the rows."""
    return rules.reshard(jnp.asarray(field_RxT), self._rules, "batch", None).reshape(-1)

  def _head(self, params: Params, hidden_RxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states [N, D] and the output matrix [D, V], cut as they are multiplied: by rows, by vocabulary."""
    kernel_DxV = params["lm_head"]["kernel"].astype(hidden_RxTxD.dtype)
    return hidden_RxTxD.reshape(-1, hidden_RxTxD.shape[-1]), rules.reshard(kernel_DxV, self._rules, None, "vocab")

  def _sft_gradients(self, params: Params, sums: Gradients | None, batch: Tokens, weights_RxT):
    """Adds the gradient of sum(weights * -logp); with an MTP layer also of its loss (bailing_moe_v2.md 3.9).

    sums: of the microbatches before; None: this is the first, and no memory is spent on zeros.
    """

    def loss_of(params):
      out = forward(self._model, params, batch.tokens_RxT, batch.positions_RxT, batch.segments_RxT)
      logp_N = self._logprob(params, out.hidden_BxTxD, batch.targets_RxT, 1.0).logp
      loss = -_weighted_sum(self._rows(weights_RxT), logp_N)
      if out.mtp_hidden_BxTxD is not None:
        # Position t predicts t + 2: the next position's target, where that one belongs to the same sequence.
        targets_RxT, weights = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.targets_RxT, weights_RxT))
        same_RxT = batch.segments_RxT == jnp.pad(batch.segments_RxT[:, 1:], ((0, 0), (0, 1)))
        mtp_logp_N = self._logprob(params, out.mtp_hidden_BxTxD, targets_RxT, 1.0).logp
        loss -= self._config.sft.mtp_loss_scale * _weighted_sum(self._rows(weights * same_RxT), mtp_logp_N)
      return loss, (out.expert_counts_LxE, None)

    return self._accumulate(sums, loss_of, params)[0]

  def _logprobs(self, params: Params, batch: Tokens) -> jax.Array:
    """Log-probs [R, T] of the targets, of the distribution that rollouts are sampled from."""
    out = self._forward(params, batch)
    scored = self._logprob(params, out.hidden_BxTxD, batch.targets_RxT, self._config.rollout.temperature)
    return scored.logp.reshape(batch.tokens_RxT.shape)

  def _rl_gradients(
    self,
    params: Params,
    sums: Gradients | None,
    batch: Tokens,
    fields: RLFields,
    objective: IcePopConfig,
    only_minibatch: bool,
  ):
    """Adds the gradient of the IcePop loss to `sums` as above; returns (sums, (logp, entropy) [R, T]).

    `only_minibatch`: the weights are theta_old still, so that log-probs at theta_old are the ones computed here, and
    the PPO ratio is exactly 1.
    """
    shape = batch.tokens_RxT.shape

    def loss_of(params):
      out = self._forward(params, batch)
      flat = jax.tree.map(self._rows, fields)
      by_sequence = objective.level is RatioLevel.SEQUENCE
      loss, metrics = policy_loss(
        *self._head(params, out.hidden_BxTxD), self._rows(batch.targets_RxT),
        None if only_minibatch else flat.logp_old_RxT, flat.logp_infer_RxT,
        flat.advantages_RxT, flat.mask_RxT, objective, temperature=self._config.rollout.temperature,
        vocab_mask=self._mask_V, weights=flat.weights_RxT, logp_ref_N=flat.logp_ref_RxT,
        segment_ids=self._rows(sequence_numbers(batch.segments_RxT)) if by_sequence else None,
      )  # fmt: skip
      return loss, (out.expert_counts_LxE, (metrics["logp"].reshape(shape), metrics["entropy"].reshape(shape)))

    return self._accumulate(sums, loss_of, params)

  def _init_optimizer(self, params: Params, phase: str) -> Any:
    return self._updates[phase].init(params)

  def abstract_optimizer(self, params: Params, phase: str) -> Any:
    """Shapes and shardings of the state for abstract parameters, for a restore."""
    return self._updates[phase].placed(self.init_optimizer.shapes(params, phase))

  def _apply(self, params: Params, opt_state: Any, grads: Params, phase: str):
    """The optimizer's step; returns (params, opt_state, gradient norm before clipping)."""
    return self._updates[phase].apply(params, opt_state, grads)

  def _balance(self, params: Params, counts_LxE) -> Params:
    """Moves the selection biases by the load rule: SFT only, frozen in RL (papers.md 1.2)."""
    rate = self._config.sft.router_bias_rate

    def move(path, leaf):
      stacked = is_router_bias(path) and path[0].key == "moe_layers"
      return updated_bias(leaf, counts_LxE, rate) if stacked else leaf

    return jax.tree_util.tree_map_with_path(move, params)


def sequence_numbers(segments_RxT: jax.Array | np.ndarray) -> jax.Array:
  """int32 [R, T], from 0 to R * T: no two sequences of the microbatch share one; padding has its neighbours'."""
  R, T = segments_RxT.shape
  return jnp.arange(R)[:, None] * T + jnp.maximum(segments_RxT - 1, 0)


def _weighted_sum(weights_N: jax.Array, logp_N: jax.Array) -> jax.Array:
  """Positions of weight 0 are left out, whatever stands there: a padding id may have log-prob minus infinity."""
  return jnp.sum(weights_N * jnp.where(weights_N > 0, logp_N, 0.0))
