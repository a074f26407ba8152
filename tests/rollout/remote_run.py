"""The run of the workers that the tests start: small, and with answers that are long enough to lose a worker in."""

import dataclasses

from configs.schema import PackingConfig, RunConfig, Unit
from tests.train import small_run


def get_config() -> RunConfig:
  base = small_run.get_config()
  return dataclasses.replace(
    base,
    name="remote",
    sft=dataclasses.replace(base.sft, steps=0),
    rl=dataclasses.replace(base.rl, steps=4, minibatches=1, eval_every=0),
    rollout=dataclasses.replace(
      base.rollout, slots=4, pool=16, group_size=2, unit=Unit.ROLLOUT, token_budget=600, max_tokens=100, steps_per_dispatch=2,
      prefill_batch=4,
    ),
    packing=PackingConfig(length=128, rows=4),
    eval=dataclasses.replace(base.eval, problems=4, samples=1, slots=4),
    checkpoint=dataclasses.replace(base.checkpoint, every=1),
  )  # fmt: skip
