"""A run whose numbers the tests may count on."""

from configs.schema import (
  EvalConfig,
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
    name="small",
    model=ModelConfig(
      vocab_size=320,
      hidden_size=16,
      num_hidden_layers=2,
      num_attention_heads=2,
      num_key_value_heads=1,
      head_dim=16,
      intermediate_size=32,
      moe_intermediate_size=8,
      num_experts=4,
      num_experts_per_tok=2,
      max_position_embeddings=512,
    ),
    task=TaskConfig(mixture=(TaskSource(name="spell_backward", options={"min_word_len": 3, "max_word_len": 10}),)),
    sft=SFTConfig(steps=10),
    rl=RLConfig(steps=10, optimizer=OptimizerConfig(learning_rate=3e-4)),
    rollout=RolloutConfig(token_budget=2000, slots=128, pool=256, max_prompt_tokens=20, max_tokens=12),
    packing=PackingConfig(length=128, rows=16),
    eval=EvalConfig(problems=512),
  )
