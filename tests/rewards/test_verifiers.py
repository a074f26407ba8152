"""Finding answers, and what counts as right."""

import time

import pytest
import reasoning_gym

from configs.schema import AnswerFormat
from ring_jax.rewards.verifiers import equal_in_value, extract, score

ALL, BOXED, HASH = AnswerFormat.ALL, AnswerFormat.BOXED, AnswerFormat.HASH


@pytest.mark.parametrize(
  ("text", "answer_format", "thinking", "answer"),
  [
    (" drow\n", ALL, False, "drow"),
    ("", ALL, False, ""),
    ("a</think>b", ALL, False, "a</think>b"),
    ("1+1=2</think>2", ALL, True, "2"),
    ("1+1=2", ALL, True, None),
    ("a</think>b</think>c", ALL, True, None),
    ("<think>a</think>b", ALL, True, None),
    ("a</think><think>b", ALL, True, None),
    ("1,2#3", HASH, False, "3"),
    ("3", HASH, False, None),
    ("1#2#3", HASH, False, None),
    ("1#2</think>#3", HASH, True, "3"),
    (r"so \boxed{1} or \boxed{\frac{1}{2}}.", BOXED, False, r"\frac{1}{2}"),
    (r"\boxed {2}", BOXED, False, "2"),
    (r"\boxed{1} then \boxed{2", BOXED, False, "1"),
    (r"\boxed{a\}b}", BOXED, False, r"a\}b"),
    (r"{\boxed{1}}}}", BOXED, False, "1"),
    ("boxed{1}", BOXED, False, None),
    (r"\boxed{1}</think>2", BOXED, True, None),
  ],
)
def test_extract(text, answer_format, thinking, answer):
  assert extract(text, answer_format, thinking) == answer


@pytest.mark.parametrize("text", ["\\boxed{" * 200_000, "{}" * 500_000, "\\boxed " * 200_000, "\\boxed" + " " * 10**6])
def test_extract_takes_linear_time(text):
  start = time.process_time()
  extract(text, BOXED)
  assert time.process_time() - start < 5.0


def test_exact_mode_takes_full_scores_only():
  dataset = reasoning_gym.create_dataset("spell_backward", seed=1, size=1)
  entry = dataset[0]
  right = entry["answer"]
  assert score(dataset, entry, right, ALL, exact=True) == 1.0
  assert score(dataset, entry, right[:-1] + "?", ALL, exact=True) == 0.0
  assert 0.5 < score(dataset, entry, right[:-1] + "?", ALL, exact=False) < 1.0
  sums = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)
  assert score(sums, sums[0], f"the answer is {sums[0]['answer']}", ALL, exact=True) == 0.0


@pytest.mark.parametrize(
  ("gold", "answer", "equal"),
  [
    ("1/2", r"\frac{1}{2}", True),
    ("1/2", "0.5", True),
    ("-4", "-4", True),
    ("-4", "-4.0", True),
    ("1234", "1,234", True),
    ("90", r"90^\circ", True),
    ("x**2 + 2*x", "x(x+2)", True),
    ("1/2", "2", False),
    ("-4", "4 - 1 - 7", False),  # the question, not its answer
    ("4", r"\frac{8}{2}", False),
    ("720", "6!", False),
    ("god", "dog", False),  # the same product of letters
    ("1e3", "1000", False),  # hexadecimal, perhaps
    ("00:34:28", "0:34:28", False),
    ("2", "\\frac{1}{", False),
  ],
)
def test_values(gold, answer, equal):
  assert equal_in_value(gold, answer) == equal


def test_boxed_answers_are_right_for_the_task_or_for_mathverify():
  dataset = reasoning_gym.create_dataset("lcm", seed=1, size=1)
  entry = dataset[0]
  assert entry["answer"] == "2842"
  for answer in ("2842", "2{,}842", "2842.0", "x = 2842"):
    assert score(dataset, entry, answer, BOXED, exact=True) == 1.0, answer
  for answer in ("2{,}841", "98 \\cdot 29", ""):
    assert score(dataset, entry, answer, BOXED, exact=True) == 0.0, answer
  assert score(dataset, entry, "2{,}842", ALL, exact=True) == 0.0
