"""Reasoning RL of Ring-1T (1.0T parameters, 51B active) at the paper's length of 65,536 tokens.

    --config=configs/ring_1t.py --config.init=DIR --config.tokenizer.path=DIR

Hyper-parameters as in `ring_mini.py`.  Ring-1T reads 65,536 tokens without YaRN.
"""

import dataclasses

from configs import ring_mini
from configs.schema import PackingConfig, RunConfig

MAX_LENGTH = 65_536  # of prompt and answer together


def get_config() -> RunConfig:
  base = ring_mini.get_config()
  return dataclasses.replace(
    base,
    name="ring_1t",
    init="checkpoints/Ring-1T",
    tokenizer=dataclasses.replace(base.tokenizer, path="checkpoints/Ring-1T"),
    model=dataclasses.replace(
      base.model,
      hidden_size=8192,
      num_hidden_layers=80,
      num_attention_heads=64,
      num_key_value_heads=8,
      intermediate_size=18_432,
      moe_intermediate_size=2048,
      first_k_dense_replace=4,
      max_position_embeddings=MAX_LENGTH,
    ),
    rollout=dataclasses.replace(base.rollout, max_tokens=MAX_LENGTH - base.rollout.max_prompt_tokens),
    packing=PackingConfig(length=MAX_LENGTH, rows=4),
  )
