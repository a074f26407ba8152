"""float32 is multiplied in float32.

Unless told otherwise a GPU rounds float32 factors to TF32 (10 bits) and a TPU to bfloat16 (7 bits), and a run whose config says
float32 has neither the trainer nor the engine that it asked for.  Products of bfloat16 need telling nothing: they are
exact in the float32 that they are summed in.

The gradient of a plain product keeps the product's precision.  What is written by hand for `jax.custom_vjp`, either pass, may
be traced later than the op is called, as under `jax.checkpoint`, and has to say it itself.
"""

import contextlib

import jax
import jax.numpy as jnp


def full_products(dtype: jnp.dtype | str) -> contextlib.AbstractContextManager:
  """What is traced inside, of operands of this dtype, multiplies them unrounded."""
  # Not for bfloat16: Pallas kernels for a TPU do not compile with such products at the highest precision.
  return jax.default_matmul_precision("highest") if jnp.dtype(dtype) == jnp.float32 else contextlib.nullcontext()
