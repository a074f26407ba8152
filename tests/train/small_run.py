"""A run of seconds with everything in it: both phases, rollouts cut by the budget and resumed, partial credit."""

import dataclasses

from configs import ring_tiny
from configs.schema import CheckpointConfig, EvalConfig, PackingConfig, RunConfig


def get_config() -> RunConfig:
  base = ring_tiny.get_config()
  return dataclasses.replace(
    base,
    name="small",
    model=dataclasses.replace(
      base.model, vocab_size=272, hidden_size=32, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=32
    ),
    # Partial credit: a model that knows nothing still gets different rewards, and so a gradient.
    task=dataclasses.replace(base.task, train_size=500, held_out_size=32, exact=False),
    sft=dataclasses.replace(
      base.sft, steps=8, batch_size=16, probe_from=0, probe_every=4, probe_problems=8, probe_samples=2
    ),
    rl=dataclasses.replace(base.rl, steps=8, minibatches=2, eval_every=4, eval_problems=8, eval_samples=2),
    rollout=dataclasses.replace(
      base.rollout,
      token_budget=160,
      slots=16,
      pool=32,
      group_size=4,
      retention=6,
      steps_per_dispatch=3,
      prefill_batch=8,
    ),
    packing=PackingConfig(length=64, rows=4),
    eval=EvalConfig(problems=16, samples=2, slots=16),
    checkpoint=CheckpointConfig(every=3),
  )
