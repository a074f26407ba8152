"""Rollout workers as processes on loopback: killed, joining, given new weights, and outliving their trainer."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import grpc
import jax
import numpy as np
import pytest

from ring_jax import model as ring_model
from ring_jax.train.rollout_worker import engine_of
from rollout.control import Control
from rollout.driver import RolloutDriver
from rollout.remote import wire
from rollout.remote import worker_pb2 as pb
from rollout.remote.pool import Patience, WorkerPool
from rollout.scheduler import C3POScheduler
from rollout.worker import EngineWorker, Job
from tests.rollout.remote_run import get_config

ROOT = pathlib.Path(__file__).parents[2]
TOKEN = "a token of the tests"
CONFIG = get_config()
IMPATIENT = Patience(call=30, health=0.3, retry=0.3, turn=0.2, stall=200, update=200)


class Process:
  """One worker."""

  def __init__(self, log, *flags):
    command = [sys.executable, "-m", "ring_jax.launch.worker", "--config=tests/rollout/remote_run.py", *flags]
    self.log = log
    with log.open("w") as output:
      self.process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {wire.TOKEN_VARIABLE: TOKEN}, stdout=output, stderr=subprocess.STDOUT
      )

  @functools.cached_property
  def address(self):
    """Waits until it listens."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
      assert self.process.poll() is None, self.log.read_text()
      found = [line for line in self.log.read_text().splitlines() if line.startswith("rollout worker on ")]
      if found:
        return found[0].split()[3].rstrip(":")
      time.sleep(0.05)
    raise AssertionError(f"no worker after 200 s: {self.log.read_text()}")

  def health(self):
    with grpc.insecure_channel(self.address) as channel:
      return wire.HEALTH.of_client(channel)(pb.Empty(), metadata=wire.credentials(TOKEN), timeout=60)

  def stop(self):
    self.process.kill()
    self.process.wait()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
  """Three: two that the tests begin with, and one that will be killed; all start at the same time."""
  folder = tmp_path_factory.mktemp("workers")
  found = [Process(folder / f"{i}.log", f"--announce={folder}/announced_{i}") for i in range(3)]
  yield found
  for worker in found:
    worker.stop()


@pytest.fixture(scope="module")
def engine():
  return engine_of(CONFIG)


@pytest.fixture(scope="module")
def versions(engine):
  return [jax.device_get(engine.load_params(ring_model.init_params(CONFIG.model, seed))) for seed in range(2)]


def prompts(count):
  """`count` of them, one after the other."""
  waiting = iter([(i, np.random.default_rng(i).integers(10, 100, 3 + i % 5).tolist()) for i in range(count)])
  return lambda wanted: [prompt for _, prompt in zip(range(wanted), waiting, strict=False)]


def run(worker, stored, count=6, on_progress=lambda driver, scheduler: None, control=None):
  """All rollouts of `count` prompts under version 0."""
  scheduler, source = C3POScheduler(CONFIG.rollout), prompts(count)
  driver = RolloutDriver(worker, scheduler, CONFIG.rollout.max_tokens, control)
  found = []
  while not (scheduler.closed and scheduler.in_flight == 0):
    found += driver.iterate(stored, 0, source, lambda clock: on_progress(driver, scheduler))[0].rollouts
  return {rollout.uid: rollout for rollout in found}, scheduler


def wait_until(condition, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.05)
  assert condition()


def test_a_killed_worker_s_rollouts_go_on_elsewhere_and_a_new_worker_gets_work(workers, engine, versions, tmp_path):
  expected, _ = run(EngineWorker(engine), versions[0])
  victim, survivor, late = workers
  addresses = tmp_path / "addresses"
  pool = WorkerPool(
    [victim.address, survivor.address], engine, token=TOKEN, file=str(addresses), patience=IMPATIENT
  )  # fmt: skip
  held = []

  def kill(driver, scheduler):
    own = [slot for slot, worker in pool._worker_of.items() if worker.address == victim.address]
    running = [scheduler.running()[slot] for slot in own if slot in scheduler.running()]
    if victim.process.poll() is None and any(0 < rollout.length < 40 for rollout in running):
      held.extend((rollout.uid, rollout.length) for rollout in running)
      victim.stop()
      addresses.write_text((late.log.parent / "announced_2").read_text())

  try:
    found, scheduler = run(pool, versions[0], on_progress=kill)
    assert victim.address not in pool.workers
    # What is left of the work may have been too little for a process that came so late: it gets the next.
    wait_until(lambda: (pool.advance([]), late.address in pool.workers)[1])
    again, _ = run(pool, versions[0])
  finally:
    pool.close()
  assert held and any(length for _, length in held)
  assert 1 <= scheduler.totals.redispatched == sum(rollout.losses for rollout in found.values()) <= 4
  assert scheduler.totals.aborted == scheduler.totals.wasted == 0
  for other in (found, again):
    assert {uid: rollout.tokens for uid, rollout in other.items()} == {
      uid: rollout.tokens for uid, rollout in expected.items()
    }
    for uid, rollout in other.items():
      np.testing.assert_allclose(rollout.logps, expected[uid].logps, rtol=0, atol=1e-5)
  assert late.health().drawn_tokens > 0


def test_new_weights_in_the_middle(workers, engine, versions):
  control, asked = Control(), []
  pool = WorkerPool([worker.address for worker in workers[1:]], engine, token=TOKEN, patience=IMPATIENT)

  def renew(driver, scheduler):
    if not asked and any(rollout.length > 20 for rollout in scheduler.running().values()):
      asked.append(True)
      control.update(versions[1], 1)

  try:
    found, _ = run(pool, versions[0], 4, renew, control)
  finally:
    pool.close()
  mixed = [rollout for rollout in found.values() if len(set(rollout.versions)) == 2]
  assert mixed and all(rollout.versions == sorted(rollout.versions) for rollout in found.values())
  local = EngineWorker(engine)
  for rollout in mixed[:2]:
    before = rollout.versions.count(0)
    assert 0 < before < len(rollout.tokens)
    local.begin(versions[1], 1, [])
    job, drawn = Job(0, rollout.uid, rollout.prompt + rollout.tokens[:before], CONFIG.rollout.max_tokens - before), []
    while not drawn or drawn[-1].reason is None:
      drawn += local.advance([] if drawn else [job]).drawn
    assert [token for one in drawn for token in one.tokens] == rollout.tokens[before:]


def records(workdir):
  path = workdir / "metrics.jsonl"
  found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  return [record for record in found if record["phase"] == "rl"]


def test_a_run_loses_a_worker_and_the_worker_that_is_left_outlives_the_trainer(workers, tmp_path):
  left, victim = workers[1:]
  workdir = tmp_path / "run"
  command = [
    sys.executable, "-m", "ring_jax.launch.train", "--config=tests/rollout/remote_run.py", f"--workdir={workdir}",
    f"--config.rollout.workers={json.dumps([left.address, victim.address])}",
  ]  # fmt: skip
  log = tmp_path / "log"

  def start():
    with log.open("a") as output:
      return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {wire.TOKEN_VARIABLE: TOKEN}, stdout=output, stderr=subprocess.STDOUT
      )

  trainer = start()
  try:
    wait_until(lambda: len(records(workdir)) >= 1 or trainer.poll() is not None, 300)
    assert trainer.poll() is None, log.read_text()
    assert victim.health().drawn_tokens > 0
    victim.stop()
    wait_until(lambda: len(records(workdir)) >= 2 or trainer.poll() is not None, 300)
    assert trainer.poll() is None, log.read_text()
    assert f"rollout worker {victim.address} is lost" in log.read_text()
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_until(lambda: left.health().running == left.health().waiting == 0)
    trainer = start()
    assert trainer.wait(timeout=300) == 0, log.read_text()
  finally:
    trainer.kill()
  done = records(workdir)
  assert "resuming after step" in log.read_text() and "not reproducible" in log.read_text()
  assert [record["version"] for record in done if "version" in record] == list(range(4))
  # What the engine said of its tokens is what the trainer says of them: the weights are there, and are the right ones.
  fresh = [record for record in done if record.get("scheduler/staleness_max") == 0]
  assert fresh and all(record["mismatch/delta_max"] <= 1e-5 for record in fresh)
  left.process.terminate()
  assert left.process.wait(timeout=60) == 0
