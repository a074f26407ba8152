"""A run that hangs ends by itself and says where; one that is only slow, or was stopped for a while, does not."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from configs.status import ExitStatus

ROOT = pathlib.Path(__file__).parents[2]

# Process 1 never comes to the collective that process 0 is in.
HANGING = """
import pathlib, sys, time
import numpy as np
from jax.experimental import multihost_utils
from ring_jax.train.watchdog import Watchdog
from sharding import cluster, processes
coordinator, index, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
processes.join(coordinator, 2, index, {}, 60.0)
cluster.connect_jax(cluster.Cluster(coordinator, 2, index), 60.0)
with Watchdog(2.0 if index == 0 else 0.0, folder) as dog:
  multihost_utils.process_allgather(np.int32(index))
  dog.beat("rollout, step 7")
  if index == 0:
    multihost_utils.process_allgather(np.int32(index))
  time.sleep(100)
"""

SLOW = """
import pathlib, sys, time
from ring_jax.train.watchdog import Watchdog
with Watchdog(1.0, pathlib.Path(sys.argv[1])) as dog:
  print("begun", flush=True)
  for _ in range(12):
    time.sleep(0.25)
    dog.beat()
time.sleep(1.5)  # no one watches any more
print("done")
"""


def start(code, *arguments):
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def test_a_collective_that_hangs_ends_both_processes_with_all_stacks(tmp_path):
  with socket.create_server(("", 0)) as server:
    coordinator = f"127.0.0.1:{server.getsockname()[1]}"
  both = [start(HANGING, coordinator, index, tmp_path) for index in range(2)]
  errors = [process.communicate(timeout=100)[1] for process in both]
  assert [process.returncode for process in both] == [ExitStatus.HUNG] * 2, errors
  line = f"error: no progress for 2 s in phase 'rollout, step 7'; all stacks are in {tmp_path}/hang_process_0.txt\n"
  assert errors[0].endswith(line) and errors[1].endswith(f"process 0 on {socket.gethostname()}: {line}")
  for text in (errors[0], (tmp_path / "hang_process_0.txt").read_text()):
    assert "in process_allgather" in text and "in _watch" in text  # the thread that hangs, and the one that saw it
  assert [path.name for path in tmp_path.iterdir()] == ["hang_process_0.txt"]


def test_slow_is_not_hung_and_neither_is_stopped(tmp_path):
  process = start(SLOW, tmp_path)
  assert process.stdout.readline() == "begun\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(3.0)
  process.send_signal(signal.SIGCONT)
  output, errors = process.communicate(timeout=60)
  assert (process.returncode, output) == (0, "done\n"), errors
  assert not list(tmp_path.iterdir())
