"""The two models that engines are compared on, and their checkpoints: random weights, true shapes.

TINY (1.7 million parameters) fits the processor's caches, so that it shows what an engine does beside the arithmetic;
SMALL (106 million) does not, so that it shows how often weights are read (cpu_speed.md section 1).
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import ModelConfig, RolloutDtype
from ring_jax import model as ring_model
from ring_jax.checkpoint import hf
from ring_jax.model import Params
from rollout import weights
from rollout.bench.ours import Cut

TINY = ModelConfig(
  vocab_size=512,
  hidden_size=128,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=32,
  rotary_dim=16,
  intermediate_size=256,
  moe_intermediate_size=64,
  num_experts=16,
  num_experts_per_tok=4,
  n_group=4,
  topk_group=2,
  routed_scaling_factor=2.5,
  rope_theta=10_000.0,
  max_position_embeddings=4096,
  initializer_range=128**-0.5,  # keeps the scale of what it is given, so that mistakes show
)
SMALL = dataclasses.replace(
  TINY,
  vocab_size=8192,
  hidden_size=512,
  num_hidden_layers=8,
  num_attention_heads=8,
  head_dim=64,
  intermediate_size=1024,
  moe_intermediate_size=256,
  num_experts=32,
  rotary_dim=32,
  initializer_range=512**-0.5,
)
MODELS = {"tiny": TINY, "small": SMALL}
CUTS = {"tiny": Cut.DATA, "small": Cut.TENSOR}  # the faster of the two (docs/speed.md)


def random_params(config: ModelConfig, seed: int = 0) -> Params:
  """Matrices as `init_params` draws them; norms from 0.5 to 1.5 and selection biases N(0, 0.3)."""
  random = np.random.default_rng(seed)

  def draw(path: tuple, leaf: jax.Array) -> jax.Array:
    if path[-1].key == "scale":
      return jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    if ring_model.is_router_bias(path):
      return jnp.asarray(random.normal(0.0, 0.3, leaf.shape), leaf.dtype)
    return leaf

  return jax.tree_util.tree_map_with_path(draw, ring_model.init_params(config, seed))


def save(folder: pathlib.Path, config: ModelConfig, params: Params, dtype: RolloutDtype) -> None:
  """A Hugging Face folder with weights of this dtype, which every engine opens."""
  config = dataclasses.replace(config, dtype=dtype.value, param_dtype=dtype.value)
  hf.save(folder, config, weights.pack(params, dtype))
