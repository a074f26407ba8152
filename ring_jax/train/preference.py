"""One step of the reward model's training: which of two answers is better (Bradley and Terry 1952, as in RLHF).

    loss = mean over pairs of -log sigmoid(score(chosen) - score(rejected))

The score of an answer is the scalar model's value at its last token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.schema import PackingConfig, RunConfig
from ring_jax.data.packing import pack, unpack
from ring_jax.data.preferences import Pair
from ring_jax.model import Params
from ring_jax.train.batches import model_tokens
from ring_jax.train.scalar_batches import pair_batches
from ring_jax.train.scalar_programs import ScalarPrograms, pair_metrics
from ring_jax.train.stream import PairStream
from sharding.processes import fetch


class RewardModelPhase:
  def __init__(self, config: RunConfig, programs: ScalarPrograms, stream: PairStream):
    self._config, self._programs, self._stream = config, programs, stream

  def step(self, params: Params, opt_state: Any) -> tuple[Params, Any, dict[str, float], int]:
    """Returns (params, opt_state, metrics, positions trained on); donates what it is given."""
    batches = pair_batches(self._stream.take(self._config.reward_model.batch_size), self._config.packing)
    sums = None
    for tokens, fields in batches:
      sums = self._programs.pair_gradients(params, sums, tokens, fields)
    metrics = pair_metrics(sums)
    params, opt_state, norm = self._programs.apply(params, opt_state, sums.params)
    metrics |= {"grad_norm": float(norm), "pairs_seen": self._stream.cursor}
    return params, opt_state, metrics, int(sum((tokens.segments_RxT > 0).sum() for tokens, _ in batches))

  def accuracy(self, params: Params, pairs: Sequence[Pair]) -> float:
    """The share of pairs whose chosen answer scores higher than the rejected one."""
    sequences = [[*pair.prompt, *answer] for pair in pairs for answer in (pair.chosen, pair.rejected)]
    score_2P = scores(self._programs, params, sequences, self._config.packing)
    return float(np.mean(score_2P[0::2] > score_2P[1::2])) if pairs else 0.0


def scores(
  programs: ScalarPrograms, params: Params, sequences: Sequence[Sequence[int]], packing: PackingConfig
) -> np.ndarray:
  """float32, one a sequence of token ids: its last value."""
  batches = pack([{"tokens": tokens} for tokens in sequences], packing.length, packing.rows)
  values = fetch([programs.values(params, model_tokens(batch)) for batch in batches])
  return np.array([values_N[-1] for values_N in unpack(batches, values)], np.float32)
