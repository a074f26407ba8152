"""The same run under every placement of its roles: when and where things are computed changes, what is computed does not."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ring_jax.checkpoint.resolve import open_checkpoint
from tests.devices import QUICK_TO_COMPILE
from tests.train.outcome import final_state

ROOT = pathlib.Path(__file__).parents[2]
TOGETHER = ()
HALVES = ("--config.placement.strategy=interleaving",)
APART = ("--config.placement.strategy=disaggregated",)
# Every role on devices of its own, and one reads differently cut parameters: sums come in another order.
SPREAD = (
  *APART,
  '--config.placement.critic={"mesh": {"data": 2}}',
  '--config.placement.reference={"mesh": {"fsdp": 1}}',
  '--config.placement.reward={"mesh": {"fsdp": 1}}',
)


def start(workdir, arguments, devices):
  return subprocess.Popen(
    [sys.executable, "-m", "ring_jax.launch.train", "--config=tests/train/placed_run.py", f"--workdir={workdir}", *arguments],
    cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": QUICK_TO_COMPILE},
    text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def finish(workdir, arguments, devices):
  process = start(workdir, arguments, devices)
  output, _ = process.communicate(timeout=400)
  assert process.returncode == 0, output
  return workdir


def outcome(workdir):
  found = final_state(workdir)
  return {name: found[name] for name in ("step", "parameters", "metrics", "rollouts")}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  return finish(tmp_path_factory.mktemp("together") / "run", TOGETHER, 2)


def test_one_step_off_policy_and_streamed_as_it_is(together):
  metrics = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
  rlhf = [record for record in metrics if record["phase"] == "rlhf"]
  stale = [record["scheduler/staleness_max"] for record in rlhf]
  assert stale[0] == 0 and min(stale[1:]) >= 1
  assert all(record["optimizer_steps"] > 1 for record in rlhf), "nothing was streamed"
  assert all(record["critic/grad_norm"] > 0 for record in rlhf)


def test_halves_give_the_same_numbers(together, tmp_path):
  """Reference and reward model see other rows on a device: their sums may round otherwise."""
  assert_close(finish(tmp_path / "run", HALVES, 2), together)


def test_killed_and_resumed_under_another_placement_it_ends_with_the_same_bits(together, tmp_path):
  process = start(tmp_path / "run", TOGETHER, 2)
  for line in iter(process.stdout.readline, ""):
    if line.startswith("RLHF"):
      break
  process.kill()
  process.communicate()
  assert outcome(finish(tmp_path / "run", APART, 4)) == outcome(together)


def test_other_layouts_on_more_devices_give_the_same_numbers(together, tmp_path):
  assert_close(finish(tmp_path / "run", SPREAD, 8), together)


def assert_close(workdir, other):
  """Metrics of RLHF to 1e-4, parameters to 1e-6."""
  mine, theirs = (
    [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (workdir, other)
  )
  assert len(mine) == len(theirs)
  for one, two in zip(mine, theirs, strict=True):
    if one["phase"] == "rlhf":
      for name in ("reward", "loss", "critic/loss", "grad_norm", "policy/entropy"):
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name
  ours, expected = (open_checkpoint(path).params for path in (workdir, other))
  for name, part in expected.items():
    _compare(name, ours[name], part)


def _compare(name, found, expected):
  if isinstance(expected, dict):
    for key, part in expected.items():
      _compare(f"{name}.{key}", found[key], part)
    return
  np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=1e-6, err_msg=name)
