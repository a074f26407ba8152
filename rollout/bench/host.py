"""What the host costs: the share of a C3PO++ iteration in which no program of the engine runs.

The driver waits for every dispatch, so that an iteration is its programs, one after the other, and what the scheduler,
the driver and the copies to the host do between them.  The programs are timed until their results are there.
"""

import dataclasses
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from configs.parallel import MeshConfig, ParallelConfig
from configs.scaling import rounded
from configs.schema import BudgetCounts, ModelConfig, RolloutConfig, RolloutDtype, Unit
from ring_jax.model import Params
from rollout.driver import RolloutDriver
from rollout.engine import Programs, RingEngine
from rollout.scheduler import C3POScheduler
from rollout.worker import EngineWorker
from sharding.mesh import engine_mesh

_GROUP = 8


def processor() -> str:
  """Its model name, where Linux tells it."""
  try:
    said = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.machine()
  return next((line.split(":", 1)[1].strip() for line in said if line.startswith("model name")), platform.machine())


class _Timed:
  """Programs that add up the seconds they take."""

  def __init__(self, clock: Callable[[], float]):
    self._clock, self.seconds = clock, 0.0

  def wrap(self, program: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
      started = self._clock()
      out = jax.block_until_ready(program(*arguments))
      self.seconds += self._clock() - started
      return out

    return call


class HostShare:
  """A driver whose rollouts all end at their last token, and are replaced, so that there is always something to do."""

  def __init__(
    self,
    model: ModelConfig,
    params: Params,
    dtype: RolloutDtype,
    *,
    slots: int,
    prompt: int,
    tokens: int,
    steps: int,
    mesh: MeshConfig,
    clock: Callable[[], float] = time.perf_counter,
  ):
    group = min(_GROUP, slots)
    config = RolloutConfig(
      token_budget=2 * slots * tokens, slots=slots, group_size=group, pool=2 * slots, unit=Unit.ROLLOUT, dtype=dtype,
      budget_counts=BudgetCounts.GENERATED, max_prompt_tokens=prompt, max_tokens=tokens, steps_per_dispatch=steps,
      prefill_batch=rounded(max(1, slots // group), mesh.data),
    )  # fmt: skip
    model = dataclasses.replace(model, parallel=ParallelConfig(mesh=mesh))
    engine = RingEngine(
      model, config, eos_ids=(), vocab_mask_V=np.ones(model.vocab_size, bool), seed=0,
      mesh=engine_mesh(mesh, "--threads"),
    )  # fmt: skip
    self._stored = engine.load_params(params)
    self._clock, self._timed = clock, _Timed(clock)
    engine.programs = Programs(*map(self._timed.wrap, engine.programs))
    self._scheduler = C3POScheduler(config)
    self._driver = RolloutDriver(EngineWorker(engine), self._scheduler, tokens)
    self._random = np.random.default_rng(0)
    self._prompt, self._vocab = prompt, model.vocab_size

  def _prompts(self, count: int) -> Sequence[tuple[int, list[int]]]:
    return [(index, self._random.integers(0, self._vocab, self._prompt).tolist()) for index in range(count)]

  def measure(self) -> float:
    """Of one iteration."""
    self._timed.seconds = 0.0
    started = self._clock()
    self._driver.iterate(self._stored, 0, self._prompts)
    seconds = self._clock() - started
    return 1.0 - self._timed.seconds / seconds
