"""What cannot work ends within seconds, with one line and status 2, before anything is loaded."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement

from configs.schema import ConfigError
from ring_jax.train import startup
from ring_jax.train.preflight import check_disk
from sharding.processes import Member

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments, name="train"):
  return [sys.executable, "-m", f"ring_jax.launch.{name}", *arguments]


def start(*arguments, devices=1, **more):
  return subprocess.Popen(
    command(*arguments, **more), cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def refusal(process, seconds=60):
  _, errors = process.communicate(timeout=seconds)
  assert process.returncode == 2 and errors.count("\n") == 1, errors
  return errors


# ---------------------------------------------------------------------------------------------------------------------
# Versions


def test_what_is_installed_here_passes():
  startup.check_versions()


@pytest.mark.parametrize("installed", ["0.10.1", "0.13.0", None])
def test_a_package_outside_of_its_window(installed):
  with pytest.raises(ConfigError, match=rf"jax ({installed}|is not) .*but ring-jax needs jax<0.13,>=0.10.2"):
    startup.check_package(Requirement("jax>=0.10.2,<0.13"), installed)


def test_a_package_inside_of_its_window():
  for version in ("0.10.2", "0.12.9", "0.12.0.dev20261101"):
    startup.check_package(Requirement("jax>=0.10.2,<0.13"), version)


def test_python_outside_of_its_window():
  startup.check_python("3.13.1", ">=3.11,<3.14")
  with pytest.raises(ConfigError, match=r"Python 3.14.0 runs, but ring-jax needs >=3.11,<3.14"):
    startup.check_python("3.14.0", ">=3.11,<3.14")


def test_a_libtpu_of_another_jax():
  wanted = Requirement('libtpu==0.0.42.*; extra == "tpu"')
  startup.check_libtpu("0.0.42.1", wanted, "0.10.2")
  with pytest.raises(ConfigError, match=r"libtpu 0.0.52 is installed, but jax 0.10.2 was made with libtpu==0.0.42"):
    startup.check_libtpu("0.0.52", wanted, "0.10.2")


# ---------------------------------------------------------------------------------------------------------------------
# Between processes


def members(**changed):
  facts = {"command": "train", "config": "1f", "versions": {"python": "3.11", "jax": "0.10.2", "libtpu": "0.0.42"}}
  skew = changed.pop("skew", 0.01)
  return [Member(0, "a", 1, 0.0, facts), Member(1, "b", 1, -0.02, facts), Member(2, "c", 1, skew, facts | changed)]


def test_processes_that_agree():
  startup.check_members(members())


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"config": "2f"}, r"process 2 on c has another config than process 0 on a \(2f, 1f\)"),
    ({"command": "sft"}, r"process 2 on c runs another command than process 0 on a \(sft, train\)"),
    ({"versions": {"python": "3.11", "jax": "0.10.3", "libtpu": "0.0.42"}}, r"process 2 on c has jax 0.10.3, process 0 on a"),
    ({"versions": {"python": "3.11", "jax": "0.10.2"}}, r"has libtpu not installed, process 0 on a has 0.0.42"),
    ({"skew": 7.04}, r"the clock of process 2 on c is 7.0 s ahead of that of process 0 on a \(at most 5 s\)"),
    ({"skew": -5.2}, r"5.2 s behind"),
  ],
)  # fmt: skip
def test_processes_that_do_not(changed, message):
  with pytest.raises(ConfigError, match=message):
    startup.check_members(members(**changed))


def test_another_config_in_one_process_ends_both(tmp_path):
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  started = time.monotonic()
  shared = ("--config=tests/train/small_run.py", f"--workdir={tmp_path}/run", f"--coordinator=localhost:{port}")
  both = [start(*shared, "--num_processes=2", f"--process_id={i}", f"--config.seed={i}") for i in range(2)]
  first, second = map(refusal, both)
  assert "process 1 on" in first and "has another config than process 0" in first
  said = [line.rpartition("error: ")[2] for line in (first, second)]  # its own line, or the other's behind its name
  assert said[0] == said[1]
  assert time.monotonic() - started < 60 and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Devices, disk, flags


def test_devices_that_the_mesh_does_not_fit(tmp_path):
  mesh = ("--config.model.parallel.mesh.fsdp=2", "--config.model.parallel.mesh.tensor=2")
  process = start("--config=tests/train/small_run.py", f"--workdir={tmp_path}/run", *mesh, devices=2)
  expected = (
    "error: model.parallel.mesh: data=1 x fsdp=2 x expert=1 x tensor=2 is 4 devices, but there are 2 cpu devices"
  )
  assert refusal(process) == f"{expected}\n"
  assert not (tmp_path / "run").exists()


def test_half_of_the_flags_and_commands_of_one_process():
  line = refusal(start("--config=tests/train/small_run.py", "--workdir=x", "--process_id=1"))
  assert line.startswith("error: --coordinator and --num_processes missing")
  line = refusal(start("--checkpoint=x", "--coordinator=a:1", "--num_processes=2", "--process_id=1", name="digest"))
  assert line.startswith("error: this command runs in one process")


def test_room_for_the_checkpoints_that_will_be_kept(tmp_path):
  free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
  tree = {"a": jax.ShapeDtypeStruct((free // 40, 3), np.float32), "b": jax.ShapeDtypeStruct((), np.int32)}  # 0.3 of it
  check_disk(tmp_path, 1, tree)
  with pytest.raises(ConfigError, match=r"3 more checkpoints of .* GB are to come \(checkpoint.keep=2 and one being"):
    check_disk(tmp_path, 2, tree | {"c": tree["a"]})
  for step in (3, 6):  # two are there: one more is needed, for as long as it is written
    (tmp_path / str(step)).mkdir()
  check_disk(tmp_path, 2, tree)
