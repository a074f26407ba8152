"""A Hugging Face folder that vLLM can open (bailing_moe_v2.md 6): `ring_jax.checkpoint.hf` writes it, with every field
that vLLM reads and the class that `auto_map` names; here shapes are checked first, and what vLLM would skip is left out.
"""

import dataclasses
import os
import pathlib

from configs.schema import ModelConfig, RolloutDtype
from parity.vllm.errors import VLLMError
from ring_jax.checkpoint import hf
from ring_jax.model import Params
from rollout import weights

_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention
_MULTIPLE = 32  # its CPU kernels for experts


def check_shapes(config: ModelConfig) -> None:
  """Raises:
  VLLMError: naming the field that vLLM has no kernel for on a CPU; its own message names none.
  """
  for name in ("hidden_size", "moe_intermediate_size"):
    value = getattr(config, name)
    if value % _MULTIPLE:
      raise VLLMError(f"model.{name}={value}: vLLM needs a multiple of {_MULTIPLE}")
  if config.head_dim not in _HEAD_DIMS:
    raise VLLMError(f"model.head_dim={config.head_dim}: vLLM needs one of {', '.join(map(str, _HEAD_DIMS))}")


def export(folder: str | os.PathLike, config: ModelConfig, params: Params, dtype: str = "float32") -> pathlib.Path:
  """Writes the folder; the MTP layer is left out, which vLLM would skip in silence.

  Args:
    folder: must not exist, or be empty.
    dtype: of the weights, "float32" or "bfloat16"; router and selection bias stay float32.

  Raises:
    VLLMError: a shape that vLLM cannot run.
    CheckpointError: the folder holds something, or a leaf does not fit the config.
  """
  check_shapes(config)
  config = dataclasses.replace(config, num_nextn_predict_layers=0, dtype=dtype, param_dtype=dtype)
  folder = pathlib.Path(folder)
  hf.save(folder, config, weights.pack(params, RolloutDtype(dtype)))
  return folder
