"""Measured accuracy: `samples` answers to each held-out problem, drawn by the engine, scored like rollouts.

It is the same engine, the same scheduler and the same scoring as in training, with a scheduler that has no budget and
lets everything finish.  Problems and randomness are fixed, so that the number is a function of the weights.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from configs.schema import (
  BudgetCounts,
  KVPolicy,
  ModelConfig,
  OnPurge,
  RolloutConfig,
  RolloutDtype,
  RolloutSchedule,
  Unit,
)
from ring_jax.data.tasks import Problem
from ring_jax.model import Params
from ring_jax.records import FinishReason, Rollout
from ring_jax.train.scoring import Scorer
from rollout.driver import Clock, RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler
from rollout.worker import EngineWorker

_SEED = 1_000_003  # of evaluation samples, whatever the run's own seed is


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What was measured; `examples` are the first answers to the first problems."""

  accuracy: float  # mean reward
  pass_at_k: float  # share of problems with at least one full score
  stopped: float  # share of answers that ended their turn
  mean_length: float  # tokens of an answer
  problems: int
  samples: int
  examples: list[dict[str, Any]]

  def metrics(self) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(self).items() if name != "examples"}


class Evaluator:
  """Measures weights on problems.

  Args:
    model: the architecture.
    rollout: lengths and sampling of the answers.
    slots, samples: how many sequences decode at once; answers a problem.
    scorer: running.
    seed: of the answers.
    mesh: the engine's; None: one device.
    dtype: of the engine's weights; float32 are the trainer's as they are.
  """

  def __init__(
    self,
    model: ModelConfig,
    rollout: RolloutConfig,
    *,
    slots: int,
    samples: int,
    scorer: Scorer,
    seed: int = _SEED,
    mesh: Mesh | None = None,
    dtype: RolloutDtype = RolloutDtype.FLOAT32,
  ):
    self._scorer = scorer
    self._config = dataclasses.replace(
      rollout,
      slots=slots, pool=max(slots, samples), group_size=samples, token_budget=2**62, unit=Unit.ROLLOUT,
      budget_counts=BudgetCounts.COMPLETED, on_purge=OnPurge.DROP, kv_policy=KVPolicy.RECOMPUTE, retention=0,
      schedule=RolloutSchedule.C3PO, batch_groups=0, launch_groups=0, dtype=dtype, router_replay=False,
    )  # fmt: skip
    self.engine = RingEngine(
      model,
      self._config,
      eos_ids=scorer.tokenizer.eos_ids,
      vocab_mask_V=scorer.tokenizer.sampleable_mask(model.vocab_size),
      seed=seed,
      mesh=mesh,
    )

  def __call__(
    self, params: Params, problems: Sequence[Problem], on_progress: Callable[[Clock], None] = lambda clock: None
  ) -> Evaluation:
    """Measures the trainer's parameters."""
    return self._summary(self.answers(params, problems, on_progress), problems)

  def answers(
    self, params: Params, problems: Sequence[Problem], on_progress: Callable[[Clock], None] = lambda clock: None
  ) -> list[Rollout]:
    """Scored answers, those to one problem together, `Rollout.problem` its position."""
    encode = self._scorer.tokenizer.encode
    waiting = iter([(index, encode(problem.prompt)) for index, problem in enumerate(problems)])
    driver = RolloutDriver(EngineWorker(self.engine), C3POScheduler(self._config), self._config.max_tokens)
    result, _ = driver.iterate(
      self.engine.load_params(params), 0, lambda count: list(itertools.islice(waiting, count)), on_progress
    )
    rollouts = sorted(result.rollouts, key=lambda rollout: rollout.uid)
    self._scorer.score(rollouts, lambda rollout: problems[rollout.problem])
    return rollouts

  def _summary(self, rollouts: Sequence[Rollout], problems: Sequence[Problem]) -> Evaluation:
    samples = self._config.group_size
    rewards_PxK = np.zeros((len(problems), samples))
    counts_P = np.zeros(len(problems), int)
    for rollout in rollouts:
      rewards_PxK[rollout.problem, counts_P[rollout.problem]] = rollout.reward
      counts_P[rollout.problem] += 1
    first = {}
    for rollout in rollouts:
      first.setdefault(rollout.problem, rollout)
    return Evaluation(
      accuracy=float(rewards_PxK.mean()),
      pass_at_k=float((rewards_PxK.max(axis=1) >= 1.0).mean()),
      stopped=float(np.mean([rollout.finish_reason is FinishReason.STOP for rollout in rollouts])),
      mean_length=float(np.mean([len(rollout.tokens) for rollout in rollouts])),
      problems=len(problems),
      samples=samples,
      examples=[
        {
          "prompt": problems[index].prompt,
          "answer": self._scorer.tokenizer.decode(first[index].tokens),
          "reward": first[index].reward,
        }
        for index in sorted(first)[:3]
      ],
    )
