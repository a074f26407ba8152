"""Rewards of rollouts: token ids to text, text to the scoring pool, scores back into the records."""

from collections import Counter
from collections.abc import Callable, Sequence

from ring_jax.data.tasks import Problem
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.records import FinishReason, Rollout
from ring_jax.rewards.pool import Kind, ScoreItem, ScoringPool
from sharding import processes


class Scorer:
  """Scores rollouts in the processes of a pool.  An answer that did not end its turn is not an answer, and scores 0.

  Where several processes run the job, the first one scores and the others hear from it: a deadline is met or not.

  Args:
    pool: running, on the first process.
  """

  def __init__(self, pool: ScoringPool | None, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self._pool = pool

  def score(self, rollouts: Sequence[Rollout], problem_of: Callable[[Rollout], Problem]) -> Counter[Kind]:
    """Sets `reward` of every rollout; returns how many were scored, had no answer, timed out, crashed, ..."""
    results = processes.group().from_first("scores", lambda: self._scored(rollouts, problem_of))
    for rollout, (score, _) in zip(rollouts, results, strict=True):
      rollout.reward = score
    return Counter(Kind(kind) for _, kind in results)

  def _scored(self, rollouts: Sequence[Rollout], problem_of: Callable[[Rollout], Problem]) -> list[tuple[float, str]]:
    items = [
      ScoreItem(problem_of(rollout), self._text(rollout), rollout.finish_reason is FinishReason.STOP)
      for rollout in rollouts
    ]
    return [(result.score, result.kind.value) for result in self._pool.score(items)]

  def _text(self, rollout: Rollout) -> str:
    """The answer as text, its end-of-turn token left out."""
    return self.tokenizer.decode([token for token in rollout.tokens if token not in self.tokenizer.eos_ids])
