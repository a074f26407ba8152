"""The live driver: versions a token, log-probs under the version that sampled, exact resume, both KV policies."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from configs.ring_tiny import get_config
from configs.schema import BudgetCounts, KVPolicy, Unit
from ring_jax import model as ring_model
from ring_jax.records import FinishReason
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler

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


def make(kv_policy):
  scheduler = C3POScheduler(engine(kv_policy).config)
  return RolloutDriver(engine(kv_policy), scheduler), scheduler


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
  driver, _ = make(KVPolicy.RECOMPUTE)
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
  driver, scheduler = make(KVPolicy.KEEP)
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
  driver, scheduler = make(kv_policy)
  prompts = Prompts()
  iterate(driver, kv_policy, versions, prompts, [0])
  saved = json.dumps(scheduler.state_dict())
  device = jax.device_get(driver.device_state)
  assert (device is None) == (kv_policy is KVPolicy.RECOMPUTE)
  cursor = prompts.cursor
  expected = iterate(driver, kv_policy, versions, prompts, [1, 2])

  driver, scheduler = make(kv_policy)
  scheduler.load_state_dict(json.loads(saved))
  if device is not None:
    assert jax.tree.map(lambda leaf: leaf.shape, device) == jax.tree.map(
      lambda leaf: leaf.shape, driver.abstract_device_state()
    )
    driver.restore_device_state(jax.device_put(device))
  again = iterate(driver, kv_policy, versions, Prompts(cursor), [1, 2])
  for one, other in zip(expected, again, strict=True):
    assert [rollout.to_dict() for rollout in one.rollouts] == [rollout.to_dict() for rollout in other.rollouts]


def test_a_source_that_runs_dry_lets_everything_finish(versions):
  driver, scheduler = make(KVPolicy.RECOMPUTE)
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
  driver, scheduler = make(KVPolicy.RECOMPUTE)
  stored = engine(KVPolicy.RECOMPUTE).load_params(versions[0])
  prompts = iter(Prompts()(2))
  driver.iterate(stored, 0, lambda count: list(itertools.islice(prompts, count)))
  assert sorted(map(tuple, seen)) == sorted(tuple(ids) for _, ids in Prompts()(2))
  assert scheduler.totals.finished + scheduler.in_flight == 2 * CONFIG.group_size
