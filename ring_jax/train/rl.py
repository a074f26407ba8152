"""One step of reasoning RL (Ring-1T section 2.3): rollouts -> rewards -> advantages -> IcePop gradient -> new weights.

weights of version v go to the engine
one C3PO++ iteration                      -> finished groups, perhaps begun under older versions
scores from the verifier processes        -> group-relative advantages; groups without one are left out
packed microbatches
log-probs at theta_old                    (skipped for a single minibatch: there they are the gradient pass's own)
for each minibatch: IcePop gradient, AdamW -> version v + 1
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from configs.schema import Denominator, RunConfig
from ring_jax.model import Params
from ring_jax.records import FinishReason, Rollout
from ring_jax.rewards.pool import Kind
from ring_jax.rl.advantages import group_advantages, has_signal
from ring_jax.rl.metrics import step_metrics
from ring_jax.train.batches import Minibatch, model_tokens, rl_fields, rl_minibatches
from ring_jax.train.programs import Programs
from ring_jax.train.report.trace import Span
from ring_jax.train.scoring import Scorer
from ring_jax.train.stream import ProblemStream
from rollout.driver import Clock, RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import IterationResult
from sharding.processes import fetch

_TOKEN_FIELDS = ("logp", "logp_old", "logp_infer", "advantages", "entropy")  # of `step_metrics`


@dataclasses.dataclass
class RLStep:
  """What a step did, for the log."""

  rollouts: list[Rollout]
  advantages: np.ndarray  # one a rollout
  metrics: dict[str, float]  # a function of the run's config alone
  tokens: int  # drawn by the engine
  positions: int  # trained on, prompts included
  seconds: dict[str, float]  # by phase


class RLPhase:
  def __init__(
    self,
    config: RunConfig,
    programs: Programs,
    engine: RingEngine,
    driver: RolloutDriver,
    scorer: Scorer,
    stream: ProblemStream,
    span: Callable[..., contextlib.AbstractContextManager[Span]],
  ):
    self._config, self._programs, self._engine, self._driver = config, programs, engine, driver
    self._scorer, self._stream, self._span = scorer, stream, span

  def step(
    self, params: Params, opt_state: Any, version: int, on_progress: Callable[[Clock], None]
  ) -> tuple[Params, Any, RLStep]:
    """Trains from weights `version` to `version + 1`; donates `params` and `opt_state`."""
    in_phase, seconds = self._span, {}
    with in_phase("sync", step=version) as span:
      stored = jax.block_until_ready(self._engine.load_params(params, version))
    seconds["sync"] = span.seconds
    with in_phase("rollout", step=version) as span:
      result, clock = self._driver.iterate(stored, version, self._stream.take, on_progress)
    seconds |= {"rollout": span.seconds, "prefill": clock.prefill, "decode": clock.decode}
    with in_phase("score", step=version) as span:
      kinds = self._scorer.score(result.rollouts, lambda rollout: self._stream.problem(rollout.problem))
    seconds["score"] = span.seconds

    rollouts = result.rollouts
    rewards, groups = [rollout.reward for rollout in rollouts], [rollout.group for rollout in rollouts]
    advantages = group_advantages(rewards, groups, self._config.rl.advantage)
    signal = has_signal(rewards, groups)
    minibatches = rl_minibatches(
      [rollout for rollout, useful in zip(rollouts, signal, strict=True) if useful],
      advantages[signal], self._config.rl, self._config.packing, (self._config.seed, version),
    )  # fmt: skip
    with in_phase("logp", step=version) as span:
      scored = [self._score(params, minibatch, len(minibatches) == 1) for minibatch in minibatches]
    seconds["logp"] = span.seconds
    with in_phase("train", step=version) as span:
      params, opt_state, trained = self._train(params, opt_state, minibatches, scored)
    seconds["train"] = span.seconds
    metrics = self._metrics(result, signal, version) | trained
    metrics |= {f"score/{kind}": kinds[kind] for kind in Kind}
    positions = sum(int((batch.segment_ids > 0).sum()) for part in minibatches for batch in part.microbatches)
    return params, opt_state, RLStep(rollouts, advantages, metrics, clock.tokens, positions, seconds)

  def _score(self, params: Params, minibatch: Minibatch, alone: bool) -> list[np.ndarray] | None:
    """Log-probs [R, T] at theta_old of each microbatch; None where the gradient pass will give them itself."""
    if alone and self._config.rl.objective.denominator is Denominator.ALL:
      return None
    return [fetch(self._programs.logprobs(params, model_tokens(batch))) for batch in minibatch.microbatches]

  def _train(self, params, opt_state, minibatches, scored):
    """One optimizer step a minibatch; returns new params, optimizer state, and metrics."""
    programs, objective = self._programs, self._config.rl.objective
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in _TOKEN_FIELDS}
    losses, norms = [], []
    for minibatch, logp_old in zip(minibatches, scored, strict=True):
      sums = None
      for batch, fields in zip(minibatch.microbatches, rl_fields(minibatch, logp_old, objective), strict=True):
        sums, out = programs.rl_gradients(params, sums, model_tokens(batch), fields, logp_old is None)
        logp_RxT, entropy_RxT = fetch(out)
        inside = fields.mask_RxT > 0
        old_RxT = logp_RxT if logp_old is None else fields.logp_old_RxT
        values = (logp_RxT, old_RxT, fields.logp_infer_RxT, fields.advantages_RxT, entropy_RxT)
        for name, value in zip(_TOKEN_FIELDS, values, strict=True):
          tokens[name].append(value[inside])
      losses.append(float(sums.loss))
      params, opt_state, norm = programs.apply(params, opt_state, sums.params, "rl")
      norms.append(float(norm))
    joined = {name: np.concatenate(values) if values else np.zeros(0) for name, values in tokens.items()}
    metrics = step_metrics(**joined, mask=np.ones_like(joined["logp"], bool), config=objective)
    metrics |= {"loss": float(np.mean(losses)), "grad_norm": max(norms)} if norms else {}
    return params, opt_state, metrics | {"optimizer_steps": len(norms)}

  def _metrics(self, result: IterationResult, signal: np.ndarray, version: int) -> dict[str, float]:
    """What the rollouts were like."""
    rollouts = result.rollouts
    metrics = result.metrics() | {
      "version": version,
      "rollouts": len(rollouts),
      "problems_seen": self._stream.cursor,
      "without_advantage": float(np.mean(~signal)) if rollouts else 0.0,
    }
    if rollouts:
      rewards = np.array([rollout.reward for rollout in rollouts])
      stopped = [rollout.finish_reason is FinishReason.STOP for rollout in rollouts]
      metrics |= {
        "reward": float(rewards.mean()),
        "solved": float((rewards >= 1.0).mean()),
        "stopped": float(np.mean(stopped)),
      }
    return metrics
