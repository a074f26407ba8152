"""Roll call and news among processes: every way in which it goes wrong is one line, and no one waits forever."""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from configs.base import ConfigError
from configs.status import ExitStatus
from sharding import cluster, processes
from sharding.processes import JoinError, meet

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def all_meet(*calls, seconds=20.0):
  """Groups, or what was raised; each call is (count, index) or (count, index, facts), in a thread of its own."""
  port = free_port()

  def one(call):
    count, index, *facts = call
    try:
      return meet(f"127.0.0.1:{port}", count, index, *facts or [{}], seconds)
    except JoinError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
    return list(pool.map(one, calls))


def test_all_learn_who_is_there_and_share_what_they_have():
  groups = all_meet((3, 2, {"x": "c"}), (3, 0, {"x": "a"}), (3, 1, {"x": "b"}))
  assert [group.index for group in groups] == [2, 0, 1] and [group.is_first for group in groups] == [False, True, False]
  for group in groups:
    assert [member.facts["x"] for member in group.members] == ["a", "b", "c"]
    assert all(member.pid == os.getpid() and abs(member.skew) < 1.0 for member in group.members)

  def talk(group):
    said = [group.gather("index", group.index), group.gather("odd", [0.1 + 0.2, None, "ü"] * group.index)]
    first = group.from_first("what 0 knows", lambda: f"from {group.index}")
    group.leave()
    return said, first

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    for said, first in pool.map(talk, groups):
      assert said == [[0, 1, 2], [[], [0.1 + 0.2, None, "ü"], [0.1 + 0.2, None, "ü"] * 2]] and first == "from 0"


def test_alone_nothing_is_sent():
  group = processes.group()
  assert group.count == 1 and group.is_first
  value = object()  # not even JSON
  assert group.gather("x", value) == [value] and group.from_first("x", lambda: value) is value
  group.leave()


@pytest.mark.parametrize(
  ("calls", "message"),
  [
    (((3, 0), (3, 2)), r"2 of 3 processes came to port \d+ within 1 s; missing: 1"),
    (((2, 0), (3, 2)), r"process 2 on .* expects 3 processes, process 0 expects 2 \(--num_processes\)"),
    (((3, 0), (3, 1), (3, 1)), r"process 1 came twice: from .* \(\d+\) and .* \(\d+\)"),
  ],
)
def test_wrong_numbers_are_one_line_for_all_that_came(calls, message):
  found = all_meet(*calls, seconds=1.0)
  assert all(isinstance(error, ConfigError) for error in found)
  assert len({str(error) for error in found}) == 1 and "\n" not in str(found[0])
  assert re.fullmatch(message, str(found[0]))


def test_nobody_there():
  port = free_port()
  with pytest.raises(JoinError, match=rf"process 0 cannot be reached at localhost:{port} within 0.5 s \(.*refused\)"):
    meet(f"localhost:{port}", 2, 1, {}, 0.5)
  with pytest.raises(JoinError, match=r"cannot be reached at nowhere.invalid:\d+ within 0.5 s"):
    meet(f"nowhere.invalid:{port}", 2, 1, {}, 0.5)


def test_a_port_that_another_program_holds(monkeypatch):
  monkeypatch.setattr(processes, "_BIND_SECONDS", 0.5)
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(JoinError, match=rf"port {port} of process 0 cannot be used \(Address already in use\)"):
      meet(f"localhost:{port}", 2, 0, {}, 5.0)
    # It listens, but speaks another language: not process 0.
    with pytest.raises(JoinError, match="cannot be reached"):
      meet(f"localhost:{port}", 2, 1, {}, 0.5)


def test_strangers_do_not_disturb_the_roll_call():
  port = free_port()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(meet, f"127.0.0.1:{port}", 2, 0, {}, 20.0)
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"", b"RJx1\x00\x00\x00\x02[]"):
      while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as stranger:
          stranger.sendall(greeting)
          break
        time.sleep(0.01)
    second = pool.submit(meet, f"127.0.0.1:{port}", 2, 1, {}, 20.0)
    groups = [first.result(), second.result()]
    assert list(pool.map(lambda group: group.gather("x", group.index), groups)) == [[0, 1], [0, 1]]
    list(pool.map(lambda group: group.leave(), groups))


def test_processes_that_are_out_of_step_say_where_they_are():
  groups = all_meet((2, 0), (2, 1))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pool.submit(groups[1]._tell, groups[1]._links[0], kind="value", name="stop after step 4?", value=0)
    with pytest.raises(RuntimeError, match=r"process 0 is at 'scores', process 1 on .* at 'stop after step 4\?'"):
      groups[0].gather("scores", [])


# ---------------------------------------------------------------------------------------------------------------------
# Ends: in processes of their own

MEMBER = """
import sys, time
from sharding.processes import join
port, index, then = sys.argv[1:]
group = join(f"127.0.0.1:{port}", 3, int(index), {}, 60.0)
print("there", flush=True)
if then == "fail":
  time.sleep(0.2)
  group.end(2, "error: the disk is full")
if then == "wait":
  group.gather("never", None)  # those that fail do not come
time.sleep(60)
"""


def three(*then):
  port = free_port()
  return [
    subprocess.Popen(
      [sys.executable, "-c", MEMBER, str(port), str(index), what],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for index, what in enumerate(then)
  ]  # fmt: skip


@pytest.mark.parametrize("failing", [0, 2])
def test_one_that_fails_takes_the_others_along_with_its_line_and_status(failing):
  members = three(*("fail" if index == failing else "wait" for index in range(3)))
  for index, member in enumerate(members):
    _, errors = member.communicate(timeout=60)
    assert member.returncode == 2
    assert errors.count("\n") == 1 and errors.endswith("error: the disk is full\n")
    assert ("process" in errors) == (index != failing)


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_killed_is_missed_at_once(lost):
  members = three("sleep", "sleep", "sleep")
  for member in members:
    assert member.stdout.readline() == "there\n"
  started = time.monotonic()
  members[lost].send_signal(signal.SIGKILL)
  for index, member in enumerate(members):
    _, errors = member.communicate(timeout=60)
    if index != lost:
      assert member.returncode == ExitStatus.LOST, errors
      assert errors.count("\n") == 1 and f"process {lost} on {socket.gethostname()} is gone" in errors
  assert time.monotonic() - started < 10


# ---------------------------------------------------------------------------------------------------------------------
# Which processes there are


def test_flags():
  assert cluster.from_flags(None, None, None) is None
  assert cluster.from_flags("host:1", 2, 1) == cluster.Cluster("host:1", 2, 1)
  for given, message in (
    (
      ("host:1", None, None),
      "--num_processes and --process_id missing: --coordinator, --num_processes and --process_id",
    ),
    ((None, 2, 0), "--coordinator missing"),
    (("host", 2, 0), "--coordinator=host: must be HOST:PORT"),
    (("host:x", 2, 0), "must be HOST:PORT"),
    (("host:70000", 2, 0), "must be HOST:PORT"),
    (("host:1", 0, 0), "--num_processes=0: must be at least 1"),
    (("host:1", 2, 2), "--process_id=2: from 0 to 1, as --num_processes=2"),
  ):
    with pytest.raises(ConfigError, match=message):
      cluster.from_flags(*given)


DETECT = "import jax; from sharding import cluster; print(cluster.detect(5.0), jax._src.xla_bridge._backends)"
SLURM = {
  "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-05],other", "SLURM_NTASKS": "12", "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
}  # fmt: skip


@pytest.mark.parametrize(
  ("environment", "platforms", "expected"),
  [
    (SLURM, "", "Cluster(coordinator='node03:61447', count=12, index=5, local_device_ids=[1]) {}\n"),
    (SLURM, "cpu", "None {}\n"),
    (SLURM, "proxy", "None {}\n"),  # Pathways: one process sees all devices
    ({}, "", "None {}\n"),
  ],
)
def test_what_the_surroundings_say(environment, platforms, expected):
  """Through JAX's own detection, and without starting a backend."""
  done = subprocess.run(
    [sys.executable, "-c", DETECT], cwd=ROOT, env=os.environ | environment | {"JAX_PLATFORMS": platforms},
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.stdout == expected, done.stderr
