"""The mixture of experts: routing, experts, combine, plus the unscaled shared expert (bailing_moe_v2.md 3.7).

Dropless: every (token, expert) pair is computed.  Pairs are sorted by expert, so that one expert's rows lie together
and `grouped_matmul` does no more than the ideal work.  Padding tokens belong to no expert and cost nothing.  How tokens
meet experts that other devices hold is in `exchange.py`.

On a mesh the whole layer is one manual region (architecture decision 3): weights are gathered along `fsdp` once, tokens
travel along `expert`, and the parts that the devices along `tensor` computed are summed at the end.

Dimension key: N tokens, K experts a token, M rows, D hidden, E experts (e: this device's), F expert width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from configs.schema import ModelConfig
from kernels.grouped_matmul import gated_experts, grouped_matmul
from ring_jax.model.exchange import Pairs, exchange
from ring_jax.model.layers import MLP, logical_axes, normal
from ring_jax.model.router import route
from sharding import rules


class RouterBias(nnx.Variable):
  """The selection bias: moved by the load rule in SFT, frozen in RL, never by a gradient."""


class Router(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    shape = (config.hidden_size, config.num_experts)
    self.kernel = normal(config, rngs, shape, ("embed", None), dtype="float32")
    self.bias = RouterBias(jnp.zeros((config.num_experts,), jnp.float32), axes=(None,))


class Experts(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
    # Index 0: gate, 1: up; one matmul for both.
    self.gate_up = normal(config, rngs, (E, D, 2, F), ("experts", "expert_embed", None, "expert_mlp"))
    self.down = normal(config, rngs, (E, F, D), ("experts", "expert_mlp", "expert_embed"))


class Routed(NamedTuple):
  """What became of a layer's tokens."""

  counts_E: jax.Array  # int32: tokens each expert got, padding not counted
  ids_BxTxK: jax.Array | None  # int32: the experts of each token, where they are recorded


class MoE(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.router = Router(config, rngs)
    self.experts = Experts(config, rngs)
    if config.num_shared_experts:
      self.shared = MLP(config, config.moe_intermediate_size * config.num_shared_experts, rngs)

  def __call__(
    self,
    x_BxTxD: jax.Array,
    valid_BxT: jax.Array,
    given_BxTxK: jax.Array | None = None,
    *,
    index: jax.Array | None = None,
    record: bool = False,
  ) -> tuple[jax.Array, Routed]:
    """Returns (output [B, T, D], what became of the tokens).

    Args:
      given_BxTxK: see `route`.
      index: None, or the layer whose experts are meant where the module holds those of all layers (a decode step).
      record: return each token's experts.
    """
    weights, axes = nnx.to_pure_dict(nnx.state(self)), logical_axes(nnx.state(self))
    rows = ("batch", None, None)
    tokens = (x_BxTxD, valid_BxT) if given_BxTxK is None else (x_BxTxD, valid_BxT, given_BxTxK)
    layer = rules.manual(
      lambda *arguments: _layer(self.config, axes, record, *arguments),
      self.config.parallel.rules,
      (axes, (), *(rows, ("batch", None), rows)[: len(tokens)]),
      (rows, Routed((None,), rows if record else None)),
    )
    return layer(weights, index, *tokens)


def _layer(config: ModelConfig, axes, record: bool, weights, index: jax.Array | None, x_BxTxD, *rest_BxT: jax.Array):
  """One device's part: its tokens, its experts."""
  B, T, D = x_BxTxD.shape
  dtype, parallel = x_BxTxD.dtype, config.parallel
  router = jax.tree.map(lambda w, a: _whole(config, w, a), weights["router"], axes["router"])
  whole = lambda name: jax.tree.map(lambda w, a: _whole(config, w.astype(dtype), a), weights[name], axes[name])  # noqa: E731
  shared = whole("shared") if "shared" in weights else None
  if index is None:
    experts = functools.partial(_experts, whole("experts"))
  else:
    experts = functools.partial(_stacked_experts, config, weights["experts"], axes["experts"], index)

  def tokens(x_NxD: jax.Array, valid_N: jax.Array, given_NxK: jax.Array | None = None) -> tuple[jax.Array, Routed]:
    routing = route(x_NxD, router["kernel"], router["bias"], config, given_NxK)
    ids_NxK = jnp.where(valid_N[:, None], routing.ids_NxK, config.num_experts)
    counts_E = (ids_NxK[..., None] == jnp.arange(config.num_experts)).sum(axis=(0, 1), dtype=jnp.int32)
    pairs = Pairs(x_NxD, ids_NxK, routing.weights_NxK)
    out_NxD = exchange(pairs, config.num_experts, experts, parallel).astype(dtype)
    if shared is not None:
      out_NxD = out_NxD + _gated(shared, x_NxD)
    return out_NxD, Routed(counts_E, routing.ids_NxK if record else None)

  flat = [x.reshape(B * T, *x.shape[2:]) for x in (x_BxTxD, *rest_BxT)]
  out_NxD, routed = _in_chunks(tokens, parallel.moe_chunk, *flat)
  out_NxD = rules.psum(out_NxD, parallel.rules.expert_mlp)
  ids_BxTxK = routed.ids_BxTxK.reshape(B, T, -1) if record else None
  return out_NxD.reshape(B, T, D), Routed(rules.psum(routed.counts_E, parallel.rules.batch), ids_BxTxK)


def _whole(config: ModelConfig, weight: jax.Array, axes: rules.LogicalAxes) -> jax.Array:
  """A weight joined along its hidden width; its gradient is summed and cut again in one reduce-scatter."""
  for name in ("embed", "expert_embed"):
    if name in axes:
      weight = rules.all_gather(weight, getattr(config.parallel.rules, name), axes.index(name))
  return weight


def _experts(weights, rows_MxD: jax.Array, sizes_e: jax.Array) -> jax.Array:
  gate_up_exDxF2 = weights["gate_up"].reshape(*weights["gate_up"].shape[:2], -1)
  gate_MxF, up_MxF = jnp.split(grouped_matmul(rows_MxD, gate_up_exDxF2, sizes_e), 2, axis=-1)
  return grouped_matmul(jax.nn.silu(gate_MxF) * up_MxF, weights["down"], sizes_e)


def _stacked_experts(config: ModelConfig, weights, axes, index: jax.Array, rows_MxD: jax.Array, sizes_e: jax.Array):
  """The same, with the experts of all layers.  Only what must be joined or cast is cut out of the stack first."""
  if rules.axis_size(config.parallel.rules.expert_embed) > 1 or weights["down"].dtype != rows_MxD.dtype:
    one = lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False).astype(rows_MxD.dtype)  # noqa: E731
    weights = jax.tree.map(lambda stack, a: _whole(config, one(stack), a[1:])[None], weights, axes)
    index = jnp.zeros_like(index)
  return gated_experts(rows_MxD, weights["gate_up"], weights["down"], sizes_e, index)


def _gated(weights, x_NxD: jax.Array) -> jax.Array:
  return (jax.nn.silu(x_NxD @ weights["gate"]) * (x_NxD @ weights["up"])) @ weights["down"]


def _in_chunks(function, size: int, x_NxD: jax.Array, *rest_N: jax.Array) -> tuple[jax.Array, Routed]:
  """function over the tokens in chunks of at most `size`, one after the other, so that its buffers are that much smaller.

  A chunk is computed again in the backward pass.  Under remat=full that costs nothing: the layer would be computed
  again anyway, and there the MoE's own output is not needed.
  """
  num_tokens = x_NxD.shape[0]
  if size == 0 or num_tokens <= size:
    return function(x_NxD, *rest_N)
  chunks = -(-num_tokens // size)
  size = -(-num_tokens // chunks)  # of equal size, as far as possible

  def cut(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, chunks * size - num_tokens), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(chunks, size, *x.shape[1:])

  joined = lambda x_CxSx: x_CxSx.reshape(-1, x_CxSx.shape[-1])[:num_tokens]  # noqa: E731
  parts = tuple(cut(x) for x in (x_NxD, *rest_N))
  out_CxSxD, routed = jax.lax.map(jax.checkpoint(lambda part: function(*part)), parts)
  return joined(out_CxSxD), Routed(routed.counts_E.sum(axis=0), jax.tree.map(joined, routed.ids_BxTxK))
