"""Hugging Face folders of Ling 2.0 / Ring 2.0 models: read into the parameter tree, written from it.

Reading checks names, shapes and dtypes of all tensors first and then fills one leaf after the other, tensor by tensor:
the host needs room for one leaf (or this host's shards of it) and one tensor.  Writing fetches one layer at a time, fills
one shard at a time, and gives the folder its name only when all of it is on the disk.  `convert.py` goes between formats
without ever holding a leaf.

The router and its bias are float32 in the tree whatever the file holds, and are written as float32, which all readers
accept (bailing_moe_v2.md 2.4).
"""

import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import ModelConfig
from ring_jax.checkpoint import hf_config, names, shards
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.hf_source import HFSource
from ring_jax.model import Params, abstract_params

DEFAULT_SHARD_BYTES = 5 * 10**9

# Token ids of the real tokenizer (section 5): chat models end a turn with either of two.
_LING_VOCAB_SIZE = 157_184
_LING_TOKENS = {"bos_token_id": 156_891, "eos_token_id": [156_892, 156_895], "pad_token_id": 156_892}


def load(
  folder: str | os.PathLike, shardings: Params | None = None, dtype: str | None = None, check_finite: bool = True
) -> tuple[ModelConfig, Params]:
  """Reads a Hugging Face folder.

  Args:
    folder: with config.json and safetensors files, sharded or not.
    shardings: a tree of `jax.sharding.Sharding` like the parameter tree; every leaf is then made shard by shard, and a
      host reads only what its devices hold.
    dtype: of parameters and activations ("float32", "bfloat16", "float64"); default: what config.json says, and then a
      tensor that this would round is an error.
    check_finite: refuse infinities and NaN.

  Raises:
    CheckpointError: naming the file or the tensor and what is wrong with it.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise CheckpointError(f"{folder}: is not a folder")
  source = HFSource(folder, dtype)
  if jax.dtypes.canonicalize_dtype(source.config.param_dtype) != jnp.dtype(source.config.param_dtype):
    raise CheckpointError(f"{folder}: dtype {source.config.param_dtype} needs JAX_ENABLE_X64=1")
  placed = None if shardings is None else names.leaves_of(shardings)
  leaves = {}
  for path, leaf in source.leaves.items():

    def part(index: tuple[slice, ...], path=path, leaf=leaf) -> np.ndarray:
      ranges = [range(size)[one] for size, one in zip(leaf.shape, index, strict=True)]
      out = np.empty([len(one) for one in ranges], leaf.dtype)
      source.fill(path, tuple(slice(one.start, one.stop) for one in ranges), out)
      if check_finite:
        source.check_finite(path, index, out)
      return out

    if placed is None:
      leaves[path] = jax.device_put(part((slice(None),) * len(leaf.shape)))
    else:
      leaves[path] = jax.make_array_from_callback(leaf.shape, placed[path], part)
    jax.block_until_ready(leaves[path])  # so that the host's copy is gone before the next one is made
  return source.config, names.tree_of(leaves)


def save(
  folder: str | os.PathLike,
  config: ModelConfig,
  params: Params,
  max_shard_bytes: int = DEFAULT_SHARD_BYTES,
  tokens: Mapping[str, Any] | None = None,
) -> None:
  """Writes a Hugging Face folder: config.json and its class, generation_config.json, shards and their index.

  Args:
    folder: must not exist, or be empty.
    params: the parameter tree; leaves are written in the dtype they have.
    tokens: bos_token_id, eos_token_id (one or a list) and pad_token_id; default: Ling's own where the vocabulary is
      Ling's, none otherwise.

  Raises:
    CheckpointError: the folder holds something, or a leaf does not fit the config.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise CheckpointError(f"{folder}: exists and is not empty; give a new folder")
  if max_shard_bytes <= 0:
    raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
  flat = names.leaves_of(params)
  _check_leaves(config, flat)
  if tokens is None:
    tokens = default_tokens(config)
  shapes = names.tensor_shapes(config, {path: leaf.shape for path, leaf in flat.items()})
  leaf_of = {block.tensor: path for path, block in names.blocks(config)}
  sizes = {name: int(np.prod(shape)) * flat[leaf_of[name]].dtype.itemsize for name, shape in shapes.items()}
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  try:
    shards.write(temporary, sizes, _tensors(config, flat), max_shard_bytes)
    shards.write_json(temporary / "config.json", config_json(config, tokens))
    shards.write_json(temporary / "generation_config.json", dict(tokens))
    hf_config.write_class(temporary)
    shards.sync(temporary)
    temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def default_tokens(config: ModelConfig) -> dict[str, Any]:
  """Ling's own token ids where the vocabulary is Ling's, none otherwise."""
  return dict(_LING_TOKENS) if config.vocab_size == _LING_VOCAB_SIZE else {}


def config_json(config: ModelConfig, tokens: Mapping[str, Any]) -> dict[str, Any]:
  """The content of `config.json`."""
  data = hf_config.to_hf(config) | {
    "auto_map": {"AutoConfig": f"{hf_config.CONFIG_FILE.removesuffix('.py')}.BailingMoeV2Config"}
  }
  data |= {key: tokens[key] for key in ("eos_token_id", "pad_token_id") if key in tokens}
  if isinstance(data.get("eos_token_id"), (list, tuple)):
    data["eos_token_id"] = data["eos_token_id"][0]  # config.json names one, generation_config.json all
  return data


def _check_leaves(config: ModelConfig, flat: Mapping[names.Path, Any]) -> None:
  abstract = names.leaves_of(abstract_params(config))
  for path in sorted(abstract.keys() ^ flat.keys()):
    raise CheckpointError(f"parameter {'.'.join(path)} is {'missing' if path in abstract else 'extra'}")
  for path, leaf in abstract.items():
    if tuple(flat[path].shape) != leaf.shape:
      raise CheckpointError(
        f"parameter {'.'.join(path)} has shape {list(flat[path].shape)}, the config says {list(leaf.shape)}"
      )


def _tensors(config: ModelConfig, flat: Mapping[names.Path, Any]) -> Iterator[tuple[str, np.ndarray]]:
  """The Hugging Face tensors in order.  Of a stacked leaf, one entry of the stack is on the host at a time."""
  fetched: dict[names.Path, tuple[int, np.ndarray]] = {}
  pending: list[np.ndarray] = []  # blocks of a fused tensor that is not complete yet
  order = list(names.blocks(config))
  for (path, block), following in zip(order, [*order[1:], None], strict=True):
    lead, *rest = block.place
    if lead is None:
      values = np.asarray(flat[path])
    else:
      if path not in fetched or fetched[path][0] != lead:
        fetched[path] = (lead, np.asarray(_entry(flat[path], lead)))
      values = fetched[path][1][tuple(slice(None) if at is None else at for at in rest)]
    if block.inputs is not None:
      rows, columns = names.block_shape(block, flat[path].shape)
      values = values.reshape(columns, rows).T
    pending.append(values)
    if following is None or following[1].tensor != block.tensor:
      yield block.tensor, pending[0] if len(pending) == 1 else np.concatenate(pending)
      pending = []


def _entry(leaf: Any, index: int) -> Any:
  """Entry of the leading dimension; on a device with a traced index, so that all entries share one program."""
  return leaf[index] if isinstance(leaf, np.ndarray) else jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
