"""The evaluate command on a run and on a Hugging Face folder; its number is a function of the weights."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from configs import loading
from configs.schema import ConfigError
from ring_jax.checkpoint import hf
from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.train.job import run_job
from ring_jax.train.measure import Settings, measure

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  config = loading.load(ROOT / "tests/train/small_run.py")
  config = dataclasses.replace(
    config, sft=dataclasses.replace(config.sft, steps=2), rl=dataclasses.replace(config.rl, steps=0)
  )
  path = tmp_path_factory.mktemp("evaluate") / "run"
  progress = run_job(config, str(path))
  assert progress.phase == "done" and progress.step == 2
  return path


def test_a_run_is_measured_as_it_measured_itself(workdir):
  stored = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  own = next(record for record in stored if record.get("name") == "sft")
  command = [sys.executable, "-m", "ring_jax.launch.evaluate", f"--checkpoint={workdir}", "--json", "--problems=16"]
  done = subprocess.run([*command, "--samples=2"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert {name: result[name] for name in ("accuracy", "pass_at_k", "mean_length", "stopped")} == {
    name: own[name] for name in ("accuracy", "pass_at_k", "mean_length", "stopped")
  }
  assert result["task"] == "spell_backward" and result["step"] == 2


def test_a_hugging_face_folder_needs_a_task_and_a_tokenizer(workdir, tmp_path):
  opened = open_checkpoint(workdir)
  folder = tmp_path / "hf"
  hf.save(folder, opened.config, opened.params)
  settings = Settings(samples=2, problems=4, slots=8, max_prompt_tokens=250, max_tokens=4)
  with pytest.raises(ConfigError, match="--task is missing"):
    measure(str(folder), settings)
  settings = dataclasses.replace(settings, task="gcd")
  with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
    measure(str(folder), settings)
  shutil.copy(workdir / "tokenizer.json", folder)
  _, result = measure(str(folder), settings)
  assert result.problems == 4 and result.samples == 2 and 0 < result.mean_length <= 4
  assert "<role>SYSTEM</role>" in result.examples[0]["prompt"]
  with pytest.raises(ConfigError, match="no task 'gdc'"):
    measure(str(folder), dataclasses.replace(settings, task="gdc"))
