"""The model as functions over a parameter tree: nested dicts of arrays, layers stacked on axis 0.

    embed.embedding [V, D]     final_norm.scale [D]     lm_head.kernel [D, V]
    dense_layers, moe_layers:  input_norm, attention.{wq, wk, wv, wo, q_norm, k_norm}, post_norm, and
                               mlp.{gate, up, down}  or  moe.{router.{kernel, bias}, experts.{gate_up, down}, shared}
    mtp:                       enorm, hnorm, eh_proj, block (one MoE layer, not stacked), final_norm

A part whose count is 0 is absent.  Dimension key: B rows or slots, T positions, W pages of a slot, D hidden, L MoE layers,
K experts a token, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from configs.schema import ModelConfig, ParallelConfig
from kernels.attention import PagedCache
from kernels.precision import full_products
from ring_jax.model.attention import KVCache
from ring_jax.model.layers import logical_axes
from ring_jax.model.transformer import ForwardOutput, RingModel
from sharding import rules

Params = dict[str, Any]


@functools.cache
def _structure(config: ModelConfig):
  """Graph definition and abstract state of the model; nothing is allocated."""
  return nnx.split(nnx.eval_shape(lambda: RingModel(config, nnx.Rngs(params=0))))


def _abstract(config: ModelConfig):
  """Abstract state, which is the same on any mesh: whoever compares layouts traces it once."""
  return _structure(dataclasses.replace(config, parallel=ParallelConfig()))[1]


def _merge(config: ModelConfig, params: Params) -> RingModel:
  graph, abstract = _structure(config)
  state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the cached one must stay abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct`s; with a mesh, laid out by `config.parallel.rules`.

  Init, restore, conversion and hand-over take their shardings from this tree.
  """
  abstract = nnx.to_pure_dict(_abstract(config))
  if mesh is None:
    return abstract
  placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
  return jax.tree.map(placed, abstract, param_shardings(config, mesh))


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
  """A `NamedSharding` for every parameter."""
  axes = logical_axes(_abstract(config))
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  return jax.tree.map(lambda leaf: rules.named(mesh, config.parallel.rules, leaf), axes, is_leaf=is_axes)


def num_params(config: ModelConfig) -> int:
  """Parameters of the model, selection biases included."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def init_params(config: ModelConfig, seed: int, mesh: Mesh | None = None) -> Params:
  """Random parameters: N(0, initializer_range) weights, norms 1, selection biases 0.

  With a mesh every device makes its own parts only; the values are the same on any mesh.
  """

  def init():
    return nnx.to_pure_dict(nnx.state(RingModel(config, nnx.Rngs(params=seed))))

  return jax.jit(init, out_shardings=None if mesh is None else param_shardings(config, mesh))()


def is_router_bias(path: tuple) -> bool:
  """Whether a key path (as of `jax.tree_util`) names a selection bias, which no gradient may move."""
  names = [getattr(key, "key", key) for key in path]
  return names[-2:] == ["router", "bias"]


def forward(
  config: ModelConfig,
  params: Params,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array | None = None,
  segment_ids_BxT: jax.Array | None = None,
  *,
  experts_LxBxTxK: jax.Array | None = None,
  return_kv: bool = False,
  return_experts: bool = False,
  mtp: bool = True,
) -> ForwardOutput:
  """Runs the model on rows of packed sequences.

  Args:
    tokens_BxT: int token ids.
    positions_BxT: positions within each sequence; default: 0, 1, ... along the row.
    segment_ids_BxT: which sequence of its row a token belongs to; 0 is padding.  Default: one sequence a row.
    experts_LxBxTxK: integers: the experts that each token takes in each MoE layer (not the MTP layer's), instead of its
      own choice; below 0: its own.
    return_kv: also return keys and values of all layers (a prefill).
    return_experts: also return each token's experts in each MoE layer.
    mtp: whether to run the MTP layer where the model has one.
  """
  if positions_BxT is None:
    positions_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
  if segment_ids_BxT is None:
    segment_ids_BxT = jnp.ones(tokens_BxT.shape, jnp.int32)
  with full_products(config.dtype):
    return _merge(config, params)(
      tokens_BxT, positions_BxT, segment_ids_BxT, experts_LxBxTxK,
      return_kv=return_kv, return_experts=return_experts, mtp=mtp,
    )  # fmt: skip


def decode_step(
  config: ModelConfig,
  params: Params,
  tokens_B: jax.Array,
  positions_B: jax.Array,
  active_B: jax.Array,
  cache: KVCache,
  page_table_BxW: jax.Array | None = None,
  *,
  return_experts: bool = False,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, jax.Array]:
  """One token for every slot: writes its keys and values at `positions_B`; returns (hidden [B, D], cache), and where asked
  for the token's experts in each MoE layer, int32 [L, B, K].

  Slots that are not active cost no expert work; what they return is meaningless but finite.

  Args:
    page_table_BxW: int32, of a cache in pages; on a mesh, each device's slots name that device's pages from 0.
  """
  with full_products(config.dtype):
    model = _merge(config, params)
    return model.decode(tokens_B, positions_B, active_B, cache, page_table_BxW, return_experts=return_experts)


def extend(
  config: ModelConfig,
  params: Params,
  tokens_BxT: jax.Array,
  starts_B: jax.Array,
  counts_B: jax.Array,
  cache: PagedCache,
  page_table_BxW: jax.Array,
) -> PagedCache:
  """A prefill whose beginning is in the cache: keys and values of the first `counts_B` of T tokens a row, from position
  `starts_B` on, over all that stands before them.

  Args:
    page_table_BxW: int32, of each row; as in `decode_step`.
  """
  with full_products(config.dtype):
    return _merge(config, params).extend(tokens_BxT, starts_B, counts_B, cache, page_table_BxW)
