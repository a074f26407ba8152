"""The safetensors files of a Hugging Face folder: which tensor lies where, slices of tensors, and writing them.

Rows are read with plain reads into a buffer of their own, so that the host's memory holds what was asked for and not the
pages of a map.  What a file says of itself is checked against the others before any tensor is read, so that a broken
folder costs no time and no memory.

Folders whose `config.json` declares FP8 weights hold `<name>_scale_inv` beside a quantised tensor, one float a block; such
a tensor is read as the product, in float32 (bailing_moe_v2.md 2.5).
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ring_jax.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale_inv"  # ends the name of a quantised tensor's scales
_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_FP8 = "F8_E4M3"


class ShardReader:
  """The tensors of a folder, by name."""

  def __init__(self, folder: pathlib.Path, fp8_block: tuple[int, int] | None = None):
    """Opens all files.

    Args:
      fp8_block: rows and columns that share a scale, where the folder's config declares FP8 weights.
    """
    self._folder = folder
    self._block = fp8_block
    self._files: dict[str, safetensors.safe_open] = {}
    self._starts: dict[str, dict[str, int]] = {}  # by file and tensor: where its bytes start
    self._descriptors: dict[str, int] = {}
    self._file_of = self._indexed() if (folder / INDEX).is_file() else self._single()
    self._check_scales()

  def __del__(self) -> None:
    for descriptor in getattr(self, "_descriptors", {}).values():
      os.close(descriptor)

  def names(self) -> Iterable[str]:
    """All tensors; the scales of quantised ones belong to those."""
    return self._file_of.keys() if self._block is None else without_scales(self._file_of)

  def file_of(self, name: str) -> str:
    return self._file_of[name]

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._slice(name).get_shape())

  def dtype(self, name: str) -> jnp.dtype:
    """Raises CheckpointError where the tensor holds no plain floating-point numbers.

    Of a quantised tensor bfloat16, the dtype that it was quantised from.
    """
    kind = self._slice(name).get_dtype()
    if kind == _FP8 and self._block is not None:
      return jnp.dtype(jnp.bfloat16)
    if kind not in _FLOATS:
      raise CheckpointError(
        f"{self._folder / self._file_of[name]}: tensor {name} holds {kind}, must be one of {', '.join(_FLOATS)}"
      )
    return jnp.dtype(_FLOATS[kind])

  def read(self, name: str, index: tuple[slice, ...], scratch: "Scratch | None" = None) -> np.ndarray:
    """A part of the tensor, in the file's dtype (float32 if it is quantised).

    Args:
      index: one slice with start and stop, or `slice(None)`, a dimension.
      scratch: where to put the values; they are then good until the next read into it.
    """
    scratch = scratch or Scratch()
    shape = self.shape(name)
    first, rest = index[0], index[1:]
    start, stop, _ = first.indices(shape[0])
    kind = self._slice(name).get_dtype()
    dtype = np.dtype(ml_dtypes.float8_e4m3fn) if kind == _FP8 else np.dtype(jnp.dtype(_FLOATS[kind]))
    values = scratch.array((stop - start, *shape[1:]), dtype)
    self._read_rows(name, start, values)
    if kind == _FP8:
      values = self._dequantised(name, start, values, scratch)
    return values[(slice(None), *rest)]

  def _read_rows(self, name: str, start: int, out: np.ndarray) -> None:
    """Fills `out` with the tensor's rows from `start` on."""
    file = self._file_of[name]
    if file not in self._descriptors:
      self._descriptors[file] = os.open(self._folder / file, os.O_RDONLY)
    row = math.prod(out.shape[1:]) * out.itemsize
    offset = self._starts_of(file)[name] + start * row
    left = memoryview(out.reshape(-1).view(np.uint8))
    while left:
      done = os.preadv(self._descriptors[file], [left], offset)
      if done == 0:
        raise CheckpointError(f"{self._folder / file}: tensor {name} is truncated")
      left, offset = left[done:], offset + done

  def _starts_of(self, file: str) -> dict[str, int]:
    """From the header, which opening the file has checked; safetensors itself keeps the offsets to itself."""
    if file not in self._starts:
      with open(self._folder / file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
      self._starts[file] = {
        name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
      }
    return self._starts[file]

  # FP8

  def _check_scales(self) -> None:
    """Every quantised tensor is a matrix and has scales of the right shape."""
    if self._block is None:
      return
    for name, file in self._file_of.items():
      if self._slice(name).get_dtype() != _FP8:
        continue
      where, scale, shape = self._folder / file, name + SCALE, self.shape(name)
      if scale not in self._file_of:
        raise CheckpointError(f"{where}: tensor {name} is {_FP8}, but its scales {scale} are missing")
      if len(shape) != 2:
        raise CheckpointError(f"{where}: tensor {name} has shape {list(shape)}; only matrices may be {_FP8}")
      wanted = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
      if self.shape(scale) != wanted or self._slice(scale).get_dtype() not in _FLOATS:
        raise CheckpointError(
          f"{self._folder / self._file_of[scale]}: tensor {scale} is {self._slice(scale).get_dtype()}"
          f"{list(self.shape(scale))}, must be floats of shape {list(wanted)}, one a block of {list(self._block)}"
        )

  def _dequantised(self, name: str, start: int, values: np.ndarray, scratch: "Scratch") -> np.ndarray:
    """Values times scales; `values` are whole rows from `start` on."""
    rows, columns = self._block
    scales = self.read(name + SCALE, (slice(None), slice(None))).astype(np.float32)
    out = scratch.array(values.shape, np.dtype(np.float32), slot=1)
    row = 0
    while row < len(values):
      block = (start + row) // rows
      end = min((block + 1) * rows - start, len(values))
      scale = np.repeat(scales[block], columns)[: values.shape[1]]
      np.multiply(values[row:end].astype(np.float32), scale, out=out[row:end])
      row = end
    return out

  # Files

  def _slice(self, name: str):
    return self._files[self._file_of[name]].get_slice(name)

  def _single(self) -> dict[str, str]:
    if not (self._folder / SINGLE).is_file():
      raise CheckpointError(f"{self._folder}: has neither {INDEX} nor {SINGLE}")
    return dict.fromkeys(self._open(SINGLE), SINGLE)

  def _indexed(self) -> dict[str, str]:
    file_of = read_index(self._folder)
    listed: dict[str, set[str]] = {}
    for name, file in file_of.items():
      listed.setdefault(file, set()).add(name)
    for file, names in sorted(listed.items()):
      held = set(self._open(file))
      for name in sorted(names - held):
        raise CheckpointError(f"{self._folder / file}: tensor {name} is missing, though {INDEX} lists it there")
      for name in sorted(held - names):
        raise CheckpointError(f"{self._folder / file}: tensor {name} is extra, {INDEX} does not list it there")
    return file_of

  def _open(self, file: str) -> list[str]:
    """Opens a file and returns the names of its tensors."""
    path = self._folder / file
    try:
      self._files[file] = safetensors.safe_open(path, framework="np")
    except FileNotFoundError:
      raise CheckpointError(f"{path}: does not exist, though {INDEX} lists it") from None
    except safetensors.SafetensorError as error:
      raise CheckpointError(f"{path}: is truncated or not a safetensors file ({error})") from None
    return list(self._files[file].keys())


def without_scales(listed: Iterable[str]) -> list[str]:
  """Names of tensors; the scales of quantised ones belong to those."""
  held = set(listed)
  return [name for name in listed if not (name.endswith(SCALE) and name.removesuffix(SCALE) in held)]


class Scratch:
  """Buffers that grow to the largest array asked for and are used again."""

  def __init__(self) -> None:
    self._slots: dict[int, np.ndarray] = {}

  def array(self, shape: tuple[int, ...], dtype: np.dtype, slot: int = 0) -> np.ndarray:
    """An array with undefined values, in place of the last one of that slot."""
    size = math.prod(shape) * dtype.itemsize
    if slot not in self._slots or self._slots[slot].size < size:
      self._slots.pop(slot, None)
      self._slots[slot] = np.empty(size, np.uint8)
    return self._slots[slot][:size].view(dtype).reshape(shape)


def read_index(folder: pathlib.Path) -> dict[str, str]:
  """The file of every tensor, as the index says; raises CheckpointError where it names anything but files beside it."""
  path = folder / INDEX
  try:
    file_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{path}: must be a JSON object with a weight_map ({error!r})") from None
  if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
    raise CheckpointError(f"{path}: weight_map must name a file for every tensor")
  for name, file in file_of.items():
    if file in ("", ".", "..") or pathlib.PurePath(file).name != file or "\\" in file:
      raise CheckpointError(f"{path}: tensor {name} is said to lie in {file!r}, which is not a file of this folder")
  return file_of


def write(
  folder: pathlib.Path, sizes: Mapping[str, int], tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
  """Writes shards and their index.

  Args:
    sizes: bytes of every tensor, in the order in which they are written.
    tensors: the same names in the same order, made as they are asked for: one shard is in memory at a time.
    max_shard_bytes: a shard ends before it would grow beyond this (one tensor alone may be larger).
  """
  groups = grouped(sizes, max_shard_bytes)
  file_of: dict[str, str] = {}
  for number, names in enumerate(groups, 1):
    file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
    shard = {name: np.ascontiguousarray(array) for name, (_, array) in zip(names, tensors, strict=False)}
    save_file(shard, folder / file, metadata={"format": "pt"})
    file_of |= dict.fromkeys(names, file)
  write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of})


def write_json(path: pathlib.Path, data: object) -> None:
  path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def sync(folder: pathlib.Path) -> None:
  """Waits until the folder's files are on the disk."""
  for path in (*folder.iterdir(), folder):
    sync_path(path)


def sync_path(path: pathlib.Path) -> None:
  """Waits until a file, or a folder's list of names, is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
  """Tensors shard by shard; a shard ends before it would grow beyond the limit."""
  groups: list[list[str]] = [[]]
  used = 0
  for name, size in sizes.items():
    if groups[-1] and used + size > limit:
      groups.append([])
      used = 0
    groups[-1].append(name)
    used += size
  return groups
