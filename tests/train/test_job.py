"""A run is killed, stopped, refused, continued: whatever happens, it ends as the run that nothing happened to."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.train.outcome import assert_same, final_state

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "tests/train/small_run.py"


def command(workdir, *overrides):
  return [sys.executable, "-m", "ring_jax.launch.train", f"--config={CONFIG}", f"--workdir={workdir}", *overrides]


def start(workdir, *overrides):
  return subprocess.Popen(
    command(workdir, *overrides), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )


def finish(workdir, *overrides):
  process = start(workdir, *overrides)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  return output


def lines(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


def wait_for(workdir, count, process):
  deadline = time.monotonic() + 200
  while lines(workdir) < count and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.01)
  assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
  assert lines(workdir) >= count


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
  finish(workdir)
  return workdir


def test_the_run_does_what_it_is_there_for(uninterrupted):
  records = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
  rl = [record for record in records if record["phase"] == "rl"]
  assert len(rl) == 8 and len(records) == 8 + 8 + 3
  assert any(record["scheduler/staleness_max"] > 0 for record in rl), "no rollout was resumed under newer weights"
  assert any(record["grad_norm"] > 0 for record in rl if "grad_norm" in record), "nothing was ever learned from"
  assert all(record["mismatch/delta_max"] <= 1e-5 for record in rl if record["scheduler/staleness_max"] == 0)
  for name in ("config.json", "trace.json", "timings.jsonl", "tokenizer.json", "plots/reward_curve.png"):
    assert (uninterrupted / name).stat().st_size > 0
  json.loads((uninterrupted / "trace.json").read_text())


def test_killed_at_any_moment_it_ends_bit_for_bit_the_same(uninterrupted, tmp_path):
  """Five SIGKILLs at seeded places: in both phases, in evaluations, while saving."""
  chance = random.Random(0)
  workdir = tmp_path / "run"
  for count in (1, 7, 10, 12, 18):
    process = start(workdir)
    wait_for(workdir, count, process)
    time.sleep(chance.uniform(0, 0.6))
    process.send_signal(signal.SIGKILL)
    process.wait()
  output = finish(workdir)
  assert "resuming after step" in output
  assert_same(final_state(uninterrupted), final_state(workdir))


def test_kept_keys_and_values_survive_a_kill(tmp_path):
  keep = ("--config.rollout.kv_policy=keep", "--config.sft.steps=2", "--config.rl.steps=5", "--config.rl.eval_every=0")
  finish(tmp_path / "plain", *keep)
  process = start(tmp_path / "killed", *keep)
  wait_for(tmp_path / "killed", 7, process)
  process.kill()
  process.wait()
  finish(tmp_path / "killed", *keep)
  assert_same(final_state(tmp_path / "plain"), final_state(tmp_path / "killed"))


def test_ctrl_c_stops_after_the_step_and_a_second_process_is_refused(uninterrupted, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir, "--config.rl.steps=5000")
  wait_for(workdir, 3, process)
  refused = subprocess.run(command(workdir), cwd=ROOT, capture_output=True, text=True)
  assert refused.returncode == 2
  assert refused.stderr.count("\n") == 1 and f"process {process.pid}" in refused.stderr
  process.send_signal(signal.SIGINT)
  output, _ = process.communicate(timeout=100)
  assert process.returncode == 130 and "the same command" in output, output
  done = lines(workdir)
  output = finish(workdir, f"--config.rl.steps={done}")
  assert "resuming after step" in output
  # Up to where the shorter run ended, both went the same way.
  expected = (
    (uninterrupted / "metrics.jsonl").read_text().splitlines()[:-2]
  )  # its last step measures at its end, and not twice
  assert (workdir / "metrics.jsonl").read_text().splitlines()[: len(expected)] == expected


def test_another_config_is_refused_and_more_steps_are_not(uninterrupted):
  refused = subprocess.run(
    command(uninterrupted, "--config.rollout.token_budget=99"), cwd=ROOT, capture_output=True, text=True
  )
  assert refused.returncode == 2 and "rollout.token_budget (160 there, 99 now)" in refused.stderr
  before = lines(uninterrupted)
  finish(uninterrupted, "--config.rl.steps=9")
  assert lines(uninterrupted) == before + 2  # one more step, one more evaluation


@pytest.mark.parametrize("reward_steps", [0, 2])
def test_general_rl_by_the_verifier_trains_no_reward_model(tmp_path, reward_steps):
  """Nobody would ask it, whether the config says how to train one or not."""
  steps = ("--config.sft.steps=0", "--config.rl.steps=1", "--config.rlhf.steps=1", "--config.rlhf.eval_problems=8")
  model = (f"--config.reward_model.steps={reward_steps}", "--config.reward_model.probe_pairs=8")
  finish(tmp_path / "run", *steps, *model)
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [record["phase"] for record in records if record["phase"] != "eval"] == ["rl", "rlhf"]
