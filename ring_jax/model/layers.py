"""Small layers: RMSNorm, partial rotary embedding with YaRN, gated MLP (reference notes, bailing_moe_v2.md 3.1, 3.4, 3.5).

Dimension key: B batch rows, T positions, D hidden size, H heads, d head dim, R rotary dims, F MLP width, V vocabulary.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from configs.schema import ModelConfig
from sharding.rules import LogicalAxes, out_sharding, reshard


def normal(
  config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, ...], axes: LogicalAxes, dtype: str | None = None
) -> nnx.Param:
  """A parameter drawn from N(0, initializer_range) (section 3.11); `axes` names its dimensions for the rules."""
  sample = jax.random.normal(rngs.params(), shape, jnp.float32) * config.initializer_range
  return nnx.Param(sample.astype(dtype or config.param_dtype), axes=axes)


def weight(config: ModelConfig, param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
  """A parameter as a matmul takes it: in the activations' dtype, and whole along `embed`.

  It is cast first, so that what is gathered is small.
  """
  axes = [None if name == "embed" else name for name in param.axes]
  return reshard(param[...].astype(dtype), config.parallel.rules, *axes)


def logical_axes(state: nnx.State) -> dict[str, Any]:
  """The tree of parameters with each one's logical axes; stacked layers are cut like single ones."""

  def axes(variable: nnx.Variable) -> LogicalAxes:
    return ("layers",) * (len(variable.shape) - len(variable.axes)) + variable.axes

  leaves = [(path, axes(variable)) for path, variable in nnx.to_flat_state(state)]
  return nnx.traversals.unflatten_mapping(dict(leaves))


class RMSNorm(nnx.Module):
  """y = w * cast(x / rms(x)): the statistics are float32, the cast comes before the weight (section 3.1)."""

  def __init__(self, config: ModelConfig, size: int):
    self.eps = config.rms_norm_eps
    self.scale = nnx.Param(jnp.ones((size,), config.param_dtype), axes=(None,))

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)


class MLP(nnx.Module):
  """down(silu(gate x) * up x), without biases: the dense layers and the shared expert (section 3.5)."""

  def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs):
    self.config = config
    self.gate = normal(config, rngs, (config.hidden_size, width), ("embed", "mlp"))
    self.up = normal(config, rngs, (config.hidden_size, width), ("embed", "mlp"))
    self.down = normal(config, rngs, (width, config.hidden_size), ("mlp", "embed"))

  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    gate_DxF, up_DxF, down_FxD = (weight(self.config, w, x_BxTxD.dtype) for w in (self.gate, self.up, self.down))
    out = out_sharding(self.config.parallel.rules, "batch", None, None)
    hidden_BxTxF = jax.nn.silu(x_BxTxD @ gate_DxF) * (x_BxTxD @ up_DxF)
    return jnp.einsum("btF,FD->btD", hidden_BxTxF, down_FxD, out_sharding=out)


def rotary_tables(config: ModelConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin [B, T, R/2], float32, of every position; YaRN where the config asks for it (section 3.4)."""
  half = config.rotary_dim // 2
  inv_freq = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) * 2 / config.rotary_dim)
  scale = 1.0
  if config.rope_scaling is not None:
    inv_freq, scale = _yarn(config, inv_freq)
  angle_BxTxR = positions_BxT.astype(jnp.float32)[..., None] * inv_freq
  return jnp.cos(angle_BxTxR) * scale, jnp.sin(angle_BxTxR) * scale


def _yarn(config: ModelConfig, inv_freq: jax.Array) -> tuple[jax.Array, float]:
  """Frequencies blended between interpolation (slow ones) and extrapolation (fast ones), and the attention factor."""
  yarn = config.rope_scaling
  dim, theta = config.rotary_dim, config.rope_theta

  def dimension_of(rotations: float) -> float:
    """The dimension that turns this many times within the original context."""
    return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

  low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
  high = min(math.ceil(dimension_of(yarn.beta_slow)), dim - 1)
  span = max(high - low, 0.001)  # the usual guard against an empty ramp
  extrapolate = 1.0 - jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / span, 0.0, 1.0)
  blended = inv_freq / yarn.factor * (1.0 - extrapolate) + inv_freq * extrapolate
  return blended, 0.1 * math.log(yarn.factor) + 1.0


def rotate(x_BxTxHxd: jax.Array, cos_BxTxR: jax.Array, sin_BxTxR: jax.Array) -> jax.Array:
  """Half-rotation of the leading rotary dimensions; the others pass through (section 3.4).  Computed in float32."""
  half = cos_BxTxR.shape[-1]
  x32 = x_BxTxHxd[..., : 2 * half].astype(cos_BxTxR.dtype)
  first, second = x32[..., :half], x32[..., half:]
  cos, sin = cos_BxTxR[:, :, None, :], sin_BxTxR[:, :, None, :]
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([turned.astype(x_BxTxHxd.dtype), x_BxTxHxd[..., 2 * half :]], axis=-1)
