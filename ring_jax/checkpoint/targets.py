"""What a conversion writes: the files of a Hugging Face folder or of an Orbax step, each made from pieces of leaves.

A plan needs the config alone.  Pieces come in the order of the file's bytes, in buffers that are used again.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from configs.schema import ModelConfig
from ring_jax.checkpoint import bits, hf, hf_config, names, orbax_files, shards
from ring_jax.checkpoint.hf_source import Index
from sharding.fingerprint import host_fingerprint

_PIECE_BYTES = 8 << 20
_KINDS = {"float64": "F64", "float32": "F32", "bfloat16": "BF16"}

Buffer = Callable[[tuple[int, ...], np.dtype], np.ndarray]  # shape and dtype to an array to fill
Leaves = Mapping[names.Path, jax.ShapeDtypeStruct]


class Source(Protocol):
  """Where leaves come from: `HFSource`, `OrbaxSource`."""

  config: ModelConfig
  leaves: Leaves
  folder: pathlib.Path

  def fill(self, path: names.Path, index: Index, out: np.ndarray) -> None: ...

  def check_finite(self, path: names.Path, index: Index, values: np.ndarray) -> None: ...


class Piece(NamedTuple):
  """Bytes of a file, and their share in the fingerprint of a leaf where the target keeps one."""

  values: np.ndarray
  leaf: str | None = None
  fingerprint: int = 0


@dataclasses.dataclass(frozen=True)
class PlannedFile:
  """A file to write."""

  name: str
  size: int
  tensors: int
  pieces: Callable[[Source, Buffer], Iterator[Piece]]


class HFTarget:
  """Shards, their index and config.json."""

  def __init__(
    self, config: ModelConfig, leaves: Leaves, max_shard_bytes: int, fields: Mapping[str, Any] | None = None
  ):
    """Plans the shards.

    Args:
      fields: of the source's own config.json, to be kept (token ids, auto_map).
    """
    self._config, self._leaves, self._fields = config, leaves, dict(fields or {})
    self.shapes = names.tensor_shapes(config, {path: leaf.shape for path, leaf in leaves.items()})
    self._blocks: dict[str, list[tuple[names.Path, names.Block]]] = {}
    for path, block in names.blocks(config):
      self._blocks.setdefault(block.tensor, []).append((path, block))
    sizes = {name: math.prod(shape) * self._dtype(name).itemsize for name, shape in self.shapes.items()}
    self.tensors, self.bytes = len(sizes), sum(sizes.values())
    groups = shards.grouped(sizes, max_shard_bytes)
    self._file_of: dict[str, str] = {}
    self.files = []
    for number, group in enumerate(groups, 1):
      file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
      self._file_of |= dict.fromkeys(group, file)
      group = sorted(group, key=lambda name: -self._dtype(name).itemsize)  # keeps every tensor aligned
      header = self._header(group, sizes)
      size = len(header) + sum(sizes[name] for name in group)
      self.files.append(PlannedFile(file, size, len(group), self._writer(header, group)))

  def finish(self, folder: pathlib.Path, fingerprints: Mapping[str, int]) -> list[str]:
    """Writes the rest; returns the files."""
    index = {"metadata": {"total_size": self.bytes}, "weight_map": self._file_of}
    shards.write_json(folder / shards.INDEX, index)
    tokens = hf.default_tokens(self._config)
    generation = folder / "generation_config.json"
    if generation.is_file():  # the source's own
      tokens |= json.loads(generation.read_text(encoding="utf-8"))
    else:
      shards.write_json(generation, tokens)
    shards.write_json(folder / "config.json", hf.config_json(self._config, tokens) | self._fields)
    if not (folder / hf_config.CONFIG_FILE).is_file():  # the source's own stays
      hf_config.write_class(folder)
    return [shards.INDEX, generation.name, "config.json", hf_config.CONFIG_FILE]

  def _dtype(self, tensor: str) -> np.dtype:
    return np.dtype(self._leaves[self._blocks[tensor][0][0]].dtype)

  def _header(self, group: Sequence[str], sizes: Mapping[str, int]) -> bytes:
    """Eight bytes of length and JSON, filled with spaces to a multiple of eight."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in group:
      span = [start, start + sizes[name]]
      header[name] = {"dtype": _KINDS[self._dtype(name).name], "shape": list(self.shapes[name]), "data_offsets": span}
      start = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

  def _writer(self, header: bytes, group: Sequence[str]) -> Callable[[Source, Buffer], Iterator[Piece]]:
    def pieces(source: Source, buffer: Buffer) -> Iterator[Piece]:
      yield Piece(np.frombuffer(header, np.uint8))
      for tensor in group:
        for path, block in self._blocks[tensor]:
          yield from self._block_pieces(source, buffer, path, block)

    return pieces

  def _block_pieces(self, source: Source, buffer: Buffer, path: names.Path, block: names.Block) -> Iterator[Piece]:
    """A block's rows, some at a time; the leaf's part is filled through a view of them."""
    leaf = self._leaves[path]
    filled = names.filled_shape(block, leaf.shape)
    inputs = block.inputs or 0
    outer, inner = filled[inputs], math.prod(filled[inputs + 1 :])  # what a range of rows is, and rows of one of these
    columns = math.prod(filled[:inputs])
    step = max(1, _PIECE_BYTES // (columns * inner * leaf.dtype.itemsize))
    axis = [axis for axis, at in enumerate(block.place) if at is None][inputs]
    fixed = [slice(None) if at is None else slice(at, at + 1) for at in block.place]
    spread = tuple(slice(None) if at is None else None for at in block.place)
    for start in range(0, outer, step):
      stop = min(start + step, outer)
      out = buffer(((stop - start) * inner, columns), np.dtype(leaf.dtype))
      view = out.T.reshape(*filled[:inputs], stop - start, *filled[inputs + 1 :]) if inputs else out.reshape(
        stop - start, *filled[1:]
      )  # fmt: skip
      index = (*fixed[:axis], slice(start, stop), *fixed[axis + 1 :])
      source.fill(path, index, view[spread])
      if not bits.all_finite(out):
        source.check_finite(path, index, view[spread])
      yield Piece(out)


class OrbaxTarget:
  """The chunks of all leaves, a file each, and the step's JSON."""

  def __init__(self, config: ModelConfig, leaves: Leaves):
    self._config, self._leaves = config, leaves
    self._chunk_shapes: dict[names.Path, tuple[int, ...]] = {}
    for path, block in names.blocks(config):
      if path not in self._chunk_shapes:
        self._chunk_shapes[path] = orbax_files.chunk_shape(block, leaves[path])
    self.files = []
    for path, leaf in leaves.items():
      for chunk in orbax_files.chunks(path, leaf.shape, self._chunk_shapes[path]):
        size = math.prod(chunk.shape) * leaf.dtype.itemsize
        self.files.append(PlannedFile(chunk.file, size, 1, self._writer(path, chunk)))
    self.tensors = len(leaves)
    self.bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())

  def finish(self, folder: pathlib.Path, fingerprints: Mapping[str, int]) -> list[str]:
    """Writes the rest; returns the files."""
    return orbax_files.write_frame(folder, self._config, self._chunk_shapes, self._leaves, fingerprints)

  def _writer(self, path: names.Path, chunk: orbax_files.Chunk) -> Callable[[Source, Buffer], Iterator[Piece]]:
    def pieces(source: Source, buffer: Buffer) -> Iterator[Piece]:
      values = buffer(chunk.shape, np.dtype(self._leaves[path].dtype))
      inside = tuple(slice(0, one.stop - one.start) for one in chunk.index)
      if values[inside].shape != chunk.shape:
        values[...] = 0  # beyond the leaf's end; zeros do not change a fingerprint
      source.fill(path, chunk.index, values[inside])
      if not bits.all_finite(values):
        source.check_finite(path, chunk.index, values[inside])
      yield Piece(values, ".".join(path), host_fingerprint(values))

    return pieces
