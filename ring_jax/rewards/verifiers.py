"""From what a model wrote to a score: find the answer, then ask the task's own scorer or MathVerify.

Ring-1T verifies by rule (papers.md 1.3; the forms are in Part 3: MathVerify on \\boxed{}, 1 or 0).  Scorers of
Reasoning Gym give partial credit, 0.89 for a word with one wrong letter (tiny_rl.md, pitfall 2), which teaches a model
to be almost right: in exact mode only a full score counts.

MathVerify compares values, which is too generous where the answer is not a value: as products of letters `god` equals
`dog`, and `4-1-7` equals -4 though nothing was computed.  It is therefore asked only where the task's own answer is
mathematical, and where that is an integer the model's answer must be a number too.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from configs.schema import AnswerFormat

_FULL = 0.999  # scores are sums of floats
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace is no brace
# No mathematics: words (but functions and LaTeX commands are), digits beside letters (hexadecimal), times, quotes.
_FUNCTIONS = r"(?:sqrt|pi|sin|cos|tan|exp|log|ln)(?![A-Za-z])"
_NOT_MATHEMATICS = re.compile(
  rf"(?<![A-Za-z\\])(?!{_FUNCTIONS})[A-Za-z]{{2,}}|\d[A-Za-z]|(?<![A-Za-z\\])[A-Za-z]\d|['\":]"
)
_INTEGER = re.compile(r"[+-]?\d+")
_UNEVALUATED = re.compile(r"[\d)}\]]\s*(?:[-+*/^!]|\\(?:times|cdot|div|pm)\b)|\\(?:[dt]?frac|sqrt|binom|sum|prod)\b|!")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")


class Dataset(Protocol):
  """What scores answers: a Reasoning Gym dataset."""

  def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> float: ...


def extract(completion: str, answer: AnswerFormat, thinking: bool = False) -> str | None:
  """The answer in a completion, without surrounding blanks; None where the format was not kept.

  Takes time in proportion to the length, whatever the text.

  Args:
    completion: what the model wrote, without its end-of-turn token.
    answer: where the answer stands.
    thinking: the prompt opened a thought; it must be closed once, and the answer stands after it.
  """
  if thinking:
    if _THINK_OPEN in completion or completion.count(_THINK_CLOSE) != 1:
      return None
    completion = completion.partition(_THINK_CLOSE)[2]
  if answer is AnswerFormat.BOXED:
    completion = _last_box(completion)
  elif answer is AnswerFormat.HASH:
    completion = completion.partition("#")[2] if completion.count("#") == 1 else None
  return None if completion is None else completion.strip()


def _last_box(text: str) -> str | None:
  """What stands in the last \\boxed{...} whose braces balance."""
  found, open_braces = None, []  # of each open brace: where its box's content starts, None for a plain one
  for match in _BOX.finditer(text):
    token = match.group()
    if token == "{":
      open_braces.append(None)
    elif token.startswith("\\boxed"):
      open_braces.append(match.end())
    elif token == "}" and open_braces:
      start = open_braces.pop()
      found = text[start : match.start()] if start is not None else found
  return found


def score(dataset: Dataset, entry: Mapping[str, Any], answer: str, answer_format: AnswerFormat, exact: bool) -> float:
  """The score of an answer, from 0 to 1; ValueError, or whatever the scorer raises, where it gives no number.

  May hang, raise or take any amount of memory, as the answer wills: call it in a process that can be lost.

  Args:
    dataset: the task, made with the same options as the entry.
    entry: the problem.
    answer: found by `extract`.
    answer_format: BOXED answers are also compared by MathVerify where the task's scorer does not take them.
    exact: 1 for a full score, else 0.
  """
  boxed = answer_format is AnswerFormat.BOXED
  try:
    value = float(dataset.score_answer(answer, entry))
    if not math.isfinite(value):
      raise ValueError(f"the scorer gave {value}")
  except (ValueError, TypeError, ArithmeticError):
    if not boxed:
      raise
    value = 0.0  # LaTeX where the task reads a plain number
  if boxed and value < _FULL and equal_in_value(str(entry["answer"]), answer):
    value = 1.0
  return float(value >= _FULL) if exact else min(max(value, 0.0), 1.0)


def equal_in_value(gold: str, answer: str) -> bool:
  """Whether MathVerify takes two answers for the same; False where `gold` is not mathematical."""
  if _NOT_MATHEMATICS.search(gold):
    return False
  if _INTEGER.fullmatch(gold.strip()) and _UNEVALUATED.search(_DEGREES.sub("", answer)):
    return False
  import math_verify  # takes a second, which only boxed answers should cost

  logging.getLogger("math_verify").setLevel(logging.CRITICAL)
  # Its own limits are alarms of the main thread, which stop no big-number arithmetic: the pool's deadline does.
  boxes = (f"\\boxed{{{text.replace('**', '^')}}}" for text in (gold, answer))  # it reads LaTeX, tasks write Python
  parsed = [math_verify.parse(box, parsing_timeout=None) for box in boxes]
  return bool(math_verify.verify(*parsed, timeout_seconds=None))
