"""Uncompressed zarr leaves, as conversion writes them: a chunk's file is read into a buffer that is used again.

TensorStore reads these files too, but makes new memory for every read, and filling fresh pages takes longer than all
else that conversion does with a byte.
"""

import itertools
import json
import math
import os
import pathlib

import jax
import numpy as np

from ring_jax.checkpoint import bits
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.hf_source import Index
from ring_jax.checkpoint.shards import Scratch
from sharding.fingerprint import host_fingerprint


def is_raw(folder: pathlib.Path) -> bool:
  """Whether the leaf in the folder is of the kind that is read here."""
  try:
    data = json.loads((folder / ".zarray").read_text(encoding="utf-8"))
    return isinstance(data, dict) and (data["compressor"], data["filters"], data["order"]) == (None, None, "C")
  except (OSError, ValueError, KeyError):
    return False


class ChunkCache:
  """The chunks that were used last, a few hundred megabytes of them; a new one takes over an old one's buffer."""

  def __init__(self, limit: int):
    self._limit = limit
    self._held: dict[pathlib.Path, tuple[np.ndarray, Scratch]] = {}  # the least recently used first

  def get(self, path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What the file holds."""
    if path in self._held:
      self._held[path] = self._held.pop(path)
      return self._held[path][0]
    scratch = Scratch()
    size = math.prod(shape) * dtype.itemsize
    while self._held and size + sum(values.nbytes for values, _ in self._held.values()) > self._limit:
      _, scratch = self._held.pop(next(iter(self._held)))
    values = scratch.array(shape, dtype)
    _read(path, values)
    self._held[path] = (values, scratch)
    return values


class RawLeaf:
  """Parts of one leaf."""

  def __init__(self, folder: pathlib.Path, leaf: jax.ShapeDtypeStruct, chunk: tuple[int, ...], cache: ChunkCache):
    self._folder, self._leaf, self._chunk, self._cache = folder, leaf, chunk, cache

  def fill(self, index: Index, out: np.ndarray) -> int:
    """Puts a part of the leaf into `out`; returns the fingerprint of what was read."""
    total = 0
    index = [slice(*one.indices(size)) for one, size in zip(index, self._leaf.shape, strict=True)]
    numbers = [range(one.start // size, -(-one.stop // size)) for one, size in zip(index, self._chunk, strict=True)]
    for number in itertools.product(*numbers):
      chunk = self._cache.get(self._folder / ".".join(map(str, number)), self._chunk, np.dtype(self._leaf.dtype))
      begin = [at * size for at, size in zip(number, self._chunk, strict=True)]
      spans = [
        (max(one.start, start), min(one.stop, start + size))
        for one, start, size in zip(index, begin, self._chunk, strict=True)
      ]
      values = chunk[tuple(slice(a - start, b - start) for (a, b), start in zip(spans, begin, strict=True))]
      total += host_fingerprint(values)
      bits.copy(
        out[tuple(slice(a - one.start, b - one.start) for (a, b), one in zip(spans, index, strict=True))], values
      )
    return total % 2**32


def _read(path: pathlib.Path, out: np.ndarray) -> None:
  try:
    with open(path, "rb", buffering=0) as stream:
      size = os.fstat(stream.fileno()).st_size
      left = memoryview(out.reshape(-1).view(np.uint8))
      while size == out.nbytes and left:
        left = left[stream.readinto(left) or len(left) :]
  except FileNotFoundError:
    raise CheckpointError(f"{path}: does not exist: {path.parent.name} is damaged") from None
  if size != out.nbytes:
    raise CheckpointError(f"{path}: has {size} bytes, must have {out.nbytes}: {path.parent.name} is damaged")
