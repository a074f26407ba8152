"""`config.json` of a Ling 2.0 / Ring 2.0 folder to `ModelConfig` and back (bailing_moe_v2.md sections 1 and 6).

The architecture is told by `architectures`, not by `model_type`: the first generation shares "bailing_moe", another
model.  Switches that change the maths are read, and a value that this model does not have is an error, never ignored.
Rotary dimensions come in three spellings (`rotary_dim`, `partial_rotary_factor`, `rope_parameters`); where a file holds
several that disagree, guessing would give a silently wrong model.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from configs.schema import ConfigError, ModelConfig, YarnConfig
from ring_jax.checkpoint.errors import CheckpointError

ARCHITECTURE = "BailingMoeV2ForCausalLM"
_MODEL_TYPES = ("bailing_moe", "bailing_moe_v2")

# Integer fields without a default; the names are those of ModelConfig too.
_SIZES = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "intermediate_size",
  "moe_intermediate_size",
  "num_experts",
  "num_experts_per_tok",
  "first_k_dense_replace",
  "max_position_embeddings",
)
# Fields with the default that BailingMoeV2Config gives them, which a file may leave out.
_DEFAULTS = {
  "num_shared_experts": 1,
  "n_group": 8,
  "topk_group": 4,
  "routed_scaling_factor": 1.0,
  "norm_topk_prob": True,
  "num_nextn_predict_layers": 0,
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-6,
}
# What this model always does; a file may leave it out, but not say otherwise.  vLLM's own defaults for several of
# these are another model's, so they are always written (section 6).
_FIXED: dict[str, Any] = {
  "hidden_act": "silu",
  "use_bias": False,
  "use_qkv_bias": False,
  "use_rmsnorm": True,
  "use_qk_norm": True,
  "norm_head": False,
  "norm_softmax": False,
  "tie_word_embeddings": False,
  "score_function": "sigmoid",
  "moe_router_enable_expert_bias": True,
  "router_dtype": "fp32",
  "using_split_qkv_in_self_attention": False,
}
_YARN_ONLY = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}


def read(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
  """The folder's model, in the dtype that its `config.json` names, and the raw fields."""
  path = folder / "config.json"
  try:
    data = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise CheckpointError(f"{path}: does not exist; a Hugging Face folder has one") from None
  except ValueError as error:
    raise CheckpointError(f"{path}: is not JSON ({error})") from None
  if not isinstance(data, dict):
    raise CheckpointError(f"{path}: must be a JSON object")
  try:
    return from_hf(data), data
  except CheckpointError as error:
    raise CheckpointError(f"{path}: {error}") from None


def from_hf(data: Mapping[str, Any]) -> ModelConfig:
  """The model that a `config.json` describes.

  Raises:
    CheckpointError: another architecture, a missing or contradictory field, or a switch that this model does not have.
  """
  _check_architecture(data)
  for name, value in _FIXED.items():
    if data.get(name, value) != value:
      raise CheckpointError(f"{name}={data[name]!r}: this model only has {value!r}")
  fp8_block(data)
  fields: dict[str, Any] = {name: _number(data, name, int) for name in _SIZES}
  fields |= {name: _number(data, name, type(default), default) for name, default in _DEFAULTS.items()}
  fields["head_dim"] = _number(data, "head_dim", int, fields["hidden_size"] // fields["num_attention_heads"])
  shared = fields["moe_intermediate_size"] * max(fields["num_shared_experts"], 1)
  width = data.get("moe_shared_expert_intermediate_size")
  if width not in (None, fields["moe_intermediate_size"], shared):
    raise CheckpointError(f"moe_shared_expert_intermediate_size={width}: only moe_intermediate_size is supported")
  dtype = _dtype(data)
  try:
    return ModelConfig(
      **fields,
      rotary_dim=_rotary_dim(data, fields["head_dim"]),
      rope_theta=_theta(data),
      rope_scaling=_yarn(data, fields["max_position_embeddings"]),
      dtype=dtype,
      param_dtype=dtype,
    )
  except ConfigError as error:
    raise CheckpointError(str(error).removeprefix("model.")) from None


def fp8_block(data: Mapping[str, Any]) -> tuple[int, int] | None:
  """Rows and columns of a block of FP8 weights that share a scale; None where the weights are not quantised.

  Raises:
    CheckpointError: another kind of quantisation.
  """
  quantization = data.get("quantization_config")
  if not quantization:
    return None
  if not isinstance(quantization, Mapping):
    raise CheckpointError(f"quantization_config={quantization!r}: must be an object or null")
  for name, wanted in (("quant_method", "fp8"), ("fmt", "e4m3")):
    if quantization.get(name, "e4m3" if name == "fmt" else None) != wanted:
      raise CheckpointError(
        f"quantization_config.{name}={quantization.get(name)!r}: quantised weights cannot be read, save block-scaled FP8"
        f" ({wanted!r})"
      )
  block = quantization.get("weight_block_size")
  if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
    raise CheckpointError(f"quantization_config.weight_block_size={block!r}: must be rows and columns, as [128, 128]")
  return block[0], block[1]


# transformers does not know the architecture: the folder brings a class for its config, which `auto_map` names.  vLLM
# opens no folder without it.
CONFIG_FILE = "configuration_bailing_moe_v2.py"
_CONFIG_CLASS = '''"""The fields of config.json, as they are: what loaders need to know of this architecture."""

from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
  model_type = "bailing_moe"
'''


def write_class(folder: pathlib.Path) -> None:
  """Writes the class that `auto_map` names beside config.json."""
  (folder / CONFIG_FILE).write_text(_CONFIG_CLASS, encoding="utf-8")


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """`config.json` with every field that transformers, vLLM and SGLang read."""
  factor = _partial_factor(config.rotary_dim, config.head_dim)
  rope = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": factor}
  scaling = None
  if config.rope_scaling is not None:
    yarn = config.rope_scaling
    scaling = {
      "type": "yarn",
      "rope_type": "yarn",
      "factor": yarn.factor,
      "original_max_position_embeddings": yarn.original_max_position_embeddings,
      "beta_fast": yarn.beta_fast,
      "beta_slow": yarn.beta_slow,
    }
    rope |= {name: value for name, value in scaling.items() if name != "type"}
  return {
    "architectures": [ARCHITECTURE],
    "model_type": "bailing_moe",
    **{name: getattr(config, name) for name in (*_SIZES, *_DEFAULTS, "head_dim", "rope_theta")},
    **_FIXED,
    "partial_rotary_factor": factor,
    "rope_parameters": rope,
    "rope_scaling": scaling,
    "moe_shared_expert_intermediate_size": config.moe_intermediate_size,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": config.param_dtype,
  }


def _check_architecture(data: Mapping[str, Any]) -> None:
  names = data.get("architectures")
  if not isinstance(names, list) or not names:
    raise CheckpointError(f"architectures={names!r}: must be [{ARCHITECTURE!r}]")
  if names[0] != ARCHITECTURE:
    detail = {
      "BailingMoeForCausalLM": "that is Ling 1, with a softmax router and no q/k norm",
      "BailingMoeV2_5ForCausalLM": "that is Ling 2.5, with linear attention",
      "BailingMoeLinearForCausalLM": "that is Ring-linear, with linear attention",
    }.get(names[0], "another model")
    raise CheckpointError(f"architectures={names!r}: only {ARCHITECTURE} can be read; {detail}")
  if data.get("model_type", _MODEL_TYPES[0]) not in _MODEL_TYPES:
    raise CheckpointError(f"model_type={data['model_type']!r}: must be one of {', '.join(_MODEL_TYPES)}")


def _number(data: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
  value = data.get(name)
  if value is None:
    if default is None:
      raise CheckpointError(f"{name}: is missing")
    return default
  accepted = {int: (int,), float: (int, float), bool: (bool,)}[kind]
  if type(value) not in accepted:
    wanted = {int: "an integer", float: "a number", bool: "true or false"}[kind]
    raise CheckpointError(f"{name}={value!r}: must be {wanted}")
  return kind(value)


def _rope(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  value = data.get(name)
  if value is None:
    return {}
  if not isinstance(value, Mapping):
    raise CheckpointError(f"{name}={value!r}: must be an object or null")
  return value


def _agreed(name: str, said: Mapping[str, Any]) -> Any:
  """The one value of several spellings; None where nothing is said."""
  values = {where: value for where, value in said.items() if value is not None}
  if len(set(values.values())) > 1:
    both = ", ".join(f"{where} gives {value}" for where, value in values.items())
    raise CheckpointError(f"{name} is contradictory: {both}")
  return next(iter(values.values()), None)


def _rotary_dim(data: Mapping[str, Any], head_dim: int) -> int:
  said: dict[str, int | None] = {"rotary_dim": _number(data, "rotary_dim", int, 0) or None}
  for where, fields in (("partial_rotary_factor", data), ("rope_parameters", _rope(data, "rope_parameters"))):
    factor = _number(fields, "partial_rotary_factor", float, 0.0)
    said[where] = int(head_dim * factor) if factor else None
  dim = _agreed("the number of rotary dimensions", said)
  if dim is None:
    logging.warning("config.json names no rotary dimensions: all %d of a head rotate, as in transformers", head_dim)
    return head_dim
  return dim


def _theta(data: Mapping[str, Any]) -> float:
  said = {
    where: _number(fields, "rope_theta", float, 0.0) or None
    for where, fields in (("rope_theta", data), ("rope_parameters", _rope(data, "rope_parameters")))
  }
  theta = _agreed("rope_theta", said)
  if theta is None:
    raise CheckpointError("rope_theta: is missing")
  return theta


def _yarn(data: Mapping[str, Any], max_position_embeddings: int) -> YarnConfig | None:
  said = {where: _one_yarn(_rope(data, where), where, max_position_embeddings) for where in
          ("rope_scaling", "rope_parameters")}  # fmt: skip
  return _agreed("YaRN", said)


def _one_yarn(rope: Mapping[str, Any], where: str, max_position_embeddings: int) -> YarnConfig | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind != "yarn":
    raise CheckpointError(f"{where}: type {kind!r} is not supported, only yarn")
  for name, default in _YARN_ONLY.items():
    if rope.get(name, default) != default:
      raise CheckpointError(f"{where}.{name}={rope[name]!r}: only plain YaRN is supported")
  if rope.get("factor") is None:
    raise CheckpointError(f"{where}.factor: is missing")
  return YarnConfig(
    factor=_number(rope, "factor", float),
    original_max_position_embeddings=_number(rope, "original_max_position_embeddings", int, max_position_embeddings),
    beta_fast=_number(rope, "beta_fast", float, 32.0),
    beta_slow=_number(rope, "beta_slow", float, 1.0),
  )


def _dtype(data: Mapping[str, Any]) -> str:
  name = str(data.get("torch_dtype") or data.get("dtype") or "bfloat16").removeprefix("torch.")
  known = {"bfloat16": "bfloat16", "float32": "float32", "float64": "float64", "float16": "float32"}
  if name not in known:
    raise CheckpointError(f"torch_dtype={name!r}: one of {', '.join(known)}")
  return known[name]


def _partial_factor(rotary_dim: int, head_dim: int) -> float:
  """rotary_dim / head_dim, such that readers who truncate `head_dim * factor` get rotary_dim back."""
  factor = rotary_dim / head_dim
  return factor if int(head_dim * factor) == rotary_dim else (rotary_dim + 0.5) / head_dim
