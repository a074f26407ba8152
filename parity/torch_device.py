"""Where PyTorch computes, said once: what is made without a device lies there (`torch.get_default_device`)."""

import torch

from configs.base import require


def use(name: str) -> None:
  """Args:
    name: cpu or cuda.

  Raises:
    ConfigError: there is no GPU for PyTorch.
  """
  if name == "cuda":  # not even "cpu" is said otherwise: to have said any costs every operation something
    require(torch.cuda.is_available(), "--torch_device=cuda: PyTorch sees no GPU here")
    torch.set_default_device("cuda")


def describe() -> str:
  return torch.cuda.get_device_name() if torch.get_default_device().type == "cuda" else "cpu"
