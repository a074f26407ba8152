"""A tiny engine and its tokenizer, for the tests of both servers."""

import dataclasses

from configs.ring_tiny import get_config
from ring_jax.data.tokenizer import Tokenizer
from rollout.engine import RingEngine, Sampling

TOKENIZER = Tokenizer.build()
MODEL = dataclasses.replace(
  get_config().model,
  vocab_size=280,
  hidden_size=32,
  num_hidden_layers=2,
  intermediate_size=32,
  moe_intermediate_size=16,
)
CONFIG = dataclasses.replace(
  get_config().rollout, slots=2, pool=2, group_size=1, max_prompt_tokens=90, max_tokens=100, steps_per_dispatch=2,
  prefill_batch=2,
)  # fmt: skip
ENGINE = RingEngine(MODEL, CONFIG, eos_ids=(), vocab_mask_V=TOKENIZER.sampleable_mask(280), seed=1)
GREEDY = Sampling(0.0, 1.0, 0, 0)
