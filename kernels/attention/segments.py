"""Which blocks of an attention matrix hold anything: packed rows make most of them empty.

A block of queries and a block of keys can be left out where no key lies before or at a query, or where the two have no
segment in common.  Segments are compared by the range of numbers in a block, which is exact for rows packed one segment
after the other (numbers never fall along a row) and, for any other row, errs towards computing a block in vain.

Dimension key: T positions, I query blocks, J key blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np

PADDING = 0  # the segment number of positions that hold nothing


def blocks_needed(segment_ids_T: jax.Array, query_block: int, key_block: int) -> jax.Array:
  """bool [I, J]; both blocks divide T.  The diagonal is always in, so that every query meets a key: itself."""
  low_I, high_I = _range(segment_ids_T, query_block)
  low_J, high_J = _range(segment_ids_T, key_block)
  common_IxJ = (low_I[:, None] <= high_J) & (low_J <= high_I[:, None])
  first_I = np.arange(len(low_I))[:, None] * query_block
  first_J = np.arange(len(low_J)) * key_block
  causal_IxJ = first_J < first_I + query_block
  diagonal_IxJ = causal_IxJ & (first_I < first_J + key_block)
  return diagonal_IxJ | (causal_IxJ & common_IxJ)


def _range(segment_ids_T: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """The smallest and the largest segment in each block; an empty range where there is only padding."""
  ids_NxB = segment_ids_T.reshape(-1, block)
  low_NxB = jnp.where(ids_NxB == PADDING, jnp.iinfo(ids_NxB.dtype).max, ids_NxB)
  return low_NxB.min(axis=1), ids_NxB.max(axis=1)
