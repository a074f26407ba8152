"""The main job of `make train`: a tiny Ring learns to spell backwards by SFT and RL, in minutes on two CPU cores.

The model is a full Ling 2.0 mixture of experts at toy size.
"""

from configs.schema import (
  CheckpointConfig,
  EvalConfig,
  IcePopConfig,
  ModelConfig,
  OptimizerConfig,
  PackingConfig,
  RLConfig,
  RolloutConfig,
  RunConfig,
  SFTConfig,
  TaskConfig,
  TaskSource,
)


def get_config() -> RunConfig:
  return RunConfig(
    name="ring_tiny",
    model=ModelConfig(
      vocab_size=320,
      hidden_size=64,
      num_hidden_layers=3,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=16,
      intermediate_size=192,
      moe_intermediate_size=32,
      num_experts=8,
      num_experts_per_tok=2,
      first_k_dense_replace=1,
      n_group=2,
      topk_group=1,
      routed_scaling_factor=1.5,
      rope_theta=10_000.0,
      max_position_embeddings=512,
      initializer_range=0.08,
    ),
    task=TaskConfig(
      mixture=(TaskSource(name="spell_backward", options={"min_word_len": 3, "max_word_len": 10}, prompt="{word}"),),
    ),
    sft=SFTConfig(
      steps=1000,
      batch_size=64,
      target_accuracy=0.4,
      probe_from=150,
      probe_every=10,
      optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
    ),
    rl=RLConfig(
      steps=150,
      objective=IcePopConfig(clip_low=0.2, clip_high=0.28),
      optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5),
      eval_every=25,
    ),
    rollout=RolloutConfig(
      token_budget=2000,
      slots=256,
      group_size=8,
      max_prompt_tokens=20,
      max_tokens=12,
      steps_per_dispatch=4,
      prefill_batch=16,
    ),
    packing=PackingConfig(length=128, rows=16),
    eval=EvalConfig(problems=512, samples=8, slots=256),
    checkpoint=CheckpointConfig(every=10),
  )
