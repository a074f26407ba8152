"""The scoring pool against a hostile corpus: nothing hangs, nothing is blamed on a neighbour, nothing stays behind."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from configs.schema import TaskConfig, TaskSource, TokenizerConfig
from ring_jax.data.tasks import TaskSet
from ring_jax.rewards import pool as pool_module
from ring_jax.rewards.pool import Kind, ScoreItem, ScoringError, ScoringPool

HERE, ROOT = str(pathlib.Path(__file__).parent), pathlib.Path(__file__).parents[2]
sys.path.append(HERE)  # the workers import the hostile task from there


@dataclasses.dataclass
class Any:
  """The least a problem can be."""

  source: int = 0
  entry: dict = dataclasses.field(default_factory=lambda: {"answer": "1/2"})


def item(text, **fields):
  return ScoreItem(Any(), text, **fields)


def config(**fields):
  return TaskConfig(**{"mixture": (TaskSource(name="hostile"),), "exact": False, "deadline": 1.0} | fields)


@pytest.fixture(scope="module")
def pool():
  with ScoringPool(config(workers=2), modules=("hostile",)) as pool:
    pool.score([item("1")])
    yield pool


def session_of(pool):
  """Processes that the pool started, and all that these started."""
  found = []
  for process in psutil.process_iter(["status"]):
    try:
      if os.getsid(process.pid) == pool._keeper.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
        found.append(process.pid)
    except ProcessLookupError:
      continue
  return found


EXPECTED = {
  "hang": Kind.TIMEOUT,
  "sleep": Kind.TIMEOUT,
  "exit": Kind.CRASH,
  "segfault": Kind.CRASH,
  "abort": Kind.CRASH,
  "memory": Kind.MEMORY,
  "sysexit": Kind.ERROR,
  "recursion": Kind.ERROR,
  "raise": Kind.ERROR,
  "nan": Kind.ERROR,
  "none": Kind.ERROR,
  "write": Kind.ERROR,
  "": Kind.ERROR,
  "\0": Kind.ERROR,
  "\ud800\udfff \u202e": Kind.ERROR,
  "9" * 6000: Kind.ERROR,
  "stdin": Kind.OK,
  "print": Kind.OK,
  "huge score": Kind.OK,
}


def test_each_hostile_item_costs_only_itself(pool):
  """Between two hostile items stand good ones with scores of their own, so that a shifted result would show."""
  items, expected = [], []
  for number, (text, kind) in enumerate(EXPECTED.items()):
    items += [item(text), item(f"0.{number + 100}"), item(f"0.{number + 500}")]
    expected += [
      (kind, 1.0 if kind is Kind.OK else 0.0),
      (Kind.OK, (number + 100) / 1000),
      (Kind.OK, (number + 500) / 1000),
    ]
  before = pool.counts.copy()
  start = time.monotonic()
  results = pool.score(items)
  assert time.monotonic() - start < 20
  assert [(result.kind, result.score) for result in results] == expected
  counted = pool.counts - before
  assert counted[Kind.TIMEOUT] == 2 and counted[Kind.CRASH] == 3 and counted[Kind.MEMORY] == 1


def test_damage_left_behind_is_not_charged_to_the_next(pool):
  texts, before = ["0.5", "leak", "roomy", *["0.25"] * 20, "0.125"], pool.replaced
  results = pool.score(list(map(item, texts)))
  assert [result.kind for result in results] == [Kind.OK] * len(texts)
  assert pool.replaced > before


def test_everything_hostile_at_once(pool):
  results = pool.score([item("exit") for _ in range(10)] + [item("1")] + [item("hang") for _ in range(3)])
  assert [result.kind for result in results] == [Kind.CRASH] * 10 + [Kind.OK] + [Kind.TIMEOUT] * 3


def test_what_an_item_starts_dies_with_it(pool):
  assert pool.score([item("spawn")])[0].kind in (Kind.TIMEOUT, Kind.ERROR)  # ERROR: only root may start processes
  assert pool.score([item("1")])[0].score == 1.0
  deadline = time.monotonic() + 5
  while len(session_of(pool)) > 3 and time.monotonic() < deadline:
    time.sleep(0.02)
  assert len(session_of(pool)) <= 3  # the keeper and two workers


def test_large_answers_are_not_sent(pool):
  huge, long = "1" * (pool_module.MAX_ANSWER + 1), "0." + "1" * (pool_module.MAX_ANSWER - 2)
  assert [result.kind for result in pool.score([item(huge), item(long), item("x" * 10**7)])] == [
    Kind.TOO_LARGE,
    Kind.OK,
    Kind.TOO_LARGE,
  ]


def test_many_large_items_and_hangs_between_them_never_block_the_parent(pool):
  padding = Any(entry={"answer": "", "padding": "x" * 300_000})
  items = [ScoreItem(padding, "hang" if number % 8 == 3 else "0.5") for number in range(24)]
  kinds = [result.kind for result in pool.score(items)]
  assert kinds == [Kind.TIMEOUT if number % 8 == 3 else Kind.OK for number in range(24)]


def test_unfinished_completions_score_0_in_exact_mode_only(pool):
  assert pool.score([item("1", finished=False)])[0] == pool_module.ScoreResult(1.0, Kind.OK)
  with ScoringPool(config(exact=True), modules=("hostile",)) as exact:
    kinds = [result.kind for result in exact.score([item("1", finished=False), item("1")])]
    assert kinds == [Kind.NO_ANSWER, Kind.OK]


def test_workers_have_no_jax_and_the_parent_may_have_threads(pool):
  stop = threading.Event()

  def work():
    while not stop.is_set():
      sum(range(1000))

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  try:
    results: list = [None] * 3
    callers = [
      threading.Thread(
        target=lambda place: results.__setitem__(place, pool.score([item(f"0.{place + 1}")] * 50)), args=(n,)
      )
      for n in range(3)
    ]
    for caller in callers:
      caller.start()
    for caller in callers:
      caller.join()
  finally:
    stop.set()
  assert [{result.score for result in found} for found in results] == [{0.1}, {0.2}, {0.3}]
  assert pool.score([item("jax?")])[0].score == 0.0


def test_a_lost_keeper_is_replaced(pool):
  os.kill(pool._keeper.pid, signal.SIGKILL)
  assert [result.score for result in pool.score([item("0.5"), item("exit"), item("0.25")])] == [0.5, 0.0, 0.25]


def test_mathverify_bombs():
  mixture = (TaskSource(name="lcm"), TaskSource(name="spell_backward"))
  problem = Any(entry={"answer": "1/2"})
  tower = "5" + "^{5" * 3 + "}" * 3
  texts = [r"\frac{1}{2}", tower, "0.5", "9^{9^{9^{9}}}/2", r"\frac{2}{4}", "10^{10^{10}}!", "1/2"]
  with ScoringPool(TaskConfig(mixture=mixture, answer="boxed", deadline=1.0)) as pool:
    start = time.monotonic()
    results = pool.score([ScoreItem(problem, f"\\boxed{{{text}}}") for text in texts])
    assert time.monotonic() - start < 15
  assert [result.score for result in results] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
  assert results[1].kind in (Kind.TIMEOUT, Kind.MEMORY, Kind.CRASH)


def test_real_problems_score_1_and_what_is_nearly_right_0():
  source = TaskSource(name="spell_backward", options={"min_word_len": 4}, prompt="{word}")
  task = TaskConfig(mixture=(source, TaskSource(name="chain_sum")), train_size=200, held_out_size=4)
  problems = [TaskSet(task, TokenizerConfig(), 0).train(index) for index in range(60)]
  right = [ScoreItem(problem, problem.completion.removesuffix("<|role_end|>")) for problem in problems]
  wrong = [ScoreItem(problem, f"{problem.entry['answer'][:-1]}?") for problem in problems]
  thought = [ScoreItem(problem, f"hm</think>{problem.entry['answer']}") for problem in problems]
  with ScoringPool(task) as pool:
    assert {result.score for result in pool.score(right)} == {1.0}
    assert {result.score for result in pool.score(wrong)} == {0.0}
    assert pool.score([]) == []
  with ScoringPool(task, thinking=True) as pool:
    assert {result.score for result in pool.score(thought)} == {1.0}
    assert {result.kind for result in pool.score(right)} == {Kind.NO_ANSWER}
  with pytest.raises(ScoringError, match="closed"):
    pool.score(right)


def test_nothing_outlives_a_killed_parent():
  code = (
    "import sys; from tests.rewards.test_pool import *\n"
    "pool = ScoringPool(config(deadline=600.0), modules=('hostile',)).__enter__()\n"
    "pool.score([item('1')])\n"
    "print(pool._keeper.pid, pool._workers[0].pid, flush=True)\n"
    "pool.score([item('hang')])\n"
  )
  parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
  pids = [int(pid) for pid in parent.stdout.readline().split()]
  assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
  parent.kill()
  parent.wait()
  deadline = time.monotonic() + 10

  def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

  while any(map(alive, pids)) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert not any(map(alive, pids))
