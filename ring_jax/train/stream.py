"""The endless streams of training problems and preference pairs as token ids, each with a cursor that a checkpoint holds."""

import functools

from ring_jax.data.preferences import Pair, Preferences
from ring_jax.data.tasks import Problem, TaskSet
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.train.batches import Example


class ProblemStream:
  """Problems in training order.  The i-th problem is a function of the task set alone: the cursor is the only state."""

  def __init__(self, tasks: TaskSet, tokenizer: Tokenizer, cursor: int = 0):
    self._tasks, self._tokenizer = tasks, tokenizer
    self.cursor = cursor
    # The members of a group ask for one problem again and again, perhaps over several iterations.
    self.problem = functools.lru_cache(maxsize=100_000)(tasks.train)

  def take(self, count: int) -> list[tuple[int, list[int]]]:
    """The next `count` problems: (index, prompt token ids)."""
    first, self.cursor = self.cursor, self.cursor + count
    return [(index, self._tokenizer.encode(self.problem(index).prompt)) for index in range(first, self.cursor)]

  def examples(self, count: int) -> list[Example]:
    """The next `count` worked answers."""
    first, self.cursor = self.cursor, self.cursor + count
    return [self._example(self.problem(index)) for index in range(first, self.cursor)]

  def _example(self, problem: Problem) -> Example:
    return Example(self._tokenizer.encode(problem.prompt), self._tokenizer.encode(problem.completion))


class PairStream:
  """Preference pairs in training order; as for problems, the cursor is the only state."""

  def __init__(self, preferences: Preferences, cursor: int = 0):
    self._preferences = preferences
    self.cursor = cursor

  def take(self, count: int) -> list[Pair]:
    """The next `count` pairs."""
    first, self.cursor = self.cursor, self.cursor + count
    return [self._preferences.train(index) for index in range(first, self.cursor)]
