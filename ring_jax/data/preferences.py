"""Preference pairs from problems with worked answers: what a reward model learns from where no person has judged.

The candidates for a problem are its worked answer and corruptions of it by 1, 2, 3 and 4 edits.  How bad a candidate is
is its edit distance (Levenshtein) to the worked answer.  A pair is two candidates of different distance, the nearer one
chosen: about half of the time that is the worked answer itself, else the less corrupted of two wrong answers, because the
reward model will have to rank wrong answers too.

    edit        one of: swap two different neighbours, drop a character, repeat one, replace one by another of its kind
                (digit, small letter, capital), so that no strange character gives the corruption away
    where       in the last place where the answer stands after the thought; a trace before it stays true.  Where it does
                not stand as such, in the whole text after the thought.  At most the last 64 characters are edited, and
                of these only letters and digits, if there are any: a blank or a quote more may mean the same

The i-th pair is a function of (task set, seed, i), and the n-th held-out pair of the task set alone: a counter is all that
a resumed run needs.  What a task's scorer says of a corruption is not asked: where several answers are right, a corruption
may be one of them.
"""

import dataclasses
import itertools
import string

import numpy as np

from configs.schema import ConfigError
from ring_jax.data.tasks import Problem, TaskSet
from ring_jax.data.tokenizer import END_OF_TURN, THINK_CLOSE, Tokenizer

_MOST_EDITS = 4
_WINDOW = 64  # characters of an answer, its last ones, that are edited
_ATTEMPTS = 20  # draws of corruptions for one pair
_HELD_OUT = 1_000_000_000  # in place of the run's seed
_KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


@dataclasses.dataclass(frozen=True)
class Pair:
  """Token ids; both answers end their turn."""

  prompt: list[int]
  chosen: list[int]
  rejected: list[int]


class Preferences:
  """The pairs of a run.

  Args:
    tasks: whose problems they are about.
    seed: of the corruptions of training problems.
    max_tokens: of an answer, its end of turn included.
  """

  def __init__(self, tasks: TaskSet, tokenizer: Tokenizer, seed: int, max_tokens: int):
    self._tasks, self._tokenizer, self._seed, self._max_tokens = tasks, tokenizer, seed, max_tokens

  def train(self, index: int) -> Pair:
    """The pair at `index` >= 0 of the endless stream: about the training problem there.

    Raises:
      ConfigError: no corruption of its answer fits in `max_tokens`.
    """
    return self._pair(self._tasks.train(index), self._seed, index)

  def held_out(self, count: int) -> list[Pair]:
    """Pairs about the first `count` held-out problems; the same for every seed.

    Raises:
      ConfigError: there are fewer, or as above.
    """
    return [self._pair(problem, _HELD_OUT, index) for index, problem in enumerate(self._tasks.held_out(count))]

  def _pair(self, problem: Problem, seed: int, index: int) -> Pair:
    encode = self._tokenizer.encode
    head, answer, tail = _parts(problem)
    rng = np.random.default_rng([seed, index])
    for _ in range(_ATTEMPTS):
      texts = [answer, *(_corrupted(answer, edits, rng) for edits in range(1, _MOST_EDITS + 1))]
      candidates = [(distance(answer, text), encode(f"{head}{text}{tail}")) for text in texts]
      fitting = [(far, ids) for far, ids in candidates if len(ids) <= self._max_tokens]
      worse = [(far, ids) for far, ids in fitting if far > min(near for near, _ in fitting)] if fitting else []
      if worse:
        far, rejected = worse[rng.integers(len(worse))]
        better = [ids for near, ids in fitting if near < far]
        return Pair(encode(problem.prompt), better[rng.integers(len(better))], rejected)
    raise ConfigError(
      f"rollout.max_tokens={self._max_tokens}: no two answers to {problem.name} {problem.index} fit in it, of"
      f" {problem.completion!r} and its corruptions"
    )


def distance(one: str, other: str) -> int:
  """Levenshtein's: the fewest characters to insert, drop or replace."""
  row = list(range(len(other) + 1))
  for i, left in enumerate(one, start=1):
    diagonal, row[0] = row[0], i
    for j, right in enumerate(other, start=1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
  return row[-1]


def _parts(problem: Problem) -> tuple[str, str, str]:
  """The completion cut in three; the part in the middle is what may be corrupted."""
  text = problem.completion.removesuffix(END_OF_TURN)
  first = text.rfind(THINK_CLOSE) + len(THINK_CLOSE) if THINK_CLOSE in text else 0
  answer = str(problem.entry["answer"])
  start = text.rfind(answer, first)
  start, end = (start, start + len(answer)) if answer and start >= 0 else (first, len(text))
  start = max(start, end - _WINDOW)
  return text[:start], text[start:end], text[end:] + problem.completion[len(text) :]


def _corrupted(text: str, edits: int, rng: np.random.Generator) -> str:
  for _ in range(edits):
    text = _edited(text, rng)
  return text


def _edited(text: str, rng: np.random.Generator) -> str:
  """One edit; never the text itself."""
  places = [i for i, character in enumerate(text) if character.isalnum()] or list(range(len(text)))
  if not places:
    return str(rng.integers(10))  # what was empty cannot be corrupted otherwise
  # A swap needs two characters, and so does a drop: an empty answer would be none.
  swaps = [(i, j) for i, j in itertools.pairwise(places) if text[i] != text[j]]
  place = places[rng.integers(len(places))]
  before, character, after = text[:place], text[place], text[place + 1 :]
  match ("replace", "repeat", "drop", "swap")[rng.integers(2 + (len(text) > 1) + bool(swaps))]:
    case "replace":
      return before + _another(character, rng) + after
    case "repeat":
      return before + 2 * character + after
    case "drop":
      return before + after
    case "swap":
      i, j = swaps[rng.integers(len(swaps))]
      return text[:i] + text[j] + text[i + 1 : j] + text[i] + text[j + 1 :]


def _another(character: str, rng: np.random.Generator) -> str:
  """A different character of the same kind."""
  kind = next((kind for kind in _KINDS if character in kind), string.digits)
  others = [other for other in kind if other != character]
  return others[rng.integers(len(others))]
