"""A tiny run with all six roles in its rlhf phase."""

import dataclasses

from configs.schema import RewardModelConfig, RunConfig
from tests.configs import small_run


def get_config() -> RunConfig:
  base = small_run.get_config()
  return dataclasses.replace(
    base,
    name="rlhf",
    rl=dataclasses.replace(base.rl, steps=0),
    rlhf=dataclasses.replace(base.rl, reward="model", advantage="gae"),
    reward_model=RewardModelConfig(steps=10),
    # Of widths that eight devices cut into equal parts.
    model=dataclasses.replace(base.model, hidden_size=32, num_experts=8),
    rollout=dataclasses.replace(base.rollout, slots=64, pool=256, token_budget=1000),
  )
