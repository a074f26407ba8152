"""`small_run` with all roles: a reward model, then RLHF with critic and reference."""

import dataclasses

from configs.schema import (
  IcePopConfig,
  MeshConfig,
  OptimizerConfig,
  ParallelConfig,
  PPOConfig,
  RewardModelConfig,
  RLConfig,
  RunConfig,
)
from tests.train import small_run


def get_config() -> RunConfig:
  base = small_run.get_config()
  # A gradient of almost nothing must not become a whole step, or rounding decides its sign.
  optimizer = OptimizerConfig(learning_rate=1e-3, eps=1e-4)
  return dataclasses.replace(
    base,
    name="placed",
    model=dataclasses.replace(
      base.model, num_hidden_layers=1, first_k_dense_replace=0, parallel=ParallelConfig(MeshConfig(fsdp=2))
    ),
    sft=dataclasses.replace(base.sft, steps=2),
    rl=dataclasses.replace(base.rl, steps=0),
    checkpoint=dataclasses.replace(base.checkpoint, every=1),
    reward_model=RewardModelConfig(steps=2, batch_size=16, probe_pairs=8, optimizer=optimizer),
    rlhf=RLConfig(
      steps=3,
      stream=4,
      staleness=1,
      reward="model",
      advantage="gae",
      objective=IcePopConfig(kl_coef=0.1),
      ppo=PPOConfig(kl_coef=0.1, reward_clip=5.0, optimizer=optimizer),
      optimizer=optimizer,
      eval_problems=8,
      eval_samples=2,
    ),
  )
