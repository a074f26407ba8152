"""The live driver: versions a token, log-probs under the version that sampled, exact resume, both KV policies."""

import dataclasses
import functools
import itertools
import json
import threading

import jax
import numpy as np
import pytest

from configs.ring_tiny import get_config
from configs.schema import BudgetCounts, KVPolicy, Unit
from ring_jax import model as ring_model
from ring_jax.records import FinishReason, Rollout
from rollout.control import Control
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler
from rollout.worker import EngineWorker, Job

MODEL = get_config().model
CONFIG = dataclasses.replace(
  get_config().rollout, slots=8, pool=16, group_size=4, token_budget=60, retention=5, max_tokens=12, steps_per_dispatch=3,
  budget_counts=BudgetCounts.GENERATED, unit=Unit.ROLLOUT, prefill_batch=4,
)  # fmt: skip
EOS = (7, 8, 9)
MASK = np.arange(MODEL.vocab_size) < 40


@pytest.fixture(scope="module")
def versions():
  """Three sets of weights that differ clearly."""
  return [ring_model.init_params(MODEL, seed) for seed in range(3)]


@functools.cache
def engine(kv_policy):
  return RingEngine(MODEL, dataclasses.replace(CONFIG, kv_policy=kv_policy), eos_ids=EOS, vocab_mask_V=MASK, seed=1)


class Prompts:
  """Endless prompts, each a function of its index."""

  def __init__(self, cursor=0):
    self.cursor = cursor

  def __call__(self, count):
    first, self.cursor = self.cursor, self.cursor + count
    draw = lambda i: np.random.default_rng(i).integers(10, 40, 3 + i % 5).tolist()  # noqa: E731
    return [(i, draw(i)) for i in range(first, self.cursor)]


def make(kv_policy, control=None):
  worker, scheduler = EngineWorker(engine(kv_policy)), C3POScheduler(engine(kv_policy).config)
  return RolloutDriver(worker, scheduler, CONFIG.max_tokens, control), scheduler, worker


def iterate(driver, kv_policy, versions, prompts, numbers):
  results = []
  for number in numbers:
    stored = engine(kv_policy).load_params(versions[number])
    results.append(driver.iterate(stored, number, prompts)[0])
  return results


@functools.cache
def _scored():
  return jax.jit(functools.partial(ring_model.forward, MODEL))


def logps_under(params, rollout):
  row = np.zeros((1, 32), np.int32)
  row[0, : len(rollout.prompt) + len(rollout.tokens)] = [*rollout.prompt, *rollout.tokens]
  logits = np.asarray(_scored()(params, row).hidden_BxTxD[0] @ params["lm_head"]["kernel"], np.float64)
  logits[:, ~MASK] = -np.inf
  logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return logps[len(rollout.prompt) - 1 + np.arange(len(rollout.tokens)), rollout.tokens]


def test_every_token_has_the_logp_of_the_version_that_sampled_it(versions):
  driver, *_ = make(KVPolicy.RECOMPUTE)
  results = iterate(driver, KVPolicy.RECOMPUTE, versions, Prompts(), [0, 1, 2])
  rollouts = [rollout for result in results for rollout in result.rollouts]
  assert len(rollouts) > 12 and any(len(set(rollout.versions)) > 1 for rollout in rollouts)
  worst = 0.0
  for rollout in rollouts:
    assert len(rollout.tokens) == len(rollout.logps) == len(rollout.versions) <= 12
    assert rollout.versions == sorted(rollout.versions)
    assert (rollout.tokens[-1] in EOS) == (rollout.finish_reason is FinishReason.STOP)
    for version in set(rollout.versions):
      own = np.array(rollout.versions) == version
      worst = max(worst, np.abs(logps_under(versions[version], rollout) - rollout.logps)[own].max())
  assert worst <= 1e-5


def test_keeping_keys_and_values_decodes_on_under_the_new_weights(versions):
  driver, scheduler, _ = make(KVPolicy.KEEP)
  first, second = iterate(driver, KVPolicy.KEEP, versions, Prompts(), [0, 1])
  mixed = [rollout for rollout in second.rollouts if set(rollout.versions) == {0, 1}]
  assert mixed and first.rollouts
  for rollout in mixed:
    own = np.array(rollout.versions) == 0
    np.testing.assert_allclose(logps_under(versions[0], rollout)[own], np.array(rollout.logps)[own], atol=1e-5)
    # Old keys and values: near the new policy's log-probs no more, which is what the policy costs.
    assert np.abs(logps_under(versions[1], rollout) - rollout.logps)[~own].max() > 1e-4
  assert all(rollout.versions for rollout in scheduler.running().values())


@pytest.mark.parametrize("kv_policy", list(KVPolicy))
def test_a_driver_restored_between_iterations_does_exactly_what_the_first_would_have_done(versions, kv_policy):
  driver, scheduler, worker = make(kv_policy)
  prompts = Prompts()
  iterate(driver, kv_policy, versions, prompts, [0])
  saved = json.dumps(scheduler.state_dict())
  device = jax.device_get(worker.kept_state)
  assert (device is None) == (kv_policy is KVPolicy.RECOMPUTE)
  cursor = prompts.cursor
  expected = iterate(driver, kv_policy, versions, prompts, [1, 2])

  driver, scheduler, worker = make(kv_policy)
  scheduler.load_state_dict(json.loads(saved))
  if device is not None:
    assert jax.tree.map(lambda leaf: leaf.shape, device) == jax.tree.map(
      lambda leaf: leaf.shape, worker.abstract_kept_state()
    )
    worker.restore(jax.device_put(device))
  again = iterate(driver, kv_policy, versions, Prompts(cursor), [1, 2])
  for one, other in zip(expected, again, strict=True):
    assert [rollout.to_dict() for rollout in one.rollouts] == [rollout.to_dict() for rollout in other.rollouts]


def test_a_source_that_runs_dry_lets_everything_finish(versions):
  driver, scheduler, _ = make(KVPolicy.RECOMPUTE)
  prompts = iter(Prompts()(5))
  stored = engine(KVPolicy.RECOMPUTE).load_params(versions[0])
  finished = []
  while not (scheduler.closed and scheduler.in_flight == 0):
    result, clock = driver.iterate(stored, 0, lambda count: list(itertools.islice(prompts, count)))
    finished.extend(result.rollouts)
  assert sorted(rollout.uid for rollout in finished) == list(range(5 * CONFIG.group_size))
  assert clock.tokens > 0


def test_a_group_costs_one_prefill(versions, monkeypatch):
  """Eight slots filled by two groups of four: two rows are prefilled, not eight."""
  seen = []
  prefill = RingEngine.prefill_batch
  monkeypatch.setattr(
    RingEngine, "prefill_batch", lambda self, params, prompts: seen.extend(prompts) or prefill(self, params, prompts)
  )
  driver, scheduler, _ = make(KVPolicy.RECOMPUTE)
  stored = engine(KVPolicy.RECOMPUTE).load_params(versions[0])
  prompts = iter(Prompts()(2))
  driver.iterate(stored, 0, lambda count: list(itertools.islice(prompts, count)))
  assert sorted(map(tuple, seen)) == sorted(tuple(ids) for _, ids in Prompts()(2))
  assert scheduler.totals.finished + scheduler.in_flight == 2 * CONFIG.group_size


# ---------------------------------------------------------------------------------------------------------------------
# In-flight control


def run_under(control, kv_policy, versions, wish, at=1):
  """One iteration; `wish` is called with the scheduler after dispatch number `at`."""
  driver, scheduler, worker = make(kv_policy, control)
  stored = [engine(kv_policy).load_params(params) for params in versions]
  calls = itertools.count(1)

  def on_progress(clock):
    if next(calls) == at:
      wish(scheduler, stored)

  result, clock = driver.iterate(stored[0], 0, Prompts(), on_progress)
  return result, clock, scheduler, worker


@pytest.mark.parametrize("kv_policy", list(KVPolicy))
def test_new_weights_between_two_dispatches_draw_the_next_token(versions, kv_policy):
  control = Control()
  result, *_ = run_under(control, kv_policy, versions, lambda scheduler, stored: control.update(stored[1], 1))
  mixed = [rollout for rollout in result.rollouts if set(rollout.versions) == {0, 1}]
  assert mixed
  for rollout in mixed:
    own = np.array(rollout.versions) == 0
    np.testing.assert_allclose(logps_under(versions[0], rollout)[own], np.array(rollout.logps)[own], atol=1e-5)
    difference = np.abs(logps_under(versions[1], rollout) - rollout.logps)[~own].max()
    assert difference <= 1e-5 if kv_policy is KVPolicy.RECOMPUTE else difference > 1e-4


def test_an_aborted_rollout_gives_its_slot_to_the_next(versions, monkeypatch):
  control, taken, placed = Control(), {}, []
  advance = EngineWorker.advance
  monkeypatch.setattr(EngineWorker, "advance", lambda self, jobs: placed.extend(jobs) or advance(self, jobs))

  def wish(scheduler, stored):
    slot, rollout = next(iter(scheduler.running().items()))
    taken.update(slot=slot, uid=rollout.uid)
    control.abort(rollout.uid)
    control.abort(10**6)  # nobody's

  result, _, scheduler, worker = run_under(control, KVPolicy.RECOMPUTE, versions, wish)
  assert result.counts.aborted == 1 and taken["uid"] not in {rollout.uid for rollout in result.rollouts}
  totals, held = scheduler.totals, sum(rollout.length for rollout in scheduler.unfinished())
  assert totals.generated == totals.trained + totals.wasted + held
  assert [job.uid for job in placed if job.slot == taken["slot"]][:1] == [taken["uid"]]
  assert sum(job.slot == taken["slot"] for job in placed) > 1
  assert not worker.running, "what the scheduler took back at the end is idle"


def test_an_aborted_group_is_gone_in_slots_and_waiting(versions):
  control, groups = Control(), []

  def wish(scheduler, stored):
    groups.append(scheduler.unfinished()[-1].group)
    control.abort_group(groups[0])

  result, _, scheduler, _ = run_under(control, KVPolicy.RECOMPUTE, versions, wish)
  assert groups[0] not in {rollout.group for rollout in [*scheduler.unfinished(), *result.rollouts]}
  assert result.counts.aborted == CONFIG.group_size


def test_a_drained_iteration_ends_with_empty_slots_and_the_rest_waits(versions):
  control = Control()
  result, _, scheduler, worker = run_under(
    control, KVPolicy.RECOMPUTE, versions, lambda scheduler, stored: control.drain()
  )
  assert not worker.running and result.rollouts and result.counted < 8 * CONFIG.max_tokens
  assert all(not rollout.tokens for rollout in scheduler.unfinished()) and scheduler.in_flight == CONFIG.pool - 8


def test_a_paused_driver_does_nothing_until_it_is_resumed(versions):
  control, seen = Control(), []

  def wish(scheduler, stored):
    control.pause()
    before = scheduler.counted
    timer = threading.Timer(0.2, lambda: (seen.append((before, scheduler.counted)), control.resume()))
    timer.start()

  result, *_ = run_under(control, KVPolicy.RECOMPUTE, versions, wish)
  plain, *_ = run_under(Control(), KVPolicy.RECOMPUTE, versions, lambda *_: None)
  assert seen and seen[0][0] == seen[0][1]
  assert [rollout.to_dict() for rollout in result.rollouts] == [rollout.to_dict() for rollout in plain.rollouts]


class Losing:
  """A worker that loses half of its slots after its second dispatch, and finds them again after its fourth."""

  def __init__(self, worker, times=1):
    self._worker, self._dispatches, self._times = worker, 0, times
    self.seen = []

  def __getattr__(self, name):
    return getattr(self._worker, name)

  @property
  def slots(self):
    lost = any(self._dispatches in (2 + 4 * i, 3 + 4 * i) for i in range(self._times))
    return frozenset(range(4)) if lost else frozenset(range(8))

  def advance(self, jobs):
    self.seen.append(jobs)
    events = self._worker.advance(jobs)
    self._dispatches += 1
    if self._dispatches in (2 + 4 * i for i in range(self._times)):
      self._worker.release(range(4, 8))
    return events


def test_rollouts_of_lost_slots_go_on_with_what_they_had(versions):
  """Samples are keyed by uid and position, so an undisturbed run draws the very same."""
  outcomes = []
  for wrap in (lambda worker: worker, Losing):
    scheduler = C3POScheduler(dataclasses.replace(CONFIG, token_budget=120))
    worker = wrap(EngineWorker(engine(KVPolicy.RECOMPUTE)))
    driver = RolloutDriver(worker, scheduler, CONFIG.max_tokens)
    stored = engine(KVPolicy.RECOMPUTE).load_params(versions[0])
    prompts = Prompts()
    results = [driver.iterate(stored, 0, prompts)[0] for _ in range(2)]
    outcomes.append(
      {rollout.uid: rollout for result in results for rollout in result.rollouts} | {-1: scheduler.totals}
    )
  plain, lossy = outcomes
  assert lossy[-1].redispatched > 0 and lossy[-1].aborted == 0 and plain[-1].redispatched == 0
  both = (plain.keys() & lossy.keys()) - {-1}
  assert both and any(lossy[uid].losses for uid in both)
  for uid in both:
    assert plain[uid].tokens == lossy[uid].tokens
    np.testing.assert_allclose(plain[uid].logps, lossy[uid].logps, atol=1e-5)


def test_an_answer_that_reaches_the_end_of_the_cache_says_so(versions):
  config = dataclasses.replace(CONFIG, max_prompt_tokens=4, max_tokens=12)  # 16 positions
  short = RingEngine(MODEL, config, eos_ids=(), vocab_mask_V=MASK, seed=1)
  worker = EngineWorker(short)
  worker.begin(short.load_params(versions[0]), 0, [])
  drawn = worker.advance([Job(0, 0, [11] * 14, 12), Job(1, 1, [12] * 4, 3)]).drawn
  assert [(d.slot, len(d.tokens), d.reason) for d in drawn] == [(0, 3, FinishReason.CACHE), (1, 3, FinishReason.LENGTH)]
  whole = Rollout(0, 0, 0, [11] * 14, tokens=drawn[0].tokens, logps=drawn[0].logps)
  np.testing.assert_allclose(logps_under(versions[0], whole), whole.logps, atol=1e-5)
  assert not worker.running
