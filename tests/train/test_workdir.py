"""A run's folder: mistakes are one line, two writers are impossible, and a failed write costs nothing."""

import dataclasses
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from configs import ring_tiny
from configs.schema import ConfigError, to_dict
from ring_jax.train.workdir import Workdir, WorkdirError, write_atomic

HOLDER = """
import os, sys, time
from ring_jax.train.workdir import Workdir
Workdir(sys.argv[1]).lock()
if sys.argv[2] == "fork" and os.fork() == 0:  # a worker that outlives the trainer
  time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def hold(path, how="plain") -> subprocess.Popen:
  """Another process that has the lock by the time this returns."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(path), how], stdout=subprocess.PIPE, text=True, start_new_session=True
  )
  assert int(process.stdout.readline()) == process.pid
  return process


def one_line(caught) -> str:
  message = str(caught.value)
  assert "\n" not in message and isinstance(caught.value, ConfigError)
  return message


def test_it_creates_its_folders(tmp_path):
  workdir = Workdir(tmp_path / "a" / "b")
  assert workdir.rollouts.is_dir() and workdir.plots.is_dir()
  assert {path.parent for path in (workdir.metrics, workdir.timings, workdir.trace, workdir.config)} == {workdir.path}
  Workdir(tmp_path / "a" / "b")  # again


@pytest.mark.parametrize("below", ["", "runs/one"])
def test_a_file_in_the_way(tmp_path, below):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(WorkdirError) as caught:
    Workdir(tmp_path / "file" / below)
  assert f"{tmp_path / 'file'} is a file" in one_line(caught)
  assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to():
  with pytest.raises(WorkdirError, match=r"workdir /proc/run: cannot be written to"):
    Workdir("/proc/run")


def test_a_second_process_is_refused_and_a_killed_one_is_not_missed(tmp_path):
  process = hold(tmp_path)
  try:
    workdir = Workdir(tmp_path)
    with pytest.raises(WorkdirError) as caught:
      workdir.lock()
    assert f"process {process.pid} on host {os.uname().nodename}" in one_line(caught)
  finally:
    process.kill()
    process.wait()
  with workdir.lock():
    assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_a_worker_that_outlives_a_killed_trainer_does_not_hold_the_lock(tmp_path):
  process = hold(tmp_path, "fork")
  try:
    process.kill()
    process.wait()
    with Workdir(tmp_path).lock():
      pass
  finally:
    os.killpg(process.pid, signal.SIGKILL)  # the worker


def test_the_same_process_is_refused_too(tmp_path):
  with Workdir(tmp_path).lock(), pytest.raises(WorkdirError, match="already in use by this process"):
    Workdir(tmp_path).lock()
  with Workdir(tmp_path).lock():
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Config


def test_the_config_is_stored_and_found_again(tmp_path):
  config = ring_tiny.get_config()
  assert not Workdir(tmp_path).store_config(config)
  assert Workdir(tmp_path).store_config(config)
  assert Workdir(tmp_path).load_config() == to_dict(config) == json.loads((tmp_path / "config.json").read_text())


def test_what_may_change_is_updated(tmp_path):
  config = ring_tiny.get_config()
  Workdir(tmp_path).store_config(config)
  longer = dataclasses.replace(
    config,
    name="longer",
    rl=dataclasses.replace(config.rl, steps=999),
    sft=dataclasses.replace(config.sft, steps=7),
    checkpoint=dataclasses.replace(config.checkpoint, every=3, keep=9),
  )
  assert Workdir(tmp_path).store_config(longer)
  assert Workdir(tmp_path).load_config() == to_dict(longer)


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
  config = ring_tiny.get_config()
  Workdir(tmp_path).store_config(config)
  before = (tmp_path / "config.json").read_bytes()
  source = dataclasses.replace(config.task.mixture[0], options={"max_word_len": 10})
  other = dataclasses.replace(
    config,
    seed=3,
    rl=dataclasses.replace(config.rl, steps=999, objective=dataclasses.replace(config.rl.objective, alpha=0.25)),
    task=dataclasses.replace(config.task, mixture=(source,)),
  )
  with pytest.raises(WorkdirError) as caught:
    Workdir(tmp_path).store_config(other)
  message = one_line(caught)
  assert "seed (0 there, 3 now)" in message
  assert "rl.objective.alpha (0.5 there, 0.25 now)" in message
  assert "task.mixture.0.options.min_word_len (3 there, absent now)" in message
  assert "rl.steps" not in message
  assert (tmp_path / "config.json").read_bytes() == before


def test_many_differences_stay_one_line():
  old = {f"field{index}": index for index in range(20)}
  with pytest.raises(WorkdirError, match=r"field5 .* and 14 more;") as caught:
    Workdir.check_config(old, {name: -1 for name in old})
  one_line(caught)


def test_an_empty_list_is_a_difference():
  with pytest.raises(WorkdirError, match=r"a \(\[\] there, absent now\), a.0 \(absent there, 1 now\)"):
    Workdir.check_config({"a": []}, {"a": [1]})


def test_a_broken_config_file(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.config.write_text('{"name": ')
  with pytest.raises(WorkdirError, match=r"config.json cannot be read") as caught:
    workdir.store_config(ring_tiny.get_config())
  one_line(caught)


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes


def test_write_atomic(tmp_path):
  write_atomic(tmp_path / "file", "old")
  write_atomic(tmp_path / "file", b"new")
  assert (tmp_path / "file").read_text() == "new"
  assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_half_way_leaves_the_old_content(tmp_path):
  path = tmp_path / "file"
  write_atomic(path, "old")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel then writes 4 kB and refuses the rest
  try:
    with pytest.raises(OSError):
      write_atomic(path, b"x" * 100_000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_content_or_the_new(tmp_path):
  program = (
    "import pathlib, sys, itertools; from ring_jax.train.workdir import write_atomic\n"
    "path = pathlib.Path(sys.argv[1])\n"
    "for index in itertools.count(): write_atomic(path, str(index % 10) * 300_000); print(flush=True)"
  )
  path = pathlib.Path(tmp_path / "file")
  for writes in (1, 3, 6):
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    for _ in range(writes):
      process.stdout.readline()
    process.kill()
    process.wait()
    content = path.read_text()
    assert len(content) == 300_000 and len(set(content)) == 1
