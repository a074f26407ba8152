"""Slots in pages draw what slots in one piece draw: shared prompts, known beginnings, evictions, resumes, new weights."""

import dataclasses
import functools
import itertools
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import (
  BudgetCounts,
  ConfigError,
  KVPolicy,
  MeshConfig,
  PackingConfig,
  ParallelConfig,
  RolloutConfig,
  Unit,
)
from ring_jax import model as ring_model
from ring_jax.checkpoint.store import RunStore
from ring_jax.records import FinishReason
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler
from rollout.service import EngineService, Request
from rollout.worker import EngineWorker, Job
from tests.configs.small_run import get_config
from tests.devices import run_on_devices

MODEL = dataclasses.replace(get_config().model, num_attention_heads=4, num_key_value_heads=2)
CONFIG = dataclasses.replace(
  get_config().rollout, slots=8, pool=16, group_size=4, token_budget=60, retention=5, max_prompt_tokens=40, max_tokens=24,
  steps_per_dispatch=3, budget_counts=BudgetCounts.GENERATED, unit=Unit.ROLLOUT, prefill_batch=4, page_size=8,
)  # fmt: skip
EOS = (7, 8)
MASK = np.arange(MODEL.vocab_size) < 40
SYSTEM = np.random.default_rng(99).integers(10, 40, 19).tolist()  # two pages and a bit


@pytest.fixture(scope="module")
def versions():
  return [ring_model.init_params(MODEL, seed) for seed in range(3)]


@functools.cache
def engine(kv_policy=KVPolicy.RECOMPUTE, eos=EOS, **changes):
  config = dataclasses.replace(CONFIG, kv_policy=kv_policy, **changes)
  return RingEngine(MODEL, config, eos_ids=eos, vocab_mask_V=MASK, seed=1)


@functools.cache
def stored(number):
  return engine().load_params(ring_model.init_params(MODEL, number))


def prompt(i):
  return [*SYSTEM, *np.random.default_rng(i).integers(10, 40, 1 + 5 * i % 20).tolist()]


class Requests:
  """Sequences served by one worker, in the order of their coming; what is handed back waits in front."""

  def __init__(self, worker, jobs):
    self.worker, self.waiting, self.running = worker, list(jobs), {}
    self.free = sorted(worker.slots)
    self.drawn = {uid: ([], [], []) for uid, _, _ in jobs}
    self.reasons, self.evicted, self.peak = {}, 0, 0

  def step(self):
    jobs = []
    while self.free and self.waiting:
      slot, (uid, tokens, limit) = self.free.pop(0), self.waiting.pop(0)
      self.running[slot] = uid, tokens, limit
      had = self.drawn[uid][0]
      jobs.append(Job(slot, uid, [*tokens, *had], limit - len(had)))
    events = self.worker.advance(jobs)
    for drawn in events.drawn:
      assert self.running[drawn.slot][0] == drawn.uid
      every = drawn.tokens, drawn.logps, [drawn.version] * len(drawn.tokens)
      for mine, new in zip(self.drawn[drawn.uid], every, strict=True):
        mine.extend(new)
      if drawn.reason is not None:
        self.reasons[drawn.uid] = drawn.reason
        self._free(drawn.slot)
    back = sorted((self._free(slot) for slot in events.evicted), key=lambda entry: entry[0])
    self.waiting[:0] = back
    self.evicted += len(back)
    if (use := self.worker.cache_use) is not None:
      self.peak = max(self.peak, use.in_use)
      assert use.in_use + use.cached <= use.pages
    assert set(self.worker.running) == set(self.running)

  def _free(self, slot):
    self.free = sorted([*self.free, slot])
    return self.running.pop(slot)

  def run(self, between=lambda step: None, most=400):
    for step in range(most):
      if not (self.waiting or self.running):
        return self
      self.step()
      between(step)
    raise AssertionError("it does not end")


def serve(worker, jobs, between=lambda step: None):
  worker.begin(stored(0), 0, [])
  return Requests(worker, jobs).run(between)


def same(one, other):
  for uid, (tokens, logps, _) in one.drawn.items():
    assert tokens == other.drawn[uid][0], uid
    np.testing.assert_allclose(logps, other.drawn[uid][1], atol=2e-6)
  assert one.reasons == other.reasons


# Six groups of four, answers of unlike lengths.
JOBS = [(4 * group + i, prompt(group), 2 + (7 * (4 * group + i)) % 23) for group in range(6) for i in range(4)]


@pytest.fixture(scope="module")
def dense():
  return serve(EngineWorker(engine(page_size=0)), JOBS)


def test_room_for_all_draws_the_same_and_holds_less(dense):
  paged = serve(EngineWorker(engine()), JOBS)
  same(dense, paged)
  use = paged.worker.cache_use
  assert paged.evicted == use.evicted == use.refused == 0
  assert use.pages == 8 * 8 and paged.peak < 40 and use.in_use == 0
  assert use.hit_rate > 0.8, "siblings and the common beginning"


@pytest.mark.parametrize("pages", [8, 14])
def test_too_few_pages_draw_the_same(dense, pages):
  paged = serve(EngineWorker(engine(pages=pages)), JOBS)
  same(dense, paged)
  assert paged.evicted > 0 and paged.peak <= pages
  # No thrashing: whoever comes in draws some before it must leave.
  assert paged.worker.cache_use.evicted <= 2 * len(JOBS)


def test_one_alone_that_outgrows_all_pages_ends_there():
  worker = EngineWorker(engine(pages=6, eos=()))  # 48 positions
  found = serve(worker, [(0, [11] * 40, 24), (1, [12] * 30, 24), (2, [13] * 20, 24)])
  assert found.reasons == {0: FinishReason.CACHE, 1: FinishReason.CACHE, 2: FinishReason.LENGTH}
  assert [len(found.drawn[uid][0]) for uid in range(3)] == [9, 19, 24]
  with pytest.raises(ValueError, match="from 1 to 48 fit"):
    worker.advance([Job(0, 5, [11] * 49, 2)])


def count_prefilled(monkeypatch):
  """Tokens of whole prefills, and of those that go on from pages."""
  counts = {"whole": 0, "rest": 0}
  prefill, extend = RingEngine.prefill_batch, RingEngine.extend_batch

  def whole(self, params, prompts):
    counts["whole"] += sum(map(len, prompts))
    return prefill(self, params, prompts)

  def rest(self, params, state, extensions):
    counts["rest"] += sum(len(one.tokens) - 1 - one.start for one in extensions)
    return extend(self, params, state, extensions)

  monkeypatch.setattr(RingEngine, "prefill_batch", whole)
  monkeypatch.setattr(RingEngine, "extend_batch", rest)
  return counts


def test_what_is_known_is_not_computed_again(monkeypatch):
  counts = count_prefilled(monkeypatch)
  worker = EngineWorker(engine(eos=()))
  worker.begin(stored(0), 0, [])
  first = Requests(worker, [(0, prompt(1), 12)]).run()  # 25 tokens: three full pages
  assert counts == {"whole": 25, "rest": 0}
  Requests(worker, [(1, prompt(1), 3)]).run()
  assert counts == {"whole": 25, "rest": 0}, "a known prompt needs nothing"
  Requests(worker, [(2, prompt(2), 3)]).run()
  assert counts == {"whole": 25, "rest": 29 + 1 - 1 - 16}, "it begins with the same two pages"
  # The answer is known too: 25 + 12 tokens, of which the last was never needed.
  Requests(worker, [(3, [*prompt(1), *first.drawn[0][0]], 3)]).run()
  assert counts["rest"] == 13 + 36 - 32
  worker.load(stored(1), 1)
  Requests(worker, [(4, prompt(1), 3)]).run()
  assert counts["whole"] == 25 + 25, "other weights know nothing"
  use = worker.cache_use
  assert use.asked - use.saved == counts["whole"] - 2 + counts["rest"]


def test_prompts_that_begin_alike_in_one_turn_are_computed_once(monkeypatch):
  counts = count_prefilled(monkeypatch)
  worker = EngineWorker(engine(eos=()))
  # The last one differs from the first in its last token alone, which is not computed: it copies.
  jobs = [(i, prompt(i), 2) for i in range(5)]
  found = serve(worker, jobs)
  assert prompt(4)[:-1] == prompt(0)[:-1] and prompt(4) != prompt(0)
  assert counts["whole"] == len(prompt(0)) and counts["rest"] == sum(len(prompt(i)) - 1 - 16 for i in range(1, 4))
  same(serve(EngineWorker(engine(page_size=0, eos=())), jobs), found)


def test_a_sibling_that_comes_later_copies_while_one_runs(monkeypatch):
  counts = count_prefilled(monkeypatch)
  worker = EngineWorker(engine(eos=()))
  jobs = [(uid, prompt(2), 3 + 4 * uid) for uid in range(10)]  # eight slots
  found = serve(worker, jobs)
  assert counts == {"whole": len(prompt(2)), "rest": 0}
  same(serve(EngineWorker(engine(page_size=0, eos=())), jobs), found)


@pytest.mark.parametrize("kv_policy", list(KVPolicy))
@pytest.mark.parametrize("pages", [0, 14])
def test_new_weights_between_dispatches(kv_policy, pages):
  """With room the two caches say the same; without, tokens still have the log-probs of one history or another."""
  found = []
  for changes in ({"page_size": 0}, {"pages": pages}):
    worker = EngineWorker(engine(kv_policy, **changes))

    def between(step, worker=worker):
      if step in (2, 9):
        worker.load(stored(1 + step // 9), 1 + step // 9)

    found.append(serve(worker, JOBS[:12], between))
  one, other = found
  assert one.reasons.keys() == other.reasons.keys() == set(range(12))
  for uid in range(12):
    if one.drawn[uid][2] == other.drawn[uid][2] and not other.evicted:
      assert one.drawn[uid][0] == other.drawn[uid][0]
      np.testing.assert_allclose(one.drawn[uid][1], other.drawn[uid][1], atol=2e-6)
    assert other.drawn[uid][2] == sorted(other.drawn[uid][2])
  assert bool(other.evicted) == bool(pages)


def test_what_is_given_up_gives_its_pages_back():
  worker = EngineWorker(engine(eos=()))
  worker.begin(stored(0), 0, [])
  served = Requests(worker, [(i, prompt(i // 4), 20) for i in range(8)])
  served.step()
  before = worker.cache_use
  worker.release([0, 1, 2])
  after = worker.cache_use
  assert before.in_use - after.in_use == 3 and before.pages == after.pages  # their own last pages; the prompt is shared
  worker.release(list(range(3, 8)))
  assert worker.cache_use.in_use == 0 and worker.cache_use.cached > 0
  worker.free()
  worker.begin(stored(0), 0, [])
  assert worker.cache_use.cached == 0, "the memory was given away, and what was in it"


# ---------------------------------------------------------------------------------------------------------------------
# Under the scheduler


NOTHING = {"weight": jnp.zeros(1)}  # an empty tree cannot be saved


class Prompts:
  def __init__(self, cursor=0):
    self.cursor = cursor

  def __call__(self, count):
    first, self.cursor = self.cursor, self.cursor + count
    return [(i, prompt(i)) for i in range(first, self.cursor)]


def make(kv_policy, **changes):
  subject = engine(kv_policy, **changes)
  worker, scheduler = EngineWorker(subject), C3POScheduler(subject.config)
  return RolloutDriver(worker, scheduler, CONFIG.max_tokens), scheduler, worker


def outcomes(driver, prompts, numbers):
  return [driver.iterate(stored(number), number, prompts)[0] for number in numbers]


def test_the_driver_trains_on_the_same_tokens_whatever_the_memory():
  plain, tight = ({}, {})
  for found, changes in ((plain, {"page_size": 0}), (tight, {"pages": 14})):
    driver, scheduler, worker = make(KVPolicy.RECOMPUTE, **changes)
    prompts = iter(Prompts()(6))
    while not (scheduler.closed and scheduler.in_flight == 0):
      result, _ = driver.iterate(stored(0), 0, lambda count, prompts=prompts: list(itertools.islice(prompts, count)))
      found.update({rollout.uid: rollout for rollout in result.rollouts})
  assert scheduler.totals.evicted == worker.cache_use.evicted + worker.cache_use.refused > 0
  assert plain.keys() == tight.keys() == set(range(24))
  for uid, rollout in plain.items():
    assert rollout.tokens == tight[uid].tokens and rollout.finish_reason == tight[uid].finish_reason
    np.testing.assert_allclose(rollout.logps, tight[uid].logps, atol=2e-6)


@pytest.mark.parametrize("kv_policy, pages", [(KVPolicy.KEEP, 0), (KVPolicy.KEEP, 14), (KVPolicy.RECOMPUTE, 14)])
def test_a_restored_driver_does_exactly_what_the_first_would_have_done(kv_policy, pages, tmp_path):
  driver, scheduler, worker = make(kv_policy, pages=pages)
  prompts = Prompts()
  outcomes(driver, prompts, [0])
  saved, cursor = json.dumps(scheduler.state_dict()), prompts.cursor
  if worker.kept_state is not None:
    with RunStore(tmp_path, keep=1) as store:
      store.save(1, NOTHING, NOTHING, {}, {}, extra={"cache": worker.kept_state})
  expected = outcomes(driver, prompts, [1, 2])

  driver, scheduler, worker = make(kv_policy, pages=pages)
  scheduler.load_state_dict(json.loads(saved))
  if kv_policy is KVPolicy.KEEP:
    with RunStore(tmp_path, keep=1) as store:
      worker.restore(store.restore(NOTHING, NOTHING, {"cache": worker.abstract_kept_state()}).extra["cache"])
  again = outcomes(driver, Prompts(cursor), [1, 2])
  for one, other in zip(expected, again, strict=True):
    assert [rollout.to_dict() for rollout in one.rollouts] == [rollout.to_dict() for rollout in other.rollouts]
    assert one.counts == other.counts


def test_a_service_finishes_more_requests_than_its_pages_hold(dense):
  service = EngineService(EngineWorker(engine(pages=14)), stored(0), 0, max_waiting=100)
  heard, done = {uid: [] for uid, _, _ in JOBS}, {}

  def listener(uid):
    def hear(update):
      heard[uid].extend(update.tokens)
      if update.reason is not None:
        done[uid] = update.reason

    return hear

  for uid, tokens, limit in JOBS:
    service.submit(Request(tokens, limit, uid), listener(uid))
  assert service.drain(timeout=300)
  service.close()
  use = service.stats().cache
  assert use.evicted + use.refused > 0 and use.peak <= 14
  assert done == dense.reasons and all(heard[uid] == dense.drawn[uid][0] for uid in heard)


def test_a_service_goes_on_with_what_new_weights_took_out_of_its_slot():
  service = EngineService(EngineWorker(engine(eos=(), pages=8)), stored(0), 0, max_waiting=4)
  drawn, ended, paused = {0: [], 1: []}, threading.Event(), threading.Event()

  def listener(uid):
    def hear(update):
      drawn[uid].extend(update.tokens)
      if uid == 1 and len(drawn[1]) == 9:
        service.pause()
        paused.set()
      if uid == 1 and update.reason is not None:
        ended.set()

    return hear

  first, _ = (service.submit(Request([10 + uid] * 17, 24, uid), listener(uid)) for uid in (0, 1))
  assert paused.wait(60)
  service.update(stored(1), 1)  # the first takes so many pages at once that the second must wait
  service.abort(first)
  service.resume()
  assert ended.wait(30) and len(drawn[1]) == 24
  assert service.stats().cache.refused == 1
  service.close()


def test_slots_cut_over_eight_devices():
  run_on_devices(8, "tests.rollout.paged_cases:each_device_has_pages_of_its_own")


def test_mistakes_are_named():
  for changes, message in (
    ({"pages": 12, "page_size": 0}, "rollout.pages=12: needs rollout.page_size"),
    ({"pages": -1}, "rollout.pages=-1: must be at least 0"),
  ):
    with pytest.raises(ConfigError, match=message):
      dataclasses.replace(CONFIG, **changes)
  with pytest.raises(ConfigError, match=r"rollout.pages=5: 40 positions on a device.*max_prompt_tokens=40"):
    engine(pages=5)
  layout = ParallelConfig(MeshConfig(data=2))
  run = dataclasses.replace(
    get_config(), rollout=dataclasses.replace(CONFIG, pages=12), packing=PackingConfig(length=64, rows=2)
  )
  with pytest.raises(ConfigError, match=r"rollout.pages=10: 40 positions on a device"):
    dataclasses.replace(
      run, model=dataclasses.replace(run.model, parallel=layout), rollout=dataclasses.replace(run.rollout, pages=10)
    )
  subject = engine(pages=12)
  prefix = subject.prefill(params=stored(0), padded_tokens=np.asarray([11, 12]), true_length=2)
  with pytest.raises(ConfigError, match="JetStream client"):
    subject.insert(prefix, subject.init_decode_state(), 0)
  assert isinstance(subject.config, RolloutConfig)
