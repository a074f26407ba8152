"""The shards of an array by device, and parts of them by where they stand in the whole array."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sharding.transfer.plan import Leaf, Piece

_THREADED_BYTES = 4 << 20  # less is done before threads have begun


def by_device(array: jax.Array) -> dict[Any, jax.Array]:
  """What each device of this process holds."""
  return {shard.device: shard.data for shard in array.addressable_shards}


def views(array: jax.Array) -> dict[Any, np.ndarray]:
  """The same in host memory: no copy where the devices are host memory themselves."""
  return {device: np.asarray(data) for device, data in by_device(array).items()}


def boxes(leaf: Leaf) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
  """The box that each device holds at the source, and at the target."""
  source, target = (dict(zip(side.device_S.tolist(), side.box_SxNx2, strict=True)) for side in leaf.sides)
  return source, target


def start(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> tuple[int, ...]:
  """Where a box begins within the shard that holds it."""
  return tuple((box_Nx2[:, 0] - shard_Nx2[:, 0]).tolist())


def within(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> tuple[slice, ...]:
  """A box within the shard that holds it; Ellipsis keeps a view of arrays without dimensions."""
  return (*(slice(a, b) for a, b in (box_Nx2 - shard_Nx2[:, :1]).tolist()), ...)


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
