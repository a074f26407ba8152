"""The engine's copy of the weights: error bounds of each dtype, what stays exact, and no loss for float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ring_tiny import get_config
from configs.schema import ExpertParallel, MeshConfig, ParallelConfig, RolloutDtype
from ring_jax.model import init_params, param_shardings
from rollout import weights
from rollout.engine import RingEngine
from sharding.mesh import make_mesh
from sharding.transfer import TransferError

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


@pytest.mark.parametrize("dtype", [RolloutDtype.FLOAT32, RolloutDtype.INT8, RolloutDtype.FP8])
@pytest.mark.parametrize("start", [None, 0, 4], ids=["one device", "other devices", "some in common"])
def test_weights_reach_an_engine_on_other_devices_bit_for_bit(params, dtype, start):
  """Cast by the trainer, cut fsdp x expert there and tensor x expert at the engine; packed once, on one device, otherwise."""
  trainer = ParallelConfig(MeshConfig(fsdp=2, expert=2), expert_parallel=ExpertParallel.ALL_TO_ALL)
  layout = ParallelConfig(MeshConfig(tensor=2, expert=2), expert_parallel=ExpertParallel.ALL_TO_ALL)
  config = dataclasses.replace(get_config().rollout, dtype=dtype, parallel=layout)
  if start is not None:
    mesh = make_mesh(trainer.mesh, jax.devices()[:4])
    held = jax.device_put(params, param_shardings(dataclasses.replace(CONFIG, parallel=trainer), mesh))
  else:
    held = jax.device_put(params, jax.devices()[0])
  engine = RingEngine(
    CONFIG, config, eos_ids=(0,), vocab_mask_V=np.ones(CONFIG.vocab_size, bool), seed=0,
    mesh=make_mesh(layout.mesh, jax.devices()[4:] if start != 4 else jax.devices()[2:6]),
  )  # fmt: skip
  expected = flat(jax.jit(weights.pack, static_argnums=1)(params, dtype))
  for version in (1, 2):
    got = flat(engine.load_params(held, version))
    assert got.keys() == expected.keys()
    for name, leaf in got.items():
      assert leaf.sharding == flat(engine.abstract_stored())[name].sharding
      np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), np.asarray(expected[name]).view(np.uint8), name)

  def refuse(sent, stored, version):
    assert sent is held and version == 3 and flat(stored).keys() == expected.keys()
    raise TransferError("the probe differs")

  with pytest.raises(TransferError, match="version 2 after version 2: versions must grow"):
    engine.load_params(held, 2)
  with pytest.raises(TransferError, match="the probe differs"):
    engine.load_params(held, 3, refuse)
  assert flat(engine.load_params(held, 3)).keys() == expected.keys(), "what was refused was not committed"
