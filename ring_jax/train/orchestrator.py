"""One step of RL on any placement: the roles' work in the order of its dependencies, side by side where devices allow it.

    weights of version v    -> engine; the critic's -> shadow critic
    engine                  -> rollouts                          one C3PO++ iteration, perhaps in parts (rl.stream)
    rollouts                -> experience                        reference, reward model, critic: at the same time
    experience              -> actor, critic: version v + 1      at the same time

What is computed does not depend on the placement; when and where it is computed does.  Where the engine has devices of its
own, the stages overlap: a part of the iteration is judged and trained on while later parts are still generated.  With
rl.staleness=1 also the next step's rollouts are generated meanwhile, under the weights that this step started with; the
step ends when both have ended, so that no token is older than one version more than its rollout's own interruptions make it.
IcePop corrects for that as for any other difference between the policy that sampled and the one that trains.

Sources: Ring-1T section 2.3; the placement paper's runtimes (papers.md 2.3, 2.4); Algorithm 1 of C3PO++ is rollout/scheduler.py.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from configs.schema import Advantage, Reward, Role, RunConfig, Switching
from ring_jax.records import FinishReason, Rollout
from ring_jax.rewards.pool import Kind
from ring_jax.rl.advantages import has_signal
from ring_jax.train.experience import Judges, Score
from ring_jax.train.learner import Learner
from ring_jax.train.pipeline import stage
from ring_jax.train.report.trace import Span
from ring_jax.train.roles import Roles, Weights
from ring_jax.train.stream import ProblemStream
from ring_jax.train.switching import Switch
from ring_jax.train.turns import Turns
from rollout.driver import Clock, RolloutDriver
from rollout.engine import RingEngine
from rollout.iteration import IterationResult
from rollout.probe import EngineProbe
from rollout.remote.pool import WorkerPool
from rollout.remote.shared import SharedPool
from rollout.worker import EngineWorker
from sharding import processes


@dataclasses.dataclass
class RLStep:
  """What a step did, for the log."""

  rollouts: list[Rollout]
  advantages: np.ndarray  # one a rollout; of a critic's, the mean over its tokens
  metrics: dict[str, float]  # a function of the run's config alone
  tokens: int  # drawn by the engine
  positions: int  # trained on, prompts included
  seconds: dict[str, float]  # by what was done; what was done at the same time adds up to more than the step


@dataclasses.dataclass
class Generated:
  """The rollouts of one step, before anything is known of them."""

  result: IterationResult
  chunks: list[list[int]]  # uids, in the order and the parts in which they are trained on
  cursor: int  # problems seen
  clock: Clock

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON data; the clock is not part of it."""
    return {"result": self.result.to_dict(), "chunks": [list(chunk) for chunk in self.chunks], "cursor": self.cursor}

  @classmethod
  def from_dict(cls, data: dict[str, Any]) -> "Generated":
    return cls(IterationResult.from_dict(data["result"]), data["chunks"], data["cursor"], Clock())


class Orchestrator:
  """Runs the steps of one phase.

  Args:
    name: of the phase: rl or rlhf.
    roles, worker: on their devices.
    driver: of the worker.
    turns: of the same placement.
    score: the verifier.
    probe: of the engine's weights; None: they do not travel.
    span: times and shows work; takes its kind and the step.
  """

  def __init__(
    self,
    config: RunConfig,
    name: str,
    roles: Roles,
    turns: Turns,
    engine: RingEngine,
    worker: EngineWorker | WorkerPool | SharedPool,
    driver: RolloutDriver,
    score: Score,
    stream: ProblemStream,
    probe: EngineProbe | None,
    span: Callable[..., contextlib.AbstractContextManager[Span]],
  ):
    self._phase = config.phase(name)
    self._roles, self._engine, self._driver, self._stream, self._span = roles, engine, driver, stream, span
    self._judge = Judges(config, name, roles, turns, score)
    replayed = config.model if config.rollout.router_replay else None
    self._learner = Learner(name, self._phase, config.packing, config.seed, roles, turns, replayed)
    self._remote = config.rollout.is_remote
    self._shared = not self._remote and roles.placement.share(Role.ROLLOUT, Role.ACTOR)
    shadowed = Role.CRITIC not in self._phase.roles or roles.judge is Role.SHADOW_CRITIC
    self._overlaps = not self._shared and shadowed and processes.group().count == 1
    switches = self._shared and config.placement.switching is Switching.HOST
    self._switch = Switch(config, name, worker) if switches else None
    self._probe = probe
    self._lock = threading.Lock()

  def step(
    self, weights: Weights, version: int, pending: Generated | None, last: bool, on_progress: Callable[[Clock], None]
  ) -> tuple[RLStep, Generated | None]:
    """Trains `weights` from `version` to `version + 1`, in place.

    Args:
      pending: the rollouts of this step, where they were generated during the one before.
      last: of the phase: no rollouts are generated ahead.

    Returns:
      What it did, and the rollouts of the next step if there are any already.
    """
    started, self._seconds = time.perf_counter(), collections.Counter()
    span = lambda kind: self._timed(kind, version)  # noqa: E731
    with span("sync"):
      stored, shadow = self._synced(weights, version)
    self._learner.begin(version)
    if self._switch is not None:
      with span("to_host"):
        self._switch.to_rollout(weights, stored)

    def generate(trained: int):
      return lambda emit: self._generate(stored, version, trained, emit, on_progress)

    following = None
    if pending is None:
      chunks, generated = stage(generate(version), ahead=self._overlaps)
    else:
      chunks, generated = _chunks_of(pending), lambda: pending
    if self._phase.staleness and not last:
      if pending is None:
        chunks = list(chunks)  # the engine does one iteration after the other
      _, following = stage(generate(version + 1), ahead=self._overlaps)
    if self._switch is not None:
      with span("from_host"):
        self._switch.to_training(weights, stored)

    def judge(emit):
      for chunk in chunks:
        emit(self._judge(chunk, weights, shadow, span))

    judged, _ = stage(judge, ahead=self._overlaps)
    advantages: dict[int, float] = {}
    kinds: collections.Counter[Kind] = collections.Counter()
    for experience in judged:
      self._learner.train(weights, experience, span)
      kinds += experience.kinds
      for rollout, value in zip(experience.rollouts, experience.advantages, strict=True):
        advantages[rollout.uid] = float(np.mean(value)) if np.size(value) else 0.0
    done, ahead = generated(), following() if following else None
    clock = _added([one.clock for one in (done if pending is None else None, ahead) if one])
    self._seconds["step"] = time.perf_counter() - started
    return self._summary(version, done, advantages, kinds, clock), ahead

  # ---- stages

  def _synced(self, weights: Weights, version: int) -> tuple[Any, Any]:
    """The actor's weights as the engine stores them, the critic's as its judge does (None: there is no critic).

    Raises:
      TransferError: what arrived is not what was sent, or the engine computes something else with it.
    """
    stored = jax.block_until_ready(self._engine.load_params(weights.actor, version, self._probe))
    if self._remote:
      # In host memory, as a worker may join at any time, and the trainer donates its arrays to the next step.
      stored = jax.tree.map(np.array, processes.fetch(stored))
    if weights.critic is None or self._roles.judge is Role.CRITIC:
      return stored, weights.critic
    return stored, self._roles.hand_over(weights.critic, Role.SHADOW_CRITIC, version)

  def _generate(
    self, stored: Any, version: int, trained: int, emit: Callable[[list[Rollout]], None], on_progress
  ) -> Generated:
    """One iteration; emits its rollouts in the parts that are trained on together."""
    size, chunks, taken = self._phase.stream, [], 0

    def give(chunk: Sequence[Rollout]) -> None:
      chunks.append([rollout.uid for rollout in chunk])
      emit(list(chunk))

    rest: list[Rollout] = []

    def on_ready(ready: Sequence[Rollout]) -> None:
      nonlocal taken
      if not size:
        return
      while len(ready) - taken >= size:
        end = taken + size
        while end < len(ready) and ready[end].group == ready[end - 1].group:
          end += 1  # siblings stay together
        give(ready[taken:end])
        taken = end
      rest[:] = ready[taken:]

    with self._timed("rollout", trained):
      result, clock = self._driver.iterate(
        stored, version, self._stream.take, on_progress, trained=trained, on_ready=on_ready
      )
    if not size:
      give(result.rollouts)
    elif rest:
      give(rest)
    return Generated(result, chunks, self._stream.cursor, clock)

  # ---- what is told

  @contextlib.contextmanager
  def _timed(self, kind: str, step: int) -> Iterator[Span]:
    with self._span(kind, step=step) as span:
      yield span
    with self._lock:
      self._seconds[kind] += span.seconds

  def _summary(
    self,
    version: int,
    generated: Generated,
    advantages: dict[int, float],
    kinds: collections.Counter[Kind],
    clock: Clock,
  ) -> RLStep:
    """Args:
    clock: the engine's, which may have generated for the next step.
    """
    result, rollouts = generated.result, generated.result.rollouts
    trained, positions = self._learner.end()
    metrics = result.metrics() | {
      "version": version,
      "rollouts": len(rollouts),
      "problems_seen": generated.cursor,
      "without_advantage": self._without_signal(rollouts),
    }
    if rollouts:
      rewards = np.array([rollout.reward for rollout in rollouts])
      stopped = [rollout.finish_reason is FinishReason.STOP for rollout in rollouts]
      metrics |= {"reward": float(rewards.mean()), "stopped": float(np.mean(stopped))}
      if self._phase.reward is Reward.VERIFIER:
        metrics["solved"] = float((rewards >= 1.0).mean())
    metrics |= trained
    metrics |= {f"score/{kind}": kinds[kind] for kind in Kind}
    seconds = dict(self._seconds) | {"prefill": clock.prefill, "decode": clock.decode}
    shown = np.array([advantages[rollout.uid] for rollout in rollouts], np.float32)
    return RLStep(rollouts, shown, metrics, clock.tokens, positions, seconds)

  def _without_signal(self, rollouts: Sequence[Rollout]) -> float:
    """Share of the rollouts whose group says nothing."""
    if not rollouts or self._phase.advantage is Advantage.GAE:
      return 0.0
    signal = has_signal([rollout.reward for rollout in rollouts], [rollout.group for rollout in rollouts])
    return float(np.mean(~signal))


def _added(clocks: Sequence[Clock]) -> Clock:
  names = [field.name for field in dataclasses.fields(Clock)]
  return Clock(**{name: sum(getattr(clock, name) for clock in clocks) for name in names})


def _chunks_of(generated: Generated) -> list[list[Rollout]]:
  by_uid = {rollout.uid: rollout for rollout in generated.result.rollouts}
  return [[by_uid[uid] for uid in chunk] for chunk in generated.chunks]
