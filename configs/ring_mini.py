"""Reasoning RL of Ring-mini-2.0 (16.3B parameters, 1.4B active) with IcePop under C3PO++.

The weights and the tokenizer are a Hugging Face folder on disk: put it at `checkpoints/Ring-mini-2.0`, or say where:

    --config=configs/ring_mini.py --config.init=DIR --config.tokenizer.path=DIR

Hyper-parameters are those of Ring-1T (reference notes, papers.md 1.2) where the paper gives them: learning rate, AdamW,
alpha and beta, no KL term, temperature 1, 480 prompts x 8 rollouts, and for `sft.steps > 0` the Long-CoT stage.  The
paper is silent about the token budget, the pool, the retention and the clip range; these are this project's choices.

The model's own context is 32,768 tokens.  YaRN doubles it to the paper's 65,536:

    --config.model.rope_scaling='{"factor": 2.0, "original_max_position_embeddings": 32768}'
    --config.model.max_position_embeddings=65536 --config.rollout.max_tokens=63488 --config.packing.length=65536
"""

from configs.schema import (
  AnswerFormat,
  ChatTemplate,
  IcePopConfig,
  ModelConfig,
  OptimizerConfig,
  PackingConfig,
  Remat,
  RLConfig,
  RolloutConfig,
  RolloutDtype,
  RunConfig,
  Schedule,
  SFTConfig,
  TaskConfig,
  TaskSource,
  TokenizerConfig,
)

PROMPT = "{question}\nThink step by step and put the final answer in \\boxed{{}}."
# Tasks whose answer is one number or expression, so that \boxed{} decides them; weights follow their difficulty.
SOURCES = {
  "gsm_symbolic": 4.0,
  "number_sequence": 2.0,
  "polynomial_multiplication": 2.0,
  "dice": 2.0,
  "count_primes": 1.0,
  "fraction_simplification": 1.0,
  "lcm": 1.0,
  "products": 1.0,
  "simple_equations": 1.0,
  "simple_geometry": 1.0,
}
ROLLOUTS_PER_STEP = 480 * 8
MEAN_TOKENS = 8192  # of one rollout, prompt included; with it the token budget is the paper's batch


def get_config() -> RunConfig:
  return RunConfig(
    name="ring_mini",
    init="checkpoints/Ring-mini-2.0",
    tokenizer=TokenizerConfig(path="checkpoints/Ring-mini-2.0", template=ChatTemplate.CHAT, thinking=True),
    model=ModelConfig(
      vocab_size=157_184,
      hidden_size=2048,
      num_hidden_layers=20,
      num_attention_heads=16,
      num_key_value_heads=4,
      head_dim=128,
      intermediate_size=5120,
      moe_intermediate_size=512,
      num_experts=256,
      num_experts_per_tok=8,
      num_shared_experts=1,
      first_k_dense_replace=1,
      n_group=8,
      topk_group=4,
      routed_scaling_factor=2.5,
      rotary_dim=64,
      rope_theta=600_000.0,
      max_position_embeddings=32_768,
      dtype="bfloat16",
      param_dtype="float32",  # at a rate of 2e-6 a step is less than half a unit of bfloat16: nothing would move
      remat=Remat.FULL,
    ),
    task=TaskConfig(
      mixture=tuple(
        TaskSource(name=name, weight=weight, prompt=PROMPT, completion="\\boxed{{{answer}}}")
        for name, weight in SOURCES.items()
      ),
      answer=AnswerFormat.BOXED,
      workers=32,
    ),
    sft=SFTConfig(
      steps=0,
      optimizer=OptimizerConfig(learning_rate=2e-4, schedule=Schedule.COSINE, warmup_steps=30, weight_decay=0.1),
    ),
    rl=RLConfig(
      steps=200,
      objective=IcePopConfig(alpha=0.5, beta=5.0, kl_coef=0.0),
      optimizer=OptimizerConfig(learning_rate=2e-6, b1=0.9, b2=0.999, weight_decay=0.01),
      eval_every=10,
    ),
    rollout=RolloutConfig(
      token_budget=ROLLOUTS_PER_STEP * MEAN_TOKENS,
      slots=1024,
      pool=ROLLOUTS_PER_STEP,
      retention=2,
      group_size=8,
      dtype=RolloutDtype.BFLOAT16,
      max_prompt_tokens=2048,
      max_tokens=30_720,
      steps_per_dispatch=16,
      temperature=1.0,
    ),
    packing=PackingConfig(length=32_768, rows=8),
  )
