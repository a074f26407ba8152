"""The model in an Orbax step folder, leaf part by leaf part: read with TensorStore, written file by file.

Orbax can only save and restore whole leaves, and a leaf holds all layers and all experts of a kind.  Its files are
those of TensorStore's zarr driver, and that can do parts.

Reading takes both layouts: one OCDBT database for all leaves (what `RunStore` saves) and a folder a leaf.

Writing makes a folder a leaf, with one file a chunk, uncompressed: a file is then just the bytes of a part of the leaf,
which can be written in one pass, hashed, and kept when a conversion goes on after a kill.

    params/_METADATA                the tree: names, shapes
    params/moe_layers.moe.experts.down/.zarray      shape, dtype, shape of a chunk
    params/moe_layers.moe.experts.down/3.1.0.0      layer 3, the second group of experts
    run/metadata                    JSON as `store` writes it, with the fingerprints of all leaves
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from configs import loading
from configs.schema import ConfigError, ModelConfig, to_dict
from ring_jax.checkpoint import bits, names, raw_zarr, shards
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.hf_source import Index
from ring_jax.model import abstract_params
from sharding.fingerprint import host_fingerprint

CHUNK_BYTES = 64 << 20
_CACHE_BYTES = 256 << 20
_DICT_KEY = 2  # Orbax's KeyType.DICT


class OrbaxSource:
  """Parts of leaves out of a step folder; every leaf's bits are compared with its fingerprint at the end."""

  def __init__(self, folder: pathlib.Path, dtype: str | None = None):
    """Opens and checks the folder.

    Args:
      dtype: of parameters and activations; default: as stored.
    """
    self.folder = folder.absolute()
    self.run = _read_run(self.folder)
    stored = _model(self.folder, self.run)
    self.config = stored if dtype is None else dataclasses.replace(stored, dtype=dtype, param_dtype=dtype)
    self.leaves: dict[names.Path, jax.ShapeDtypeStruct] = names.leaves_of(abstract_params(self.config))
    self._stored = names.leaves_of(abstract_params(stored))
    self._arrays = self._open()
    self._raw = self._raw_leaves()
    self._sums = dict.fromkeys(self._stored, 0)

  def fill(self, path: names.Path, index: Index, out: np.ndarray) -> None:
    """Puts the part of a leaf that `index` selects into `out`, in the dtype of `out`."""
    if path in self._raw:
      self._sums[path] = (self._sums[path] + self._raw[path].fill(index, out)) % 2**32
      return
    try:
      values = self._arrays[path][index].read().result()
    except Exception as error:
      text = " ".join(str(error).split())[:200]
      raise CheckpointError(f"{self.folder / 'params'}: {'.'.join(path)} is damaged: {text}") from error
    self._sums[path] = (self._sums[path] + host_fingerprint(values)) % 2**32
    bits.copy(out, values)

  def check_finite(self, path: names.Path, index: Index, values: np.ndarray) -> None:
    """Refuses infinities and NaN in what `fill` gave."""
    if not bits.all_finite(values):
      raise CheckpointError(f"{self.folder / 'params'}: {'.'.join(path)} holds NaN or infinity")

  def take_sums(self) -> dict[str, int]:
    """Fingerprints of what was read since the last call, by leaf."""
    sums = {".".join(path): value for path, value in self._sums.items() if value}
    self._sums = dict.fromkeys(self._sums, 0)
    return sums

  def check_sums(self, sums: Mapping[str, int]) -> None:
    """Compares fingerprints of all that was read with those that were saved."""
    saved = self.run["fingerprints"]["params"]
    for path in self._stored:
      name = ".".join(path)
      if sums.get(name, 0) % 2**32 != saved.get(name):
        raise CheckpointError(f"{self.folder}: is damaged: {name} does not have the bits that were saved")

  def _open(self) -> dict[names.Path, ts.TensorStore]:
    folder = self.folder / "params"
    ocdbt = (folder / "manifest.ocdbt").is_file()
    self._check_tree(folder)
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def open_all(context: ts.Context) -> dict[names.Path, ts.TensorStore]:
      opened = {}
      for path in self._stored:
        name = ".".join(path)
        kvstore = {"driver": "ocdbt", "base": folder.as_uri() + "/", "path": name + "/"}
        spec = {"driver": "zarr", "kvstore": kvstore if ocdbt else (folder / name).as_uri() + "/"}
        opened[path] = ts.open(spec, read=True, open=True, context=context)
      return {path: _opened(folder, path, future) for path, future in opened.items()}

    arrays = open_all(context)
    for path, leaf in self._stored.items():
      held = (arrays[path].shape, arrays[path].dtype.numpy_dtype)
      if held != (leaf.shape, leaf.dtype):
        raise CheckpointError(
          f"{folder}: {'.'.join(path)} is {held[1]}{list(held[0])}, the config says {leaf.dtype}{list(leaf.shape)}"
        )
    # Chunks that hold much more than one tensor are read again and again unless they stay in memory.
    large = [math.prod(array.chunk_layout.read_chunk.shape) * array.dtype.numpy_dtype.itemsize
             for array in arrays.values()]  # fmt: skip
    needed = sum(size for size in large if size > CHUNK_BYTES)
    if needed:
      context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES + needed}})
      arrays = open_all(context)
    return arrays

  def _raw_leaves(self) -> dict[names.Path, raw_zarr.RawLeaf]:
    cache, found = raw_zarr.ChunkCache(_CACHE_BYTES), {}
    for path, leaf in self._stored.items():
      folder = self.folder / "params" / ".".join(path)
      if raw_zarr.is_raw(folder):
        chunk = self._arrays[path].chunk_layout.read_chunk.shape
        found[path] = raw_zarr.RawLeaf(folder, leaf, chunk, cache)
    return found

  def _check_tree(self, folder: pathlib.Path) -> None:
    path = folder / "_METADATA"
    try:
      tree = json.loads(path.read_text(encoding="utf-8"))["tree_metadata"].values()
      held = {".".join(key["key"] for key in entry["key_metadata"]) for entry in tree}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise CheckpointError(f"{path}: is damaged ({error!r})") from None
    wanted = {".".join(path) for path in self._stored}
    for name in sorted(held ^ wanted):
      raise CheckpointError(f"{folder}: {name} is {'missing' if name in wanted else 'extra'}: another config wrote it")


def _opened(folder: pathlib.Path, path: names.Path, future: ts.Future) -> ts.TensorStore:
  try:
    return future.result()
  except Exception as error:
    text = " ".join(str(error).split())[:200]
    raise CheckpointError(f"{folder}: {'.'.join(path)} is damaged: {text}") from error


def _read_run(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / "run" / "metadata"
  try:
    run = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(run["step"], int) or not isinstance(run["fingerprints"]["params"], dict):
      raise ValueError("step or fingerprints")
    return run
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{path}: is damaged ({error!r})") from None


def _model(folder: pathlib.Path, run: dict[str, Any]) -> ModelConfig:
  try:
    return loading.model_from_dict(run["config"]["model"])
  except (KeyError, TypeError, ConfigError) as error:
    raise CheckpointError(f"{folder / 'run'}: holds no model config ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclasses.dataclass(frozen=True)
class Chunk:
  """One file: a part of a leaf."""

  file: str  # in the step folder
  index: Index  # what of the leaf it holds
  shape: tuple[int, ...]  # of the file; at the leaf's end it may be larger than what it holds


def chunk_shape(block: names.Block, leaf: jax.ShapeDtypeStruct, limit: int = CHUNK_BYTES) -> tuple[int, ...]:
  """At most `limit` bytes, made of whole layers, else of whole experts, else of rows of a tensor.

  Every dimension that is split selects rows in the Hugging Face tensors, so that both directions read what they need.
  """
  shape = list(leaf.shape)
  filled = [axis for axis, at in enumerate(block.place) if at is None]
  stacked = [
    axis for axis, at in enumerate(block.place) if at is not None and (not axis or block.place[axis - 1] is not None)
  ]
  for axis in (*stacked, filled[block.inputs or 0]):
    size = math.prod(shape) * leaf.dtype.itemsize
    if size > limit:
      fitting = max(1, limit * shape[axis] // size)
      shape[axis] = -(-shape[axis] // -(-shape[axis] // fitting))  # of equal size, as far as possible
  return tuple(shape)


def chunks(path: names.Path, shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Chunk]:
  """The files of a leaf."""
  counts = [range(-(-size // one)) for size, one in zip(shape, chunk, strict=True)]
  for number in itertools.product(*counts):
    index = tuple(
      slice(at * one, min((at + 1) * one, size)) for at, one, size in zip(number, chunk, shape, strict=True)
    )
    yield Chunk(f"params/{'.'.join(path)}/{'.'.join(map(str, number))}", index, chunk)


def write_frame(
  folder: pathlib.Path,
  config: ModelConfig,
  chunk_shapes: Mapping[names.Path, tuple[int, ...]],
  leaves: Mapping[names.Path, jax.ShapeDtypeStruct],
  fingerprints: Mapping[str, int],
) -> list[str]:
  """Everything of a step folder but the chunks; returns the files.

  The run's JSON is the shortest that can be opened: step 0, the model's config alone, no host state, fingerprints.
  """
  tree = {}
  written = []
  for path, leaf in leaves.items():
    keys = [{"key": key, "key_type": _DICT_KEY} for key in path]
    value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape)}
    tree[str(path)] = {"key_metadata": keys, "value_metadata": value}
    written.append(f"params/{'.'.join(path)}/.zarray")
    shards.write_json(folder / written[-1], _zarray(leaf, chunk_shapes[path]))
  metadata = {
    "tree_metadata": tree,
    "use_ocdbt": False,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }
  shards.write_json(folder / "params" / "_METADATA", metadata)
  run = {"step": 0, "config": {"model": to_dict(config)}, "host": {}, "fingerprints": {"params": dict(fingerprints)}}
  (folder / "run").mkdir(exist_ok=True)
  shards.write_json(folder / "run" / "metadata", run)
  return [*written, "params/_METADATA", "run/metadata"]


def _zarray(leaf: jax.ShapeDtypeStruct, chunk: tuple[int, ...]) -> dict[str, Any]:
  dtype = np.dtype(leaf.dtype)
  return {
    "chunks": list(chunk),
    "compressor": None,
    "dimension_separator": ".",
    "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str,
    "fill_value": None,
    "filters": None,
    "order": "C",
    "shape": list(leaf.shape),
    "zarr_format": 2,
  }
