"""The shards of an array by device, and parts of them by where they stand in the whole array."""

import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from sharding.transfer.plan import Leaf

_THREADED_BYTES = 4 << 20  # less is done before threads have begun
_BLOCK_BYTES = 128 << 10  # two blocks and what they are gathered in stay in a core's second-level cache

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


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
  return {shard.device: Shard(shard.data, _box(shard.index, array.shape)) for shard in array.addressable_shards}


def boxes(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[Any, np.ndarray]:
  """What each device holds of an array that is laid out so."""
  return {device: _box(cuts, shape) for device, cuts in sharding.devices_indices_map(shape).items()}


def _box(cuts: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
  return np.array([cut.indices(n)[:2] for cut, n in zip(cuts, shape, strict=True)], np.int64).reshape(-1, 2)


def assembled(leaf: Leaf, parts: Mapping[int, jax.Array]) -> jax.Array:
  """The tensor at the target, of its shards by device."""
  order = [parts[device] for device in leaf.target.device_S.tolist()]
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, order)


def start(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> tuple[int, ...]:
  """Where a box begins within the shard that holds it."""
  return tuple((box_Nx2[:, 0] - shard_Nx2[:, 0]).tolist())


def within(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> tuple[slice, ...]:
  """A box within the shard that holds it; Ellipsis keeps a view of arrays without dimensions."""
  return (*(slice(a, b) for a, b in (box_Nx2 - shard_Nx2[:, :1]).tolist()), ...)


def words(*views: np.ndarray) -> list[np.ndarray]:
  """All in the widest words that their rows consist of: numpy is quick with these, with bfloat16 it is not."""
  first = views[0]
  word = first.itemsize
  if first.ndim and first.shape[-1]:
    runs = all(view.strides[-1] == view.itemsize or view.shape[-1] == 1 for view in views)
    steps = {step for view in views for step in (view.ctypes.data, view.shape[-1] * view.itemsize, *view.strides[:-1])}
    fits = (size for size in (8, 4, 2) if size > word and runs and all(step % size == 0 for step in steps))
    word = next(fits, word)
  return [view.view(f"u{word}") for view in views]


def blocks(views: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
  """Views of one shape, along their first axis, or deeper, until they are small."""
  first = views[0]
  if first.nbytes <= _BLOCK_BYTES:
    yield views
  elif first.ndim > 1 and first[0].nbytes > _BLOCK_BYTES:
    for rows in zip(*views, strict=True):
      yield from blocks(rows)
  else:
    step = len(first) * _BLOCK_BYTES // first.nbytes
    for at in range(0, len(first), step):
      yield [view[at : at + step] for view in views]


class Equal:
  """Whether two views of the same shape have the same bits.

  By the C library's memcmp, which tells all bits apart for what numpy takes to sum them and half of what `numpy.not_equal`
  takes.  Rows that do not lie one after the other are gathered in a buffer first.  One thread's own.
  """

  def __init__(self):
    self._buffers = [np.empty(_BLOCK_BYTES, np.uint8) for _ in range(2)]
    self._addresses = [buffer.ctypes.data for buffer in self._buffers]

  def __call__(self, a: np.ndarray, b: np.ndarray) -> bool:
    if a.nbytes > _BLOCK_BYTES:
      return all(self(*pair) for pair in blocks(words(a, b)))
    return not _memcmp(self._address(a, 0), self._address(b, 1), a.nbytes)

  def _address(self, view: np.ndarray, side: int) -> int:
    if view.flags.c_contiguous:
      return view.ctypes.data
    self._buffers[side][: view.nbytes].view(view.dtype).reshape(view.shape)[...] = view
    return self._addresses[side]


def inside(box_Nx2: np.ndarray, shard_Nx2: np.ndarray) -> bool:
  return bool((box_Nx2[:, 0] >= shard_Nx2[:, 0]).all() and (box_Nx2[:, 1] <= shard_Nx2[:, 1]).all())


def text(leaf: Leaf, box_Nx2: np.ndarray) -> str:
  """As in moe.experts.up[0:2, :, 8:16]."""
  cuts = (":" if (a, b) == (0, n) else f"{a}:{b}" for (a, b), n in zip(box_Nx2.tolist(), leaf.shape, strict=True))
  return f"{leaf.name}[{', '.join(cuts)}]" if leaf.shape else leaf.name


def each(function: Callable[[Any], Any], items: Iterable[Any], size: int) -> list[Any]:
  """`function` of all, in threads where `size` bytes are much."""
  return list((_pool().map if size > _THREADED_BYTES else map)(function, items))


@functools.cache
def _pool() -> ThreadPoolExecutor:
  return ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="transfer")
