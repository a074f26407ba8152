"""The simulator: its decisions are the driver's, dispatch by dispatch, and its numbers what can be worked out by hand."""

import collections
import dataclasses
import itertools
import json
import math
import statistics
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import ConfigError
from configs.ring_tiny import get_config
from configs.schema import BudgetCounts, KVPolicy, OnPurge, RetentionCounts, RolloutConfig, RolloutSchedule, Unit
from ring_jax import model as ring_model
from ring_jax.records import FinishReason
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler
from rollout.simulator import picture, report
from rollout.simulator.costs import Costs, costs_dict, read_costs
from rollout.simulator.lengths import Generator, Shape, Trace, read_trace
from rollout.simulator.simulation import CountedRollout, Simulation, in_batches
from rollout.worker import EngineWorker
from tests.rollout.player import any_schedule

PRICES = Costs(
  decode_step=0.5, decode_per_slot=0.25, decode_per_kv_token=0.125, prefill_call=2.0, prefill_per_token=0.0625, sync=3.0,
  train_update=1.0, train_per_token=0.5,
)  # fmt: skip


def flat(lengths, group_size=1, prompt=10):
  return Trace(group_size, list(lengths), [prompt] * len(lengths))


def plain(**changes):
  """A config whose budget, window and slots are given, the rest as simple as it gets."""
  return RolloutConfig(**{"retention": 10**6, "group_size": 1, "steps_per_dispatch": 1, **changes})


def synchronous(trace, config, costs, groups):
  return Simulation(trace, in_batches(config, RolloutSchedule.SYNCHRONOUS, groups), costs).run()


def oversampled(trace, config, costs, wanted, launched, schedule):
  return Simulation(trace, in_batches(config, schedule, wanted, launched), costs).run()


OVERSAMPLING = (RolloutSchedule.OVERSAMPLE_RESUME, RolloutSchedule.OVERSAMPLE_DISCARD)

# ---------------------------------------------------------------------------------------------------------------------
# The same decisions as the driver's


class DispatchByDispatch:
  """The driver's loop with real tokens, a token a slot a step; time is added up step by step."""

  def __init__(self, trace, config, costs):
    self.trace, self.config, self.costs = trace, config, costs
    self.scheduler = C3POScheduler(config)
    self.cursor = self.steps = 0
    self.decode_seconds = self.prefill_seconds = 0.0

  def iterate(self):
    scheduler, version = self.scheduler, self.scheduler.iteration
    scheduler.begin_iteration()
    running, places = scheduler.running(), []
    while not scheduler.iteration_done:
      wanted = scheduler.wanted_groups
      if wanted:
        found = list(range(self.cursor, min(self.cursor + wanted, self.trace.groups)))
        self.cursor += len(found)
        scheduler.admit([(group, [0]) for group in found])
        if len(found) < wanted:
          scheduler.close()
      placed = scheduler.place()
      places.append([(slot, rollout.uid) for slot, rollout in placed])
      self.prefill(placed)
      running.update(placed)
      if running:  # the driver decodes once for nobody where the prompts have just run out
        self.decode(running, version)
    return scheduler.end_iteration(version), [place for place in places if place]

  def prefill(self, placed):
    prompts = self.trace.prompts
    sequences = {
      (rollout.group, prompts[rollout.uid]) if not rollout.tokens else rollout.uid:
      prompts[rollout.uid] + len(rollout.tokens)
      for _, rollout in placed
    }  # fmt: skip
    calls = math.ceil(len(sequences) / self.config.prefill_batch)
    self.prefill_seconds += calls * self.costs.prefill_call + sum(sequences.values()) * self.costs.prefill_per_token

  def decode(self, running, version):
    context = sum(self.trace.prompts[rollout.uid] + len(rollout.tokens) for rollout in running.values())
    for step in range(self.config.steps_per_dispatch):
      self.steps += 1
      self.decode_seconds += self.costs.decode_step + self.costs.decode_per_slot * len(running)
      self.decode_seconds += self.costs.decode_per_kv_token * (context + step * len(running))
    for slot in sorted(running):
      rollout = running[slot]
      left = self.trace.lengths[rollout.uid] - len(rollout.tokens)
      drawn = list(range(min(left, self.config.steps_per_dispatch)))
      self.scheduler.record(rollout.uid, drawn, [0.0] * len(drawn), version)
      if len(rollout.tokens) == self.trace.lengths[rollout.uid]:
        self.scheduler.finish(rollout.uid, FinishReason.STOP)
        del running[slot]


def spread(rollout):
  """Versions, one a token."""
  if isinstance(rollout, CountedRollout):
    return [version for version, count in rollout.runs for _ in range(count)]
  return rollout.versions


def seen(result):
  both = [[(r.uid, r.group, spread(r), r.finish_reason) for r in rs] for rs in (result.rollouts, result.purged)]
  return (*both, result.counted, result.counts.to_dict(), result.in_flight, result.buffered)


configs = st.builds(
  lambda slots, extra, group, **fields: RolloutConfig(
    slots=slots, pool=max(slots, group) + extra, group_size=group, prefill_batch=2, **fields
  ),
  slots=st.integers(1, 6),
  extra=st.integers(0, 6),
  group=st.integers(1, 4),
  token_budget=st.integers(1, 60),
  retention=st.integers(0, 3),
  unit=st.sampled_from(Unit),
  budget_counts=st.sampled_from(BudgetCounts),
  retention_counts=st.sampled_from(RetentionCounts),
  on_purge=st.sampled_from(OnPurge),
  kv_policy=st.sampled_from(KVPolicy),
  steps_per_dispatch=st.integers(1, 4),
)


@st.composite
def traces(draw, group_size):
  groups = draw(st.integers(1, 10))
  number = groups * group_size
  lengths = draw(st.lists(st.integers(1, 25), min_size=number, max_size=number))
  prompts = [prompt for prompt in draw(st.lists(st.integers(1, 9), min_size=groups, max_size=groups))]
  return Trace(group_size, lengths, [prompt for prompt in prompts for _ in range(group_size)])


@settings(max_examples=300)
@given(config=any_schedule(configs), data=st.data())
def test_it_decides_as_the_driver_does(config, data):
  trace = data.draw(traces(config.group_size))
  simulation, driver = Simulation(trace, config, PRICES), DispatchByDispatch(trace, config, PRICES)
  places, place = [], simulation.scheduler.place

  def noted():
    placed = place()
    places.extend([[(slot, rollout.uid) for slot, rollout in placed]] if placed else [])
    return placed

  simulation.scheduler.place = noted
  for _ in range(200):
    places.clear()
    ours = simulation.iterate()
    theirs, their_places = driver.iterate()
    assert seen(ours) == seen(theirs)
    assert places == their_places
    assert simulation.clock.steps == driver.steps
    assert simulation.clock.decode_seconds == pytest.approx(driver.decode_seconds)
    assert simulation.clock.prefill_seconds == pytest.approx(driver.prefill_seconds)
    if driver.scheduler.closed and driver.scheduler.in_flight == 0:
      break
  else:
    assert config.on_purge is OnPurge.REQUEUE  # which may start the same answer again for long
  assert simulation.scheduler.totals == driver.scheduler.totals


def test_it_decides_as_the_real_driver_on_the_real_engine_did():
  """Answers of a model decide the trace; the simulation then takes every decision of the run again."""
  tiny = get_config()
  config = dataclasses.replace(
    tiny.rollout, slots=8, pool=16, group_size=4, token_budget=50, retention=1, max_tokens=12, steps_per_dispatch=3,
    prefill_batch=4, on_purge=OnPurge.TRAIN,
  )  # fmt: skip
  mask = np.arange(tiny.model.vocab_size) < 40
  engine = RingEngine(tiny.model, config, eos_ids=(7, 8, 9), vocab_mask_V=mask, seed=3)
  stored = engine.load_params(ring_model.init_params(tiny.model, 0))
  scheduler = C3POScheduler(config)
  driver = RolloutDriver(EngineWorker(engine), scheduler, config.max_tokens)
  prompts = iter([(problem, [10 + problem, 20, 30]) for problem in range(12)])
  results = []
  while not (scheduler.closed and scheduler.in_flight == 0):
    results.append(driver.iterate(stored, len(results), lambda count: list(itertools.islice(prompts, count)))[0])
  # A purged answer would have gone on: all that is known is that it is longer.
  lengths = {r.uid: len(r.tokens) + 99 * (r.finish_reason is FinishReason.PURGED) for x in results for r in x.rollouts}
  assert len(set(lengths.values())) > 3 and len(results) > 4 and len(lengths) > 40
  assert any(result.purged for result in results), "no answer outlived its window"

  simulation = Simulation(flat([lengths.get(uid, 99) for uid in range(48)], 4), config, Costs())
  for result in results:
    ours, theirs = seen(simulation.iterate()), seen(result)
    assert [[r[:3] for r in ours[0]], *ours[1:]] == [[r[:3] for r in theirs[0]], *theirs[1:]]
  assert simulation.scheduler.closed and simulation.scheduler.in_flight == 0


def test_a_simulated_scheduler_goes_through_json():
  trace = Generator(Shape.LOGNORMAL, mean=50, cap=400).draw(60, 4)
  config = RolloutConfig(slots=16, token_budget=600, retention=1, group_size=4, kv_policy=KVPolicy.KEEP)
  first, second = (Simulation(trace, config, Costs()) for _ in range(2))
  for _ in range(4):
    first.iterate()
    second.iterate()
  state = json.loads(json.dumps(first.scheduler.state_dict()))
  second.scheduler = C3POScheduler(config, CountedRollout)
  second.scheduler.load_state_dict(state)
  for _ in range(4):
    assert seen(first.iterate()) == seen(second.iterate())


# ---------------------------------------------------------------------------------------------------------------------
# What holds for every schedule


@settings(max_examples=150)
@given(config=configs, data=st.data(), wanted=st.integers(1, 4), more=st.integers(0, 4))
def test_books_and_bounds(config, data, wanted, more):
  if config.on_purge is OnPurge.REQUEUE:
    config = dataclasses.replace(config, on_purge=OnPurge.TRAIN)
  trace = data.draw(traces(config.group_size))
  total, entire = sum(trace.lengths), collections.Counter(trace.lengths)
  c3po = Simulation(trace, config, PRICES).run()
  batch = synchronous(trace, config, PRICES, wanted)
  resumed, discarded = (oversampled(trace, config, PRICES, wanted, wanted + more, kind) for kind in OVERSAMPLING)
  for outcome in (c3po, batch, resumed, discarded):
    assert outcome.total("tokens_generated") == outcome.tokens_trained + outcome.total("tokens_wasted")
    assert outcome.total("rollouts_trained") + outcome.lost == len(trace.lengths)
    assert sum(outcome.staleness.values()) == outcome.tokens_trained
    assert outcome.total("busy") <= config.slots * outcome.total("steps")
    assert outcome.utilisation is None or outcome.utilisation <= 1
    assert outcome.total("steps") >= max(outcome.lengths, default=0)
    assert outcome.clock.seconds == pytest.approx(outcome.seconds)
    summary = outcome.summary(trace)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
  for outcome in (batch, resumed):
    assert outcome.lengths == entire and outcome.tokens_trained == total and outcome.lost == 0
  assert set(batch.staleness) == {0} and set(discarded.staleness) <= {0}
  # Graham: a list schedule ends within total / slots + (1 - 1 / slots) longest, here in whole dispatches.
  k, size = config.steps_per_dispatch, trace.group_size * wanted
  for index, iteration in enumerate(batch.series):
    own = [k * math.ceil(length / k) for length in trace.lengths[index * size : (index + 1) * size]]
    assert max(own) <= iteration.steps <= sum(own) / config.slots + (1 - 1 / config.slots) * max(own)


def test_oversampling_by_hand():
  """Two slots, groups of one, one wanted of two launched: lengths 2, 5, 3.

  Iteration 0: uids 0 and 1; uid 0 ends after 2 steps; uid 1 has 2 tokens.
  Iteration 1: uids 1 and 2: both end after 3 steps, and both are trained on.
  """
  trace, config = flat([2, 5, 3]), plain(slots=2, token_budget=1)
  resumed = oversampled(trace, config, PRICES, 1, 2, RolloutSchedule.OVERSAMPLE_RESUME)
  assert [(one.steps, one.tokens_trained, one.tokens_wasted, one.in_flight) for one in resumed.series] == [
    (2, 2, 0, 1), (3, 8, 0, 0),
  ]  # fmt: skip
  assert resumed.staleness == {0: 2 + 3 + 3, 1: 2}
  assert resumed.clock.prefill_tokens == 10 + 10 + 12 + 10
  discarded = oversampled(trace, config, PRICES, 1, 2, RolloutSchedule.OVERSAMPLE_DISCARD)
  assert [(one.steps, one.tokens_trained, one.tokens_wasted) for one in discarded.series] == [(2, 2, 2), (3, 3, 0)]
  assert discarded.lost == 1 and discarded.lengths == {2: 1, 3: 1}


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


@pytest.mark.parametrize("counts", BudgetCounts)
def test_answers_of_one_length_gain_nothing(counts):
  trace = flat([40] * 96, 4)
  config = RolloutConfig(slots=16, token_budget=640, retention=0, group_size=4, budget_counts=counts)
  c3po, batch = Simulation(trace, config, PRICES).run(), synchronous(trace, config, PRICES, 4)
  assert c3po.utilisation == batch.utilisation == 1.0
  assert c3po.series == batch.series
  assert c3po.speedup_over(batch, "rollout_seconds") == c3po.speedup_over(batch, "seconds") == 1.0


def test_a_batch_that_fits_takes_the_expected_maximum():
  """K geometric answers at once: E[max] = sum over j >= 0 of 1 - (1 - q^j)^K, near (H_K - 1/2) / p + 1/2 or so."""
  p, K, batches = 0.02, 32, 600
  lengths = np.random.default_rng(0).geometric(p, batches * K)
  outcome = synchronous(flat(lengths.tolist()), plain(slots=K, token_budget=1), Costs(), K)
  steps = [iteration.steps for iteration in outcome.series]
  assert steps == lengths.reshape(batches, K).max(axis=1).tolist()
  expected = sum(1 - (1 - (1 - p) ** j) ** K for j in range(5000))
  assert expected == pytest.approx(sum(1 / k for k in range(1, K + 1)) / -math.log(1 - p) + 0.5, rel=1e-3)
  assert abs(statistics.mean(steps) - expected) < 3 * statistics.stdev(steps) / math.sqrt(batches)
  # So the speedup of a schedule that keeps its slots full is E[max] / E[length], where a step costs the same for any number.
  prices = Costs(decode_step=1.0, decode_per_slot=0.0, prefill_per_token=0.0, sync=0.0)
  trace, config = flat(lengths.tolist()), plain(slots=K, token_budget=round(K / p))
  found = Simulation(trace, config, prices).run().speedup_over(synchronous(trace, config, prices, K), "rollout_seconds")
  assert found == pytest.approx(expected * p, rel=0.03)


def test_littles_law():
  """Slots in use = throughput x time in a slot, with the time taken from the trace and the rest from the clock."""
  trace = Generator(Shape.LOGNORMAL, mean=100, cap=1000).draw(1500, 1)
  for k in (1, 7):
    config = plain(slots=24, token_budget=2400, steps_per_dispatch=k, kv_policy=KVPolicy.KEEP)
    outcome = Simulation(trace, config, Costs()).run()
    steps = outcome.total("steps")
    throughput = outcome.total("rollouts_trained") / steps
    in_slot = statistics.mean(k * math.ceil(length / k) for length in trace.lengths)
    assert outcome.total("busy") / steps == pytest.approx(throughput * in_slot)


@pytest.mark.parametrize("group_size, slots", [(1, 32), (8, 128), (8, 64)])
def test_slots_lost_to_whole_groups(group_size, slots):
  """With pool = slots the free places are 0 to G - 1, all as likely: (G - 1) / 2 slots stand empty while prompts last."""
  trace = Generator(Shape.LOGNORMAL, mean=300, sigma=1.0, cap=4000).draw(24_000 // group_size, group_size)
  config = plain(slots=slots, token_budget=300 * slots, group_size=group_size, unit=Unit.ROLLOUT)
  outcome = Simulation(trace, config, Costs()).run()
  assert outcome.fed_utilisation == pytest.approx(1 - (group_size - 1) / 2 / slots, abs=0.003)
  spare = dataclasses.replace(config, pool=slots + group_size - 1)
  assert Simulation(trace, spare, Costs()).run().fed_utilisation == pytest.approx(1, abs=0.002)


def test_mean_staleness():
  """A token drawn t steps before its answer's end is t / T versions old, T the steps of an iteration: over all tokens
  E[L^2] / (2 E[L] T)."""
  trace = Generator(Shape.LOGNORMAL, mean=300, sigma=1.0, cap=4000).draw(20_000, 1)
  outcome = Simulation(trace, plain(slots=64, token_budget=64 * 300, unit=Unit.ROLLOUT), Costs()).run()
  square = sum(length * length for length in trace.lengths) / sum(trace.lengths)
  period = outcome.total("steps") / len(outcome.series)
  found = outcome.total("staleness_sum") / outcome.tokens_trained
  assert found == pytest.approx(square / 2 / period, rel=0.03)


def test_dropping_biases_lengths_and_the_report_says_so():
  trace = Generator(Shape.LOGNORMAL, mean=300, sigma=1.2, cap=5000).draw(1000, 8)
  config = RolloutConfig(slots=64, token_budget=64 * 300, retention=3, group_size=8)
  summaries = {
    purge: Simulation(trace, dataclasses.replace(config, on_purge=purge), Costs()).run().summary(trace)
    for purge in (OnPurge.DROP, OnPurge.TRAIN)
  }
  dropped = summaries[OnPurge.DROP]
  assert dropped["tokens_wasted"] > 0.1 * dropped["tokens_generated"] and dropped["rollouts_lost"] > 0
  assert dropped["length_bias"]["mean_trained"] < 0.9 * dropped["length_bias"]["mean_generated"]
  assert dropped["length_bias"]["distance"] > 0.01
  assert summaries[OnPurge.TRAIN]["tokens_wasted"] == summaries[OnPurge.TRAIN]["rollouts_lost"] == 0
  patient = Simulation(trace, dataclasses.replace(config, retention=30), Costs()).run().summary(trace)
  assert patient["length_bias"]["distance"] == 0.0 and patient["tokens_wasted"] == 0


def test_the_number_of_the_paper_and_the_bound_on_slots():
  """The long tail of issue 7: log-normal sigma 1.2, cap 32k, groups of 8, pool = slots."""
  trace = Generator(Shape.LOGNORMAL, mean=4096, sigma=1.2, cap=32_768).draw(4000, 8)
  config = RolloutConfig(slots=256, token_budget=round(256 * trace.mean), retention=12, group_size=8)
  assert config.pool == config.slots
  c3po, batch = Simulation(trace, config, Costs()).run(), synchronous(trace, config, Costs(), 32)
  assert c3po.speedup_over(batch, "rollout_seconds") >= 2.5
  assert c3po.utilisation >= 0.9
  assert c3po.lengths == batch.lengths


def test_work_a_rollout():
  """A million rollouts under two schedules take half a minute (docs/simulator.md) as long as a rollout takes no more calls
  than this; and it takes no more of them in a longer trace."""

  def calls(groups):
    count = 0

    def profile(_frame, event, _function):
      nonlocal count
      count += event in ("call", "c_call")

    trace = Generator(Shape.LOGNORMAL).draw(groups, 8)
    config = RolloutConfig(slots=512, token_budget=round(512 * trace.mean), retention=10)
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
      outcomes = [Simulation(trace, config, Costs()).run(), synchronous(trace, config, Costs(), 64)]
      report.comparison(trace, *outcomes, [])
    finally:
      sys.setprofile(before)
    return count / len(trace.lengths)

  short, long = calls(500), calls(2000)
  assert long < 150 and long < 1.05 * short


# ---------------------------------------------------------------------------------------------------------------------
# Traces and prices


def test_generators():
  for shape, generator in {
    "lognormal": Generator(Shape.LOGNORMAL, mean=500, sigma=0.8, cap=10**7),
    "pareto": Generator(Shape.PARETO, mean=500, alpha=3.0, cap=10**7),
    "bimodal": Generator(Shape.BIMODAL, mean=500, sigma=0.3, hard_share=0.1, hard_factor=10, cap=10**7),
  }.items():
    trace = generator.draw(20_000, 4)
    assert trace.mean == pytest.approx(500, rel=0.03), shape
    assert trace == generator.draw(20_000, 4) != dataclasses.replace(generator, seed=1).draw(20_000, 4)
    assert min(trace.lengths) >= 1 and set(trace.prompts) == {256} and trace.groups == 20_000
    capped = dataclasses.replace(generator, cap=700).draw(2000, 4)
    assert max(capped.lengths) == 700
  logs = np.log(Generator(Shape.LOGNORMAL, mean=500, sigma=0.8, cap=10**7).draw(40_000, 1).lengths)
  assert logs.std() == pytest.approx(0.8, rel=0.02)
  tail = np.array(Generator(Shape.PARETO, mean=500, alpha=1.5, cap=10**9).draw(40_000, 1).lengths)
  smallest = 500 / 3
  for factor in (2, 8):
    assert (tail > factor * smallest).mean() == pytest.approx(factor**-1.5, rel=0.05)
  modes = np.array(
    Generator(Shape.BIMODAL, mean=500, sigma=0.1, hard_share=0.1, hard_factor=10).draw(20_000, 1).lengths
  )
  assert (modes > 1000).mean() == pytest.approx(0.1, abs=0.01)
  assert modes[modes > 1000].mean() / modes[modes < 1000].mean() == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_correlation_inside_of_a_group(rho):
  logs = np.log(Generator(Shape.LOGNORMAL, cap=10**9, correlation=rho).draw(30_000, 2).lengths).reshape(-1, 2)
  assert np.corrcoef(logs.T)[0, 1] == pytest.approx(rho, abs=0.02)


def write(path, records):
  path.write_text("".join(json.dumps(record) + "\n" if isinstance(record, dict) else record for record in records))
  return str(path)


def answer(prompt, sample, tokens, prompt_tokens=5):
  return {"prompt_id": prompt, "sample_id": sample, "prompt_tokens": prompt_tokens, "response_tokens": tokens}


def test_a_trace_file_groups_what_belongs_together(tmp_path):
  lines = [answer("b", 0, 7), answer("a", 0, 3, 9), "\n", answer("b", 1, 8) | {"note": 1}, answer("a", 1, 4, 9)]
  path = write(tmp_path / "trace.jsonl", lines)
  assert read_trace(path) == Trace(2, [7, 8, 3, 4], [5, 5, 9, 9])
  assert read_trace(path, 1) == Trace(1, [7, 3, 8, 4], [5, 9, 5, 9])


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", "line 2: is not JSON"),
    ("[1]\n", "line 2: is list"),
    ({"prompt_id": 1, "sample_id": 1}, "line 2: lacks prompt_tokens, response_tokens"),
    (answer(0, 1, 0), "line 2: response_tokens=0 must be an integer of at least 1"),
    (answer(0, 1, 2.5), "line 2: response_tokens=2.5 must be an integer"),
    (answer(0, 1, True), "line 2: response_tokens=True must be an integer"),
    (answer(0, 1, 3, "x"), "line 2: prompt_tokens='x' must be an integer"),
    (answer(None, 1, 3), "line 2: prompt_id=None must be an integer or a string"),
    (answer(0, 0, 3), "line 2: sample 0 of prompt 0 stands there twice"),
    (answer(1, 0, 3), "prompt 'x' has 2 samples, but the first prompt has 1; --group_size=1"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = write(tmp_path / "trace.jsonl", [answer(0, 0, 3), line, answer("x", 0, 3), answer("x", 1, 3)])
  with pytest.raises(ConfigError) as caught:
    read_trace(path)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_traces_that_are_none(tmp_path):
  (tmp_path / "empty").write_text("\n")
  (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
  for name, message in (("empty", "holds no answer"), ("binary", "not a text file"), ("absent", "No such file")):
    with pytest.raises(ConfigError, match=message):
      read_trace(str(tmp_path / name))
  with pytest.raises(ConfigError, match=r"prompt 0 has 1 samples, but --group_size=2"):
    read_trace(write(tmp_path / "one", [answer(0, 0, 3)]), 2)


def test_prices(tmp_path):
  table = Costs(decode_table=[[1, 1.0], [3, 2.0], [11, 6.0]])
  assert [table.decode_seconds(active) for active in (0, 1, 2, 3, 7, 11, 20)] == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 6.0]
  assert Costs(decode_step=1.0, decode_per_slot=0.5).decode_seconds(4) == 3.0
  for costs in (table, PRICES):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs_dict(costs)))
    assert read_costs(str(path)) == costs
  for text, message in (
    ("[]", "must be a JSON object"),
    ("{", "is not JSON"),
    ('{"speed": 1}', "speed is no cost"),
    ('{"sync": -1}', r"costs.sync=-1: must be a number"),
    ('{"sync": "1"}', r"costs.sync='1': must be a number"),
    ('{"sync": NaN}', r"costs.sync=nan: must be a number"),
    ('{"decode_table": [[2, 1], [1, 1]]}', "sequences rising"),
    ('{"decode_table": [[1, 1]], "decode_step": 1}', "contradicts decode_step"),
    ('{"decode_step": 0, "decode_per_slot": 0}', "must take time"),
  ):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
      read_costs(str(tmp_path / "bad.json"))


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def test_the_picture_shows_the_clock(tmp_path):
  trace = Generator(Shape.LOGNORMAL, mean=100, cap=900).draw(200, 4)
  config = RolloutConfig(slots=16, token_budget=1600, retention=9, group_size=4)
  prices = Costs(decode_step=1.0, decode_per_slot=0.0)
  outcomes = [Simulation(trace, config, prices).run(), synchronous(trace, config, prices, 4)]
  for outcome in outcomes:
    edges = np.linspace(0, outcome.clock.marks[-1][0], 50)
    shown = float((picture.slots_in_use(outcome, edges) * np.diff(edges)).sum())
    assert shown == pytest.approx(outcome.total("busy"))  # a step is a second
  image = picture.draw(trace, outcomes)
  assert image.startswith(b"\x89PNG") and len(image) > 20_000
