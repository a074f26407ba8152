"""From examples and rollouts to packed microbatches.

A sequence is prompt + answer.  Every per-token field lies where the model predicts that token: the field of token t + 1
stands at position t, beside the hidden state that gives its log-prob.

RL: rollouts of groups with a signal are dealt into minibatches, and each minibatch is packed into microbatches of one
fixed shape.  A token's weight holds the denominators of the whole minibatch, so that microbatches simply add up.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.schema import Denominator, IcePopConfig, PackingConfig, RLConfig
from kernels.icepop import sequence_weight
from ring_jax.data.packing import PackedBatch, pack
from ring_jax.records import Rollout
from ring_jax.rl.metrics import calibrate
from ring_jax.train.programs import RLFields, Tokens


@dataclasses.dataclass(frozen=True)
class Example:
  """One worked answer: token ids of prompt and completion (which ends its turn)."""

  prompt: Sequence[int]
  completion: Sequence[int]


def model_tokens(batch: PackedBatch) -> Tokens:
  return Tokens(batch.tokens, batch.positions, batch.segment_ids, batch.targets)


def at_predictions(prompt_length: int, values: Sequence[float]) -> np.ndarray:
  """float32 [prompt + answer]: the answer's values, each one position before its token; 0 elsewhere."""
  field = np.zeros((prompt_length + len(values),), np.float32)
  field[prompt_length - 1 : -1] = values
  return field


def sft_batches(examples: Sequence[Example], packing: PackingConfig) -> list[tuple[Tokens, np.ndarray]]:
  """Microbatches of one SFT step with per-token weights [R, T]: the mean over all completion tokens."""
  total = sum(len(example.completion) for example in examples)
  sequences = [
    {
      "tokens": [*example.prompt, *example.completion],
      "weights": at_predictions(len(example.prompt), [1.0 / total] * len(example.completion)),
    }
    for example in examples
  ]
  return [(model_tokens(batch), batch.fields["weights"]) for batch in pack(sequences, packing.length, packing.rows)]


@dataclasses.dataclass
class Minibatch:
  """What one optimizer step of RL trains on."""

  microbatches: list[PackedBatch]  # fields: logp_infer, advantages, mask
  num_sequences: int


def rl_minibatches(
  rollouts: Sequence[Rollout], advantages: np.ndarray, config: RLConfig, packing: PackingConfig, seed: Any
) -> list[Minibatch]:
  """Deals rollouts into `config.minibatches` minibatches (fewer if there are too few rollouts).

  Args:
    rollouts, advantages: of groups that have a signal.
    seed: of the shuffle, for `numpy.random.default_rng`.
  """
  order = np.arange(len(rollouts))
  if config.minibatches > 1:
    order = np.random.default_rng(seed).permutation(order)
  parts = [order[first :: config.minibatches] for first in range(config.minibatches)]
  return [_minibatch([(rollouts[i], float(advantages[i])) for i in part], packing) for part in parts if len(part)]


def _minibatch(chosen: Sequence[tuple[Rollout, float]], packing: PackingConfig) -> Minibatch:
  sequences = [
    {
      "tokens": [*rollout.prompt, *rollout.tokens],
      "logp_infer": at_predictions(len(rollout.prompt), rollout.logps),
      "advantages": at_predictions(len(rollout.prompt), [advantage] * len(rollout.tokens)),
      "mask": at_predictions(len(rollout.prompt), [1.0] * len(rollout.tokens)),
    }
    for rollout, advantage in chosen
  ]
  return Minibatch(pack(sequences, packing.length, packing.rows), len(chosen))


def rl_fields(minibatch: Minibatch, logp_old: Sequence[np.ndarray] | None, config: IcePopConfig) -> list[RLFields]:
  """What the objective needs for each microbatch, weights of the whole minibatch included.

  Args:
    logp_old: [R, T] of each microbatch; None: the gradient pass gives them.
  """
  counted = [batch.fields["mask"] > 0 for batch in minibatch.microbatches]
  if config.denominator is Denominator.KEPT:
    for inside_RxT, old_RxT, batch in zip(counted, logp_old, minibatch.microbatches, strict=True):
      inside_RxT &= calibrate(old_RxT, old_RxT, batch.fields["logp_infer"], config).kept
  total = int(sum(inside_RxT.sum() for inside_RxT in counted))
  fields = []
  for number, (batch, inside_RxT) in enumerate(zip(minibatch.microbatches, counted, strict=True)):
    get = batch.fields
    old_RxT = np.zeros_like(get["logp_infer"]) if logp_old is None else logp_old[number]
    weights_RxT = _weights(batch.segment_ids, inside_RxT, minibatch.num_sequences, total, config)
    fields.append(RLFields(get["logp_infer"], old_RxT, get["advantages"], get["mask"], weights_RxT * get["mask"]))
  return fields


def _weights(segments_RxT, counted_RxT, num_sequences: int, num_tokens: int, config: IcePopConfig) -> np.ndarray:
  """float32 [R, T]: what each token of its sequence weighs, by how many tokens of the sequence count."""
  R, T = segments_RxT.shape
  sequence_RxT = segments_RxT + np.arange(R)[:, None] * (T + 1)  # no two sequences of a microbatch share a number
  lengths = np.bincount(sequence_RxT.reshape(-1), counted_RxT.reshape(-1), minlength=R * (T + 1)).astype(int)
  weight_of = np.zeros(len(lengths), np.float32)
  for sequence in np.flatnonzero(lengths):
    weight_of[sequence] = sequence_weight(int(lengths[sequence]), num_sequences, num_tokens, config)
  return weight_of[sequence_RxT]
