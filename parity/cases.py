"""Small models that hold, between them, what a reading of the notes can get wrong, with parameters in which it shows.

Every norm, bias and matrix is random and of a scale that matters: with the usual initialisation (norms 1, biases 0, tiny
weights) most mistakes change nothing.  Parameters are drawn by NumPy, so that every implementation gets the same.

Dimension key: B rows, T positions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.schema import ModelConfig, YarnConfig
from ring_jax.data.packing import PackedBatch, pack
from ring_jax.model import abstract_params


class Case(NamedTuple):
  name: str
  config: ModelConfig
  bias_shift: float = 0.0  # added to every selection bias; below -1, all biased scores are negative
  seed: int = 0


# Four heads of 16 dimensions are not the hidden size; two query heads share a kv head; four experts are a group.
_BASE = ModelConfig(
  vocab_size=96,
  hidden_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
  intermediate_size=80,
  moe_intermediate_size=24,
  num_experts=16,
  num_experts_per_tok=4,
  first_k_dense_replace=1,
  n_group=4,
  topk_group=2,
  routed_scaling_factor=2.5,
  rope_theta=10_000.0,
  max_position_embeddings=128,
)


def _case(name: str, bias_shift: float = 0.0, seed: int = 0, **changes: Any) -> Case:
  return Case(name, dataclasses.replace(_BASE, **changes), bias_shift, seed)


QUICK = (
  _case("groups-negative-bias", bias_shift=-3.0, seed=1),
  _case("all-moe-yarn", seed=2, first_k_dense_replace=0, n_group=1, topk_group=1, num_hidden_layers=2,
        rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=32)),
  _case("two-dense-mtp", bias_shift=-3.0, seed=3, first_k_dense_replace=2, num_nextn_predict_layers=1, rotary_dim=12),
)  # fmt: skip

FULL = (
  *QUICK,
  _case("groups", seed=4, num_hidden_layers=6),
  _case("full-rotary-one-kv-head", seed=5, rotary_dim=16, num_key_value_heads=1),
  _case("wide-head", seed=6, head_dim=32, num_attention_heads=3, num_key_value_heads=3, rotary_dim=0),
  _case("all-moe-mtp-yarn", seed=7, first_k_dense_replace=0, num_nextn_predict_layers=1,
        rope_scaling=YarnConfig(factor=2.0, original_max_position_embeddings=64)),
  _case("two-shared-experts", seed=8, num_shared_experts=2, norm_topk_prob=True),
  _case("no-shared-unnormalised", seed=9, num_shared_experts=0, norm_topk_prob=False, bias_shift=-3.0),
  _case("one-expert-a-token", seed=10, num_experts_per_tok=1, topk_group=1),
)  # fmt: skip


def cases(quick: bool) -> tuple[Case, ...]:
  return QUICK if quick else FULL


def random_params(config: ModelConfig, seed: int, bias_shift: float = 0.0) -> dict[str, Any]:
  """A parameter tree of float32 NumPy arrays: norms from 0.5 to 1.5, selection biases N(bias_shift, 0.3), and matrices
  that keep the scale of what they are given."""
  random = np.random.default_rng(seed)

  def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    names = [key.key for key in path]
    if names[-1] == "scale":
      values = random.uniform(0.5, 1.5, leaf.shape)
    elif names[-1] == "bias":
      values = random.normal(bias_shift, 0.3, leaf.shape)
    elif names[-1] == "embedding":
      values = random.normal(0.0, 1.0, leaf.shape)
    else:
      values = random.normal(0.0, _fan_in(names, leaf.shape) ** -0.5, leaf.shape)
    return values.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def _fan_in(names: list[str], shape: tuple[int, ...]) -> int:
  """Of a matrix of the tree: the product of the axes that are summed over."""
  stacked = names[0].endswith("_layers")
  own = shape[1:] if stacked else shape
  if names[-1] == "wo":
    return own[0] * own[1]
  return own[1] if "experts" in names else own[0]


def packed_batch(config: ModelConfig, seed: int, rows: int = 2, length: int = 48) -> PackedBatch:
  """Sequences of several lengths in rows with padding at their ends."""
  random = np.random.default_rng(seed)
  lengths = [n for _ in range(rows) for n in (length // 2, length // 3, length // 12)]
  sequences: list[Mapping[str, Any]] = [{"tokens": random.integers(0, config.vocab_size, n)} for n in lengths]
  (batch,) = pack(sequences, length, rows)
  return batch
