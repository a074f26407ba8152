"""Reasoning RL of Ring-flash-2.0 (103B parameters, 6.2B active); all but the model's shape is as in `ring_mini.py`.

--config=configs/ring_flash.py --config.init=DIR --config.tokenizer.path=DIR
"""

import dataclasses

from configs import ring_mini
from configs.schema import RunConfig


def get_config() -> RunConfig:
  base = ring_mini.get_config()
  return dataclasses.replace(
    base,
    name="ring_flash",
    init="checkpoints/Ring-flash-2.0",
    tokenizer=dataclasses.replace(base.tokenizer, path="checkpoints/Ring-flash-2.0"),
    model=dataclasses.replace(
      base.model,
      hidden_size=4096,
      num_hidden_layers=32,
      num_attention_heads=32,
      intermediate_size=9216,
      moe_intermediate_size=1024,
    ),
  )
