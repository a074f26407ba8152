"""The wire, by both ends in one process: answers that are right, and everything that either end may do wrong."""

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from concurrent import futures

import grpc
import jax
import numpy as np
import pytest

from configs.base import ConfigError
from configs.ring_tiny import get_config
from configs.schema import KVPolicy, RolloutDtype, Unit
from ring_jax import model as ring_model
from ring_jax.checkpoint import hf
from ring_jax.records import FinishReason
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine, Sampling
from rollout.remote import server as server_side
from rollout.remote import wire
from rollout.remote import worker_pb2 as pb
from rollout.remote.client import RemoteWorker, WorkerLost
from rollout.remote.pool import Patience, WorkerPool
from rollout.remote.server import add_rl_service, serve
from rollout.remote.stream import BrokenStream, HostWeights, Receiver, parts
from rollout.scheduler import C3POScheduler
from rollout.service import EngineService
from rollout.worker import EngineWorker, Job
from sharding.transfer.plan import named_leaves

MODEL = dataclasses.replace(get_config().model, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
CONFIG = dataclasses.replace(
  get_config().rollout, slots=4, pool=16, group_size=2, unit=Unit.ROLLOUT, max_tokens=24, max_prompt_tokens=40, token_budget=150,
  steps_per_dispatch=2, prefill_batch=2,
)  # fmt: skip
MASK = np.arange(MODEL.vocab_size) < 40
EOS = (7, 8)
ENGINE = RingEngine(MODEL, CONFIG, eos_ids=EOS, vocab_mask_V=MASK, seed=1)
SETTINGS = {name: wire.digest(value) for name, value in ENGINE.settings().items()}
TOKEN = "a token of the tests"
IMPATIENT = Patience(call=20, health=0.2, retry=0.2, turn=0.2, stall=120, update=120)


@pytest.fixture(scope="module")
def versions():
  return [jax.device_get(ENGINE.load_params(ring_model.init_params(MODEL, seed))) for seed in range(2)]


@contextlib.contextmanager
def started(engine=ENGINE, token=TOKEN, **options):
  """A server with an engine of its own: the service and its port."""
  service = EngineService(EngineWorker(engine), None, -1, max_waiting=16)
  server, port = serve(service, token=token, **options)
  try:
    yield service, port
  finally:
    server.stop(grace=None).wait()
    service.close()


@pytest.fixture
def worker():
  with started() as found:
    yield found


@contextlib.contextmanager
def pool_of(*ports, engine=ENGINE, token=TOKEN, **options):
  pool = WorkerPool([f"127.0.0.1:{port}" for port in ports], engine, token=token, patience=IMPATIENT, **options)
  try:
    yield pool
  finally:
    pool.close()


def wait_until(condition, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert condition()


class Prompts:
  """Endless prompts, each a function of its index."""

  def __init__(self):
    self.cursor = 0

  def __call__(self, count):
    first, self.cursor = self.cursor, self.cursor + count
    return [(i, np.random.default_rng(i).integers(10, 40, 3 + i % 5).tolist()) for i in range(first, self.cursor)]


def answers(worker, versions, numbers=(0,), config=CONFIG, limit=8):
  """What the rollouts of `limit` prompts draw under the versions given, one an iteration; all of them end in the last."""
  scheduler, source = C3POScheduler(config), Prompts()
  driver = RolloutDriver(worker, scheduler, config.max_tokens)
  take = lambda count: source(min(count, limit - source.cursor))  # noqa: E731
  found = []
  for number in numbers:
    found += driver.iterate(versions[number], number, take)[0].rollouts
  while scheduler.in_flight:
    found += driver.iterate(versions[numbers[-1]], numbers[-1], take)[0].rollouts
  return {rollout.uid: rollout for rollout in found}, scheduler


def same(one, other):
  assert one.keys() == other.keys() and one
  for uid in one:
    assert one[uid].tokens == other[uid].tokens and one[uid].versions == other[uid].versions, uid
    np.testing.assert_allclose(one[uid].logps, other[uid].logps, rtol=0, atol=1e-5)
    assert one[uid].finish_reason == other[uid].finish_reason


def test_two_workers_draw_what_one_engine_of_this_process_does(versions):
  expected, _ = answers(EngineWorker(ENGINE), versions)
  with started() as (_, one), started() as (_, other), pool_of(one, other) as pool:
    found, scheduler = answers(pool, versions)
    assert len(pool.slots) == 8 and len(pool.workers) == 2
  same(expected, found)
  assert {rollout.finish_reason for rollout in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
  assert scheduler.totals.redispatched == 0
