"""A run's config for more devices, and for a length."""

import dataclasses

from configs.parallel import ExpertParallel, MeshConfig, ParallelConfig, ShardingRules
from configs.schema import Memory, ModelConfig, Remat, RunConfig, YarnConfig

# What an MoE layer handles at a time: tokens times their width.
_CHUNK_NUMBERS = 4096 * 2048


def spread(
  config: RunConfig, *, fsdp: int, expert: int, slots: int = 0, small: bool = False, whole: bool = True
) -> RunConfig:
  """The run on fsdp x expert devices, each with a row of tokens in training.

  More rows are more microbatches, not more memory.

  Args:
    slots: of the engine; default: the config's.  Rounded up to a multiple of the devices.
    small: spend time to save memory: optimizer state and layer inputs wait in host memory.
    whole: every device of the engine has all weights but the experts', so that it gathers none at each token; else they
      are cut over fsdp.
  """
  devices = fsdp * expert
  train = ParallelConfig(
    MeshConfig(fsdp=fsdp, expert=expert),
    expert_parallel=ExpertParallel.ALL_TO_ALL if expert > 1 else ExpertParallel.LOCAL,
    moe_chunk=moe_chunk(config.model),
  )
  model = dataclasses.replace(config.model, parallel=train, remat=Remat.OFFLOAD if small else config.model.remat)
  slots = rounded(slots or config.rollout.slots, devices)
  rollout = dataclasses.replace(
    config.rollout,
    parallel=dataclasses.replace(train, rules=ShardingRules(embed=() if whole else ("fsdp",))),
    slots=slots,
    pool=max(config.rollout.pool, slots),
    prefill_batch=rounded(config.rollout.prefill_batch, devices),
    pages=rounded(config.rollout.pages, devices),
  )
  rl = config.rl
  if small:
    rl = dataclasses.replace(rl, optimizer=dataclasses.replace(rl.optimizer, memory=Memory.HOST))
  return dataclasses.replace(
    config,
    model=model,
    rl=rl,
    rollout=rollout,
    packing=dataclasses.replace(config.packing, rows=devices),
    eval=dataclasses.replace(config.eval, slots=rounded(config.eval.slots, devices)),
  )


def at_length(config: RunConfig, length: int) -> RunConfig:
  """The run with rollouts and rows of `length` tokens, prompt and answer together; by YaRN beyond the model's own."""
  model, own = config.model, config.model.max_position_embeddings
  if length > own:
    scaling = YarnConfig(factor=length / own, original_max_position_embeddings=own)
    model = dataclasses.replace(model, rope_scaling=scaling, max_position_embeddings=length)
  return dataclasses.replace(
    config,
    model=model,
    rollout=dataclasses.replace(config.rollout, max_tokens=length - config.rollout.max_prompt_tokens),
    packing=dataclasses.replace(config.packing, length=length),
  )


def moe_chunk(model: ModelConfig) -> int:
  """Tokens of a device that an MoE layer takes at a time."""
  return max(_CHUNK_NUMBERS // model.hidden_size, 1)


def rounded(value: int, parts: int) -> int:
  """Up to a multiple of `parts`."""
  return -(-value // parts) * parts
