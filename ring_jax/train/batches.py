"""From examples and rollouts to packed microbatches.

A sequence is prompt + answer.  Every per-token field lies where the model predicts that token: the field of token t + 1
stands at position t, beside the hidden state that gives its log-prob.

RL: rollouts are dealt into minibatches, and each minibatch is packed into microbatches of one fixed shape.  A token's weight
holds the denominators of the whole minibatch, so that microbatches simply add up.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.schema import Denominator, IcePopConfig, ModelConfig, PackingConfig
from kernels.icepop import sequence_weight
from ring_jax.data.packing import PackedBatch, pack, unpack
from ring_jax.records import Rollout
from ring_jax.rl import replay
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
  """Rollouts in microbatches: what one optimizer step of RL trains on, or what a model judges."""

  index: np.ndarray  # int [rollouts]: which of the rollouts that were dealt
  rollouts: list[Rollout]
  microbatches: list[PackedBatch]  # fields: logp_infer, mask

  def gather(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each rollout's answer, token by token, what stands at its predictions; `values` [R, T] of each microbatch."""
    pairs = zip(self.rollouts, unpack(self.microbatches, values), strict=True)
    return [own[len(rollout.prompt) - 1 : -1] for rollout, own in pairs]

  def spread(self, values: Sequence[Any]) -> list[np.ndarray]:
    """float32 [R, T] of each microbatch: a number or an array a rollout, at the predictions of its answer; 0 elsewhere."""
    fields = []
    for batch in self.microbatches:
      field_RxT = np.zeros(batch.tokens.shape, np.float32)
      for number, row, first, length in batch.where:
        field_RxT[row, first + len(self.rollouts[number].prompt) - 1 : first + length - 1] = values[number]
      fields.append(field_RxT)
    return fields

  def tokens(self, replayed: ModelConfig | None = None) -> list[Tokens]:
    """What the actor reads of each microbatch.

    Args:
      replayed: the actor, if it is to route tokens as the engine did (`rl.replay`).
    """
    if replayed is None:
      return [model_tokens(batch) for batch in self.microbatches]
    found = []
    for batch in self.microbatches:
      shape = (replayed.num_moe_layers, *batch.tokens.shape, replayed.num_experts_per_tok)
      experts_LxRxTxK = np.full(shape, replay.OWN, np.int16)
      for number, row, first, length in batch.where:
        rollout = self.rollouts[number]
        if rollout.experts:
          span = slice(first + len(rollout.prompt) - 1, first + length - 1)
          experts_LxRxTxK[:, row, span] = replay.decode(rollout.experts, replayed)
      found.append(model_tokens(batch)._replace(experts_LxRxTxK=experts_LxRxTxK))
    return found

  def last(self, values: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [rollouts]: what stands at the last token of each rollout; `values` [R, T] of each microbatch."""
    return np.array([own[-1] for own in unpack(self.microbatches, values)], np.float32)


def rl_minibatches(
  rollouts: Sequence[Rollout], packing: PackingConfig, count: int = 1, seed: Any = None
) -> list[Minibatch]:
  """Deals rollouts into `count` minibatches (fewer if there are too few rollouts), each packed.

  Args:
    seed: of the shuffle that comes before, for `numpy.random.default_rng`; a single minibatch is not shuffled.
  """
  return [minibatch(part, rollouts, packing) for part in deal(np.arange(len(rollouts)), count, seed)]


def deal(order: np.ndarray, count: int, seed: Any) -> list[np.ndarray]:
  """What `rl_minibatches` deals: `order` in parts, none of them empty."""
  if count > 1:
    order = np.random.default_rng(seed).permutation(order)
  return [part for first in range(count) if len(part := order[first::count])]


def minibatch(index: np.ndarray, rollouts: Sequence[Rollout], packing: PackingConfig) -> Minibatch:
  """Those rollouts, packed."""
  chosen = [rollouts[i] for i in index]
  sequences = [
    {
      "tokens": [*rollout.prompt, *rollout.tokens],
      "logp_infer": at_predictions(len(rollout.prompt), rollout.logps),
      "mask": at_predictions(len(rollout.prompt), [1.0] * len(rollout.tokens)),
    }
    for rollout in chosen
  ]
  return Minibatch(index, chosen, pack(sequences, packing.length, packing.rows))


def rl_fields(
  minibatch: Minibatch,
  advantages: Sequence[Any],
  logp_old: Sequence[np.ndarray] | None,
  config: IcePopConfig,
  logp_ref: Sequence[np.ndarray] | None = None,
) -> list[RLFields]:
  """What the objective needs for each microbatch, weights of the whole minibatch included.

  Args:
    advantages: of each rollout of the minibatch: a number, or one a token of its answer.
    logp_old: [R, T] of each microbatch; None: the gradient pass gives them.
    logp_ref: the same by the reference; needed where kl_coef > 0.
  """
  counted = [batch.fields["mask"] > 0 for batch in minibatch.microbatches]
  if config.denominator is Denominator.KEPT:
    for inside_RxT, old_RxT, batch in zip(counted, logp_old, minibatch.microbatches, strict=True):
      inside_RxT &= calibrate(old_RxT, old_RxT, batch.fields["logp_infer"], config).kept
  weights = token_weights(minibatch, counted, config)
  advantages_RxT = minibatch.spread(advantages)
  fields = []
  for number, batch in enumerate(minibatch.microbatches):
    get = batch.fields
    old_RxT = np.zeros_like(get["logp_infer"]) if logp_old is None else logp_old[number]
    ref_RxT = None if logp_ref is None else logp_ref[number]
    fields.append(RLFields(get["logp_infer"], old_RxT, advantages_RxT[number], get["mask"], weights[number], ref_RxT))
  return fields


def token_weights(minibatch: Minibatch, counted: Sequence[np.ndarray], config: IcePopConfig) -> list[np.ndarray]:
  """float32 [R, T] of each microbatch: what a token of an answer weighs, as the aggregate says; 0 elsewhere.

  Args:
    counted: bool [R, T] of each microbatch: the tokens that count in a sequence's length.
  """
  total = int(sum(inside_RxT.sum() for inside_RxT in counted))
  return [
    _weights(batch.segment_ids, inside_RxT, len(minibatch.rollouts), total, config) * batch.fields["mask"]
    for batch, inside_RxT in zip(minibatch.microbatches, counted, strict=True)
  ]


def _weights(segments_RxT, counted_RxT, num_sequences: int, num_tokens: int, config: IcePopConfig) -> np.ndarray:
  """float32 [R, T]: what each token of its sequence weighs, by how many tokens of the sequence count."""
  R, T = segments_RxT.shape
  sequence_RxT = segments_RxT + np.arange(R)[:, None] * (T + 1)  # no two sequences of a microbatch share a number
  lengths = np.bincount(sequence_RxT.reshape(-1), counted_RxT.reshape(-1), minlength=R * (T + 1)).astype(int)
  weight_of = np.zeros(len(lengths), np.float32)
  for sequence in np.flatnonzero(lengths):
    weight_of[sequence] = sequence_weight(int(lengths[sequence]), num_sequences, num_tokens, config)
  return weight_of[sequence_RxT]
