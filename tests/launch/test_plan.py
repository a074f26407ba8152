"""The command `plan`: its JSON, the config file that it writes, mistakes."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from configs import loading
from configs.schema import ConfigError
from ring_jax.launch import plan
from tests.planning import rlhf_run

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


def test_what_does_not_fit_ends_with_status_1_and_says_by_how_much():
  done = command("--config=configs/ring_1t.py", "--topology=v5e:2x2")
  assert done.returncode == 1 and "nothing fits" in done.stdout and "GiB a device" in done.stdout, done.stderr


def test_a_mistake_is_one_line():
  done = command(f"--config={RUN}")
  assert done.returncode == 2 and "--topology is missing" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
  ("given", "says"),
  [
    ({"topology": "v5e:2x4", "phase": "rl"}, r"rl.steps=0"),
    ({"topology": "2*v5e:2x4"}, "one slice at a time"),
    ({"topology": "v5e:2x4", "devices": 8}, "--devices is for --calibrate"),
    ({"topology": "v5e:2x4", "trace": "answers.jsonl", "mean": 9.0}, "--trace: contradicts --mean"),
    ({"measured": ["a"]}, "--measured: needs --calibrate"),
    ({"calibrate": ["/nowhere"]}, "give --devices=N"),
    ({"calibrate": ["/nowhere"], "devices": 8}, "/nowhere: config.json cannot be read"),
    ({"topology": "v5e:2x4", "apply": "placed.txt"}, "--apply=placed.txt: must be a Python file"),
  ],
)
def test_flags_that_contradict_each_other(given, says, monkeypatch):
  none = dict.fromkeys(("topology", "devices", "phase", "trace", "mean", "prompt_tokens", "apply"))
  flags = none | {"sigma": 1.2, "calibrate": [], "measured": [], "top": 10, "json": False} | given
  monkeypatch.setattr(plan, "FLAGS", types.SimpleNamespace(config=RUN, **flags))
  with pytest.raises(ConfigError, match=says):
    plan.main(rlhf_run.get_config())
