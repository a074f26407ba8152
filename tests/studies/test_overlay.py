"""Curves of any runs in one picture."""

import json

import pytest

from configs.schema import ConfigError
from ring_jax.studies import overlay


def run(folder, rewards, phase="rl"):
  folder.mkdir(parents=True)
  lines = [{"phase": phase, "step": step, "reward": reward} for step, reward in enumerate(rewards, 11)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (folder / "timings.jsonl").write_text("".join(json.dumps(line | {"seconds/step": 2.0}) + "\n" for line in lines))
  return str(folder)


def test_groups_are_averaged_and_runs_stand_alone(tmp_path):
  a, b, c = (run(tmp_path / name, rewards) for name, rewards in (("a", [0, 1, 2]), ("b", [2, 3]), ("c", [5.0])))
  groups = overlay.read([f"both={a}+{b}", c], "rl")
  assert [group.name for group in groups] == ["both", "c"]
  steps, curves = overlay.curves_of(groups[0], "reward", 1)
  assert list(steps) == [1, 2] and curves == [[0, 1], [2, 3]]
  assert overlay.curves_of(groups[0], "seconds/step", 1)[1][0] == [2.0, 2.0]
  table = overlay.table(groups, ["reward"], 1)
  assert (
    table.rows[0][:2] == ["both", "2"] and table.rows[0][2].startswith("2.0000 ± ") and table.rows[1][2] == "5.0000"
  )
  assert overlay.draw(groups, ["reward", "seconds/step"], 1).startswith(b"\x89PNG")


def test_mistakes_are_one_line(tmp_path):
  a = run(tmp_path / "a", [1.0])
  with pytest.raises(ConfigError, match="no steps of rlhf"):
    overlay.read([a], "rlhf")
  with pytest.raises(ConfigError, match="two of them are called a"):
    overlay.read([a, a], "rl")
  with pytest.raises(ConfigError, match="--metrics=rewards: no run has it; there are reward, seconds/step"):
    overlay.draw(overlay.read([a], "rl"), ["rewards"], 1)
