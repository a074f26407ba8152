"""ring-jax's side of the bench: `RingEngine` through prefill_batch, insert_batch and decode.

On a CPU a device is a core, as XLA spreads a step's small operations over cores badly.  What fits the caches is fastest with the
slots cut over them (`data`); what does not, with the weights cut over them (`tensor`), as each core then reads its own part
of the weights and not all of them (docs/speed.md).

Dimension key: N steps, B slots.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from configs.base import Enum
from configs.parallel import MeshConfig, ParallelConfig
from configs.scaling import rounded
from configs.schema import ModelConfig, RolloutConfig, RolloutDtype
from ring_jax.model import Params
from ring_jax.records import FinishReason
from rollout import filling
from rollout.engine import RingEngine
from rollout.jobs import Job, Running
from sharding.mesh import engine_mesh

PREFILL_TOKENS = 2048  # of one dispatch, where there are as many prompts


class Cut(Enum):
  """What is cut over the devices."""

  DATA = "data"  # slots
  TENSOR = "tensor"  # weights, as far as key heads allow, and slots over what is left


def mesh_of(cut: Cut, devices: int, slots: int, kv_heads: int) -> MeshConfig:
  """Over all devices, or over fewer where slots do not divide."""
  tensor = math.gcd(devices, kv_heads) if cut is Cut.TENSOR else 1
  rest = devices // tensor
  return MeshConfig(data=rest if slots % rest == 0 else 1, tensor=tensor)


class Ours:
  """One engine of `slots` slots.

  Args:
    length: prompt and answer together, at most.
    prompt: tokens of a prompt; how many are prefilled together depends on it.
    steps: of a dispatch.
    mesh: the devices, and what is cut over them.
    clock: in seconds.
  """

  def __init__(
    self,
    model: ModelConfig,
    params: Params,
    dtype: RolloutDtype,
    *,
    slots: int,
    prompt: int,
    length: int,
    steps: int,
    mesh: MeshConfig,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._clock = clock
    self._config = RolloutConfig(
      token_budget=1, slots=slots, group_size=1, dtype=dtype, max_prompt_tokens=prompt, max_tokens=length - prompt,
      prefill_batch=rounded(max(1, min(slots, PREFILL_TOKENS // prompt)), mesh.data), steps_per_dispatch=steps,
    )  # fmt: skip
    model = dataclasses.replace(model, parallel=ParallelConfig(mesh=mesh))
    # No end token: all engines draw the same number.
    self._engine = RingEngine(
      model, self._config, eos_ids=(), vocab_mask_V=np.ones(model.vocab_size, bool), seed=0,
      mesh=engine_mesh(mesh, "--threads"),
    )  # fmt: skip
    self._stored = self._engine.load_params(params)
    self._state = self._engine.init_decode_state()

  def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, np.ndarray, np.ndarray]:
    """(seconds until the host has all of it, tokens [N, B], log-probs [N, B])."""
    started = self._clock()
    jobs = [
      Running(Job(slot, slot, prompt, tokens), tokens, FinishReason.LENGTH, 0) for slot, prompt in enumerate(prompts)
    ]
    self._state = filling.insert(self._engine, self._stored, self._state, jobs)
    drawn: list[Any] = []
    for first in range(0, tokens, self._config.steps_per_dispatch):
      steps = min(self._config.steps_per_dispatch, tokens - first)
      self._state, out = self._engine.decode(self._stored, self._state, steps)
      drawn.append(jax.device_get(out))
    seconds = self._clock() - started
    if not all(out.valid_NxB[:, : len(prompts)].all() for out in drawn):
      raise RuntimeError("a slot fell silent before its last token")
    return seconds, *(np.concatenate([getattr(out, name) for out in drawn]) for name in ("token_NxB", "logp_NxB"))
