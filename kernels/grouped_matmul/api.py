"""The grouped matmul: out[m] = lhs[m] @ rhs[group of m], rows sorted by group (architecture decision 9).

Dimension key: M rows, E groups, K inner, N outer.
"""

import jax
import jax.numpy as jnp

from configs.schema import Enum
from kernels.choice import choose
from kernels.grouped_matmul.blocked import grouped_matmul_blocked
from kernels.grouped_matmul.reference import grouped_matmul_reference


class Implementation(Enum):
  REFERENCE = "reference"  # every row times every group's matrix, masked: E times the work, obviously right
  BLOCKED = "blocked"  # blocks of rows of one group, in XLA: CPU and GPU


_FUNCTIONS = {
  Implementation.REFERENCE: grouped_matmul_reference,
  Implementation.BLOCKED: grouped_matmul_blocked,
}


def grouped_matmul(
  lhs_MxK: jax.Array,
  rhs_ExKxN: jax.Array,
  group_sizes_E: jax.Array,
  *,
  implementation: Implementation | str | None = None,
) -> jax.Array:
  """Multiplies each group of rows with the group's own matrix; differentiable in lhs and rhs.

  Args:
    lhs_MxK: rows sorted by group, floating point.
    rhs_ExKxN: one matrix a group, same dtype as lhs.
    group_sizes_E: integers >= 0, rows of each group in order.  Their sum may be less than M: the rows beyond belong to
      no group, are zero in the result and get zero gradient.  A sum above M is not allowed (and cannot be checked).
    implementation: None means `blocked`.

  Returns:
    out_MxN in the dtype of lhs; products are summed in float32 (float64 for float64 arguments).

  Raises:
    ConfigError: unknown implementation.
    ValueError: shapes or dtypes that do not fit together.
  """
  chosen = choose(implementation, Implementation.BLOCKED, "grouped_matmul")
  if lhs_MxK.ndim != 2 or rhs_ExKxN.ndim != 3 or lhs_MxK.shape[1] != rhs_ExKxN.shape[1]:
    raise ValueError(f"grouped_matmul: lhs {lhs_MxK.shape} and rhs {rhs_ExKxN.shape}: expected [M, K] and [E, K, N]")
  if group_sizes_E.shape != rhs_ExKxN.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(
      f"grouped_matmul: group_sizes {group_sizes_E.dtype}{list(group_sizes_E.shape)}: expected"
      f" {rhs_ExKxN.shape[0]} integers, one a group of rhs"
    )
  if lhs_MxK.dtype != rhs_ExKxN.dtype or not jnp.issubdtype(lhs_MxK.dtype, jnp.floating):
    raise ValueError(
      f"grouped_matmul: lhs is {lhs_MxK.dtype} and rhs {rhs_ExKxN.dtype}: expected one floating dtype for both"
    )
  return _FUNCTIONS[chosen](lhs_MxK, rhs_ExKxN, group_sizes_E)
