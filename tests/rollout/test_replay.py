"""The event log: a run's scheduling is done again from it, and what is not as it was is found."""

import dataclasses
import itertools
import json
import random
import subprocess
import sys

import pytest

from configs import ring_tiny
from configs.schema import BudgetCounts, ConfigError, KVPolicy, OnPurge, RetentionCounts, RolloutConfig, Unit, to_dict
from ring_jax.records import FinishReason
from rollout import events
from rollout.control import Control
from rollout.driver import RolloutDriver
from rollout.events import Entry, EventLog
from rollout.replay import replay
from rollout.scheduler import C3POScheduler
from rollout.simulator.costs import Costs
from rollout.simulator.lengths import Generator, Shape
from rollout.simulator.simulation import Simulation
from rollout.timeline import perfetto
from rollout.timeline.spans import Happened, Kind, build, carried
from rollout.worker import Drawn, Events

CONFIG = RolloutConfig(slots=6, pool=14, group_size=2, token_budget=40, retention=1, max_tokens=30, max_prompt_tokens=8)


class Erratic:
  """Far away and unreliable: draws in any order and amount, loses and finds slots, gives jobs back."""

  def __init__(self, config, seed):
    self._config, self._chance = config, random.Random(seed)
    self.slots, self._jobs, self._version = set(range(config.slots)), {}, 0

  def begin(self, params, version, running):
    self._version = version
    self._jobs = {job.slot: job for job in running}

  def load(self, params, version):
    self._version = version

  def end(self):
    pass

  def release(self, slots):
    for slot in slots:
      self._jobs.pop(slot, None)

  def advance(self, jobs):
    chance = self._chance
    self._jobs |= {job.slot: job for job in jobs}
    found = Events(prefill_seconds=0.001, decode_seconds=0.002)
    for slot in chance.sample(sorted(self._jobs), chance.randint(0, len(self._jobs))):
      job = self._jobs[slot]
      count = min(chance.randint(1, 5), job.max_tokens)
      reason = FinishReason.LENGTH if count == job.max_tokens else None
      reason = FinishReason.STOP if not reason and chance.random() < 0.2 else reason
      found.drawn.append(Drawn(slot, job.uid, [5] * count, [-1.0] * count, self._version, reason))
      if reason:
        del self._jobs[slot]
      else:
        self._jobs[slot] = dataclasses.replace(job, max_tokens=job.max_tokens - count)
    if chance.random() < 0.1 and self._jobs:
      found.evicted = [chance.choice(sorted(self._jobs))]
      self.release(found.evicted)
    if chance.random() < 0.1:
      self.slots = set(chance.sample(range(self._config.slots + 2), chance.randint(2, self._config.slots)))
      self.release([slot for slot in list(self._jobs) if slot not in self.slots])
    return found


def run(path, config=CONFIG, seed=0, iterations=12, groups=10**9):
  """An asynchronous run with everything in it; returns what it trained on."""
  scheduler, control, chance = C3POScheduler(config), Control(), random.Random(seed + 1)
  ticks = itertools.count()
  log = EventLog(path, lambda: 0.005 * next(ticks))
  driver = RolloutDriver(Erratic(config, seed), scheduler, config.max_tokens, control, log)
  source = ((index, [1] * (1 + index % 5)) for index in range(groups))
  trained = []

  def on_progress(clock):
    unfinished = scheduler.unfinished()
    if unfinished and chance.random() < 0.1:
      control.abort(chance.choice(unfinished).uid)
    if unfinished and chance.random() < 0.05:
      control.abort_group(chance.choice(unfinished).group)
    if chance.random() < 0.02:
      control.drain()
    if chance.random() < 0.05:
      control.update(None, scheduler.iteration)

  while len(trained) < iterations and not (scheduler.closed and not scheduler.in_flight):
    result, _ = driver.iterate(None, scheduler.iteration, lambda n: list(itertools.islice(source, n)), on_progress)
    trained.append([rollout.uid for rollout in result.rollouts])
  log.close()
  return trained


@pytest.mark.parametrize("kv_policy", list(KVPolicy))
@pytest.mark.parametrize("on_purge", list(OnPurge))
@pytest.mark.parametrize("unit", list(Unit))
def test_an_asynchronous_run_is_replayed_exactly(tmp_path, unit, on_purge, kv_policy):
  counts, ages = random.Random(str((unit, on_purge))).choice(list(itertools.product(BudgetCounts, RetentionCounts)))
  config = dataclasses.replace(
    CONFIG, unit=unit, on_purge=on_purge, kv_policy=kv_policy, budget_counts=counts, retention_counts=ages
  )
  seen = set()
  for seed in range(6):
    path = tmp_path / f"{seed}.jsonl"
    trained = run(path, config, seed, groups=60 if seed % 2 else 10**9)
    entries = events.read(path)
    found = replay(entries, config)
    assert found.difference is None, str(found.difference)
    assert found.events == len(entries) and found.iterations == len(trained)
    assert trained == [event.trained for _, event in entries if isinstance(event, events.End)]
    seen |= {type(event) for _, event in entries} | {
      event.done for _, event in entries if isinstance(event, events.End)
    }
  assert seen >= {events.Evict, events.Slots, events.Abort, events.Admit, True, False}


def test_any_decision_that_was_another_is_found(tmp_path):
  run(tmp_path / "log", seed=3)
  entries = events.read(tmp_path / "log")
  changes = {
    "what is purged": (events.Begin, lambda e: {"purged": e.purged[1:]}, lambda e: e.purged),
    "wanted groups": (events.Admit, lambda e: {"wanted": e.wanted + 1}, lambda e: True),
    "placements": (events.Place, lambda e: {"placed": e.placed[::-1]}, lambda e: len(e.placed) > 1),
    "what is trained on": (events.End, lambda e: {"trained": e.trained[:-1]}, lambda e: e.trained),
    "counted": (events.End, lambda e: {"counted": e.counted + 1}, lambda e: True),
    "in_flight": (events.End, lambda e: {"in_flight": e.in_flight - 1}, lambda e: True),
    "whether the iteration is over": (events.End, lambda e: {"done": not e.done}, lambda e: True),
    "rollout in slot": (
      events.Draw, lambda e: {"drawn": [[one[0], one[1] + 1, *one[2:]] for one in e.drawn]}, lambda e: e.drawn,
    ),
  }  # fmt: skip
  for decision, (kind, change, fits) in changes.items():
    line = [i for i, (_, event) in enumerate(entries) if isinstance(event, kind) and fits(event)][-1]
    changed = list(entries)
    changed[line] = Entry(0.0, dataclasses.replace(entries[line].event, **change(entries[line].event)))
    found = replay(changed, CONFIG).difference
    assert decision in str(found) and found.line == line + 1 and "\n" not in str(found)
  other = dataclasses.replace(CONFIG, retention=0)  # other rules decide otherwise
  assert replay(entries, other).difference is not None
  lost = [entry for entry in entries if not isinstance(entry.event, events.Evict)]
  assert replay(lost, CONFIG).difference is not None
  with pytest.raises(ConfigError, match="first iteration"):
    replay(entries[1:], CONFIG)


def test_a_resumed_run_s_log_is_one_history(tmp_path):
  """Cut back to what its scheduler had ended, with half a line at its end; then as if nothing had happened."""
  path, plain = tmp_path / "log", tmp_path / "plain"
  run(path, seed=5, iterations=7)
  whole = path.read_text()
  lines = whole.splitlines(keepends=True)
  ends = [index for index, line in enumerate(lines) if line.startswith('{"event":"end"')]
  for cut, kept in ((7, ends[6] + 1), (3, ends[2] + 1), (0, 0)):
    path.write_text(whole + lines[0] + lines[1][:20])
    log = EventLog(path)
    log.truncate(cut)
    assert path.read_text() == "".join(lines[:kept])
    log.write(events.Abort([4]))
    log.close()
    assert events.read(path)[-1].event == events.Abort([4]) and len(events.read(path)) == kept + 1
    times = [entry.seconds for entry in events.read(path)]
    assert times == sorted(times)  # the clock goes on
  path.write_text("".join(lines[ends[2] + 1 :]))  # a log whose beginning is gone
  log = EventLog(path)
  log.truncate(5)
  assert path.read_text() == "".join(lines[ends[2] + 1 : ends[4] + 1])
  log.close()
  plain.write_text("{}\n")
  with pytest.raises(ConfigError, match="line 1 is not an event"):
    events.read(plain)


def drawn_until(entries, index):
  return [one for _, event in entries[:index] if isinstance(event, events.Draw) for one in event.drawn]


def test_the_timeline_has_every_token_and_every_end(tmp_path):
  run(tmp_path / "log", dataclasses.replace(CONFIG, kv_policy=KVPolicy.KEEP), seed=8)
  entries = events.read(tmp_path / "log")
  timeline = build(entries)
  drawn = [one for _, event in entries if isinstance(event, events.Draw) for one in event.drawn]
  decoded = [span for span in timeline.spans if span.kind is Kind.DECODE]
  assert sum(span.tokens for span in decoded) == sum(one[2] for one in drawn)
  for key in {(one[0], one[1], one[3]) for one in drawn}:
    expected = sum(one[2] for one in drawn if (one[0], one[1], one[3]) == key)
    assert sum(span.tokens for span in decoded if (span.slot, span.uid, span.version) == key) == expected
  assert {Kind.PREFILL, Kind.DECODE, Kind.WAITING} == {span.kind for span in timeline.spans}
  for slot in timeline.slots:  # a slot does one thing at a time
    mine = sorted((span.start, span.end) for span in timeline.spans if span.slot == slot)
    assert all(start <= end for start, end in mine)
    assert all(one[1] <= two[0] + 1e-9 for one, two in itertools.pairwise(mine))
  marks = [mark.what for mark in timeline.marks]
  for reason in ("stop", "length"):
    assert marks.count(Happened(reason)) == sum(one[4] == reason for one in drawn)
  for what, kind, field in (
    (Happened.PURGED, events.Begin, "purged"), (Happened.EVICTED, events.Evict, "evicted"),
    (Happened.ABORTED, events.Abort, "uids"),
  ):  # fmt: skip
    expected = sum(len(getattr(event, field)) for _, event in entries if isinstance(event, kind))
    assert marks.count(what) == expected > 0
  assert [one.number for one in timeline.iterations] == list(range(12))
  assert max(count for _, count in timeline.in_use) <= CONFIG.slots
  compared = 0
  for index, (_, event) in enumerate(entries):
    if isinstance(event, events.Begin):
      before, running = carried(timeline, timeline.iterations[event.iteration]), dict(event.running)
      for slot in before.keys() & running.keys():
        earlier = [one for one in drawn_until(entries, index) if one[1] == running[slot]]
        assert sum(before[slot].values()) == sum(one[2] for one in earlier)
        assert before[slot].keys() == {one[3] for one in earlier}
        compared += 1
  assert compared > 2
  found = json.loads(json.dumps(perfetto.tracks(timeline)))
  names = {event["args"]["name"] for event in found if event["name"] == "thread_name"}
  assert len(names) == len(timeline.slots) + 1
  spans = [event for event in found if event["ph"] == "X" and event["tid"]]
  assert len(spans) == len(timeline.spans)
  colours = {event["args"]["version"]: event["cname"] for event in spans if "version" in event["args"]}
  assert colours[3] != colours[4]


@pytest.mark.parametrize("kv_policy", list(KVPolicy))
@pytest.mark.parametrize("counts", list(BudgetCounts))
def test_a_simulation_writes_a_log_too(tmp_path, counts, kv_policy):
  trace = Generator(Shape.LOGNORMAL, mean=50, cap=400).draw(60, 4)
  config = RolloutConfig(
    slots=16, token_budget=600, retention=1, group_size=4, on_purge=OnPurge.TRAIN, steps_per_dispatch=2,
    budget_counts=counts, kv_policy=kv_policy,
  )  # fmt: skip
  plain = Simulation(trace, config, Costs()).run()
  log = EventLog(tmp_path / "log", lambda: simulation.clock.seconds)
  simulation = Simulation(trace, config, Costs(), log)
  outcome = simulation.run()
  log.close()
  assert outcome.series == plain.series
  entries = events.read(tmp_path / "log")
  found, timeline = replay(entries, config), build(entries)
  assert found.difference is None and found.iterations == len(outcome.series)
  assert found.tokens == outcome.total("tokens_generated") == sum(span.tokens for span in timeline.spans)
  for iteration, seen in zip(outcome.series, timeline.iterations, strict=True):
    assert seen.end - seen.start == pytest.approx(iteration.rollout_seconds, abs=1e-5)


def command(name, *arguments):
  return subprocess.run([sys.executable, "-m", name, *map(str, arguments)], capture_output=True, text=True)


def test_the_commands(tmp_path):
  config = dataclasses.replace(ring_tiny.get_config(), rollout=CONFIG)
  (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
  run(tmp_path / "events.jsonl", seed=2)
  done = command("rollout.replay", f"--workdir={tmp_path}", "--json")
  assert done.returncode == 0 and json.loads(done.stdout)["same"], done.stderr
  picture, trace = tmp_path / "picture.png", tmp_path / "slots.json"
  (tmp_path / "trace.json").write_text('[\n{"name": "train", "ph": "X", "ts": 1.0, "dur": 2.0}')
  flags = (f"--workdir={tmp_path}", "--iteration=2:4", f"--out={picture}", f"--trace={trace}")
  done = command("rollout.timeline", *flags)
  assert done.returncode == 0 and picture.read_bytes()[1:4] == b"PNG", done.stderr
  assert json.loads(trace.read_text())[0]["name"] == "train"
  lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
  place = next(i for i, line in enumerate(lines) if i > 40 and '"place"' in line and len(json.loads(line)["placed"]))
  record = json.loads(lines[place])
  record["placed"][0][1] += 1
  (tmp_path / "events.jsonl").write_text(
    "".join(lines[:place]) + json.dumps(record) + "\n" + "".join(lines[place + 1 :])
  )
  done = command("rollout.replay", f"--workdir={tmp_path}")
  assert done.returncode == 1 and done.stdout.count("\n") == 1 and f"line {place + 1}: placements" in done.stdout
  done = command("rollout.timeline", f"--workdir={tmp_path}", "--iteration=90", f"--out={picture}")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "0 to 11" in done.stderr
