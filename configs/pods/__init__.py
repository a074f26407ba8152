"""Ring-mini, Ring-flash and Ring-1T on pods: one file each, laid out as compiled (docs/sharding.md has what each needs).

Rows and rollouts are 32,768 tokens long; `configs.scaling.at_length` and `launch.compile --length` change that.
"""

import dataclasses

from configs.scaling import at_length, spread
from configs.schema import RunConfig

LENGTH = 32_768
PAGE = 256  # tokens: long answers, few pages


def on_pod(config: RunConfig, **layout: int | bool) -> RunConfig:
  """The run in pages, at this length, spread as `scaling.spread` is told."""
  config = at_length(config, LENGTH)
  config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, page_size=PAGE))
  return spread(config, **layout)
