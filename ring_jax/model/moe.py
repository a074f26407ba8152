"""The mixture of experts: dispatch, grouped matmuls, combine, plus the unscaled shared expert (bailing_moe_v2.md 3.7).

Dropless: every (token, expert) pair is computed.  Pairs are sorted by expert, so that one expert's rows lie together
and `grouped_matmul` does no more than the ideal work.  Padding tokens belong to no expert: they sort behind all groups
and cost nothing.

Dimension key: N tokens, K experts a token, M = N * K pairs, D hidden, E experts, F expert width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from configs.schema import ModelConfig
from kernels.grouped_matmul import grouped_matmul
from ring_jax.model.layers import MLP, normal
from ring_jax.model.router import route


class RouterBias(nnx.Variable):
  """The selection bias: moved by the load rule in SFT, frozen in RL, never by a gradient."""


class Router(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.kernel = normal(config, rngs, config.hidden_size, config.num_experts, dtype="float32")
    self.bias = RouterBias(jnp.zeros((config.num_experts,), jnp.float32))


class Experts(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
    self.gate_up = normal(config, rngs, E, D, 2, F)  # index 0: gate, 1: up; one matmul for both
    self.down = normal(config, rngs, E, F, D)

  def __call__(self, rows_MxD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    dtype = rows_MxD.dtype
    gate_up_ExDxF2 = self.gate_up[...].astype(dtype).reshape(*self.gate_up.shape[:2], -1)
    gate_MxF, up_MxF = jnp.split(grouped_matmul(rows_MxD, gate_up_ExDxF2, group_sizes_E), 2, axis=-1)
    return grouped_matmul(jax.nn.silu(gate_MxF) * up_MxF, self.down[...].astype(dtype), group_sizes_E)


class MoE(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.router = Router(config, rngs)
    self.experts = Experts(config, rngs)
    if config.num_shared_experts:
      self.shared = MLP(config, config.moe_intermediate_size * config.num_shared_experts, rngs)

  def __call__(self, x_BxTxD: jax.Array, valid_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (output [B, T, D], tokens each expert got [E], int32, padding not counted)."""
    B, T, D = x_BxTxD.shape
    E, K = self.config.num_experts, self.config.num_experts_per_tok
    x_NxD = x_BxTxD.reshape(B * T, D)
    routing = route(x_NxD, self.router.kernel[...], self.router.bias[...], self.config)
    experts_M = jnp.where(valid_BxT.reshape(-1, 1), routing.ids_NxK, E).reshape(-1)
    order_M = jnp.argsort(experts_M, stable=True)
    rank_M = jnp.argsort(order_M)  # where each pair went
    group_sizes_E = jnp.bincount(experts_M, length=E + 1)[:E].astype(jnp.int32)

    rows_MxD = self.experts(_dispatch(x_NxD, order_M, rank_M, K), group_sizes_E)
    pairs_NxKxD = _permute(rows_MxD, rank_M, order_M).reshape(B * T, K, D)
    # The sum over experts is float32, in the fixed order of the top-k.
    wide = routing.weights_NxK.dtype
    out_NxD = jnp.einsum("nk,nkD->nD", routing.weights_NxK, pairs_NxKxD.astype(wide)).astype(x_BxTxD.dtype)
    out_BxTxD = out_NxD.reshape(B, T, D)
    if self.config.num_shared_experts:
      out_BxTxD = out_BxTxD + self.shared(x_BxTxD)
    return out_BxTxD, group_sizes_E


# Gathers whose backward pass is a gather too: XLA's own is a scatter-add, which is slow and sums in no fixed order.


@jax.custom_vjp
def _permute(rows_MxD, index_M, inverse_M):
  return rows_MxD[index_M]


_permute.defvjp(lambda rows, index, inverse: (rows[index], inverse), lambda inverse, grad: (grad[inverse], None, None))


def _dispatch(x_NxD, order_M, rank_M, k):
  """Row m is the token of the m-th pair in expert order."""

  @jax.custom_vjp
  def gather(x, order, rank):
    return x[order // k]

  def forward(x, order, rank):
    return x[order // k], rank

  def backward(rank, grad_MxD):
    return grad_MxD[rank].reshape(-1, k, grad_MxD.shape[-1]).sum(axis=1), None, None

  gather.defvjp(forward, backward)
  return gather(x_NxD, order_M, rank_M)
