"""bfloat16 by its bits, for programs on a CPU.

XLA has no bfloat16 arithmetic there.  It widens an operand as a whole: the stack of all layers before a loop that needs a
slice of it in each step, a cache to write one token into it, and narrows that again.  uint16 it takes as it is.
"""

import jax
import jax.numpy as jnp
from jax import lax


def bits(x: jax.Array) -> jax.Array:
  """uint16 of bfloat16."""
  return lax.bitcast_convert_type(x, jnp.uint16)


def values(x: jax.Array) -> jax.Array:
  """The inverse of `bits`."""
  return lax.bitcast_convert_type(x, jnp.bfloat16)


def widened(x: jax.Array) -> jax.Array:
  """bfloat16, or its bits, as float32: the same numbers.  Other types as they are."""
  if x.dtype == jnp.bfloat16:
    x = bits(x)
  return x if x.dtype != jnp.uint16 else lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
