"""The shards of an array by device, and parts of them by where they stand in the whole array."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from sharding.transfer.plan import Leaf, Piece

_THREADED_BYTES = 4 << 20  # less is done before threads have begun


class Shard(NamedTuple):
  """What one device holds of an array, and which box of it that is, as the array itself says."""

  data: jax.Array
  box_Nx2: np.ndarray

  @property
  def view(self) -> np.ndarray:
    """In host memory: no copy where the device is host memory itself."""
    return np.asarray(self.data)


def by_device(array: jax.Array) -> dict[Any, Shard]:
  """The shards on devices of this process."""
  shards = {}
  for shard in array.addressable_shards:
    cuts = [cut.indices(n)[:2] for cut, n in zip(shard.index, array.shape, strict=True)]
    shards[shard.device] = Shard(shard.data, np.array(cuts, np.int64).reshape(-1, 2))
  return shards


def start(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> tuple[int, ...]:
  """Where a box begins within the shard that holds it."""
  return tuple((box_Nx2[:, 0] - shard_Nx2[:, 0]).tolist())


def within(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> tuple[slice, ...]:
  """A box within the shard that holds it; Ellipsis keeps a view of arrays without dimensions."""
  return (*(slice(a, b) for a, b in (box_Nx2 - shard_Nx2[:, :1]).tolist()), ...)


def words(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Views of both in the widest words that their rows consist of: numpy is quick with these, with bfloat16 it is not."""
  if a.ndim == 0 or a.shape[-1] == 0:
    return a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}")
  runs = all(x.strides[-1] == x.itemsize or x.shape[-1] == 1 for x in (a, b))
  sizes = [a.shape[-1] * a.itemsize, *(step for x in (a, b) for step in (x.ctypes.data, *x.strides[:-1]))]
  fits = (word for word in (8, 4, 2, 1) if word > a.itemsize and runs and all(size % word == 0 for size in sizes))
  word = next(fits, a.itemsize)
  return a.view(f"u{word}"), b.view(f"u{word}")


def inside(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> bool:
  return bool((box_Nx2[:, 0] >= shard_Nx2[:, 0]).all() and (box_Nx2[:, 1] <= shard_Nx2[:, 1]).all())


def text(leaf: Leaf, box_Nx2: np.ndarray) -> str:
  """As in moe.experts.up[0:2, :, 8:16]."""
  cuts = (":" if (a, b) == (0, n) else f"{a}:{b}" for (a, b), n in zip(box_Nx2.tolist(), leaf.shape, strict=True))
  return f"{leaf.name}[{', '.join(cuts)}]" if leaf.shape else leaf.name


def each(function: Callable[..., Any], pieces: Iterable[tuple[Leaf, Piece]], *more: Iterable[Any]) -> list[Any]:
  """`function(leaf, piece, ...)` of all, in threads where it is much."""
  pieces = list(pieces)
  columns = ([leaf for leaf, _ in pieces], [piece for _, piece in pieces], *more)
  size = sum(np.prod(piece.shape, dtype=np.int64) * leaf.dtype.itemsize for leaf, piece in pieces)
  return list((_pool().map if size > _THREADED_BYTES else map)(function, *columns))


@functools.cache
def _pool() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="transfer")
