"""The jitted programs of the scalar model: values, and the gradients of what the critic and the reward model minimise.

    critic          sum_t w_t max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2)    papers.md 2.4
                    w_t = value_coef / 2 / answer tokens of the minibatch
    reward model    sum_p w_p -log sigmoid(score of the chosen - score of the rejected)            Bradley and Terry 1952
                    w_p = 1 / pairs of the step

As in `programs`: microbatches of one fixed shape, whose gradients, losses and tallies simply add up, because weights hold
the denominators of the whole.  Both answers of a pair must lie in one microbatch, in any of its rows
(`data.packing.pack_groups`).  The router's selection biases are left as the actor's training made them.

Dimension key: R rows of a microbatch, T tokens of a row, P pairs of a step, N = R * T.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.schema import ParallelConfig, RunConfig
from ring_jax.model import Params, scalar_values
from ring_jax.train.programs import Tokens
from ring_jax.train.updates import Update, added, gradients
from sharding import rules


class ValueFields(NamedTuple):
  """What the value loss needs at each prediction of an answer token; 0 elsewhere."""

  old_RxT: np.ndarray  # the critic's values before the step
  returns_RxT: np.ndarray
  weights_RxT: np.ndarray  # what the token's loss is multiplied by; above 0 exactly where a token counts
  clip: float  # how far from its old value a value is followed


class PairFields(NamedTuple):
  """The pairs of a microbatch; those of the step that are not in it have weight 0."""

  chosen_P: np.ndarray  # int32: where its last token stands, row * T + column
  rejected_P: np.ndarray
  weights_P: np.ndarray


class ValueTally(NamedTuple):
  """Over the tokens that count."""

  tokens: jax.Array  # int32
  clipped: jax.Array  # int32: tokens whose gradient the clip cuts
  error: jax.Array  # float32: sum of return - value, and of its square
  error_squared: jax.Array
  returns: jax.Array  # float32: the same of the return
  returns_squared: jax.Array


class PairTally(NamedTuple):
  pairs: jax.Array  # int32
  correct: jax.Array  # int32: pairs whose chosen answer scores higher
  margin: jax.Array  # float32: sum of score(chosen) - score(rejected)


class ScalarSums(NamedTuple):
  """Sums over the microbatches of one optimizer step."""

  params: Params
  loss: jax.Array  # float32
  tally: ValueTally | PairTally


class ScalarPrograms:
  """The programs of one scalar model; each compiles on first use.

  Args:
    config: the run.
    optimizer: of this model; one that only judges never uses it.
    mesh: of `parallel`; None: one device.
    parallel: the layout of this model's role; None: the actor's.
  """

  def __init__(
    self, config: RunConfig, optimizer: Update, mesh: Mesh | None = None, parallel: ParallelConfig | None = None
  ):
    self._model = dataclasses.replace(config.model, parallel=parallel or config.model.parallel)
    self._optimizer = optimizer
    self._rules = self._model.parallel.rules
    on_mesh = functools.partial(rules.Program, mesh)
    self.values = on_mesh(self._values)
    self.value_gradients = on_mesh(self._value_gradients, donate_argnums=1)
    self.pair_gradients = on_mesh(self._pair_gradients, donate_argnums=1)
    self.init_optimizer = on_mesh(optimizer.init)
    self.apply = on_mesh(optimizer.apply, donate_argnums=(0, 1))

  def abstract_optimizer(self, params: Params) -> Any:
    """Shapes and shardings of the state for abstract parameters, for a restore."""
    return self._optimizer.placed(self.init_optimizer.shapes(params))

  def _values(self, params: Params, batch: Tokens) -> jax.Array:
    """float32 [R, T]; a reward model's score of a sequence is the value at its last position."""
    return scalar_values(self._model, params, batch.tokens_RxT, batch.positions_RxT, batch.segments_RxT)

  def _value_gradients(self, params: Params, sums: ScalarSums | None, batch: Tokens, fields: ValueFields) -> ScalarSums:
    """Adds the gradient of the critic's loss to `sums`; None: this is the first microbatch."""
    old_RxT, returns_RxT, weights_RxT = (
      rules.reshard(jnp.asarray(field_RxT), self._rules, "batch", None) for field_RxT in fields[:3]
    )
    inside_RxT = weights_RxT > 0
    total = lambda x_RxT: jnp.sum(jnp.where(inside_RxT, x_RxT, 0))  # noqa: E731

    def loss_of(params):
      value_RxT = self._values(params, batch)
      near_RxT = jnp.clip(value_RxT, old_RxT - fields.clip, old_RxT + fields.clip)
      error_RxT, near_error_RxT = returns_RxT - value_RxT, returns_RxT - near_RxT
      # The worse of both; where they are equal the value itself, so that the gradient is not that of the clip's edge.
      clipped_RxT = jnp.square(near_error_RxT) > jnp.square(error_RxT)
      loss = total(weights_RxT * jnp.square(jnp.where(clipped_RxT, near_error_RxT, error_RxT)))
      return loss, ValueTally(
        jnp.sum(inside_RxT.astype(jnp.int32)), total(clipped_RxT.astype(jnp.int32)),
        total(error_RxT), total(jnp.square(error_RxT)), total(returns_RxT), total(jnp.square(returns_RxT)),
      )  # fmt: skip

    loss, tally, grads = gradients(loss_of, params)
    return added(sums, ScalarSums(grads, loss, tally))

  def _pair_gradients(self, params: Params, sums: ScalarSums | None, batch: Tokens, fields: PairFields) -> ScalarSums:
    """Adds the gradient of the reward model's loss to `sums`; None: this is the first microbatch."""
    inside_P = jnp.asarray(fields.weights_P) > 0

    def loss_of(params):
      # The rows of a pair may lie on different devices: every device gets all values, one number a position.
      value_N = rules.reshard(self._values(params, batch), self._rules, None, None).reshape(-1)
      margin_P = value_N[fields.chosen_P] - value_N[fields.rejected_P]
      loss = jnp.sum(fields.weights_P * jax.nn.softplus(-margin_P))
      count = lambda which_P: jnp.sum((which_P & inside_P).astype(jnp.int32))  # noqa: E731
      return loss, PairTally(count(inside_P), count(margin_P > 0), jnp.sum(jnp.where(inside_P, margin_P, 0)))

    loss, tally, grads = gradients(loss_of, params)
    return added(sums, ScalarSums(grads, loss, tally))


def value_metrics(sums: ScalarSums) -> dict[str, float]:
  """Of a minibatch: the loss, the share of tokens whose gradient the clip cuts, and how much of the returns the values
  explain, 1 - Var(return - value) / Var(return); 0 where all returns are equal.
  """
  tally = ValueTally(*map(float, jax.device_get(sums.tally)))
  count = max(tally.tokens, 1.0)
  variance = lambda total, squared: max(squared / count - (total / count) ** 2, 0.0)  # noqa: E731
  left, all_ = variance(tally.error, tally.error_squared), variance(tally.returns, tally.returns_squared)
  return {
    "loss": float(sums.loss),
    "clipped": tally.clipped / count,
    "explained_variance": 1.0 - left / all_ if all_ > 0 else 0.0,
  }


def pair_metrics(sums: ScalarSums) -> dict[str, float]:
  """Of a step: the loss, the share of pairs ranked as they should be, and the mean difference of their scores."""
  tally = PairTally(*map(float, jax.device_get(sums.tally)))
  pairs = max(tally.pairs, 1.0)
  return {"loss": float(sums.loss), "accuracy": tally.correct / pairs, "margin": tally.margin / pairs}
