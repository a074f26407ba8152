"""Points in processes of their own: order, cores, what is kept, what fails."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from configs.status import ExitStatus
from ring_jax.studies import page
from ring_jax.studies.runner import Runner, StudyError
from ring_jax.studies.study import Settings
from tests.studies.small_study import Small

SETTINGS = Settings(seeds=2)


def runner(home, said=None):
  return Runner(Small(), SETTINGS, home, say=(said if said is not None else []).append)


def tries(home, name):
  return len((home / name / "tries").read_text())


def test_points_run_once_in_order_on_their_cores(tmp_path):
  said = []
  (tmp_path / "first_seed1").mkdir(parents=True)
  (tmp_path / "first_seed1" / "broken").touch()
  with pytest.raises(StudyError, match=r"^2 of 7 points failed \(.*(first_seed1|second_seed1)"):
    runner(tmp_path, said).run()
  assert any("this point was told to fail" in line for line in said)
  assert not (tmp_path / "second_seed1").exists()  # what it needs has failed
  assert tries(tmp_path, "alone_seed0") == 1  # the others went on

  (tmp_path / "first_seed1" / "broken").unlink()
  again = runner(tmp_path)
  again.run()
  assert [tries(tmp_path, f"{arm}_seed{seed}") for arm in ("first", "second") for seed in (0, 1)] == [1, 2, 1, 1]
  results, minutes = again.results()
  assert results.arms() == ["first", "second", "turns", "alone"] and results.seeds("second") == [0, 1] and minutes >= 0
  (first, _), (second, _), turns, (alone,) = (results.of(arm) for arm in results.arms())
  assert first["time"] < second["time"] and second["earlier"][0] > 0
  assert (first["cores"], first["devices"]) == (1, "1")
  assert (alone["cores"], alone["devices"]) == (len(os.sched_getaffinity(0)), "3")
  check_turns(*turns)

  report = Small().report(SETTINGS, results)
  text = page.write(tmp_path / "pages", Small(), SETTINGS, report, minutes).read_text()
  for part in ("--name=small", "--seeds=2", "| first | 1 |", "a \\| b", "A note.", "## Not shown", "* Subtraction."):
    assert part in text, part


def check_turns(one, other):
  """Side by side, but in its turn each had the machine to itself."""
  for own, neighbour in ((one, other), (other, one)):
    assert own["cores"] == len(os.sched_getaffinity(0))
    began, ended = own["turn"]
    assert sum(began <= time <= ended for time in own["worked"]) > 20
    assert not any(began + 0.05 < time < ended for time in neighbour["worked"])
  first, last = sorted((one, other), key=lambda point: point["turn"][0])
  if len(os.sched_getaffinity(0)) > 1:
    assert last["worked"][0] < first["turn"][0] < first["turn"][1] <= last["turn"][0]


def test_what_cannot_be_gone_on_with_is_refused(tmp_path):
  home = tmp_path / "study"
  home.mkdir()
  (home / "study.json").write_text(json.dumps({"study": "small", "quick": True}))
  with pytest.raises(StudyError, match=r"quick=True.*another --workdir"):
    runner(home).run()
  (home / "study.json").unlink()
  holder = subprocess.Popen(
    [sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()",
     home / "study.json"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  holder.stdout.readline()
  with pytest.raises(StudyError, match="another process measures this study"):
    runner(home).run()
  holder.communicate("\n")
  (home / "first_seed0").mkdir()
  (home / "first_seed0" / "result.json").write_text("{")
  with pytest.raises(StudyError, match=r"result\.json: is no result"):
    runner(home).results()


def test_sigterm_ends_the_points_too(tmp_path):
  (tmp_path / "small" / "first_seed0").mkdir(parents=True)
  (tmp_path / "small" / "first_seed0" / "slow").touch()
  program = (
    "from ring_jax.launch import study; from tests.studies.small_study import Small; study.STUDIES['small'] = Small();"
    " study.define_flags(); study.app.run(study.main)"
  )
  command = subprocess.Popen([sys.executable, "-c", program, "--name=small", f"--workdir={tmp_path}"])
  started = tmp_path / "small" / "first_seed0" / "tries"
  for _ in range(600):
    if started.exists():
      break
    time.sleep(0.1)
  command.terminate()
  assert command.wait(timeout=30) == ExitStatus.PREEMPTED
  running = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
  assert not any(str(tmp_path).encode() in arguments and b"studies.child" in arguments for arguments in running)
