"""SIGKILL in the midst of generating, at twenty places: what is generated in the end is what nobody disturbed."""

import json
import multiprocessing
import random
import signal

import pytest

from tests.rollout import killed_run
from tests.train.outcome import decisions

KILLS = 20


@pytest.fixture(scope="module")
def processes():
  """Begin with everything imported and JAX not yet started."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.rollout.killed_run"])
  return context


def run(processes, folder, dispatch=-1, moment=0.0):
  folder.mkdir(exist_ok=True)
  process = processes.Process(target=killed_run.run, args=(str(folder), dispatch, moment))
  process.start()
  process.join()
  return process.exitcode


def results(folder):
  return [json.loads((folder / f"iteration_{i}.json").read_text()) for i in range(killed_run.ITERATIONS)]


def test_a_run_killed_at_twenty_places_draws_every_token_again(processes, tmp_path):
  plain, killed = tmp_path / "plain", tmp_path / "killed"
  assert run(processes, plain) == 0
  dispatches = sum(name == "Draw" for name, _ in decisions(plain / "events.jsonl"))
  each = dispatches // killed_run.ITERATIONS
  assert each > 4
  chance, saved, lost = random.Random(0), set(), 0
  for _ in range(KILLS):
    # Within three iterations, so that it gets on by one; a dispatch takes about a millisecond.
    assert run(processes, killed, chance.randrange(1, 3 * each), chance.uniform(0, 0.002)) == -signal.SIGKILL
    state = killed / "state.json"
    saved.add(json.loads(state.read_text())["scheduler"]["iteration"] if state.exists() else 0)
    lost += not (killed / "events.jsonl").read_text().splitlines()[-1].startswith('{"event":"end"')
  assert len(saved) > 4 and lost > KILLS // 2, "the kills were not in the midst of generating"
  assert run(processes, killed) == 0

  rollouts = [rollout for result in results(plain) for rollout in result["rollouts"]]
  assert any(len(set(rollout["versions"])) > 2 for rollout in rollouts) and len(rollouts) > 20
  assert results(killed) == results(plain)  # tokens, log-probs and versions, bit for bit
  assert decisions(killed / "events.jsonl") == decisions(plain / "events.jsonl")
