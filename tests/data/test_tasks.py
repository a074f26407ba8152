"""Problems: disjoint splits, an order that is a pure function of (config, seed, i), formats, filters, traces."""

import os
import pathlib
import subprocess
import sys

import pytest
import reasoning_gym

from configs.schema import ConfigError, TaskConfig, TaskSource, TokenizerConfig
from ring_jax.data.profanity import is_clean
from ring_jax.data.tasks import TaskSet, token_limits
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.data.traces import TRACES, last_result

ROOT = pathlib.Path(__file__).parents[2]
SPELL = TaskSource(name="spell_backward", options={"min_word_len": 3, "max_word_len": 6}, prompt="{word}")
SUMS = TaskSource(name="chain_sum", weight=3.0, options={"max_digits": 1}, prompt="{expression!c}=")


def task_set(*sources, seed=0, **fields):
  sizes = {"train_size": 400, "held_out_size": 64} | fields
  return TaskSet(TaskConfig(mixture=sources, **sizes), TokenizerConfig(), seed)


def prompts(problems):
  return [problem.prompt for problem in problems]


@pytest.mark.parametrize("options", [{"max_terms": 2, "max_digits": 1}, {"max_terms": 4, "max_digits": 2}])
def test_splits_are_disjoint_and_without_duplicates(options):
  # Two one-digit terms: 200 prompts in all, so that chance alone would mix the splits.
  source = TaskSource(name="chain_sum", options={"min_terms": 2} | options, prompt="{expression}")
  tasks = task_set(source)
  held_out = prompts(tasks.held_out())
  assert len(set(held_out)) == len(held_out) == 64
  epoch = len(dict.fromkeys(prompts(tasks.train(i) for i in range(400))))
  train = prompts(tasks.train(i) for i in range(epoch))
  assert len(set(train)) == epoch and not set(train) & set(held_out)
  # The next epoch has the same problems in another order.
  again = prompts(tasks.train(i) for i in range(epoch, 2 * epoch))
  assert sorted(again) == sorted(train) and again != train
  assert tasks.left_out["duplicate"] + tasks.left_out["held out"] == 400 - epoch


def test_held_out_problems_do_not_depend_on_the_seed_and_the_order_does():
  one, other = (task_set(SPELL, SUMS, seed=seed) for seed in (1, 2))
  assert prompts(one.held_out()) == prompts(other.held_out())
  assert prompts(one.held_out(8)) == prompts(one.held_out())[:8]
  first, second = (prompts(tasks.train(i) for i in range(100)) for tasks in (one, other))
  assert first != second
  # Access in any order, from any start, gives the same problem.
  late = task_set(SPELL, SUMS, seed=1)
  assert [late.train(i).prompt for i in (700, 99, 0)] == [one.train(i).prompt for i in (700, 99, 0)]
  assert late.train(99).index == 99


def test_mixture_has_its_weights_in_every_stretch():
  tasks = task_set(SPELL, SUMS)
  names = [tasks.train(i).name for i in range(80)]
  assert all(names[i : i + 8].count("chain_sum") == 6 for i in range(0, 80, 8))
  assert [p.source for p in tasks.held_out()].count(0) == 16


def test_the_same_problems_in_every_process():
  # ransom_note draws from sets of strings: another problem for every hash seed, if nothing is done about it.
  code = (
    "import hashlib; from tests.data.test_tasks import *\n"
    "ladder = TaskSource(name='ransom_note')\n"
    "tasks = task_set(SPELL, ladder, SUMS, train_size=50, held_out_size=9)\n"
    "text = repr([(p.prompt, p.completion) for p in [*tasks.held_out(), *map(tasks.train, range(120))]])\n"
    "print(hashlib.sha256(text.encode()).hexdigest())\n"
  )
  runs = [
    subprocess.run(
      [sys.executable, "-c", code],
      env=os.environ | {"PYTHONHASHSEED": seed},
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ("1", "2")
  ]
  assert runs[0] == runs[1] and len(runs[0]) == 65


def test_prompt_and_completion():
  problem = task_set(SPELL).train(3)
  word = problem.entry["metadata"]["word"]
  assert problem.question == word
  assert problem.prompt == f"<role>HUMAN</role>{word}<role>ASSISTANT</role>"
  assert problem.completion == f"{word[::-1]}<|role_end|>"
  think = TaskSource(name="chain_sum", prompt="{expression!c}=", completion="{trace}</think>{answer}")
  config = TaskConfig(mixture=(think,), train_size=50, held_out_size=4)
  problem = TaskSet(config, TokenizerConfig(thinking=True), 0).train(0)
  assert problem.prompt.endswith("=<role>ASSISTANT</role><think>") and " " not in problem.prompt
  trace, answer = problem.completion.removesuffix("<|role_end|>").split("</think>")
  assert last_result(trace) == answer == problem.entry["answer"]


def test_compact_lists():
  source = TaskSource(name="number_sorting", prompt="{original_numbers!c}")
  problem = task_set(source, train_size=5, held_out_size=2).train(0)
  assert problem.question == ",".join(problem.entry["metadata"]["original_numbers"])


def test_problems_that_cannot_be_scored_are_left_out():
  zeros = TaskSource(name="base_conversion", options={"min_value": 0, "max_value": 3}, prompt="{source_repr}")
  tasks = task_set(zeros, held_out_size=1)
  assert all(tasks.train(i).entry["answer"] for i in range(20)) and tasks.left_out["empty answer"] > 0


@pytest.mark.parametrize(
  ("source", "message"),
  [
    (TaskSource(name="spell_backwards"), "no task 'spell_backwards'; did you mean spell_backward"),
    (TaskSource(name="chain_sum", options={"max_term": 3}), "options of chain_sum: .*max_term"),
    (TaskSource(name="chain_sum", options={"min_terms": 9, "max_terms": 3}), "max_terms must be >= min_terms"),
    (TaskSource(name="chain_sum", prompt="{word}"), r"no field {word}; fields: answer, .*expression"),
    (TaskSource(name="chain_sum", prompt="{"), "format '{' of chain_sum"),
    (TaskSource(name="chain_sum", prompt="{}"), "chain_sum"),
    (TaskSource(name="chain_sum", prompt="{expression:d}"), "cannot be formatted"),
    (TaskSource(name="mini_sudoku", completion="{trace}"), r"mini_sudoku has no {trace}; there is one for base_conv"),
  ],
)
def test_user_errors_are_one_line(source, message):
  with pytest.raises(ConfigError, match=message) as error:
    task_set(source)
  assert "\n" not in str(error.value)


def test_too_few_problems_say_how_many_there_are():
  tiny = TaskSource(name="chain_sum", options={"min_terms": 2, "max_terms": 2, "max_digits": 1}, prompt="{expression}")
  with pytest.raises(ConfigError, match=r"task\.held_out_size=500: chain_sum .* only 200 distinct"):
    task_set(tiny, held_out_size=500).held_out()
  with pytest.raises(ConfigError, match=r"no training problem of chain_sum is left of 400 draws \(400 held out\)"):
    task_set(tiny, held_out_size=200).train(0)
  with pytest.raises(ConfigError, match="65 held-out problems were asked for"):
    task_set(SPELL).held_out(65)


def test_token_limits_leave_problems_out_and_count_them():
  tokenizer = Tokenizer.build()
  tasks = task_set(SPELL).filtered(token_limits(tokenizer, max_prompt_tokens=11, max_tokens=6))
  for problem in [*tasks.held_out(), *map(tasks.train, range(300))]:
    assert len(tokenizer.encode(problem.prompt)) <= 11 and len(problem.question) <= 5
  assert tasks.left_out["prompt too long"] > 20
  short = task_set(SPELL).filtered(token_limits(tokenizer, 100, 5))
  assert len(short.train(0).question) <= 4 and short.left_out["completion too long"] > 0


def test_profanity_is_left_out():
  shown = task_set(SPELL, train_size=3000)
  assert all(is_clean(f"{problem.question} {problem.completion}") for problem in map(shown.train, range(2500)))
  assert shown.left_out["profanity"] > 0
  assert task_set(SPELL, train_size=3000, exclude_profanity=False).left_out["profanity"] == 0
  assert is_clean("Count the spaces in 455 assistants, stop on top") and is_clean("")


def test_corpus_is_text_of_training_problems_only():
  one, other = task_set(SPELL, seed=0), task_set(SPELL, seed=5)
  corpus = one.corpus(100)
  assert corpus == other.corpus(100) and len(corpus) > 100
  assert not set(corpus) & {problem.question for problem in one.held_out()}


# Options that reach the corners of each trace: signs, more than two numbers, letters as digits.
TRACED = {
  "base_conversion": [{}, {"max_base": 36, "max_value": 10**6}, {"min_value": 1, "max_value": 3}],
  "chain_sum": [{}, {"allow_negation": True}],
  "count_bits": [{}, {"max_n": 40}],
  "gcd": [{}, {"min_numbers": 3, "max_numbers": 4, "max_value": 60}],
  "lcm": [{}, {"min_numbers": 3, "max_numbers": 3}],
  "letter_counting": [{}],
  "number_sorting": [{}, {"min_value": 0, "max_value": 9, "max_decimals": 0}],
  "prime_factorization": [{}],
  "products": [{}, {"allow_negation": True, "max_terms": 4}],
  "spell_backward": [{}],
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_end_with_the_answer_and_their_steps_are_true(name):
  for options in TRACED[name]:
    dataset = reasoning_gym.create_dataset(name, seed=3, size=300, **options)
    for entry in dataset:
      if not entry["answer"]:
        continue  # Reasoning Gym writes the number 0 as no digits
      trace = TRACES[name](entry)
      result = last_result(trace)
      if name == "number_sorting":
        result = str(result.split(","))
      assert dataset.score_answer(result, entry) == 1.0, (entry, trace)
      assert result == entry["answer"]
      if name in ("chain_sum", "products", "gcd", "lcm"):
        for step in (step for step in trace.split(";") if "=" in step):
          left, right = step.split("=")
          assert eval(left.replace("/", "//")) == int(right), step
