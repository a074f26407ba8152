"""Preference pairs: never equal, the worse one farther from the truth, thoughts untouched, a function of (tasks, seed, i)."""

import dataclasses

import numpy as np
import pytest

from configs.schema import ConfigError, TaskConfig, TaskSource, TokenizerConfig
from ring_jax.data.preferences import Preferences, distance
from ring_jax.data.tasks import TaskSet, token_limits
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.train.stream import PairStream

SPELL = TaskSource(name="spell_backward", options={"min_word_len": 3, "max_word_len": 8}, prompt="{word}")
SUMS = TaskSource(
  name="chain_sum", options={"max_terms": 3, "max_digits": 1}, prompt="{expression!c}", completion="{trace}</think>{answer}"
)  # fmt: skip
TOKENIZER = Tokenizer.build()
MOST = 40


def preferences(*sources, seed=0, max_tokens=MOST, **fields):
  config = TaskConfig(mixture=sources, **({"train_size": 300, "held_out_size": 48} | fields))
  tasks = TaskSet(config, TokenizerConfig(), seed).filtered(token_limits(TOKENIZER, 2000, max_tokens))
  return tasks, Preferences(tasks, TOKENIZER, seed, max_tokens)


def answer_of(ids):
  return TOKENIZER.decode(ids).split("</think>")[-1].removesuffix("<|role_end|>")


@pytest.mark.parametrize("source", [SPELL, SUMS], ids=["plain", "thinking"])
def test_the_chosen_answer_is_nearer_to_the_worked_one(source):
  tasks, pairs = preferences(source)
  kept, chosen_far, rejected_far = 0, [], []
  for index in range(250):
    problem, pair = tasks.train(index), pairs.train(index)
    worked = TOKENIZER.encode(problem.completion)
    assert pair.prompt == TOKENIZER.encode(problem.prompt)
    for ids in (pair.chosen, pair.rejected):
      assert len(ids) <= MOST and ids[-1] == worked[-1]  # it ends its turn
      thought, marker, _ = TOKENIZER.decode(ids).rpartition("</think>")
      assert problem.completion.startswith(thought + marker)
    near, far = (distance(problem.entry["answer"], answer_of(ids)) for ids in (pair.chosen, pair.rejected))
    assert near < far and pair.chosen != pair.rejected
    kept += pair.chosen == worked
    assert (near == 0) == (pair.chosen == worked)
    chosen_far.append(near)
    rejected_far.append(far)
  assert 80 < kept < 200  # the worked answer is the chosen one about half of the time
  assert len(set(chosen_far)) >= 3 and len(set(rejected_far)) >= 4


def test_every_kind_of_edit_is_seen_and_replacements_keep_their_kind():
  tasks, pairs = preferences(SPELL)
  grown = {len(answer_of(pairs.train(i).rejected)) - len(tasks.train(i).entry["answer"]) for i in range(200)}
  assert {-1, 0, 1} <= grown
  texts = [answer_of(pairs.train(i).rejected) for i in range(200)]
  assert all(text.isalpha() for text in texts)
  assert any(sorted(text) == sorted(tasks.train(i).entry["answer"]) for i, text in enumerate(texts))  # swapped


def test_pairs_are_a_function_of_tasks_seed_and_index():
  _, one = preferences(SPELL, SUMS, seed=1)
  _, again = preferences(SPELL, SUMS, seed=1)
  assert [again.train(i) for i in (77, 3, 0)] == [one.train(i) for i in (77, 3, 0)]
  tasks, other = preferences(SPELL, SUMS, seed=2)
  assert [other.train(i) for i in range(20)] != [one.train(i) for i in range(20)]
  assert one.held_out(48) == other.held_out(48) and one.held_out(5) == one.held_out(48)[:5]
  assert [pair.prompt for pair in one.held_out(48)] == [TOKENIZER.encode(p.prompt) for p in tasks.held_out()]
  # A problem that comes again, in the next epoch, comes with another pair.
  first = {tuple(pair.prompt): pair for pair in map(one.train, range(300))}
  later = [pair for pair in map(one.train, range(600, 900)) if tuple(pair.prompt) in first]
  assert len(later) > 50 and np.mean([first[tuple(pair.prompt)] != pair for pair in later]) > 0.8


def test_a_cursor_resumes_the_stream():
  _, pairs = preferences(SPELL)
  stream = PairStream(pairs)
  batches = [stream.take(count) for count in (4, 1, 7)]
  resumed = PairStream(preferences(SPELL)[1], cursor=5)
  assert stream.cursor == 12 and resumed.take(7) == batches[2] and PairStream(pairs).take(0) == []


def test_short_and_long_answers():
  tasks, pairs = preferences(dataclasses.replace(SUMS, options={"max_terms": 2, "max_digits": 1, "min_digits": 1}))
  assert any(len(tasks.train(i).entry["answer"]) == 1 for i in range(50))
  assert all(answer_of(pairs.train(i).rejected) for i in range(50))  # a dropped digit never leaves nothing
  long = TaskSource(name="number_sorting", options={"min_numbers": 40, "max_numbers": 40})
  tasks, pairs = preferences(long, max_tokens=2000)
  for index in range(20):
    worked, rejected = (TOKENIZER.decode(ids) for ids in (pairs.train(index).chosen, pairs.train(index).rejected))
    answer = tasks.train(index).entry["answer"]
    assert len(answer) > 200 and rejected.startswith(answer[:-64]) and worked.startswith(answer[:-64])


def test_what_does_not_fit_is_one_clear_error():
  tasks, _ = preferences(SPELL, max_tokens=100)
  small = Preferences(tasks, TOKENIZER, 0, max_tokens=2)
  with pytest.raises(ConfigError, match=r"rollout\.max_tokens=2: no two answers to spell_backward 0 fit"):
    small.train(0)
  with pytest.raises(ConfigError, match="49 held-out problems were asked for"):
    small.held_out(49)


def test_distance_by_hand():
  for one, other, expected in (
    ("", "", 0),
    ("abc", "abc", 0),
    ("", "ab", 2),
    ("kitten", "sitting", 3),
    ("ab", "ba", 2),
  ):
    assert distance(one, other) == distance(other, one) == expected
