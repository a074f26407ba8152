"""The Ling 2.0 / Ring 2.0 mixture-of-experts model."""

from ring_jax.model.api import (
  Params,
  abstract_params,
  decode_step,
  extend,
  forward,
  init_params,
  is_router_bias,
  num_params,
  param_shardings,
)
from ring_jax.model.attention import KVCache, cache_axes, init_cache
from ring_jax.model.router import updated_bias
from ring_jax.model.scalar import abstract_scalar, init_scalar, scalar_from_actor, scalar_shardings, scalar_values
from ring_jax.model.transformer import ForwardOutput

__all__ = [
  "ForwardOutput",
  "KVCache",
  "Params",
  "abstract_params",
  "abstract_scalar",
  "cache_axes",
  "decode_step",
  "extend",
  "forward",
  "init_cache",
  "init_params",
  "init_scalar",
  "is_router_bias",
  "num_params",
  "param_shardings",
  "scalar_from_actor",
  "scalar_shardings",
  "scalar_values",
  "updated_bias",
]
