"""Arithmetic after a reasoning trace: `make think`.  The tiny Ring again, on another task.

The prompt opens <think>; the cold start imitates traces made by program (running sums), RL rewards exact answers only.
"""

import dataclasses

from configs import ring_tiny
from configs.schema import RunConfig, TaskConfig, TaskSource, TokenizerConfig


def get_config() -> RunConfig:
  base = ring_tiny.get_config()
  return dataclasses.replace(
    base,
    name="ring_tiny_think",
    task=TaskConfig(
      mixture=(
        TaskSource(
          name="chain_sum",
          options={"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1},
          prompt="{expression!c}",
          completion="{trace}</think>{answer}",
        ),
      ),
    ),
    tokenizer=TokenizerConfig(thinking=True),
    sft=dataclasses.replace(base.sft, steps=4000),
    rl=dataclasses.replace(base.rl, steps=300),
    rollout=dataclasses.replace(base.rollout, token_budget=6000, max_prompt_tokens=24, max_tokens=40),
  )
