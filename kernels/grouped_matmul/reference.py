"""The grouped matmul by definition: every row times every matrix, and a one-hot mask that keeps the row's own."""

import jax
import jax.numpy as jnp


def grouped_matmul_reference(lhs_MxK: jax.Array, rhs_ExKxN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
  num_groups = rhs_ExKxN.shape[0]
  dtype = jnp.promote_types(lhs_MxK.dtype, jnp.float32)
  # A row beyond the last group gets the group number E, whose one-hot row is all zeros.
  group_M = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(lhs_MxK.shape[0]), side="right")
  mine_MxE = jax.nn.one_hot(group_M, num_groups, dtype=dtype)
  every_MxExN = jnp.einsum("mk,ekn->men", lhs_MxK.astype(dtype), rhs_ExKxN.astype(dtype))
  return jnp.einsum("men,me->mn", every_MxExN, mine_MxE).astype(lhs_MxK.dtype)
