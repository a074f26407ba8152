"""AdamW with warm-up, and one step of RL from recorded rollouts (papers.md 1.2, 1.4).

The step takes what an engine left behind, a list of `Rollout`, and does what the trainer does with it: rollouts are dealt
into minibatches by the same shuffle, log-probs at theta_old are computed before the first update, and every minibatch
gives one AdamW step.  It does not pack: one sequence a row, so that packing is checked as well.

Dimension key: S sequences, T positions, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from configs.schema import OptimizerConfig, RLConfig, Schedule
from parity.torch_twin import objective
from parity.torch_twin.model import RingTwin
from ring_jax.records import Rollout


class TwinOptimizer:
  """Global-norm clipping, Adam, decoupled weight decay; norms are not decayed, the selection bias is no parameter."""

  def __init__(self, model: RingTwin, config: OptimizerConfig, total_steps: int):
    self._config, self._total_steps, self._done = config, total_steps, 0
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    self._parameters = [*matrices, *norms]
    self._adamw = torch.optim.AdamW(
      [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}],
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
    norm = torch.stack([parameter.grad.float().square().sum() for parameter in self._parameters]).sum().sqrt()
    if norm >= self._config.grad_clip:
      for parameter in self._parameters:
        parameter.grad.mul_(self._config.grad_clip / norm)
    for group in self._adamw.param_groups:
      group["lr"] = self.learning_rate()
    self._adamw.step()
    self._adamw.zero_grad(set_to_none=True)
    self._done += 1
    return norm.item()


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
  logp_infer: torch.Tensor
  advantages: torch.Tensor  # [S, 1]


def sequences_of(rollouts: Sequence[Rollout], advantages: Sequence[float], device: Any = "cpu") -> Sequences:
  length = max(len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts)
  tokens, segments, mask = (np.zeros((len(rollouts), length), np.int64) for _ in range(3))
  logp_infer = np.zeros((len(rollouts), length), np.float32)
  for row, rollout in enumerate(rollouts):
    begin, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.tokens)
    tokens[row, :end] = rollout.prompt + rollout.tokens
    segments[row, :end] = 1
    mask[row, begin - 1 : end - 1] = 1
    logp_infer[row, begin - 1 : end - 1] = rollout.logps
  advantages_Sx1 = np.asarray(advantages, np.float32)[:, None]
  put = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
  return Sequences(put(tokens), put(segments), put(mask).bool(), put(logp_infer), put(advantages_Sx1))


@dataclasses.dataclass(frozen=True)
class StepReport:
  """One number an optimizer step, one array a rollout."""

  losses: list[float]
  norms: list[float]  # of gradients, before clipping
  logp: list[np.ndarray]  # of each rollout's answer, at theta_old
  kept: list[np.ndarray]  # bool: answer tokens inside the band when they were trained on


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
  logp_ref = None if reference is None else answer_logps(reference, rollouts, scorer)
  report = StepReport([], [], logp_old, [np.zeros(0, bool)] * len(rollouts))
  for part in minibatches(len(rollouts), config.minibatches, seed):
    loss = _accumulate(model, part, rollouts, advantages, config, scorer, logp_old, logp_ref, report.kept)
    report.losses.append(loss)
    report.norms.append(optimizer.step())
  return report


def minibatches(count: int, parts: int, seed: Any) -> list[np.ndarray]:
  """Indices of each minibatch: dealt in turn from a shuffle, or all of them in order."""
  order = np.random.default_rng(seed).permutation(count) if parts > 1 else np.arange(count)
  return [part for first in range(parts) if len(part := order[first::parts])]


def answer_logps(model: RingTwin, rollouts: Sequence[Rollout], scorer: Scorer) -> list[np.ndarray]:
  """Log-probs of each rollout's answer."""
  scores, device = [], next(model.parameters()).device
  for first in range(0, len(rollouts), scorer.rows):
    chosen = rollouts[first : first + scorer.rows]
    batch = sequences_of(chosen, [0.0] * len(chosen), device)
    with torch.no_grad():
      logp = scorer(model, batch).logp
    scores += [row[inside].cpu().numpy() for row, inside in zip(logp, batch.mask, strict=True)]
  return scores


def _spread(values: Sequence[np.ndarray], mask: torch.Tensor) -> torch.Tensor:
  """Values of each sequence's answer, laid out as the mask is."""
  out = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
  for row, inside, own in zip(out, mask, values, strict=True):
    row[inside] = torch.as_tensor(own, dtype=torch.float32, device=mask.device)
  return out


def _accumulate(model, part, rollouts, advantages, config: RLConfig, scorer, logp_old, logp_ref, kept) -> float:
  """Gradients of one minibatch; returns its loss.  Writes `kept`."""
  device, icepop = next(model.parameters()).device, config.objective
  batches = []
  for first in range(0, len(part), scorer.rows):
    chosen = part[first : first + scorer.rows]
    batch = sequences_of([rollouts[i] for i in chosen], [advantages[i] for i in chosen], device)
    old = _spread([logp_old[i] for i in chosen], batch.mask)
    counted = objective.counted_tokens(batch.mask, old, batch.logp_infer, icepop)
    batches.append((chosen, batch, old, counted))
  num_tokens = sum(int(counted.sum()) for _, _, _, counted in batches)
  total = 0.0
  for chosen, batch, old, counted in batches:
    weights = objective.weights_of(counted, len(part), num_tokens, icepop)
    ref = None if logp_ref is None else _spread([logp_ref[i] for i in chosen], batch.mask)
    logp = scorer(model, batch).logp
    loss, inside = objective.icepop(
      logp, old, batch.logp_infer, batch.advantages, batch.mask, weights, icepop, logp_ref=ref
    )
    loss.backward()
    total += loss.item()
    for i, row, mask in zip(chosen, inside, batch.mask, strict=True):
      kept[i] = row[mask].cpu().numpy()
  return total
