"""One engine for many: order, aborts, new weights, and faults of either side."""

import dataclasses
import queue
import threading
import time

import numpy as np
import pytest

from configs.ring_tiny import get_config
from ring_jax import model as ring_model
from ring_jax.records import FinishReason
from rollout.engine import RingEngine, Sampling
from rollout.service import Busy, EngineService, Request, Unavailable
from rollout.worker import EngineWorker

MODEL = get_config().model
CONFIG = dataclasses.replace(
  get_config().rollout, slots=2, pool=2, group_size=1, max_tokens=200, max_prompt_tokens=40, steps_per_dispatch=2, prefill_batch=2,
)  # fmt: skip
ENGINE = RingEngine(MODEL, CONFIG, eos_ids=(), vocab_mask_V=np.arange(MODEL.vocab_size) < 40, seed=1)
GREEDY = Sampling(1.0, 1.0, 1, 0)


@pytest.fixture(scope="module")
def versions():
  return [ENGINE.load_params(ring_model.init_params(MODEL, seed)) for seed in range(2)]


@pytest.fixture
def service(versions):
  served = EngineService(EngineWorker(ENGINE), versions[0], 0, max_waiting=3)
  yield served
  served.close()


class Heard:
  """A listener that keeps what it hears."""

  def __init__(self):
    self._updates = queue.SimpleQueue()
    self.seen = []

  def __call__(self, update):
    self._updates.put(update)

  def next(self):
    self.seen.append(self._updates.get(timeout=60))
    return self.seen[-1]

  def all(self):
    while self.next().reason is None:
      pass
    return [token for update in self.seen for token in update.tokens]


def ask(service, tokens=(11, 12, 13), max_tokens=6, uid=0, sampling=None):
  heard = Heard()
  return service.submit(Request(list(tokens), max_tokens, uid, sampling), heard), heard


def test_each_gets_its_own_answer_whatever_runs_beside_it(service):
  alone = ask(service, (11, 20), 5, uid=0)[1].all()
  together = [ask(service, (11 + i, 20), 5 + i, uid=i)[1] for i in range(4)]
  answers = [heard.all() for heard in together]
  assert [len(answer) for answer in answers] == [5, 6, 7, 8] and answers[0] == alone
  assert all(heard.seen[-1].reason is FinishReason.LENGTH for heard in together)
  stats = service.stats()
  assert stats.finished == 5 and stats.running == stats.waiting == 0
  assert stats.drawn_tokens == 5 + 5 + 6 + 7 + 8 and stats.prompt_tokens == 10


def test_an_abort_frees_the_slot_at_once(service):
  (first, heard), _ = ask(service, max_tokens=200), ask(service, max_tokens=200)
  _, waiting = ask(service, max_tokens=2)
  heard.next()
  service.abort(first)
  assert len(waiting.all()) == 2  # long before 200 tokens of the others
  while heard.next().reason is None:
    pass
  assert heard.seen[-1].reason is FinishReason.ABORTED and service.stats().aborted == 1
  service.abort(first)
  service.abort(12345)


def test_one_that_waits_can_be_aborted(service):
  running = [ask(service, max_tokens=150)[1] for _ in range(2)]
  number, heard = ask(service, max_tokens=3)
  service.abort(number)
  assert heard.next().reason is FinishReason.ABORTED and not heard.seen[0].tokens
  assert len(running[0].all()) == 150


def test_the_queue_has_an_end(service):
  service.pause()
  held = [ask(service, max_tokens=2)[1] for _ in range(2 + 3)]
  with pytest.raises(Busy, match="3 requests are waiting already"):
    ask(service)
  assert service.stats().refused == 1 and service.stats().waiting == 5
  service.resume()
  assert [len(heard.all()) for heard in held] == [2] * 5


def test_what_could_never_run_is_refused_at_the_door(service):
  with pytest.raises(ValueError, match="from 1 to 256 fit"):
    ask(service, tokens=[11] * 257)
  with pytest.raises(ValueError, match="from 1 to"):
    ask(service, tokens=[])
  with pytest.raises(ValueError, match="max_tokens=0"):
    ask(service, max_tokens=0)
  assert service.stats().requests == 0


def test_new_weights_draw_the_next_token(service, versions):
  _, heard = ask(service, max_tokens=100, sampling=GREEDY)
  heard.next()
  service.update(versions[1], 1)
  answer = heard.all()
  seen = [(update.version, len(update.tokens)) for update in heard.seen]
  assert {version for version, _ in seen} == {0, 1} and seen == sorted(seen, key=lambda entry: entry[0])
  drawn_before = sum(count for version, count in seen if version == 0)
  # The rest is what the new weights say of prompt and beginning.
  _, again = ask(service, (11, 12, 13, *answer[:drawn_before]), 100 - drawn_before, sampling=GREEDY)
  assert again.all() == answer[drawn_before:]


def test_a_pause_holds_and_a_drain_lets_end(service):
  _, heard = ask(service, max_tokens=40)
  heard.next()
  service.pause()
  time.sleep(0.1)
  before = service.stats().dispatches
  time.sleep(0.1)
  assert service.stats().dispatches == before and service.stats().running == 1
  assert service.drain(timeout=60) and len(heard.all()) == 40
  with pytest.raises(Unavailable, match="closing"):
    ask(service)


def test_a_listener_that_fails_loses_its_own_request_only(service):
  def broken(update):
    raise RuntimeError("the client is gone")

  service.submit(Request([11, 12], 150, 7), broken)
  _, heard = ask(service, max_tokens=30)
  assert len(heard.all()) == 30
  deadline = time.monotonic() + 60
  while service.stats().aborted == 0 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert service.stats().aborted == 1


def test_an_engine_that_fails_is_heard_of_by_all(versions):
  worker = EngineWorker(ENGINE)
  service = EngineService(worker, versions[0], 0, max_waiting=3)
  held = [ask(service, max_tokens=200)[1] for _ in range(3)]
  held[0].next()

  def advance(jobs):
    raise RuntimeError("out of memory")

  worker.advance = advance
  for heard in held:
    while heard.next().reason is None:
      pass
    assert heard.seen[-1].reason is FinishReason.ABORTED and "out of memory" in heard.seen[-1].error
  with pytest.raises(Unavailable, match="out of memory"):
    ask(service)
  with pytest.raises(Unavailable, match="out of memory"):
    service.update(versions[1], 1)
  assert "out of memory" in service.stats().error
  service.close()


def test_weights_that_the_engine_does_not_take_are_heard_of_too(versions):
  worker = EngineWorker(ENGINE)
  service = EngineService(worker, versions[0], 2, max_waiting=3)

  def load(params, version):
    raise RuntimeError("out of memory")

  worker.load = load
  heard = queue.SimpleQueue()

  def update(version):
    try:
      service.update(versions[1], version)
    except Unavailable as error:
      heard.put(str(error))

  service.pause()
  for version in (1, 3):
    threading.Thread(target=update, args=(version,), daemon=True).start()
  assert all("out of memory" in heard.get(timeout=20) for _ in range(2))
  service.close()


def test_one_whose_slot_cannot_be_freed_is_told(versions):
  worker = EngineWorker(ENGINE)
  service = EngineService(worker, versions[0], 0, max_waiting=3)
  number, heard = ask(service, max_tokens=200)
  heard.next()

  def release(slots):
    raise RuntimeError("out of memory")

  worker.release = release
  service.abort(number)
  while heard.next().reason is None:
    pass
  assert heard.seen[-1].reason is FinishReason.ABORTED
  service.close()


def test_closing_tells_everyone(versions):
  service = EngineService(EngineWorker(ENGINE), versions[0], 0, max_waiting=3)
  _, heard = ask(service, max_tokens=200)
  heard.next()
  closing = threading.Thread(target=service.close)
  closing.start()
  while heard.next().reason is None:
    pass
  closing.join(timeout=60)
  assert heard.seen[-1].reason is FinishReason.ABORTED and "closed" in heard.seen[-1].error
