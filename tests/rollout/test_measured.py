"""Schedules on the real engine: answers are as long as they are told to be, and decisions are the simulator's."""

import dataclasses

from configs.ring_tiny import get_config
from configs.schema import RolloutSchedule
from rollout import events
from rollout.events import EventLog
from rollout.measured import Measurement, compare
from rollout.replay import replay
from rollout.simulator import report
from rollout.simulator.costs import Costs
from rollout.simulator.lengths import Generator, Shape
from rollout.simulator.simulation import Simulation, in_batches
from tests.rollout.killed_run import MODEL

CONFIG = dataclasses.replace(
  get_config().rollout, slots=6, pool=6, group_size=2, token_budget=30, retention=9, max_tokens=13, max_prompt_tokens=3,
  steps_per_dispatch=2, prefill_batch=6,
)  # fmt: skip
BATCH = 3


def test_both_schedules_do_what_was_simulated(tmp_path):
  trace = Generator(Shape.LOGNORMAL, mean=5, cap=13, prompt_tokens=3).draw(10, 2)
  assert len(set(trace.lengths)) > 6
  measurement, log = Measurement(MODEL, CONFIG, trace, BATCH), EventLog(tmp_path / "events.jsonl")
  found = compare(measurement, 1, log)
  log.close()
  c3po, batch = found["c3po"], found["synchronous"]
  assert c3po["tokens_trained"] == batch["tokens_trained"] == sum(trace.lengths)
  assert c3po["rollouts_trained"] == batch["rollouts_trained"] == 20 and c3po["tokens_wasted"] == 0
  assert c3po["max_staleness"] > 0 == batch["max_staleness"]

  simulated = Simulation(trace, CONFIG, Costs()).run()
  batches = Simulation(trace, in_batches(CONFIG, RolloutSchedule.SYNCHRONOUS, BATCH), Costs()).run()
  assert (
    (c3po["iterations"], batch["iterations"]) == (len(simulated.series), len(batches.series)) == (c3po["iterations"], 4)
  )
  # The driver takes one more look with empty slots where its prompts run out.
  assert c3po["dispatches"] - simulated.clock.dispatches in (0, 1)
  assert 0 <= batch["dispatches"] - batches.clock.dispatches <= batch["iterations"]
  assert found["dispatch_speedup"] > 1 and "on the real engine" in report.measured_lines(found)[0]

  entries = events.read(tmp_path / "events.jsonl")
  drawn = {uid: 0 for uid in range(20)}
  for _, event in entries:
    for _, uid, count, *_ in event.drawn if isinstance(event, events.Draw) else ():
      drawn[uid] += count
  assert list(drawn.values()) == trace.lengths
  assert replay(entries, CONFIG).difference is None
