"""Parameters between the project's tree (nested dicts, layers stacked) and the twin's tensors (the checkpoint's names).

Written from the checkpoint's table (bailing_moe_v2.md section 2), apart from `ring_jax.checkpoint`, whose mistakes it would
otherwise repeat.  Both ways are exact copies.

Dimension key: D hidden, H query heads, K kv heads, d head dim, E experts, f expert width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from configs.schema import ModelConfig
from parity.torch_twin.model import RingTwin, ScalarTwin, Trunk

Tree = Mapping[str, Any]
State = dict[str, torch.Tensor]

_MTP_NAMES = {"enorm.weight": "enorm", "hnorm.weight": "hnorm", "final_layernorm.weight": "final_norm"}


def build(config: ModelConfig, params: Tree, device: torch.device | str | None = None) -> Any:
  """The twin holding these parameters: a `RingTwin`, or a `ScalarTwin` of a tree {"trunk", "head"}.

  Without a device it is on PyTorch's default one, which `parity.run` sets.
  """
  with torch.device("meta"):
    model = ScalarTwin(config) if "head" in params else RingTwin(config)
  model = model.to_empty(device=device or torch.get_default_device())
  load(model, params)
  return model


def load(model: Trunk, params: Tree) -> None:
  """Copies the tree into the twin.

  Raises:
    ValueError: the tree does not give every tensor exactly once, in its shape.
  """
  try:
    state, expected = to_state(model.config, params), model.state_dict()
  except KeyError as error:
    raise ValueError(f"parameter tree does not fit the twin: it has no {error}") from None
  wrong = sorted(
    name for name in state.keys() | expected.keys()
    if name not in state or name not in expected or state[name].shape != expected[name].shape
  )  # fmt: skip
  if wrong:
    raise ValueError(f"parameter tree does not fit the twin: {wrong[0]} and {len(wrong) - 1} more")
  model.load_state_dict(state)


def to_state(config: ModelConfig, params: Tree) -> State:
  """The tree's arrays (of any kind that NumPy reads) under the checkpoint's names."""
  if "head" in params:
    head = {"head.weight": params["head"]["kernel"], "head.bias": np.reshape(params["head"]["bias"], 1)}
    return to_state(config, params["trunk"]) | {name: _tensor(value) for name, value in head.items()}
  state = {
    "model.word_embeddings.weight": params["embed"]["embedding"],
    "model.norm.weight": params["final_norm"]["scale"],
  }
  if "lm_head" in params:
    state["lm_head.weight"] = np.asarray(params["lm_head"]["kernel"]).T
  for number, tree in _layers(config, params):
    for name, value in layer_to_state(config, tree).items():
      state[f"model.layers.{number}.{name}"] = value
  return {name: _tensor(value) for name, value in state.items()}


def params_of(model: Trunk) -> dict[str, Any]:
  """The twin's parameters as a tree of NumPy arrays."""
  return from_state(model.config, model.state_dict())


def gradients_of(model: Trunk) -> dict[str, Any]:
  """The twin's gradients as a tree; 0 where nothing reached a tensor, as for the selection bias."""
  state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
  state |= {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
  return from_state(model.config, state)


def from_state(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
  """The inverse of `to_state`; bfloat16, which NumPy lacks, comes as float32."""
  arrays = {name: _array(value) for name, value in state.items()}
  depth, first = config.num_hidden_layers, config.first_k_dense_replace
  layers = []
  for number in range(depth + config.num_nextn_predict_layers):
    prefix = f"model.layers.{number}."
    own = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    layers.append(_layer_from_state(config, own))
  tree: dict[str, Any] = {
    "embed": {"embedding": arrays["model.word_embeddings.weight"]},
    "final_norm": {"scale": arrays["model.norm.weight"]},
  }
  if "lm_head.weight" in arrays:
    tree["lm_head"] = {"kernel": arrays["lm_head.weight"].T}
  for name, part in (("dense_layers", layers[:first]), ("moe_layers", layers[first:depth])):
    if part:
      tree[name] = _map(lambda *values: np.stack(values), *part)
  if config.num_nextn_predict_layers:
    prefix = f"model.layers.{depth}."
    tree["mtp"] = {ours: {"scale": arrays[prefix + theirs]} for theirs, ours in _MTP_NAMES.items()}
    tree["mtp"] |= {"eh_proj": {"kernel": arrays[prefix + "eh_proj.weight"].T}, "block": layers[depth]}
  if "head.weight" in arrays:
    return {"trunk": tree, "head": {"kernel": arrays["head.weight"], "bias": arrays["head.bias"].reshape(())}}
  return tree


# ---------------------------------------------------------------------------------------------------------------------
# One layer


def _layers(config: ModelConfig, params: Tree):
  """(number, the layer's own tree) of every layer, the MTP layer last."""
  first = config.first_k_dense_replace
  for number in range(config.num_hidden_layers):
    stack, index = ("dense_layers", number) if number < first else ("moe_layers", number - first)
    yield number, _map(lambda value, index=index: np.asarray(value)[index], params[stack])
  if config.num_nextn_predict_layers:
    yield config.num_hidden_layers, {**params["mtp"]["block"], "mtp": params["mtp"]}


def fuse_qkv(config: ModelConfig, attention: Tree) -> np.ndarray:
  """[(H + 2 K) d, D]: all query heads, all key heads, all value heads (2.1)."""
  rows = [
    np.moveaxis(np.asarray(attention[name]), 0, -1).reshape(-1, config.hidden_size) for name in ("wq", "wk", "wv")
  ]
  return np.concatenate(rows)


def layer_to_state(config: ModelConfig, layer: Tree) -> dict[str, np.ndarray]:
  """One layer's tensors, without their prefix."""
  attention = layer["attention"]
  state = {
    "input_layernorm.weight": layer["input_norm"]["scale"],
    "post_attention_layernorm.weight": layer["post_norm"]["scale"],
    "attention.query_key_value.weight": fuse_qkv(config, attention),
    "attention.query_layernorm.weight": attention["q_norm"]["scale"],
    "attention.key_layernorm.weight": attention["k_norm"]["scale"],
    "attention.dense.weight": np.asarray(attention["wo"]).reshape(-1, config.hidden_size).T,
  }
  if "mlp" in layer:
    state |= _gated("mlp", **layer["mlp"])
  else:
    moe = layer["moe"]
    state |= {"mlp.gate.weight": np.asarray(moe["router"]["kernel"]).T, "mlp.gate.expert_bias": moe["router"]["bias"]}
    gate_up, down = np.asarray(moe["experts"]["gate_up"]), np.asarray(moe["experts"]["down"])
    for e in range(config.num_experts):
      state |= _gated(f"mlp.experts.{e}", gate_up[e, :, 0], gate_up[e, :, 1], down[e])
    if "shared" in moe:
      state |= _gated("mlp.shared_experts", **moe["shared"])
  if "mtp" in layer:
    state |= {theirs: layer["mtp"][ours]["scale"] for theirs, ours in _MTP_NAMES.items()}
    state["eh_proj.weight"] = np.asarray(layer["mtp"]["eh_proj"]["kernel"]).T
  return state


def _gated(prefix: str, gate, up, down) -> dict[str, np.ndarray]:
  parts = {"gate": gate, "up": up, "down": down}
  return {f"{prefix}.{name}_proj.weight": np.asarray(value).T for name, value in parts.items()}


def _layer_from_state(config: ModelConfig, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  D, H, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
  q, k, v = np.split(state["attention.query_key_value.weight"], [H * d, (H + K) * d])

  def heads(rows: np.ndarray) -> np.ndarray:
    return np.moveaxis(rows.reshape(-1, d, D), -1, 0)

  def gated(prefix: str) -> dict[str, np.ndarray]:
    return {name: state[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up", "down")}

  layer: dict[str, Any] = {
    "input_norm": {"scale": state["input_layernorm.weight"]},
    "post_norm": {"scale": state["post_attention_layernorm.weight"]},
    "attention": {
      "wq": heads(q), "wk": heads(k), "wv": heads(v), "wo": state["attention.dense.weight"].T.reshape(H, d, D),
      "q_norm": {"scale": state["attention.query_layernorm.weight"]},
      "k_norm": {"scale": state["attention.key_layernorm.weight"]},
    },
  }  # fmt: skip
  if "mlp.gate.weight" not in state:
    return layer | {"mlp": gated("mlp")}
  experts = [gated(f"mlp.experts.{e}") for e in range(config.num_experts)]
  moe: dict[str, Any] = {
    "router": {"kernel": state["mlp.gate.weight"].T, "bias": state["mlp.gate.expert_bias"]},
    "experts": {
      "gate_up": np.stack([np.stack([expert["gate"], expert["up"]], axis=1) for expert in experts]),
      "down": np.stack([expert["down"] for expert in experts]),
    },
  }
  if config.num_shared_experts:
    moe["shared"] = gated("mlp.shared_experts")
  return layer | {"moe": moe}


# ---------------------------------------------------------------------------------------------------------------------
# Small things


def _map(function: Callable, tree: Tree, *others: Tree) -> dict[str, Any]:
  return {
    key: _map(function, value, *(other[key] for other in others))
    if isinstance(value, Mapping)
    else function(value, *(other[key] for other in others))
    for key, value in tree.items()
  }


def _tensor(value: Any) -> torch.Tensor:
  array = np.asarray(value)
  return torch.from_numpy(np.array(array, np.float64 if array.dtype == np.float64 else np.float32))


def _array(value: torch.Tensor) -> np.ndarray:
  value = value.detach().cpu()
  return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
