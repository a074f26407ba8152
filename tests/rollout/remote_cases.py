"""Workers and pools in one process, for the tests of both ends of the wire."""

import contextlib
import dataclasses
import time

import jax
import numpy as np

from configs.ring_tiny import get_config
from configs.schema import Unit
from ring_jax import model as ring_model
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.remote.pool import Patience, WorkerPool
from rollout.remote.server import serve
from rollout.scheduler import C3POScheduler
from rollout.service import EngineService
from rollout.worker import EngineWorker

MODEL = dataclasses.replace(get_config().model, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
CONFIG = dataclasses.replace(
  get_config().rollout, slots=4, pool=16, group_size=2, unit=Unit.ROLLOUT, max_tokens=24, max_prompt_tokens=40, token_budget=150,
  steps_per_dispatch=2, prefill_batch=2,
)  # fmt: skip
MASK = np.arange(MODEL.vocab_size) < 40
EOS = (7, 8)
ENGINE = RingEngine(MODEL, CONFIG, eos_ids=EOS, vocab_mask_V=MASK, seed=1)
TOKEN = "a token of the tests"
IMPATIENT = Patience(call=20, health=0.2, retry=0.2, turn=0.2, stall=120, update=120)


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


@contextlib.contextmanager
def pool_of(*ports, engine=ENGINE, token=TOKEN, **options):
  pool = WorkerPool([f"127.0.0.1:{port}" for port in ports], engine, token=token, patience=IMPATIENT, **options)
  try:
    yield pool
  finally:
    pool.close()


def packed_versions():
  """Two sets of weights, as the engine stores them, in host memory."""
  return [jax.device_get(ENGINE.load_params(ring_model.init_params(MODEL, seed))) for seed in range(2)]


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
