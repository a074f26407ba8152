"""How the parameter tree and the tensors of a Hugging Face folder correspond (bailing_moe_v2.md section 2).

Every leaf of the tree is put together from *blocks*.  A block is one Hugging Face tensor, or some rows of one (the
fused query_key_value), and fills one place of the leaf: a layer of the stack, an expert, the gate or the up half.

    leaf[place] = tensor[rows].T.reshape(...)      weights: Hugging Face has (out, in), the tree has in before out
    leaf[place] = tensor                           norms, embedding, selection bias

Nothing here touches numbers: reading and writing (hf.py) both walk this table, in the two directions.

Dimension key: L layers, D hidden, H query heads, K kv heads, d head dim, E experts, F and f MLP widths, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from configs.schema import ModelConfig

Path = tuple[str, ...]  # of a leaf: its keys from the root


@dataclasses.dataclass(frozen=True)
class Block:
  """One tensor's part of a leaf."""

  tensor: str  # Hugging Face name
  place: tuple[int | None, ...]  # one entry a dimension of the leaf: an index, or None for a dimension it fills
  inputs: int | None = None  # how many of the filled dimensions are inputs of the weight; None: not transposed
  rows: tuple[int, int] | None = None  # which rows of the tensor, start and stop; None: all


def blocks(config: ModelConfig) -> Iterator[tuple[Path, Block]]:
  """Every block of the model and the leaf it belongs to, layer by layer as the upstream files are written."""
  yield ("embed", "embedding"), Block("model.word_embeddings.weight", (None, None))
  for index in range(config.num_hidden_layers):
    moe = index >= config.first_k_dense_replace
    stack = "moe_layers" if moe else "dense_layers"
    depth = index - config.first_k_dense_replace if moe else index
    for path, block in _layer(config, moe, f"model.layers.{index}."):
      yield (stack, *path), dataclasses.replace(block, place=(depth, *block.place))
  yield ("final_norm", "scale"), Block("model.norm.weight", (None,))
  yield ("lm_head", "kernel"), Block("lm_head.weight", (None, None), inputs=1)
  if config.num_nextn_predict_layers:
    prefix = mtp_prefix(config)
    for path, block in _layer(config, True, prefix):
      yield ("mtp", "block", *path), block
    yield ("mtp", "enorm", "scale"), Block(prefix + "enorm.weight", (None,))
    yield ("mtp", "hnorm", "scale"), Block(prefix + "hnorm.weight", (None,))
    yield ("mtp", "eh_proj", "kernel"), Block(prefix + "eh_proj.weight", (None, None), inputs=1)
    yield ("mtp", "final_norm", "scale"), Block(prefix + "final_layernorm.weight", (None,))


def blocks_of_leaves(config: ModelConfig) -> dict[Path, list[Block]]:
  """The blocks of every leaf."""
  found: dict[Path, list[Block]] = {}
  for path, block in blocks(config):
    found.setdefault(path, []).append(block)
  return found


def mtp_prefix(config: ModelConfig) -> str:
  """The MTP layer follows the others; `num_hidden_layers` does not count it."""
  return f"model.layers.{config.num_hidden_layers}."


def _layer(config: ModelConfig, moe: bool, prefix: str) -> Iterator[tuple[Path, Block]]:
  """The blocks of one layer; places are those of a single layer, without the stack's dimension."""
  H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
  yield ("input_norm", "scale"), Block(prefix + "input_layernorm.weight", (None,))
  # The fused projection's rows: all query heads, then all keys, then all values (section 2.1).
  for name, start, heads in (("wq", 0, H), ("wk", H, K), ("wv", H + K, K)):
    rows = (start * d, (start + heads) * d)
    fused = Block(prefix + "attention.query_key_value.weight", (None, None, None), inputs=1, rows=rows)
    yield ("attention", name), fused
  yield ("attention", "wo"), Block(prefix + "attention.dense.weight", (None, None, None), inputs=2)
  yield ("attention", "q_norm", "scale"), Block(prefix + "attention.query_layernorm.weight", (None,))
  yield ("attention", "k_norm", "scale"), Block(prefix + "attention.key_layernorm.weight", (None,))
  yield ("post_norm", "scale"), Block(prefix + "post_attention_layernorm.weight", (None,))
  if not moe:
    yield from _gated(("mlp",), prefix + "mlp.")
    return
  yield ("moe", "router", "kernel"), Block(prefix + "mlp.gate.weight", (None, None), inputs=1)
  yield ("moe", "router", "bias"), Block(prefix + "mlp.gate.expert_bias", (None,))
  for expert in range(config.num_experts):
    one = f"{prefix}mlp.experts.{expert}."
    for half, name in enumerate(("gate", "up")):
      yield ("moe", "experts", "gate_up"), Block(f"{one}{name}_proj.weight", (expert, None, half, None), inputs=1)
    yield ("moe", "experts", "down"), Block(f"{one}down_proj.weight", (expert, None, None), inputs=1)
  if config.num_shared_experts:
    yield from _gated(("moe", "shared"), prefix + "mlp.shared_experts.")


def _gated(path: Path, prefix: str) -> Iterator[tuple[Path, Block]]:
  for name in ("gate", "up", "down"):
    yield (*path, name), Block(f"{prefix}{name}_proj.weight", (None, None), inputs=1)


def filled_shape(block: Block, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the part of the leaf that the block fills."""
  return tuple(size for size, index in zip(leaf_shape, block.place, strict=True) if index is None)


def block_shape(block: Block, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the block in its tensor: (out, in) for weights."""
  filled = filled_shape(block, leaf_shape)
  if block.inputs is None:
    return filled
  return (math.prod(filled[block.inputs :]), math.prod(filled[: block.inputs]))


def tensor_shapes(config: ModelConfig, leaf_shapes: Mapping[Path, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
  """Shape of every Hugging Face tensor of the model, in the order in which they are written."""
  shapes: dict[str, tuple[int, ...]] = {}
  for path, block in blocks(config):
    shape = block_shape(block, leaf_shapes[path])
    if block.rows is not None:  # the blocks of a fused tensor come in order: the last one ends where it ends
      shape = (block.rows[1], *shape[1:])
    shapes[block.tensor] = shape
  return shapes


def leaves_of(tree: Mapping[str, Any]) -> dict[Path, Any]:
  """Leaves of a parameter tree by path; a `Sharding` is a leaf too."""
  flat: dict[Path, Any] = {}

  def walk(node: Any, path: Path) -> None:
    if isinstance(node, Mapping):
      for key, value in node.items():
        walk(value, (*path, key))
    else:
      flat[path] = node

  walk(tree, ())
  return flat


def tree_of(leaves: Mapping[Path, Any]) -> dict[str, Any]:
  """The inverse of `leaves_of`."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree
