"""Problems: Reasoning Gym tasks as prompts, worked answers and entries to score against.

Reasoning Gym draws the problem at index i from seed + i, so neighbouring seeds share nearly all problems (tiny_rl.md,
pitfall 3).  Held-out and training problems are drawn from seeds far apart, and no prompt is used twice:

  held-out   the first `held_out_size` distinct prompts from the held-out seed; the same for every run seed
  training   `train_size` draws in an order given by the run's seed, without prompts seen before or held out;
             after the last one the list starts again in another order

A problem is drawn when it is first needed, because some tasks take 0.1 s for one.  The i-th training problem is a pure
function of (config, seed, i): a counter is all that a resumed run needs.
"""

import collections
import dataclasses
import functools
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from configs.schema import ConfigError, TaskConfig, TaskSource, TokenizerConfig, require
from ring_jax.data.chat import render_answer, render_prompt
from ring_jax.data.entries import Entries, open_entries
from ring_jax.data.profanity import is_clean
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.data.traces import TRACES

_TRAIN_SEED = 1
_HELD_OUT_SEED = 1_000_000_000
_DRAWS = 20  # held-out draws for one problem, on average, before a task is said to have too few


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem, ready to be shown, imitated and scored."""

  source: int  # position in task.mixture
  name: str  # of the Reasoning Gym task
  index: int  # in the training order, or among the held-out problems
  question: str  # the prompt without the chat template
  prompt: str  # what the model continues
  completion: str  # what SFT imitates, end of turn included
  entry: Mapping[str, Any]  # what Reasoning Gym scores an answer against


Keep = Callable[[Problem], str]  # empty: keep; otherwise the reason for leaving the problem out


def token_limits(tokenizer: Tokenizer, max_prompt_tokens: int, max_tokens: int) -> Keep:
  """Leaves out problems whose prompt or worked answer (end of turn included) has too many tokens."""

  def keep(problem: Problem) -> str:
    if len(tokenizer.encode(problem.prompt)) > max_prompt_tokens:
      return "prompt too long"
    return "completion too long" if len(tokenizer.encode(problem.completion)) > max_tokens else ""

  return keep


class TaskSet:
  """The problems of a run.

  Args:
    config: the mixture and its sizes.
    tokenizer_config: the chat template.
    seed: of the training order; held-out problems do not depend on it.
    keep: a further filter on both splits.

  Raises:
    ConfigError: a task, an option or a field of a format that does not exist.
  """

  def __init__(self, config: TaskConfig, tokenizer_config: TokenizerConfig, seed: int, keep: Keep = lambda problem: ""):
    require(config.train_size < _HELD_OUT_SEED, f"task.train_size={config.train_size}: less than {_HELD_OUT_SEED}")
    self._config, self._template, self._seed, self._keep = config, tokenizer_config, seed, keep
    self._turns = _Turns([source.weight for source in config.mixture])
    self._train = [
      _Train(_Draws(position, source, _TRAIN_SEED, config.train_size, tokenizer_config), self._reason, seed)
      for position, source in enumerate(config.mixture)
    ]

  @property
  def left_out(self) -> collections.Counter[str]:
    """How many training draws were left out so far, by reason."""
    return sum((train.left_out for train in self._train), collections.Counter())

  def filtered(self, keep: Keep) -> "TaskSet":
    """The same problems without those that `keep` gives a reason against."""
    return TaskSet(self._config, self._template, self._seed, keep)

  def held_out(self, count: int | None = None) -> list[Problem]:
    """The first `count` held-out problems; all `held_out_size` by default.

    Raises:
      ConfigError: there are fewer.
    """
    problems = self._held_out
    count = len(problems) if count is None else count
    require(count <= len(problems), f"task.held_out_size={len(problems)}: {count} held-out problems were asked for")
    return problems[:count]

  def train(self, index: int) -> Problem:
    """The training problem at `index` >= 0 of the endless stream.

    Raises:
      ConfigError: a source has no training problem at all.
    """
    source, rank = self._turns[index]
    return dataclasses.replace(self._train[source].at(rank), index=index)

  def corpus(self, limit: int = 2000) -> list[str]:
    """Text to learn a tokenizer from: questions and worked answers of at most `limit` training draws per source.

    Does not depend on the seed, so that runs which differ in nothing else share their tokenizer.
    """
    problems = [train.draws[raw] for train in self._train for raw in range(min(limit, self._config.train_size))]
    return [
      text for problem in problems if not self._reason(problem) for text in (problem.question, problem.completion)
    ]

  @functools.cached_property
  def _held_out(self) -> list[Problem]:
    """Draws source by source in turn until there are enough."""
    config, size = self._config, self._config.held_out_size
    counts = collections.Counter(self._turns[position][0] for position in range(size))
    streams = {source: self._held_out_of(source, count) for source, count in counts.items()}
    problems, prompts = [], set()
    for position in range(size):
      source, rank = self._turns[position]
      problem = next((problem for problem in streams[source] if problem.prompt not in prompts), None)
      if problem is None:
        wanted = "" if len(counts) == 1 else f", of which {counts[source]} are of {config.mixture[source].name}"
        raise ConfigError(
          f"task.held_out_size={size}{wanted}: {config.mixture[source].name} with these options and limits has only"
          f" {rank} distinct problems in {_DRAWS * counts[source]} draws"
        )
      prompts.add(problem.prompt)
      problems.append(dataclasses.replace(problem, index=position))
    return problems

  def _held_out_of(self, source: int, count: int) -> Iterator[Problem]:
    draws = _Draws(source, self._config.mixture[source], _HELD_OUT_SEED, _DRAWS * count, self._template)
    return (draws[raw] for raw in range(_DRAWS * count) if not self._unfit(draws[raw]))

  @functools.cached_property
  def _held_out_prompts(self) -> frozenset[str]:
    return frozenset(problem.prompt for problem in self._held_out)

  def _reason(self, problem: Problem) -> str:
    """Why a training draw is left out; empty if it is not."""
    return "held out" if problem.prompt in self._held_out_prompts else self._unfit(problem)

  def _unfit(self, problem: Problem) -> str:
    if problem.entry["answer"] == "":
      return "empty answer"  # scorers take nothing written for no answer (base_conversion of 0)
    if self._config.exclude_profanity and not is_clean(f"{problem.question} {problem.completion}"):
      return "profanity"
    return self._keep(problem)


class _Turns:
  """Whose turn it is: smooth weighted round robin, so that every stretch of the stream has the weights' shares."""

  def __init__(self, weights: list[float]):
    self._weights, self._credit = np.asarray(weights), np.zeros(len(weights))
    self._counts = [0] * len(weights)
    self._turns: list[tuple[int, int]] = []

  def __getitem__(self, index: int) -> tuple[int, int]:
    """(source, how many turns that source had before)."""
    while len(self._turns) <= index:
      self._credit += self._weights
      source = int(np.argmax(self._credit))
      self._credit[source] -= self._weights.sum()
      self._turns.append((source, self._counts[source]))
      self._counts[source] += 1
    return self._turns[index]


class _Train:
  """Training problems of one source by rank: the clean draws in a shuffled order, again and again."""

  def __init__(self, draws: "_Draws", reason: Keep, seed: int):
    self.draws, self._reason, self._seed = draws, reason, seed
    self._order: list[int] = []  # raw indices of the first epoch, as far as it was walked
    self._walk = self._first_epoch()
    self._epoch = functools.lru_cache(maxsize=2)(self._permutation)
    self.left_out: collections.Counter[str] = collections.Counter()

  def at(self, rank: int) -> Problem:
    while len(self._order) <= rank and (raw := next(self._walk, None)) is not None:
      self._order.append(raw)
    if not self._order:
      raise ConfigError(
        f"task.mixture: no training problem of {self.draws.name} is left of {self.draws.size} draws"
        f" ({', '.join(f'{count} {reason}' for reason, count in self.left_out.items())})"
      )
    epoch, offset = divmod(rank, len(self._order))
    return self.draws[self._order[self._epoch(epoch)[offset] if epoch else rank]]

  def _permutation(self, epoch: int) -> np.ndarray:
    size = len(self._order) if epoch else self.draws.size
    return np.random.default_rng([self._seed, self.draws.source, epoch]).permutation(size)

  def _first_epoch(self) -> Iterator[int]:
    seen = set()
    for raw in self._permutation(0).tolist():
      problem = self.draws[raw]
      reason = "duplicate" if problem.prompt in seen else self._reason(problem)
      if reason:
        self.left_out[reason] += 1
      else:
        seen.add(problem.prompt)
        yield raw


class _Draws:
  """Problems of one source by raw index, from one seed."""

  def __init__(self, source: int, config: TaskSource, seed: int, size: int, template: TokenizerConfig):
    self.source, self.name, self.size = source, config.name, size
    self._config, self._template = config, template
    self._entries: Entries = open_entries(config, seed, size)
    self._with_trace = any("trace" in _fields(text, config.name) for text in (config.prompt, config.completion))
    if self._with_trace and config.name not in TRACES:
      raise ConfigError(f"task.mixture: {config.name} has no {{trace}}; there is one for {', '.join(TRACES)}")
    self._problem = functools.lru_cache(maxsize=4096)(self._draw)
    self._draw(0)  # an unknown field should show at once

  def __getitem__(self, raw: int) -> Problem:
    return self._problem(raw)

  def _draw(self, raw: int) -> Problem:
    entry = self._entries[raw]
    fields = {**entry["metadata"], "question": entry["question"], "answer": entry["answer"]}
    if self._with_trace:
      fields["trace"] = TRACES[self.name](entry)
    question, completion = (_format(text, fields, self.name) for text in (self._config.prompt, self._config.completion))
    prompt = render_prompt(question, self._template)
    return Problem(self.source, self.name, raw, question, prompt, render_answer(completion), entry)


class _Formatter(string.Formatter):
  """Python's format strings, and `{field!c}`: compact, a list joined by commas, text without blanks."""

  def convert_field(self, value: Any, conversion: str | None) -> Any:
    if conversion != "c":
      return super().convert_field(value, conversion)
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else "".join(str(value).split())


_FORMATTER = _Formatter()


def _fields(text: str, name: str) -> set[str]:
  """Names of the fields in a format string."""
  try:
    return {field.split(".")[0].split("[")[0] for _, field, _, _ in _FORMATTER.parse(text) if field is not None}
  except ValueError as error:
    raise ConfigError(f"task.mixture: format {text!r} of {name}: {error}") from None


def _format(text: str, fields: Mapping[str, Any], name: str) -> str:
  try:
    return _FORMATTER.vformat(text, (), fields)
  except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
    unknown = sorted(_fields(text, name) - fields.keys())
    problem = f"has no field {{{unknown[0]}}}" if unknown else f"cannot be formatted ({error})"
    raise ConfigError(f"task.mixture: {text!r} of {name} {problem}; fields: {', '.join(sorted(fields))}") from None
