"""What the Triton kernels, written in Pallas, share.  Pallas is imported late: a process without a GPU needs none of it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
  """A product inside of a kernel, float32; of float32 factors unrounded (precision.py)."""
  from jax.experimental.pallas import triton

  return triton.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, **transposed)


def compiler_params(warps: int, stages: int) -> Any:
  from jax.experimental.pallas import triton

  return triton.CompilerParams(num_warps=warps, num_stages=stages)
