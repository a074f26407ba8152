"""Rewards of rollouts: token ids to text, text to the scoring pool, scores back into the records."""

from collections import Counter
from collections.abc import Callable, Sequence

from ring_jax.data.tasks import Problem
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.records import FinishReason, Rollout
from ring_jax.rewards.pool import Kind, ScoreItem, ScoringPool


class Scorer:
  """Scores rollouts in the processes of a pool.  An answer that did not end its turn is not an answer, and scores 0."""

  def __init__(self, pool: ScoringPool, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self._pool = pool

  def score(self, rollouts: Sequence[Rollout], problem_of: Callable[[Rollout], Problem]) -> Counter[Kind]:
    """Sets `reward` of every rollout; returns how many were scored, had no answer, timed out, crashed, ..."""
    items = [
      ScoreItem(problem_of(rollout), self._text(rollout), rollout.finish_reason is FinishReason.STOP)
      for rollout in rollouts
    ]
    results = self._pool.score(items)
    for rollout, result in zip(rollouts, results, strict=True):
      rollout.reward = result.score
    return Counter(result.kind for result in results)

  def _text(self, rollout: Rollout) -> str:
    """The answer as text, its end-of-turn token left out."""
    return self.tokenizer.decode([token for token in rollout.tokens if token not in self.tokenizer.eos_ids])
