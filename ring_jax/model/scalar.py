"""The scalar model: the Ring trunk and a head of one number a position.  Critic and reward model are both this.

    {"trunk": the model's parameters but lm_head and mtp, "head": {"kernel": [D], "bias": []}}
    value_t = hidden_t . kernel + bias         float32, hidden_t after the final norm

A critic's value at position t is that of the state which predicts token t + 1; a reward model's score of an answer is its
value at the answer's last token (papers.md 2.4).

What each starts from: a reward model from the actor's trunk, which already reads its answers, and a critic from the
trained reward model, whose scores are the returns that it shall predict.  A new head is zero: nothing is known yet, so
every preference is even (a loss of exactly log 2) and every value 0, and no random direction of the trunk must first be
unlearned.  The head's gradient is not zero, so that the trunk learns from the second step on.  The head is float32 whatever
the trunk is: it is D + 1 numbers, and small steps must not round away.

Dimension key: B rows, T positions, D hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import ModelConfig
from ring_jax.model.api import Params, abstract_params, forward, init_params

_ACTOR_ONLY = ("lm_head", "mtp")


def init_scalar(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> Params:
  """A random trunk, the one that `init_params` gives an actor of this seed, and a head of zeros."""
  return jax.jit(_with_head)(init_params(_without_mtp(config), seed, mesh))


def scalar_from_actor(params: Params) -> Params:
  """The actor's trunk, copied so that either can be donated, and a head of zeros; laid out as the actor is."""
  return jax.jit(lambda trunk: _with_head(jax.tree.map(jnp.copy, trunk)))(_trunk(params))


def abstract_scalar(config: ModelConfig, mesh: Mesh | None = None) -> Params:
  """The tree as `jax.ShapeDtypeStruct`s; with a mesh, laid out by `config.parallel.rules`, the head whole everywhere."""
  whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  head = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
    for name, shape in (("kernel", (config.hidden_size,)), ("bias", ()))
  }
  return {"trunk": _trunk(abstract_params(config, mesh)), "head": head}


def scalar_shardings(config: ModelConfig, mesh: Mesh) -> Params:
  """A `NamedSharding` for every parameter."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract_scalar(config, mesh))


def scalar_values(
  config: ModelConfig,
  params: Params,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array | None = None,
  segment_ids_BxT: jax.Array | None = None,
) -> jax.Array:
  """float32 [B, T]: the value at every position of packed rows; where padding is, it means nothing but is finite.

  Args: as of `forward`.
  """
  hidden_BxTxD = forward(_without_mtp(config), params["trunk"], tokens_BxT, positions_BxT, segment_ids_BxT).hidden_BxTxD
  # Products and a sum, not a matmul: on a TPU a matmul of float32 multiplies in bfloat16 unless told otherwise.
  value_BxT = jnp.sum(hidden_BxTxD.astype(jnp.float32) * params["head"]["kernel"], axis=-1)
  return value_BxT + params["head"]["bias"]


def _trunk(params: Params) -> Params:
  return {name: part for name, part in params.items() if name not in _ACTOR_ONLY}


def _without_mtp(config: ModelConfig) -> ModelConfig:
  return dataclasses.replace(config, num_nextn_predict_layers=0)


def _with_head(params: Params) -> Params:
  scale_D = params["final_norm"]["scale"]  # whole on every device, as the head shall be
  head = {"kernel": jnp.zeros_like(scale_D, jnp.float32), "bias": jnp.zeros_like(scale_D.sum(), jnp.float32)}
  return {"trunk": _trunk(params), "head": head}
