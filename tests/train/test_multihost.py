"""Two processes run the real job, are preempted, killed and find a damaged checkpoint, and end as one process would.

Two processes of one device each add two numbers in any sum over devices, and so does one process of two devices: the
results are the same bits.  (Of four numbers the order matters, and Gloo has its own; docs/tpu.md has the figures.)
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.schema import MeshConfig, ParallelConfig
from configs.status import ExitStatus
from ring_jax.checkpoint.store import RunStore, steps
from ring_jax.model import abstract_params
from ring_jax.train.optimizer import make_optimizer
from sharding import rules
from sharding.mesh import make_mesh
from tests.devices import QUICK_TO_COMPILE
from tests.train import small_run
from tests.train.outcome import assert_same, final_state

ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = (
  "--config=tests/train/small_run.py", "--config.sft.steps=3", "--config.rl.steps=3", "--config.checkpoint.every=1",
  "--config.model.num_hidden_layers=1", "--config.model.first_k_dense_replace=0",
)  # fmt: skip
MESH = ("--config.model.parallel.mesh.fsdp=2",)


def start(workdir, *arguments, devices):
  environment = {
    "JAX_NUM_CPU_DEVICES": str(devices),
    # JAX's cache keeps programs of process 0 only; the other one compiles them at every start.
    "XLA_FLAGS": QUICK_TO_COMPILE,
  }
  return subprocess.Popen(
    [sys.executable, "-m", "ring_jax.launch.train", *ARGUMENTS, f"--workdir={workdir}", *arguments], cwd=ROOT,
    env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip


def start_pair(workdir):
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  joined = (*MESH, f"--coordinator=localhost:{port}", "--num_processes=2")
  return [start(workdir, *joined, f"--process_id={index}", devices=1) for index in range(2)]


def ended(processes, *statuses, seconds=300):
  """What they printed, once they have ended so."""
  output = [process.communicate(timeout=seconds)[0] for process in processes]
  assert tuple(process.returncode for process in processes) == statuses, "\n---\n".join(output)
  return output


def wait_for(workdir, lines, processes):
  path, deadline = workdir / "metrics.jsonl", time.monotonic() + 250
  while not path.exists() or path.read_text().count("\n") < lines:
    assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """The run in one process with two devices."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  ended([start(workdir, *MESH, devices=2)], 0)
  return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """The run in two processes, with everything that happened to it."""
  workdir = tmp_path_factory.mktemp("two") / "run"

  pair = start_pair(workdir)
  wait_for(workdir, 3, pair)
  pair[1].send_signal(signal.SIGTERM)  # only one of them is told
  first, second = ended(pair, ExitStatus.PREEMPTED, ExitStatus.PREEMPTED)
  assert "the same command goes on from there" in first and "before SFT" in first
  assert not any(word in second for word in ("SFT", "accuracy", "stopped")), "the second process writes, too"

  pair = start_pair(workdir)
  assert any("resuming after step" in line for line in iter(pair[0].stdout.readline, ""))
  pair[1].kill()
  first, _ = ended(pair, ExitStatus.LOST, -signal.SIGKILL, seconds=60)
  assert first.splitlines()[-1] == (
    f"error: process 1 on {socket.gethostname()} is gone; the same command goes on from the last checkpoint"
  )

  older, newest = steps(workdir / "checkpoints")
  largest = max((workdir / "checkpoints" / str(newest) / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  first, _ = ended(start_pair(workdir), 0, 0)
  assert f"resuming after step {older}" in first
  assert (workdir / "checkpoints" / f"{newest}.damaged").is_dir()
  return workdir


def test_two_processes_end_as_one_does(one, two):
  expected, found = final_state(one), final_state(two)
  assert expected["step"] == "6" and expected["metrics"].count("\n") == 3 + 3 + 3
  assert_same(expected, found)


def test_what_two_processes_wrote_is_read_on_one_device_and_on_four(one, two):
  def read(workdir, mesh):
    config = small_run.get_config()
    model = dataclasses.replace(
      config.model, parallel=ParallelConfig(mesh=mesh), num_hidden_layers=1, first_k_dense_replace=0
    )
    devices = None if mesh.num_devices == 1 else make_mesh(mesh, jax.devices()[: mesh.num_devices])
    params = abstract_params(model, devices)
    state = rules.Program(devices, make_optimizer(config.rl.optimizer, 6).init).shapes(params)
    with RunStore(workdir / "checkpoints", keep=2) as store:
      found = store.restore(params, state)
    return found.params, found.optimizer_state

  expected = read(one, MeshConfig())
  for mesh in (MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2)):
    found = read(two, mesh)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      assert len(leaf.sharding.device_set) == mesh.num_devices
      assert leaf.dtype == other.dtype and np.asarray(leaf).tobytes() == np.asarray(other).tobytes()
    assert mesh.num_devices == 1 or any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(found))


def test_the_run_goes_on_in_one_process_on_one_device(two):
  (output,) = ended([start(two, "--config.rl.steps=4", devices=1)], 0)
  assert "resuming after step 6" in output
  records = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
  assert [record["step"] for record in records if record["phase"] == "rl"] == [4, 5, 6, 7]
  assert records[-1]["name"] == "rl" and records[-1]["step"] == 7
