"""A run's stored rollouts: found by what they are, written to a file, and scored again."""

import dataclasses
import json
import subprocess
import sys

import pytest

from configs import ring_tiny, ring_tiny_rlhf
from configs.schema import ConfigError
from ring_jax.records import FinishReason, Rollout
from ring_jax.train import stored
from ring_jax.train.assets import prepare_tasks
from ring_jax.train.report.samples import SampleLog
from ring_jax.train.workdir import Workdir

CONFIG = dataclasses.replace(ring_tiny_rlhf.get_config(), task=ring_tiny.get_config().task)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Two steps by the verifier: of each two answers one is right; and one whose rewards are a reward model's."""
  folder = Workdir(tmp_path_factory.mktemp("run"))
  folder.store_config(CONFIG)
  tokenizer, tasks = prepare_tasks(CONFIG.task, CONFIG.tokenizer, CONFIG.rollout, CONFIG.seed, CONFIG.init, folder.path)
  log, uid = SampleLog(folder.rollouts), 0
  for step in (1, 2, 3):
    rollouts = []
    for problem in (2 * step, 2 * step + 1):
      asked = tasks.train(problem)
      for right in (True, False):
        tokens = tokenizer.encode(asked.completion)
        tokens = tokens if right else tokens[:2]
        reason = FinishReason.STOP if right else FinishReason.LENGTH
        reward = (0.5 if step == 3 else float(right)) if uid != 4 else 0.0  # rollout 4 is right, and stored as wrong
        prompt = tokenizer.encode(asked.prompt)
        rollouts.append(
          Rollout(
            uid,
            problem,
            problem,
            prompt,
            tokens,
            [-1.0] * len(tokens),
            [step] * len(tokens),
            finish_reason=reason,
            reward=reward,
          )
        )
        uid += 1
    log.write(step, step, rollouts, [0.0] * 4, lambda r: (tokenizer.decode(r.prompt), tokenizer.decode(r.tokens)))
  phases = [{"phase": "rlhf" if step == 3 else "rl", "step": step} for step in (1, 2, 3)]
  folder.metrics.write_text("".join(json.dumps(phase) + "\n" for phase in phases))
  return folder.path


def uids(workdir, **chosen):
  reason = chosen.pop("finish_reason", None)
  ranges = {name: stored.Range.parse(name, text) for name, text in chosen.items()}
  return [record["uid"] for record in stored.find(workdir, stored.Query(finish_reason=reason, **ranges))]


def test_they_are_found_by_what_they_are(workdir):
  assert uids(workdir) == list(range(12))
  assert uids(workdir, step="2") == [4, 5, 6, 7] and uids(workdir, step="2:") == list(range(4, 12))
  assert uids(workdir, problem="3:4") == [2, 3, 4, 5] and uids(workdir, uid=":1") == [0, 1]
  assert uids(workdir, reward="0.2:0.8") == [8, 9, 10, 11]
  assert uids(workdir, finish_reason=FinishReason.LENGTH, step=":2") == [1, 3, 5, 7]
  assert uids(workdir, length=":2") == [1, 3, 5, 7, 9, 11]
  assert uids(workdir, step="9") == []


@pytest.mark.parametrize("text", ["x", ":", "5:3", "1:2:3", ""])
def test_what_is_no_range_is_said(text):
  with pytest.raises(ConfigError, match="--length="):
    stored.Range.parse("length", text)


def test_scored_again(workdir):
  found = stored.rescore(workdir, CONFIG, list(stored.find(workdir, stored.Query())))
  assert (found.scored, found.left_out) == (8, 4)
  assert [(one["uid"], one["stored"], one["now"]) for one in found.differing] == [(4, 0.0, 1.0)]
  assert found.kinds == {"ok": 4, "no_answer": 4}
  assert "1 rewards differ" in found.lines()[0] and "4 left out" in found.lines()[0]


def test_the_command(workdir, tmp_path):
  def run(*arguments):
    command = [sys.executable, "-m", "ring_jax.launch.rollouts", f"--workdir={workdir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)

  out = tmp_path / "some.jsonl"
  done = run("--finish_reason=stop", "--limit=3", f"--out={out}", "--json")
  assert json.loads(done.stdout) == {"count": 3}, done.stderr
  assert [json.loads(line)["uid"] for line in out.read_text().splitlines()] == [0, 2, 4]
  done = run("--step=4:2")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--step=4:2" in done.stderr
