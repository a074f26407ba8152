"""Hugging Face folders: round trips, shardings, and errors that name the tensor for all that can be broken."""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from configs import ring_1t
from configs.schema import YarnConfig
from ring_jax.checkpoint import hf, hf_config
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.model import abstract_params
from tests.checkpoint import hf_folder

INDEX = "model.safetensors.index.json"


def all_tensors(folder):
  index = json.loads((folder / INDEX).read_text())
  found = {}
  for file in sorted(set(index["weight_map"].values())):
    with safe_open(folder / file, "np") as shard:
      assert shard.metadata() == {"format": "pt"}
    for name, array in load_file(folder / file).items():
      assert index["weight_map"][name] == file
      found[name] = array
  assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
  return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(tmp_path, dtype):
  fields = hf_folder.fields(dtype=dtype, first_k_dense_replace=1, num_nextn_predict_layers=1)
  tensors = hf_folder.random_tensors(fields)
  config, params = hf.load(hf_folder.write(tmp_path / "in", fields, tensors))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    assert leaf.dtype == ("float32" if "router" in name else dtype), name
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config)
  )
  hf.save(tmp_path / "out", config, params, max_shard_bytes=20_000)
  written = all_tensors(tmp_path / "out")
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
  assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 25_000
  assert written.keys() == tensors.keys()
  for name, array in tensors.items():
    expected = array.astype(np.float32) if name.endswith("mlp.gate.weight") else array
    assert written[name].dtype == expected.dtype and written[name].tobytes() == expected.tobytes(), name
  again_config, again = hf.load(tmp_path / "out")
  assert again_config == config
  pairs = zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (params, again)), strict=True)
  assert all(first.tobytes() == second.tobytes() for first, second in pairs)


def test_fused_rows_are_queries_then_keys_then_values(tmp_path):
  fields = hf_folder.fields(num_hidden_layers=1)
  tensors = hf_folder.random_tensors(fields)
  H, K, d, h = 4, 2, 8, fields["hidden_size"]
  fused = np.arange((H + 2 * K) * d, dtype=np.float32)[:, None] + np.arange(h, dtype=np.float32) / 32
  tensors["model.layers.0.attention.query_key_value.weight"] = fused
  _, params = hf.load(hf_folder.write(tmp_path, fields, tensors, files=1))
  attention = params["dense_layers"]["attention"]
  for name, first, heads in (("wq", 0, H), ("wk", H, K), ("wv", H + K, K)):
    for head in range(heads):
      rows = (first + head) * d
      np.testing.assert_array_equal(attention[name][0, :, head], fused[rows : rows + d].T)


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ring_jax.checkpoint import hf

_, whole = hf.load(sys.argv[1])
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split = 0
for axis in range(5):
  def sharding(leaf):
    fits = axis < leaf.ndim and leaf.shape[axis] % 2 == 0
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "x") if fits else PartitionSpec())
  shardings = jax.tree.map(sharding, whole)
  _, placed = hf.load(sys.argv[1], shardings=shardings)
  for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
    expected = whole
    for key in path:
      expected, wanted = expected[key.key], (shardings if key is path[0] else wanted)[key.key]
    assert leaf.sharding == wanted, path
    split += leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    np.testing.assert_array_equal(leaf, expected, err_msg=f"{path} split along {axis}")
print(split)
"""


def test_leaves_are_made_on_the_given_shardings(tmp_path):
  """Two devices; every dimension of every leaf is split in turn, so that partial reads of all kinds are compared."""
  fields = hf_folder.fields(num_nextn_predict_layers=1)
  folder = hf_folder.write(tmp_path, fields, hf_folder.random_tensors(fields))
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  done = subprocess.run([sys.executable, "-c", SHARDED, folder], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > 60


def test_mtp_tensors_are_optional_when_the_config_does_not_ask_for_them(tmp_path):
  with_mtp = hf_folder.fields(num_nextn_predict_layers=1)
  tensors = hf_folder.random_tensors(with_mtp)
  config, params = hf.load(hf_folder.write(tmp_path / "extra", with_mtp | {"num_nextn_predict_layers": 0}, tensors))
  assert config.num_nextn_predict_layers == 0 and "mtp" not in params
  without = {name: array for name, array in tensors.items() if not name.startswith("model.layers.3.")}
  with pytest.raises(CheckpointError, match=r"model\.layers\.3\.input_layernorm\.weight is missing \(and 3\d more\)"):
    hf.load(hf_folder.write(tmp_path / "missing", with_mtp, without))


def test_dtypes(tmp_path):
  fields = hf_folder.fields(dtype="bfloat16")
  tensors = hf_folder.random_tensors(fields)
  wide = tensors["model.layers.1.mlp.gate.weight"].astype(np.float32) * 1.0009765625  # not a bfloat16
  tensors["model.layers.1.mlp.gate.weight"] = wide
  folder = hf_folder.write(tmp_path / "a", fields, tensors)
  config, params = hf.load(folder)
  assert config.param_dtype == config.dtype == "bfloat16"
  np.testing.assert_array_equal(params["moe_layers"]["moe"]["router"]["kernel"][0], wide.T)
  config, params = hf.load(folder, dtype="float32")
  assert config.param_dtype == "float32" and params["lm_head"]["kernel"].dtype == jnp.float32
  tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
  folder = hf_folder.write(tmp_path / "b", fields, tensors)
  with pytest.raises(CheckpointError, match=r"model\.norm\.weight is float32, config\.json says bfloat16; to conv"):
    hf.load(folder)
  assert hf.load(folder, dtype="bfloat16")[1]["final_norm"]["scale"].dtype == jnp.bfloat16
  with pytest.raises(CheckpointError, match="dtype float64 needs JAX_ENABLE_X64=1"):
    hf.load(folder, dtype="float64")


# ---------------------------------------------------------------------------------------------------------------------
# Broken folders

NORM = "model.layers.1.input_layernorm.weight"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


def change(name, function):
  return lambda fields, tensors: tensors.update({name: function(tensors[name])})


def with_value(value):
  def put(array):
    array = array.copy()
    array.reshape(-1)[-1] = value
    return array

  return put


@pytest.mark.parametrize(
  ("breaks", "message"),
  [
    (lambda fields, tensors: tensors.pop(EXPERT), f"tensor {EXPERT} is missing"),
    (lambda fields, tensors: [tensors.pop(NORM), tensors.pop(EXPERT)], f"tensor {NORM} is missing (and 1 more)"),
    (lambda fields, tensors: tensors.update(odd=np.zeros(1, np.float32)), "tensor odd is extra"),
    (change(EXPERT, lambda a: a.reshape(24, 12)), f"tensor {EXPERT} has shape [24, 12], config.json says [12, 24]"),
    (change(NORM, lambda a: a.astype(np.int32)), f"tensor {NORM} holds I32, must be one of F64, F32, BF16, F16"),
    (change(NORM, lambda a: a.astype(ml_dtypes.float8_e4m3fn)), f"tensor {NORM} holds F8_E4M3, must be one of"),
    (change(EXPERT, with_value(np.nan)), f"tensor {EXPERT} holds NaN or infinity"),
    (change(NORM, with_value(-np.inf)), f"tensor {NORM} holds NaN or infinity"),
    (lambda fields, tensors: fields.update(hidden_size=32), "tensor model.word_embeddings.weight has shape [40, 24]"),
    (lambda fields, tensors: fields.update(num_experts=16, n_group=4), "mlp.experts.8.gate_proj.weight is missing"),
    (lambda fields, tensors: fields.update(num_hidden_layers=2), "tensor model.layers.2.attention.dense.weight is"),
  ],
)  # fmt: skip
@pytest.mark.parametrize("files", [1, 2])
def test_broken_tensors_name_themselves(tmp_path, breaks, message, files):
  fields = hf_folder.fields()
  tensors = hf_folder.random_tensors(fields)
  breaks(fields, tensors)
  folder = hf_folder.write(tmp_path, fields, tensors, files)
  if "model.layers.2.attention" in message:  # too few layers: the first layer beyond reads like an MTP layer
    hf_folder.write(tmp_path, fields | {"num_nextn_predict_layers": 1}, tensors, files)
    message = "tensor model.layers.2.enorm.weight is missing"
  with pytest.raises(CheckpointError) as caught:
    hf.load(folder)
  text = str(caught.value)
  assert message in text and str(folder) in text and "\n" not in text


def test_nonfinite_bfloat16_is_found_and_the_check_can_be_turned_off(tmp_path):
  fields = hf_folder.fields(dtype="bfloat16", num_hidden_layers=1)
  tensors = hf_folder.random_tensors(fields)
  largest = np.array(ml_dtypes.finfo(ml_dtypes.bfloat16).max, ml_dtypes.bfloat16)
  tensors["model.norm.weight"] = with_value(largest)(tensors["model.norm.weight"])
  hf.load(hf_folder.write(tmp_path / "finite", fields, tensors))
  tensors["model.norm.weight"] = with_value(np.inf)(tensors["model.norm.weight"])
  folder = hf_folder.write(tmp_path / "infinite", fields, tensors)
  with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinity"):
    hf.load(folder)
  assert jnp.isinf(hf.load(folder, check_finite=False)[1]["final_norm"]["scale"]).any()


def edit_index(folder, function):
  index = json.loads((folder / INDEX).read_text())
  function(index["weight_map"])
  (folder / INDEX).write_text(json.dumps(index))


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
  ("breaks", "message"),
  [
    (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-7]), f"{SHARD}: is truncated or not a safetensors"),
    (lambda d: (d / SHARD).write_bytes(b"abc"), f"{SHARD}: is truncated or not a safetensors file"),
    (lambda d: (d / SHARD).unlink(), f"{SHARD}: does not exist, though {INDEX} lists it"),
    (lambda d: edit_index(d, lambda m: m.update({NORM: "../x"})), f"{NORM} is said to lie in '../x', which is not"),
    (lambda d: edit_index(d, lambda m: m.update({NORM: "/etc/x"})), f"{NORM} is said to lie in '/etc/x', which is not"),
    (lambda d: edit_index(d, lambda m: m.update({NORM: ".."})), f"{NORM} is said to lie in '..', which is not a file"),
    (lambda d: edit_index(d, lambda m: m.update(ghost=SHARD)), f"{SHARD}: tensor ghost is missing, though"),
    (lambda d: edit_index(d, lambda m: m.pop(NORM)), f"tensor {NORM} is extra, {INDEX} does not list it there"),
    (lambda d: edit_index(d, lambda m: m.update({NORM: 3})), f"{INDEX}: weight_map must name a file for every tensor"),
    (lambda d: (d / INDEX).write_text("{"), f"{INDEX}: must be a JSON object with a weight_map"),
    (lambda d: (d / INDEX).unlink(), f"has neither {INDEX} nor model.safetensors"),
    (lambda d: (d / "config.json").unlink(), "config.json: does not exist; a Hugging Face folder has one"),
    (lambda d: (d / "config.json").write_text("[1]"), "config.json: must be a JSON object"),
    (lambda d: (d / "config.json").write_text("{,"), "config.json: is not JSON ("),
  ],
)  # fmt: skip
def test_broken_files_name_themselves(tmp_path, breaks, message):
  fields = hf_folder.fields()
  folder = hf_folder.write(tmp_path, fields, hf_folder.random_tensors(fields))
  breaks(folder)
  with pytest.raises(CheckpointError) as caught:
    hf.load(folder)
  text = str(caught.value)
  assert message in text and str(folder) in text and "\n" not in text


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_saving_never_overwrites_and_leaves_nothing_half_done(tmp_path):
  fields = hf_folder.fields(num_hidden_layers=1)
  config, params = hf.load(hf_folder.write(tmp_path / "in", fields, hf_folder.random_tensors(fields)))
  with pytest.raises(CheckpointError, match="exists and is not empty; give a new folder"):
    hf.save(tmp_path / "in", config, params)
  with pytest.raises(CheckpointError, match=r"parameter dense_layers\.mlp\.gate is missing"):
    mlp = {name: leaf for name, leaf in params["dense_layers"]["mlp"].items() if name != "gate"}
    hf.save(tmp_path / "out", config, params | {"dense_layers": params["dense_layers"] | {"mlp": mlp}})
  with pytest.raises(CheckpointError, match=r"parameter final_norm\.scale has shape \[3\], the config says \[24\]"):
    hf.save(tmp_path / "out", config, params | {"final_norm": {"scale": jnp.ones(3)}})
  with pytest.raises(TypeError):  # an error in the middle of writing
    hf.save(tmp_path / "out", config, params, tokens={"pad_token_id": object()})
  assert [path.name for path in tmp_path.iterdir()] == ["in"]
  (tmp_path / "out").mkdir()
  hf.save(tmp_path / "out", config, params, tokens={"eos_token_id": [1, 2], "pad_token_id": 1})
  assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1


def test_loading_is_bounded_by_a_leaf_and_a_tensor(tmp_path):
  """Above the parameters themselves, which the CPU's device shares with NumPy."""
  fields = hf_folder.fields(vocab_size=20_000, num_hidden_layers=1)
  tensors = hf_folder.random_tensors(fields)
  leaf = tensors["model.word_embeddings.weight"].nbytes
  folder = hf_folder.write(tmp_path, fields, tensors, files=1)
  hf.load(folder)  # compiles and imports
  tracemalloc.start()
  _, params = hf.load(folder)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert leaf < peak < sum(array.nbytes for array in jax.tree.leaves(params)) + 1.4 * leaf


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def test_config_round_trip_and_the_fields_that_engines_need():
  config = hf_config.from_hf(hf_folder.fields(n_group=0, topk_group=0))
  assert (config.n_group, config.topk_group, config.rotary_dim) == (1, 1, 4)
  yarn = YarnConfig(factor=4.0, original_max_position_embeddings=16, beta_fast=20.0)
  for changed in (config, dataclasses.replace(config, rope_scaling=yarn), dataclasses.replace(config, rotary_dim=6)):
    written = json.loads(json.dumps(hf_config.to_hf(changed)))
    assert hf_config.from_hf(written) == changed
  for head_dim in range(2, 200, 2):  # other readers truncate
    for rotary_dim in range(2, head_dim + 1, 2):
      wide = dataclasses.replace(config, head_dim=head_dim, rotary_dim=rotary_dim)
      assert int(head_dim * hf_config.to_hf(wide)["partial_rotary_factor"]) == rotary_dim
  needed = """hidden_size num_attention_heads num_key_value_heads head_dim use_bias use_qkv_bias rms_norm_eps
    max_position_embeddings num_experts num_experts_per_tok norm_topk_prob num_shared_experts moe_intermediate_size
    intermediate_size first_k_dense_replace num_hidden_layers vocab_size embedding_dropout use_qk_norm use_rmsnorm
    score_function n_group topk_group routed_scaling_factor router_dtype moe_router_enable_expert_bias
    tie_word_embeddings norm_head rope_theta partial_rotary_factor num_nextn_predict_layers torch_dtype"""
  assert set(needed.split()) <= written.keys()
  assert written["use_rmsnorm"] is written["use_qk_norm"] is written["moe_router_enable_expert_bias"] is True
  assert "rotary_dim" not in written  # beside partial_rotary_factor, some engines would apply both


def test_the_published_config_of_ling_1t_is_read():
  published = {
    "architectures": ["BailingMoeV2ForCausalLM"], "attention_dropout": 0.0, "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 18432, "eos_token_id": 156892, "pad_token_id": 156892, "first_k_dense_replace": 4,
    "hidden_act": "silu", "max_position_embeddings": 32768, "model_type": "bailing_moe", "moe_intermediate_size": 2048,
    "norm_topk_prob": True, "num_experts_per_tok": 8, "num_attention_heads": 64, "norm_head": False, "num_experts": 256,
    "num_key_value_heads": 8, "rope_theta": 600000, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_bias": False, "use_rmsnorm": True, "rms_norm_eps": 1e-06, "head_dim": 128,
    "num_shared_experts": 1, "use_cache": True, "use_qkv_bias": False, "embedding_dropout": 0.0, "norm_softmax": False,
    "output_dropout": 0.0, "vocab_size": 157184, "rotary_dim": 64, "using_split_qkv_in_self_attention": False,
    "router_dtype": "fp32", "moe_router_enable_expert_bias": True, "routed_scaling_factor": 2.5, "n_group": 8,
    "topk_group": 4, "use_qk_norm": True, "score_function": "sigmoid",
  }  # fmt: skip
  model = ring_1t.get_config().model
  assert hf_config.from_hf(published) == dataclasses.replace(
    model, max_position_embeddings=32768, remat=hf_config.from_hf(published).remat, param_dtype="bfloat16"
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"architectures": ["BailingMoeForCausalLM"]}, "that is Ling 1, with a softmax router"),
    ({"architectures": ["LlamaForCausalLM"]}, "only BailingMoeV2ForCausalLM can be read; another model"),
    ({"architectures": []}, "architectures=[]: must be ['BailingMoeV2ForCausalLM']"),
    ({"model_type": "bailing_hybrid"}, "model_type='bailing_hybrid': must be one of bailing_moe, bailing_moe_v2"),
    ({"hidden_size": None}, "hidden_size: is missing"),
    ({"hidden_size": "24"}, "hidden_size='24': must be an integer"),
    ({"hidden_size": 24.5}, "hidden_size=24.5: must be an integer"),
    ({"hidden_size": -4}, "hidden_size=-4: must be at least 1"),
    ({"n_group": 3}, "n_group=3: must divide num_experts=8"),
    ({"score_function": "softmax"}, "score_function='softmax': this model only has 'sigmoid'"),
    ({"use_rmsnorm": False}, "use_rmsnorm=False: this model only has True"),
    ({"use_qkv_bias": True}, "use_qkv_bias=True: this model only has False"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True: this model only has False"),
    ({"quantization_config": {"fmt": "e4m3"}}, "quantised weights cannot be read"),
    ({"rotary_dim": 8}, "the number of rotary dimensions is contradictory: rotary_dim gives 8, partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": 3.0}}, "rope_theta is contradictory: rope_theta gives 10000.0, rope_"),
    ({"rope_theta": None}, "rope_theta: is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type 'linear' is not supported, only yarn"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: is missing"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "rope_scaling.mscale=1.0: only plain YaRN"),
    ({"moe_shared_expert_intermediate_size": 7}, "moe_shared_expert_intermediate_size=7: only moe_intermediate_size"),
    ({"torch_dtype": "int8"}, "torch_dtype='int8': one of bfloat16, float32, float64, float16"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2: only depth 0 and 1 exist"),
  ],
)
def test_configs_that_this_model_cannot_have(changes, message):
  with pytest.raises(CheckpointError) as caught:
    hf_config.from_hf(hf_folder.fields() | changes)
  assert message in str(caught.value) and "\n" not in str(caught.value)
