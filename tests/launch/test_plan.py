"""The command `plan`: its JSON, the config file that it writes, mistakes."""

import json
import os
import pathlib
import subprocess
import sys

from configs import loading

ROOT = pathlib.Path(__file__).parents[2]
RUN = "tests/planning/rlhf_run.py"


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "ring_jax.launch.plan", *arguments],
    cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def test_the_winner_as_json_and_as_a_config_file(tmp_path):
  target = tmp_path / "placed.py"
  done = command(
    f"--config={RUN}", "--topology=v5e:2x4", "--json", f"--apply={target}", "--top=3", "--config.rlhf.stream=32"
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert (found["topology"], found["devices"], found["phase"], found["fits"]) == ("v5e:2x4", 8, "rlhf", True)
  assert {
    "strategy",
    "placement",
    "step_seconds",
    "tokens_per_second",
    "bottleneck",
    "idle",
    "hbm_bytes",
  } <= found.keys()
  assert len(found["ranking"]) == 3 and found["ranking"][0]["step_seconds"] == found["step_seconds"]
  assert found["by_strategy"].keys() == {"colocated", "interleaving", "disaggregated"}
  rates = [one["tokens_per_second"] for one in found["ranking"]]
  assert rates == sorted(rates, reverse=True) and 0 < found["hbm_bytes"] < found["hbm_limit"]
  assert found["placement"]["actor"]["devices"].startswith("0:") and "actor " in found["picture"]
  assert found["naive"]["factor"] > 1
  placed = loading.load(target)
  assert placed.rlhf.stream == 32 and str(placed.placement.strategy) == found["strategy"]
  for role, seat in placed.seats.items():
    assert found["placement"][role]["devices"] == f"{seat.devices.start}:{seat.devices.stop}"
    assert found["placement"][role]["mesh"]["fsdp"] == seat.parallel.mesh.fsdp
  assert placed == loading.override(loading.load(ROOT / RUN), found["overrides"] | {"rlhf.stream": "32"})


def test_what_does_not_fit_and_mistakes():
  large = command("--config=configs/ring_1t.py", "--topology=v5e:2x2")
  assert large.returncode == 1 and "nothing fits" in large.stdout and "GiB a device" in large.stdout, large.stderr
  for arguments, says in (
    ([f"--config={RUN}"], "--topology is missing"),
    ([f"--config={RUN}", "--topology=v5e:2x4", "--phase=rl"], "rl.steps=0"),
    ([f"--config={RUN}", "--topology=2*v5e:2x4"], "one slice at a time"),
    ([f"--config={RUN}", "--measured=a"], "--measured: needs --calibrate"),
    ([f"--config={RUN}", "--calibrate=/nowhere", "--devices=8"], "/nowhere"),
  ):
    done = command(*arguments)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
