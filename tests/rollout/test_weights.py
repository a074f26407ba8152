"""The engine's copy of the weights: error bounds of each dtype, what stays exact, and no loss for float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ring_tiny import get_config
from configs.schema import RolloutDtype
from ring_jax.model import init_params
from rollout import weights

CONFIG = get_config().model


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, 0)


def flat(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
  ("dtype", "bound"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 0.51 / 127), ("int4", 0.51 / 7), ("fp8", 2**-4)]
)
def test_error_of_each_channel_is_bounded_by_the_format(params, dtype, bound):
  restored = flat(weights.unpack(weights.pack(params, RolloutDtype(dtype)), "float32"))
  changed = 0
  for name, leaf in flat(params).items():
    error = jnp.abs(restored[name].astype(jnp.float32) - leaf)
    changed += bool(error.max() > 0)
    assert float(error.max()) <= bound * float(jnp.abs(leaf).max()) + 1e-12, name
    if "router" in name or "norm" in name:
      assert float(error.max()) == 0.0, f"{name} must keep its precision"
  assert (changed > 0) == (dtype != "float32")


def test_scales_are_per_output_channel(params):
  packed = weights.pack(params, RolloutDtype.INT8)
  layer = packed["moe_layers"]
  D, E, f = CONFIG.hidden_size, CONFIG.num_experts, CONFIG.moe_intermediate_size
  L, H, d = CONFIG.num_moe_layers, CONFIG.num_attention_heads, CONFIG.head_dim
  assert layer["moe"]["experts"]["gate_up"].scale.shape == (L, E, 1, 2, f)
  assert layer["moe"]["experts"]["down"].scale.shape == (L, E, 1, D)
  assert layer["attention"]["wq"].scale.shape == (L, 1, H, d)
  assert layer["attention"]["wo"].scale.shape == (L, 1, 1, D)
  assert layer["attention"]["wq"].values.dtype == jnp.int8


def test_int4_uses_all_levels_symmetrically_and_zero_channels_stay_zero(params):
  zeroed = jax.tree.map(lambda leaf: leaf, params)
  zeroed["dense_layers"]["mlp"]["up"] = params["dense_layers"]["mlp"]["up"].at[:, :, 3].set(0.0)
  up = weights.pack(zeroed, RolloutDtype.INT4)["dense_layers"]["mlp"]["up"]
  levels = np.unique(np.asarray(up.values.astype(jnp.int8)))
  assert levels.min() == -7 and levels.max() == 7
  assert np.isfinite(np.asarray(up.scale)).all()
  assert not np.asarray(up.values.astype(jnp.int8))[:, :, 3].any()
