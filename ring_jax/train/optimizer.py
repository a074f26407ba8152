"""AdamW with warm-up, as Ring-1T trains (papers.md 1.2): global-norm clipping, then Adam, then decoupled weight decay."""

from typing import Any

import jax
import optax

from configs.schema import OptimizerConfig, Schedule


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """The rate at each step (counted from 0): a linear warm-up that never is 0, then constant or cosine to 0."""

  def schedule(step):
    warmup = jax.numpy.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.schedule is Schedule.CONSTANT:
      return config.learning_rate * warmup
    done = jax.numpy.clip((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
    return config.learning_rate * warmup * 0.5 * (1 + jax.numpy.cos(jax.numpy.pi * done))

  return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
  """The transformation for a phase of `total_steps` steps.

  Matrices are decayed, the scalar model's head kernel among them.  Norm scales are not, and neither are biases: the
  head's, which is the mean of what it predicts, and the router's, which no gradient reaches, so that an update of it is
  exactly zero.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.grad_clip),
    optax.adamw(
      learning_rate(config, total_steps),
      b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=_decayed,
    ),
  )  # fmt: skip


def _decayed(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
