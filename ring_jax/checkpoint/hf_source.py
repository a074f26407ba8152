"""The model in a Hugging Face folder, read leaf part by leaf part; all names, shapes and dtypes are checked on opening."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from configs.schema import ModelConfig
from ring_jax.checkpoint import bits, hf_config, names, shards
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.model import abstract_params

Index = tuple[slice, ...]  # one slice a dimension of a leaf


class HFSource:
  """Parts of leaves out of safetensors files."""

  def __init__(self, folder: str | os.PathLike, dtype: str | None = None):
    """Opens and checks the folder.

    Args:
      dtype: of parameters and activations; default: what config.json says, and then a tensor that this would round is
        an error.
    """
    self.folder = pathlib.Path(folder)
    if not self.folder.is_dir():
      raise CheckpointError(f"{self.folder}: is not a folder")
    self.config, data = hf_config.read(self.folder)
    if dtype is not None:
      self.config = dataclasses.replace(self.config, dtype=dtype, param_dtype=dtype)
    self.leaves: dict[names.Path, jax.ShapeDtypeStruct] = names.leaves_of(abstract_params(self.config))
    self._blocks = names.blocks_of_leaves(self.config)
    self._reader = shards.ShardReader(self.folder, hf_config.fp8_block(data))
    self._scratch = shards.Scratch()
    self._check_tensors(may_round=dtype is not None)

  def fill(self, path: names.Path, index: Index, out: np.ndarray) -> None:
    """Puts the part of a leaf that `index` selects into `out`, in the dtype of `out`."""
    shape = self.leaves[path].shape
    ranges = [range(size)[one] for size, one in zip(shape, index, strict=True)]
    for block, where, wanted in self._inside(path, ranges):
      bits.copy(out[where], self._read_block(block, names.filled_shape(block, shape), wanted))

  def check_finite(self, path: names.Path, index: Index, values: np.ndarray) -> None:
    """Refuses infinities and NaN in what `fill` gave, and names the tensor."""
    if bits.all_finite(values):
      return
    ranges = [range(size)[one] for size, one in zip(self.leaves[path].shape, index, strict=True)]
    for block, where, _ in self._inside(path, ranges):
      if not bits.all_finite(values[where]):
        file = self.folder / self._reader.file_of(block.tensor)
        raise CheckpointError(f"{file}: tensor {block.tensor} holds NaN or infinity")

  def _inside(self, path: names.Path, ranges: list[range]):
    """The blocks that have a share in the part, where it lies in the part, and which part of the block it is."""
    for block in self._blocks[path]:
      if any(at is not None and at not in one for at, one in zip(block.place, ranges, strict=True)):
        continue
      where = tuple(slice(None) if at is None else at - one.start for at, one in zip(block.place, ranges, strict=True))
      yield block, where, [one for at, one in zip(block.place, ranges, strict=True) if at is None]

  def _read_block(self, block: names.Block, filled: tuple[int, ...], wanted: list[range]) -> np.ndarray:
    """The wanted part of a block, turned to the leaf's order of dimensions.

    Of several dimensions that one tensor dimension is made of (heads x head_dim), the first selects what is read.
    """
    if block.inputs is None:
      return self._reader.read(block.tensor, tuple(slice(one.start, one.stop) for one in wanted), self._scratch)
    into, out = slice(0, block.inputs), slice(block.inputs, None)
    columns, rows = _flat_range(filled[into], wanted[into]), _flat_range(filled[out], wanted[out])
    first = block.rows[0] if block.rows else 0
    index = (slice(first + rows.start, first + rows.stop), slice(columns.start, columns.stop))
    matrix = self._reader.read(block.tensor, index, self._scratch)
    shape = [len(wanted[0]), *filled[1 : block.inputs], len(wanted[block.inputs]), *filled[block.inputs + 1 :]]
    inner = tuple(
      slice(None) if position in (0, block.inputs) else slice(one.start, one.stop)
      for position, one in enumerate(wanted)
    )
    return matrix.T.reshape(shape)[inner]

  def _check_tensors(self, may_round: bool) -> None:
    """Names, shapes and dtypes of the whole folder against the config."""
    shapes = names.tensor_shapes(self.config, {path: leaf.shape for path, leaf in self.leaves.items()})
    check_names(self.folder, self.config, self._reader.names(), shapes)
    for path, parts in self._blocks.items():
      for block in parts:
        name, file = block.tensor, self.folder / self._reader.file_of(block.tensor)
        if self._reader.shape(name) != shapes[name]:
          raise CheckpointError(
            f"{file}: tensor {name} has shape {list(self._reader.shape(name))}, config.json says {list(shapes[name])}"
          )
        held, wanted = self._reader.dtype(name), self.leaves[path].dtype
        if not may_round and bits.narrows(held, wanted):
          raise CheckpointError(
            f"{file}: tensor {name} is {held}, config.json says {wanted}; to convert it, ask for a dtype"
          )


def check_names(folder: pathlib.Path, config: ModelConfig, held, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Refuses names that are missing or too many.

  Args:
    held: what the folder has.
    shapes: of the model's tensors.
  """
  held = set(held)
  if not config.num_nextn_predict_layers:  # an MTP layer that the config does not ask for may lie there
    held = {name for name in held if not name.startswith(names.mtp_prefix(config))}
  for what, tensors in (
    ("missing", [name for name in shapes if name not in held]),
    ("extra", sorted(held - shapes.keys())),
  ):
    if tensors:
      more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
      raise CheckpointError(f"{folder}: tensor {tensors[0]} is {what}{more}")


def _flat_range(sizes: tuple[int, ...], wanted: list[range]) -> range:
  """What the first dimension's range is in the flattened dimensions."""
  inner = int(np.prod(sizes[1:]))
  return range(wanted[0].start * inner, wanted[0].stop * inner)
