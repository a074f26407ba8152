"""The outside oracle: transformers' `Glm4MoeForCausalLM` holding a ring-jax model's parameters.

GLM-4-MoE and Ling 2.0 (without its MTP layer) are the same function under other names (bailing_moe_v2.md section 4), so
its logits and gradients judge this project's forward and backward passes.  The mapping below is written for this
purpose only: it shares nothing with `ring_jax.checkpoint`, whose mistakes it is to find.

    tree                                    GLM
    attention.{wq, wk, wv} [D, H, d]        self_attn.{q, k, v}_proj [H * d, D]
    attention.wo [H, d, D]                  self_attn.o_proj [D, H * d]
    moe.router.{kernel, bias}               mlp.gate.{weight, e_score_correction_bias}
    moe.experts.gate_up [E, D, 2, f]        mlp.experts.gate_up_proj [E, 2 * f, D]
    moe.experts.down [E, f, D]              mlp.experts.down_proj [E, D, f]
    a weight [in, out]                      a weight [out, in]

Dimension key: B rows, T positions, V vocabulary, D hidden, H heads, d head dim, E experts, f expert width, L layers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from configs.schema import ModelConfig

Tree = Mapping[str, Any]


def glm_config(config: ModelConfig) -> Glm4MoeConfig:
  """The same architecture in GLM's fields; GLM's own defaults differ, so that all are set.

  Raises:
    ValueError: no shared expert, which GLM always has.
  """
  if config.num_shared_experts == 0:
    raise ValueError("Glm4Moe always has a shared expert: num_shared_experts must be at least 1")
  rope: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": config.rope_theta,
    "partial_rotary_factor": config.rotary_dim / config.head_dim,
  }
  if config.rope_scaling is not None:
    yarn = config.rope_scaling
    rope |= {
      "rope_type": "yarn",
      "factor": yarn.factor,
      "original_max_position_embeddings": yarn.original_max_position_embeddings,
      "beta_fast": yarn.beta_fast,
      "beta_slow": yarn.beta_slow,
    }
  same = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "first_k_dense_replace", "num_experts_per_tok", "n_group",
    "topk_group", "routed_scaling_factor", "norm_topk_prob", "rms_norm_eps", "max_position_embeddings",
  )  # fmt: skip
  return Glm4MoeConfig(
    **{name: getattr(config, name) for name in same},
    n_routed_experts=config.num_experts,
    n_shared_experts=config.num_shared_experts,
    rope_parameters=rope,
    use_qk_norm=True,
    attention_bias=False,
    num_mtp_layers=0,
    tie_word_embeddings=False,
    attn_implementation="eager",
    experts_implementation="eager",
  )


def build(config: ModelConfig, params: Tree, dtype: torch.dtype = torch.float32) -> Glm4MoeForCausalLM:
  """The model with these parameters (arrays of any kind that NumPy reads), on PyTorch's default device.

  Raises:
    ValueError: the tree does not give every GLM tensor exactly once.
  """
  model = Glm4MoeForCausalLM(glm_config(config)).to(dtype)
  state = {name: torch.from_numpy(np.array(value)) for name, value in _to_glm(config, params)}
  expected = model.state_dict()
  if state.keys() != expected.keys():
    raise ValueError(f"parameter tree does not fit GLM: {sorted(state.keys() ^ expected.keys())[:5]}")
  model.load_state_dict(state, strict=True)
  return model.to(torch.get_default_device()).eval()


def logits(model: Glm4MoeForCausalLM, tokens_BxT: np.ndarray) -> np.ndarray:
  """Logits [B, T, V], float32."""
  with torch.no_grad():
    logits_BxTxV = model(input_ids=torch.as_tensor(tokens_BxT, device=model.device).long(), use_cache=False).logits
  return logits_BxTxV.float().cpu().numpy()


def loss_and_gradients(
  model: Glm4MoeForCausalLM, config: ModelConfig, tokens_BxT: np.ndarray
) -> tuple[float, dict[str, Any]]:
  """Mean cross-entropy of the next token over all rows, and its gradient as a tree with the parameters' keys.

  The tree has no router bias (it has no gradient) and no MTP layer.
  """
  tokens = torch.as_tensor(tokens_BxT, device=model.device).long()
  model.zero_grad()
  logits_BxTxV = model(input_ids=tokens, use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(logits_BxTxV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
  loss.backward()
  gradients = {
    name: np.zeros(tuple(parameter.shape), np.float32)
    if parameter.grad is None
    else parameter.grad.float().cpu().numpy()
    for name, parameter in model.named_parameters()
  }
  return loss.item(), _from_glm(config, gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Tree to GLM


def _numpy(value: Any) -> np.ndarray:
  array = np.asarray(value)
  return array if array.dtype == np.float64 else array.astype(np.float32)


def _to_glm(config: ModelConfig, params: Tree) -> Iterator[tuple[str, np.ndarray]]:
  yield "model.embed_tokens.weight", _numpy(params["embed"]["embedding"])
  yield "model.norm.weight", _numpy(params["final_norm"]["scale"])
  yield "lm_head.weight", _numpy(params["lm_head"]["kernel"]).T
  for index in range(config.num_hidden_layers):
    moe = index >= config.first_k_dense_replace
    stack = params["moe_layers" if moe else "dense_layers"]
    depth = index - config.first_k_dense_replace if moe else index
    for name, value in _layer_to_glm(_entry(stack, depth), config.hidden_size):
      yield f"model.layers.{index}.{name}", value


def _entry(tree: Tree, index: int) -> dict[str, Any]:
  return {
    key: _entry(value, index) if isinstance(value, Mapping) else _numpy(value)[index] for key, value in tree.items()
  }


def _layer_to_glm(layer: Tree, D: int) -> Iterator[tuple[str, np.ndarray]]:
  attention = layer["attention"]
  yield "input_layernorm.weight", layer["input_norm"]["scale"]
  yield "post_attention_layernorm.weight", layer["post_norm"]["scale"]
  for name in "qkv":
    yield f"self_attn.{name}_proj.weight", attention[f"w{name}"].reshape(D, -1).T
  yield "self_attn.o_proj.weight", attention["wo"].reshape(-1, D).T
  for name in "qk":
    yield f"self_attn.{name}_norm.weight", attention[f"{name}_norm"]["scale"]
  if "mlp" in layer:
    yield from _gated_to_glm("mlp", layer["mlp"])
    return
  moe = layer["moe"]
  yield "mlp.gate.weight", moe["router"]["kernel"].T
  yield "mlp.gate.e_score_correction_bias", moe["router"]["bias"]
  E, _, _, f = moe["experts"]["gate_up"].shape
  yield "mlp.experts.gate_up_proj", moe["experts"]["gate_up"].reshape(E, D, 2 * f).transpose(0, 2, 1)
  yield "mlp.experts.down_proj", moe["experts"]["down"].transpose(0, 2, 1)
  yield from _gated_to_glm("mlp.shared_experts", moe["shared"])


def _gated_to_glm(prefix: str, mlp: Tree) -> Iterator[tuple[str, np.ndarray]]:
  for name in ("gate", "up", "down"):
    yield f"{prefix}.{name}_proj.weight", mlp[name].T


# ---------------------------------------------------------------------------------------------------------------------
# GLM to tree, for gradients


def _from_glm(config: ModelConfig, grads: Mapping[str, np.ndarray]) -> dict[str, Any]:
  layers = [_layer_from_glm(config, grads, index) for index in range(config.num_hidden_layers)]
  first = config.first_k_dense_replace
  tree: dict[str, Any] = {
    "embed": {"embedding": grads["model.embed_tokens.weight"]},
    "final_norm": {"scale": grads["model.norm.weight"]},
    "lm_head": {"kernel": grads["lm_head.weight"].T},
  }
  for name, part in (("dense_layers", layers[:first]), ("moe_layers", layers[first:])):
    if part:
      tree[name] = _stacked(part)
  return tree


def _layer_from_glm(config: ModelConfig, grads: Mapping[str, np.ndarray], index: int) -> dict[str, Any]:
  D, E, f = config.hidden_size, config.num_experts, config.moe_intermediate_size
  H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

  def take(name: str) -> np.ndarray:
    return grads[f"model.layers.{index}.{name}"]

  def gated(prefix: str) -> dict[str, np.ndarray]:
    return {name: take(f"{prefix}.{name}_proj.weight").T for name in ("gate", "up", "down")}

  layer: dict[str, Any] = {
    "input_norm": {"scale": take("input_layernorm.weight")},
    "post_norm": {"scale": take("post_attention_layernorm.weight")},
    "attention": {
      "wq": take("self_attn.q_proj.weight").T.reshape(D, H, d),
      "wk": take("self_attn.k_proj.weight").T.reshape(D, K, d),
      "wv": take("self_attn.v_proj.weight").T.reshape(D, K, d),
      "wo": take("self_attn.o_proj.weight").T.reshape(H, d, D),
      "q_norm": {"scale": take("self_attn.q_norm.weight")},
      "k_norm": {"scale": take("self_attn.k_norm.weight")},
    },
  }
  if index < config.first_k_dense_replace:
    return layer | {"mlp": gated("mlp")}
  experts = {
    "gate_up": take("mlp.experts.gate_up_proj").transpose(0, 2, 1).reshape(E, D, 2, f),
    "down": take("mlp.experts.down_proj").transpose(0, 2, 1),
  }
  moe = {"router": {"kernel": take("mlp.gate.weight").T}, "experts": experts, "shared": gated("mlp.shared_experts")}
  return layer | {"moe": moe}


def _stacked(layers: list[dict[str, Any]]) -> dict[str, Any]:
  stacked: dict[str, Any] = {}
  for key, value in layers[0].items():
    column = [layer[key] for layer in layers]
    stacked[key] = _stacked(column) if isinstance(value, dict) else np.stack(column)
  return stacked
