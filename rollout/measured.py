"""C3PO++ against the synchronous batch on the real engine: the same answers, of the lengths that a trace gives.

    C3PO++        the driver's iterations until the trace has ended
    synchronous   batches of as many prompts as make a budget, each until its longest answer has ended

Both run the same programs over the same slots under the same weights and train on the same tokens.  An answer is as long as
the trace says: nothing ends it before, and the worker is told to end it there.  What is measured is the rollout phase, with
its prefills, partial answers again after every iteration included, and the host's work.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.schema import ModelConfig, RolloutConfig, RolloutSchedule
from ring_jax.model import init_params
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.events import EventLog
from rollout.scheduler import C3POScheduler
from rollout.simulator.lengths import Trace
from rollout.simulator.simulation import in_batches
from rollout.worker import EngineWorker, Events, Job


class ForcedWorker(EngineWorker):
  """Ends every answer at a length of its own; `answers` and `prompts` are tokens by uid."""

  answers: Sequence[int] = ()
  prompts: Sequence[int] = ()

  def begin(self, params: Any, version: int, running: Sequence[Job]) -> None:
    super().begin(params, version, [self._forced(job) for job in running])

  def advance(self, jobs: Sequence[Job]) -> Events:
    return super().advance([self._forced(job) for job in jobs])

  def _forced(self, job: Job) -> Job:
    drawn = len(job.tokens) - self.prompts[job.uid]
    return dataclasses.replace(job, max_tokens=self.answers[job.uid] - drawn)


@dataclasses.dataclass
class Phases:
  """All rollout phases of one schedule."""

  schedule: str
  seconds: float = 0.0
  prefill_seconds: float = 0.0  # of these
  dispatches: int = 0
  iterations: int = 0
  tokens_trained: int = 0
  rollouts_trained: int = 0
  tokens_wasted: int = 0
  max_staleness: int = 0  # versions


class Measurement:
  """Args:
  config: with room for the longest prompt and answer of the trace.
  groups: of a synchronous batch.
  """

  def __init__(self, model: ModelConfig, config: RolloutConfig, trace: Trace, groups: int):
    self._config, self._trace, self._groups = config, trace, groups
    everything = np.ones(model.vocab_size, bool)
    self._engine = RingEngine(model, config, eos_ids=(), vocab_mask_V=everything, seed=0)
    self._params = self._engine.load_params(init_params(model, 0))
    self._worker = ForcedWorker(self._engine)
    rng = np.random.default_rng(0)
    self._prompts = [
      rng.integers(model.vocab_size, size=trace.prompts[group * trace.group_size]).tolist()
      for group in range(trace.groups)
    ]

  def c3po(self, log: EventLog | None = None) -> Phases:
    phases = Phases("c3po")
    self._run(phases, self._config, log)
    return phases

  def synchronous(self) -> Phases:
    phases = Phases("synchronous")
    self._run(phases, in_batches(self._config, RolloutSchedule.SYNCHRONOUS, self._groups), None)
    return phases

  def _run(self, phases: Phases, config: RolloutConfig, log: EventLog | None) -> None:
    """One scheduler, to the end of the trace."""
    self._worker.answers, self._worker.prompts = self._trace.lengths, self._trace.prompts
    source = iter(enumerate(self._prompts))
    scheduler = C3POScheduler(config)
    driver = RolloutDriver(self._worker, scheduler, config.max_tokens, log=log)

    def counted(_) -> None:
      phases.dispatches += 1

    while not (scheduler.closed and not scheduler.in_flight):
      started = time.perf_counter()
      result, clock = driver.iterate(
        self._params, scheduler.iteration, lambda wanted: list(itertools.islice(source, wanted)), counted
      )
      phases.seconds += time.perf_counter() - started
      phases.prefill_seconds += clock.prefill
      phases.iterations += 1
      phases.rollouts_trained += len(result.rollouts)
      phases.tokens_trained += result.counts.trained
      phases.tokens_wasted += result.counts.wasted
      phases.max_staleness = max(phases.max_staleness, result.counts.max_staleness)


def compare(measurement: Measurement, repeats: int, log: EventLog | None = None) -> dict[str, Any]:
  """Plain JSON data: both schedules in turn, after one turn that compiles; the quicker of each one's turns counts.

  Args:
    log: of the last turn of C3PO++.
  """
  measurement.c3po()
  measurement.synchronous()
  turns = [
    (measurement.c3po(log if turn + 1 == repeats else None), measurement.synchronous()) for turn in range(repeats)
  ]
  c3po, batch = (min(phases, key=lambda one: one.seconds) for phases in zip(*turns, strict=True))
  token = lambda name, one: getattr(one, name) / one.tokens_trained  # noqa: E731
  return {
    "rollout_speedup": token("seconds", batch) / token("seconds", c3po),
    "dispatch_speedup": token("dispatches", batch) / token("dispatches", c3po),
    "turns": [token("seconds", two) / token("seconds", one) for one, two in turns],
    "c3po": dataclasses.asdict(c3po),
    "synchronous": dataclasses.asdict(batch),
  }
