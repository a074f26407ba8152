"""AdamW with warm-up, and one step of RL with group-relative advantages from recorded rollouts (papers.md 1.2, 1.4).

The step takes what an engine left behind, a list of `Rollout`, and does what the trainer does with it: rollouts are dealt
into minibatches by the same shuffle, log-probs at theta_old are computed before the first update, and every minibatch
gives one AdamW step.  It does not pack: one sequence a row, so that packing is checked as well.  `ppo.py` builds the step
of RLHF, with a critic and a reward model, from the same parts.

Dimension key: S sequences, T positions, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from configs.schema import IcePopConfig, OptimizerConfig, RLConfig, Schedule
from parity.torch_twin import objective
from parity.torch_twin.model import RingTwin, RMSNorm, ScalarHead, Trunk, device_of
from ring_jax.records import Rollout


class TwinOptimizer:
  """Global-norm clipping, Adam, decoupled weight decay.

  Norms are not decayed, nor is the bias of a scalar head; the selection bias is no parameter.
  """

  def __init__(self, model: Trunk, config: OptimizerConfig, total_steps: int):
    self._config, self._total_steps, self._done = config, total_steps, 0
    kept = [module.weight for module in model.modules() if isinstance(module, RMSNorm)]
    kept += [module.bias for module in model.modules() if isinstance(module, ScalarHead)]
    known = set(map(id, kept))
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in known]
    self._parameters = [*decayed, *kept]
    self._adamw = torch.optim.AdamW(
      [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
      lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps, foreach=False,
    )  # fmt: skip

  def learning_rate(self) -> float:
    """Of the next step: linear warm-up to the full rate, then constant or a half cosine to 0."""
    config, step = self._config, self._done
    rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.schedule is Schedule.COSINE:
      progress = (step - config.warmup_steps) / max(self._total_steps - config.warmup_steps, 1)
      rate *= 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return rate

  def step(self) -> float:
    """Updates the model from its gradients and clears them; returns their norm before clipping."""
    for parameter in self._parameters:
      if parameter.grad is None:  # of a layer the loss does not reach: decay acts on it all the same
        parameter.grad = torch.zeros_like(parameter)
    norm = self._sum_of_squares([parameter.grad for parameter in self._parameters]).sqrt()
    if norm >= self._config.grad_clip:
      for parameter in self._parameters:
        parameter.grad.mul_(self._config.grad_clip / norm)
    for group in self._adamw.param_groups:
      group["lr"] = self.learning_rate()
    self._adamw.step()
    self._adamw.zero_grad(set_to_none=True)
    self._done += 1
    return norm.item()

  def _sum_of_squares(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()


@dataclasses.dataclass(frozen=True)
class Scorer:
  """How log-probs are computed: the distribution that rollouts were sampled from."""

  temperature: float = 1.0
  vocab_mask: np.ndarray | None = None  # bool [V]
  rows: int = 64  # sequences of one forward pass

  def __call__(self, model: RingTwin, batch: "Sequences") -> objective.Scores:
    """[S, T]: position t holds the score of token t + 1; the last position's is of token 0 and is masked."""
    device = batch.tokens.device
    mask_V = None if self.vocab_mask is None else torch.as_tensor(self.vocab_mask, device=device)
    hidden = model(batch.tokens, segments_BxT=batch.segments, mtp=False).hidden_BxTxD
    return objective.token_scores(model, hidden, batch.tokens.roll(-1, 1), self.temperature, mask_V)


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Prompt and answer, right-padded; [S, T] each.  Fields of token t + 1 stand at position t."""

  tokens: torch.Tensor
  segments: torch.Tensor  # 1, padding 0
  mask: torch.Tensor  # bool: the position predicts a token of the answer

  def spread(self, values: Sequence[Any]) -> torch.Tensor:
    """Values of each answer (one, or one a token), float32 [S, T], laid out as the mask is; 0 elsewhere."""
    out = torch.zeros(self.mask.shape, dtype=torch.float32, device=self.mask.device)
    for row, inside, own in zip(out, self.mask, values, strict=True):
      row[inside] = torch.as_tensor(own, dtype=torch.float32, device=self.mask.device)
    return out

  def gather(self, values: torch.Tensor) -> list[np.ndarray]:
    """The inverse: what stands where the mask is, of each sequence."""
    return [row[inside].cpu().numpy() for row, inside in zip(values, self.mask, strict=True)]


def sequences_of(rollouts: Sequence[Rollout], device: torch.device) -> Sequences:
  length = max(len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts)
  tokens, segments, mask = (np.zeros((len(rollouts), length), np.int64) for _ in range(3))
  for row, rollout in enumerate(rollouts):
    begin, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.tokens)
    tokens[row, :end] = rollout.prompt + rollout.tokens
    segments[row, :end] = 1
    mask[row, begin - 1 : end - 1] = 1
  put = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
  return Sequences(put(tokens), put(segments), put(mask).bool())


@dataclasses.dataclass(frozen=True)
class StepReport:
  """One number an optimizer step, one array a rollout."""

  losses: list[float]
  norms: list[float]  # of gradients, before clipping
  logp: list[np.ndarray]  # of each rollout's answer, at theta_old
  kept: list[np.ndarray]  # bool: answer tokens that were not left out when they were trained on


def rl_step(
  model: RingTwin,
  optimizer: TwinOptimizer,
  rollouts: Sequence[Rollout],
  advantages: Sequence[float],
  config: RLConfig,
  *,
  seed: Any,
  scorer: Scorer | None = None,
  reference: RingTwin | None = None,
) -> StepReport:
  """Trains on recorded rollouts, as the trainer does on its own.

  Args:
    rollouts, advantages: of groups whose rewards differ (the trainer leaves the others out).
    seed: of the deal into minibatches, for `numpy.random.default_rng`: (the run's seed, the weights' version).
    scorer: temperature, vocabulary and batch size; default: 1, all ids, 64 rows.
    reference: the policy of the KL term, where there is one.

  Raises:
    ValueError: not one advantage a rollout, or kl_coef > 0 without a reference.
  """
  if len(rollouts) != len(advantages):
    raise ValueError(f"rl_step: {len(rollouts)} rollouts but {len(advantages)} advantages: one of each")
  scorer = scorer or Scorer()
  logp_old = answer_logps(model, rollouts, scorer)
  logp_ref = [None] * len(rollouts) if reference is None else answer_logps(reference, rollouts, scorer)
  lessons = [Lesson(*fields) for fields in zip(rollouts, advantages, logp_old, logp_ref, strict=True)]
  report = StepReport([], [], logp_old, [np.zeros(0, bool)] * len(rollouts))
  for part in minibatches(len(rollouts), config.minibatches, seed):
    chosen = [lessons[i] for i in part]
    loss, kept = actor_gradients(model, chosen, totals_of(chosen, config.objective), config.objective, scorer)
    report.losses.append(loss)
    report.norms.append(optimizer.step())
    for i, inside in zip(part, kept, strict=True):
      report.kept[i] = inside
  return report


def minibatches(count: int, parts: int, seed: Any) -> list[np.ndarray]:
  """Indices of each minibatch: dealt in turn from a shuffle, or all of them in order."""
  order = np.random.default_rng(seed).permutation(count) if parts > 1 else np.arange(count)
  return [part for first in range(parts) if len(part := order[first::parts])]


def answer_logps(model: RingTwin, rollouts: Sequence[Rollout], scorer: Scorer) -> list[np.ndarray]:
  """Log-probs of each rollout's answer."""
  scores, device = [], device_of(model)
  for chosen in batched(rollouts, scorer.rows):
    batch = sequences_of(chosen, device)
    with torch.no_grad():
      scores += batch.gather(scorer(model, batch).logp)
  return scores


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
  for first in range(0, len(items), size):
    yield items[first : first + size]


# ---------------------------------------------------------------------------------------------------------------------
# The actor's gradient


class Lesson(NamedTuple):
  """One rollout, and what the actor's objective needs of it; arrays have a number a token of the answer."""

  rollout: Rollout
  advantages: Any  # or one number
  logp_old: np.ndarray
  logp_ref: np.ndarray | None


class Totals(NamedTuple):
  """Of a whole minibatch, of which a process may hold a part."""

  sequences: int
  tokens: int  # those that count


def totals_of(lessons: Sequence[Lesson], config: IcePopConfig) -> Totals:
  tokens = 0
  for lesson in lessons:
    old = torch.as_tensor(lesson.logp_old, dtype=torch.float32)
    infer = torch.as_tensor(lesson.rollout.logps, dtype=torch.float32)
    tokens += int(objective.counted_tokens(torch.ones_like(infer, dtype=torch.bool), old, infer, config).sum())
  return Totals(len(lessons), tokens)


def actor_gradients(
  model: RingTwin, lessons: Sequence[Lesson], totals: Totals, config: IcePopConfig, scorer: Scorer
) -> tuple[float, list[np.ndarray]]:
  """Adds the gradients of a minibatch, or of a part of one.

  Args:
    totals: of the whole minibatch: gradients and losses of its parts add up.

  Returns:
    The loss, and for each rollout which tokens of its answer were not left out.
  """
  device, total, kept = device_of(model), 0.0, []
  for chosen in batched(lessons, scorer.rows):
    rollouts, advantages, old, ref = zip(*chosen, strict=True)
    batch = sequences_of(rollouts, device)
    old, infer = batch.spread(old), batch.spread([rollout.logps for rollout in rollouts])
    ref = None if ref[0] is None else batch.spread(ref)
    counted = objective.counted_tokens(batch.mask, old, infer, config)
    weights = objective.weights_of(counted, *totals, config)
    logp = scorer(model, batch).logp
    loss, inside = objective.icepop(
      logp, old, infer, batch.spread(advantages), batch.mask, weights, config, logp_ref=ref
    )
    loss.backward()
    total += loss.item()
    kept += batch.gather(inside)
  return total, kept
