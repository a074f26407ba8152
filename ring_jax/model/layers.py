"""Small layers: RMSNorm, partial rotary embedding with YaRN, gated MLP (reference notes, bailing_moe_v2.md 3.1, 3.4, 3.5).

Dimension key: B batch rows, T positions, D hidden size, H heads, d head dim, R rotary dims, F MLP width, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from configs.schema import ModelConfig


def normal(config: ModelConfig, rngs: nnx.Rngs, *shape: int, dtype: str | None = None) -> nnx.Param:
  """A parameter drawn from N(0, initializer_range) (section 3.11)."""
  sample = jax.random.normal(rngs.params(), shape, jnp.float32) * config.initializer_range
  return nnx.Param(sample.astype(dtype or config.param_dtype))


class RMSNorm(nnx.Module):
  """y = w * cast(x / rms(x)): the statistics are float32, the cast comes before the weight (section 3.1)."""

  def __init__(self, config: ModelConfig, size: int):
    self.eps = config.rms_norm_eps
    self.scale = nnx.Param(jnp.ones((size,), config.param_dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)


class MLP(nnx.Module):
  """down(silu(gate x) * up x), without biases: the dense layers and the shared expert (section 3.5)."""

  def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs):
    self.gate = normal(config, rngs, config.hidden_size, width)
    self.up = normal(config, rngs, config.hidden_size, width)
    self.down = normal(config, rngs, width, config.hidden_size)

  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    dtype = x_BxTxD.dtype
    gate_BxTxF = x_BxTxD @ self.gate[...].astype(dtype)
    up_BxTxF = x_BxTxD @ self.up[...].astype(dtype)
    return (jax.nn.silu(gate_BxTxF) * up_BxTxF) @ self.down[...].astype(dtype)


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
