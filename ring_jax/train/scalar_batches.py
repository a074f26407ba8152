"""From rollouts and preference pairs to the packed microbatches of the scalar model.

As in `batches`: a sequence is prompt + answer, and what belongs to token t + 1 stands at position t, so that a critic's
value of an answer token is the one at its prediction.  A score is the value at a sequence's last position.
"""

from collections.abc import Sequence

import numpy as np

from configs.schema import PackingConfig, PPOConfig
from ring_jax.data.packing import pack_groups
from ring_jax.data.preferences import Pair
from ring_jax.train.batches import Minibatch, model_tokens
from ring_jax.train.programs import Tokens
from ring_jax.train.scalar_programs import PairFields, ValueFields


def value_batches(
  batch: Minibatch, old_values: Sequence[np.ndarray], returns: Sequence[np.ndarray], config: PPOConfig
) -> list[tuple[Tokens, ValueFields]]:
  """Microbatches of the critic's step on one minibatch: the mean over all its answer tokens.

  Args:
    old_values: the critic's before the step, one number a token.
    returns: of `rl.ppo.gae`, likewise.
  """
  weight = config.value_coef / 2 / max(sum(len(rollout.tokens) for rollout in batch.rollouts), 1)
  fields = (batch.spread(values) for values in (old_values, returns, [weight] * len(batch.rollouts)))
  return [
    (model_tokens(one), ValueFields(*own, config.value_clip))
    for one, *own in zip(batch.microbatches, *fields, strict=True)
  ]


def pair_batches(pairs: Sequence[Pair], packing: PackingConfig) -> list[tuple[Tokens, PairFields]]:
  """Microbatches of the reward model's step: the mean over all pairs, each of them whole in one microbatch."""
  groups = [[{"tokens": [*pair.prompt, *pair.chosen]}, {"tokens": [*pair.prompt, *pair.rejected]}] for pair in pairs]
  found = []
  for batch in pack_groups(groups, packing.length, packing.rows):
    places_2xP = np.zeros((2, len(pairs)), np.int32)
    weights_P = np.zeros(len(pairs), np.float32)
    for index, row, first, size in batch.where:
      pair, which = divmod(index, 2)
      places_2xP[which, pair] = row * packing.length + first + size - 1
      weights_P[pair] = 1 / len(pairs)
    found.append((model_tokens(batch), PairFields(*places_2xP, weights_P)))
  return found
