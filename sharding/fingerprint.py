"""Fingerprint of an array: the sum of its bits as unsigned words, modulo 2^32.

It is the same on any sharding, and parts may be summed one by one in any order: what is kept with every leaf of a
checkpoint, and what both ends of a weight transfer are compared by.  Words are as wide as an element, 32 bits at most.
It does not see where in the array a value stands, so that a transfer takes it of every part for itself.
"""

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16}  # by item size; else uint32
_NARROW = ("int4", "uint4", "int2", "uint2")  # several in a byte on some devices


@jax.jit
def fingerprint(leaf: jax.Array) -> jax.Array:
  """Of an array on its devices; uint32."""
  if leaf.dtype == jnp.bool_ or leaf.dtype.name in _NARROW:
    leaf = leaf.astype(jnp.uint8)
  word = _WORDS.get(leaf.dtype.itemsize, np.uint32)
  return jnp.sum(jax.lax.bitcast_convert_type(leaf, word), dtype=jnp.uint32)


def host_fingerprint(values: np.ndarray) -> int:
  """Of an array, or a part of one, in host memory."""
  if values.dtype.name in _NARROW:
    values = values.astype(np.uint8)
  word = _WORDS.get(values.dtype.itemsize, np.uint32)
  words = values.view(word) if values.dtype.itemsize <= 4 else np.ascontiguousarray(values).reshape(-1).view(word)
  return int(words.sum(dtype=np.uint32))
