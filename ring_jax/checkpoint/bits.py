"""Bit-level work on host arrays that conversion does on every byte: finite checks, transposing copies.

All of it goes through small pieces that stay in the processor's cache and through buffers that are used again: a fresh
page costs more than the work on it.
"""

import jax.numpy as jnp
import numpy as np

_EXPONENTS = {  # all exponent bits set: an infinity or NaN
  "bfloat16": (np.uint16, 0x7F80),
  "float16": (np.uint16, 0x7C00),
  "float32": (np.uint32, 0x7F80_0000),
  "float64": (np.uint64, 0x7FF0_0000_0000_0000),
}
_PIECE = 1 << 16  # elements
_TILE = 16  # elements; a tile's rows are then half a cache line or more


def all_finite(values: np.ndarray) -> bool:
  """Whether a floating-point array holds neither infinity nor NaN."""
  word, exponent = _EXPONENTS[values.dtype.name]
  words = np.ascontiguousarray(values).reshape(-1).view(word)
  masked = np.empty(min(_PIECE, words.size), word)
  for start in range(0, words.size, _PIECE):
    piece = words[start : start + _PIECE]
    if np.bitwise_and(piece, word(exponent), out=masked[: piece.size]).max() == exponent:
      return False
  return True


def copy(out: np.ndarray, values: np.ndarray) -> None:
  """`out[...] = values`, with a cast where the dtypes differ, in tiles where one is the transpose of the other."""
  axes = [axis for axis in range(out.ndim) if out.shape[axis] > 1]
  fast = min(axes, key=lambda axis: out.strides[axis], default=None)
  if fast is None or values.strides[fast] == values.itemsize:
    out[...] = values
    return
  at = (slice(None),) * fast
  for start in range(0, out.shape[fast], _TILE):
    part = (*at, slice(start, start + _TILE))
    out[part] = values[part]


def narrows(held: np.dtype, wanted: np.dtype) -> bool:
  """Whether values of `held` may be rounded when they become `wanted`."""
  return jnp.promote_types(held, wanted) != wanted
