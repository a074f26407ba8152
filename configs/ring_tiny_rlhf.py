"""The whole pipeline of Ring-1T at toy size: `make rlhf`.  Cold start, reasoning RL, then general RL with a reward model.

The reward model learns from pairs of answers, of which the better one is nearer to the right answer.  RLHF is PPO: actor and
critic are trained, the reference and the reward model judge.  Its reward is the reward model's alone; the verifier only
measures.
"""

import dataclasses

from configs import ring_tiny
from configs.schema import OptimizerConfig, PPOConfig, RewardModelConfig, RLConfig, RunConfig


def get_config() -> RunConfig:
  base = ring_tiny.get_config()
  return dataclasses.replace(
    base,
    name="ring_tiny_rlhf",
    rl=dataclasses.replace(base.rl, steps=75),
    reward_model=RewardModelConfig(
      steps=300,
      batch_size=64,
      optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=10, schedule="cosine"),
    ),
    rlhf=RLConfig(
      steps=50,
      reward="model",
      advantage="gae",
      objective=base.rl.objective,
      # With ppo.kl_coef=0.02 and three times the rate the actor learns to please the reward model and forgets to spell.
      ppo=PPOConfig(
        kl_coef=0.2, reward_clip=5.0, value_clip=0.5, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5)
      ),
      optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5),
      eval_every=25,
    ),
  )
