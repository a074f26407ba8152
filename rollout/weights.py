"""The engine's copy of the weights, in a dtype of its own.

What the engine stores is what makes it disagree with the trainer, and what IcePop is for: bfloat16, or eight- and
four-bit values with one float32 scale per output channel (symmetric, round to nearest even).  Only matrices of the
layers are quantised; embedding, lm_head, norms and router keep their precision, as in the FP8 checkpoints of the model
family (bailing_moe_v2.md 2.5).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from configs.schema import RolloutDtype

# The axes that a matmul sums over, counted from the end so that stacked layers need no other rule.
_INPUT_AXES = {
  "wq": (-3,), "wk": (-3,), "wv": (-3,), "wo": (-3, -2), "gate": (-2,), "up": (-2,), "down": (-2,), "gate_up": (-3,),
}  # fmt: skip

_STORAGE = {
  RolloutDtype.INT8: (jnp.int8, 127.0),
  RolloutDtype.INT4: (jnp.int4, 7.0),
  RolloutDtype.FP8: (jnp.float8_e4m3fn, 448.0),
}


class Quantized(NamedTuple):
  """values * scale is the weight; scale has size 1 along the summed axes."""

  values: jax.Array
  scale: jax.Array


def compute_dtype(dtype: RolloutDtype, model_dtype: str) -> str:
  """What the engine computes in: bfloat16 weights mean bfloat16 activations; otherwise the model's own dtype."""
  return "bfloat16" if dtype is RolloutDtype.BFLOAT16 else model_dtype


def pack(params: dict[str, Any], dtype: RolloutDtype) -> dict[str, Any]:
  """The trainer's tree as the engine stores it.  The MTP layer is left behind: rollouts do not use it."""
  params = {name: part for name, part in params.items() if name != "mtp"}

  def convert(path, weight):
    names = [key.key for key in path]
    if dtype is RolloutDtype.FLOAT32 or "router" in names:
      return weight
    if dtype is RolloutDtype.BFLOAT16:
      return weight.astype(jnp.bfloat16)
    if names[-1] not in _INPUT_AXES:
      return weight
    storage, largest = _STORAGE[dtype]
    weight32 = weight.astype(jnp.float32)
    peak = jnp.max(jnp.abs(weight32), axis=_INPUT_AXES[names[-1]], keepdims=True)
    scale = jnp.where(peak > 0, peak / largest, 1.0)
    scaled = weight32 / scale
    if jnp.issubdtype(storage, jnp.integer):
      scaled = jnp.clip(jnp.round(scaled), -largest, largest)
    return Quantized(scaled.astype(storage), scale)

  return jax.tree_util.tree_map_with_path(convert, params)


def unpack(stored: dict[str, Any], dtype: str) -> dict[str, Any]:
  """The tree as the model takes it; called inside the jitted step, so that what is kept stays small."""

  def restore(leaf):
    if isinstance(leaf, Quantized):
      return (leaf.values.astype(jnp.float32) * leaf.scale).astype(dtype)
    return leaf

  return jax.tree.map(restore, stored, is_leaf=lambda leaf: isinstance(leaf, Quantized))
