"""Random Hugging Face folders of tiny Ling 2.0 models, written straight from the published names and shapes.

Nothing of the code under test is used: only NumPy and safetensors.
"""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

# hidden (24) is not heads x head_dim (32), and all sizes differ, so that a swapped dimension cannot go unseen.
SIZES = {
  "vocab_size": 40,
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "intermediate_size": 28,
  "moe_intermediate_size": 12,
  "num_experts": 8,
  "num_experts_per_tok": 3,
  "num_shared_experts": 1,
  "first_k_dense_replace": 1,
  "n_group": 4,
  "topk_group": 2,
  "max_position_embeddings": 64,
  "num_nextn_predict_layers": 0,
}
FIXED = {
  "architectures": ["BailingMoeV2ForCausalLM"],
  "model_type": "bailing_moe",
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "routed_scaling_factor": 2.5,
  "norm_topk_prob": True,
  "use_bias": False,
  "use_qkv_bias": False,
  "use_rmsnorm": True,
  "use_qk_norm": True,
  "score_function": "sigmoid",
  "moe_router_enable_expert_bias": True,
  "router_dtype": "fp32",
  "tie_word_embeddings": False,
  "rope_scaling": None,
}
ROPE = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


def fields(rope: dict[str, Any] = ROPE, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
  """A config.json."""
  return FIXED | SIZES | rope | {"torch_dtype": dtype} | changes


def random_tensors(config: dict[str, Any], seed: int = 0, bias: float = 0.0) -> dict[str, np.ndarray]:
  """Tensors by Hugging Face name; weights in `torch_dtype`, the selection bias float32 around `bias`."""
  rng = np.random.default_rng(seed)
  h, V, d = config["hidden_size"], config["vocab_size"], config["head_dim"]
  H, K = config["num_attention_heads"], config["num_key_value_heads"]
  f, E = config["moe_intermediate_size"], config["num_experts"]
  dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[config["torch_dtype"]]

  def weight(*shape: int) -> np.ndarray:
    return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(dtype)

  def norm(size: int) -> np.ndarray:
    return rng.uniform(0.5, 1.5, size).astype(dtype)

  def gated(prefix: str, width: int) -> dict[str, np.ndarray]:
    return {
      f"{prefix}.gate_proj.weight": weight(width, h),
      f"{prefix}.up_proj.weight": weight(width, h),
      f"{prefix}.down_proj.weight": weight(h, width),
    }

  tensors = {"model.word_embeddings.weight": weight(V, h), "model.norm.weight": norm(h), "lm_head.weight": weight(V, h)}
  layers = config["num_hidden_layers"]
  for i in range(layers + config["num_nextn_predict_layers"]):
    at = f"model.layers.{i}."
    tensors |= {
      at + "input_layernorm.weight": norm(h),
      at + "attention.query_key_value.weight": weight((H + 2 * K) * d, h),
      at + "attention.query_layernorm.weight": norm(d),
      at + "attention.key_layernorm.weight": norm(d),
      at + "attention.dense.weight": weight(h, H * d),
      at + "post_attention_layernorm.weight": norm(h),
    }
    if i < config["first_k_dense_replace"]:
      tensors |= gated(at + "mlp", config["intermediate_size"])
      continue
    tensors[at + "mlp.gate.weight"] = weight(E, h) * dtype(2)
    tensors[at + "mlp.gate.expert_bias"] = (rng.normal(size=E) * 0.2 + bias).astype(np.float32)
    for e in range(E):
      tensors |= gated(f"{at}mlp.experts.{e}", f)
    tensors |= gated(at + "mlp.shared_experts", f * config["num_shared_experts"])
    if i == layers:
      tensors |= {
        at + "enorm.weight": norm(h),
        at + "hnorm.weight": norm(h),
        at + "eh_proj.weight": weight(h, 2 * h),
        at + "final_layernorm.weight": norm(h),
      }
  return tensors


def write(folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray], files: int = 2) -> pathlib.Path:
  """config.json, `files` shards and an index; one file alone is model.safetensors without an index."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  if files == 1:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  file_of = {name: f"model-{1 + i % files:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
  for file in set(file_of.values()):
    save_file({n: t for n, t in tensors.items() if file_of[n] == file}, folder / file, metadata={"format": "pt"})
  size = sum(tensor.nbytes for tensor in tensors.values())
  index = {"metadata": {"total_size": size}, "weight_map": file_of}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder
