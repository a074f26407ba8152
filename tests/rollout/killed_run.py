"""A run of short iterations that saves after each of them, and may be told to kill itself in the midst of generating."""

import dataclasses
import json
import os
import pathlib
import signal
import threading

import jax
import numpy as np

from configs.ring_tiny import get_config
from ring_jax import model as ring_model
from ring_jax.train.workdir import write_atomic
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.events import EventLog
from rollout.scheduler import C3POScheduler
from rollout.worker import EngineWorker

ITERATIONS = 30
MODEL = dataclasses.replace(
  get_config().model, vocab_size=48, hidden_size=16, num_hidden_layers=2, first_k_dense_replace=0, intermediate_size=32,
  moe_intermediate_size=16,
)  # fmt: skip
CONFIG = dataclasses.replace(
  get_config().rollout, slots=6, pool=12, group_size=3, token_budget=30, retention=4, max_tokens=11, max_prompt_tokens=5,
  steps_per_dispatch=1, prefill_batch=6,
)  # fmt: skip


class Doomed(EngineWorker):
  """Is killed a moment after one of its dispatches began."""

  dispatch, moment = -1, 0.0

  def advance(self, jobs):
    if self.dispatch == 0:
      threading.Timer(self.moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
    self.dispatch -= 1
    return super().advance(jobs)


def prompts_from(cursor):
  def take(count):
    first, cursor[0] = cursor[0], cursor[0] + count
    return [(i, np.random.default_rng(i).integers(10, 40, 2 + i % 4).tolist()) for i in range(first, cursor[0])]

  return take


def run(folder: str, dispatch: int, moment: float) -> None:
  """Goes on from what the folder holds; to its end, or until killed."""
  path = pathlib.Path(folder)
  engine = RingEngine(MODEL, CONFIG, eos_ids=(7, 8), vocab_mask_V=np.arange(48) < 40, seed=1)
  worker, scheduler, log = Doomed(engine), C3POScheduler(CONFIG), EventLog(path / "events.jsonl")
  worker.dispatch, worker.moment = dispatch, moment
  cursor, state = [0], path / "state.json"
  if state.exists():
    saved = json.loads(state.read_text())
    scheduler.load_state_dict(saved["scheduler"])
    cursor[0] = saved["cursor"]
  log.truncate(scheduler.iteration)
  driver = RolloutDriver(worker, scheduler, CONFIG.max_tokens, log=log)
  fresh = jax.device_get(ring_model.init_params(MODEL, 0))
  take = prompts_from(cursor)
  while scheduler.iteration < ITERATIONS:
    version = scheduler.iteration
    params = jax.tree.map(lambda leaf: leaf * np.float32(1 + 0.1 * version), fresh)  # noqa: B023
    result, _ = driver.iterate(engine.load_params(params), version, take)
    write_atomic(path / f"iteration_{version}.json", json.dumps(result.to_dict()))
    write_atomic(state, json.dumps({"scheduler": scheduler.state_dict(), "cursor": cursor[0]}))
