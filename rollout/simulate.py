"""Compares C3PO++ with the synchronous batch over a trace of answer lengths, without a model.

    python -m rollout.simulate --trace=lengths.jsonl --slots=256 --token_budget=1000000 --retention=8 --json
    python -m rollout.simulate --generator=lognormal --sigma=1.2 --cap=32768 --prompts=4000 --slots=512 --retention=10 --compare --plot=schedules.png
    python -m rollout.simulate --calibrate=runs/ring_tiny --costs_out=costs.json
    python -m rollout.simulate --measure --generator=lognormal --mean=24 --cap=224 --prompt_tokens=8 --prompts=64 --slots=32 --retention=12

A trace is JSONL, one answer a line: {"prompt_id": 17, "sample_id": 0, "prompt_tokens": 210, "response_tokens": 3907}.  The
scheduler is the one that a live run uses, with the same rules (docs/scheduler.md).  Costs are seconds; --costs takes what
--calibrate has fitted to a real run, and a flag of its own overrides it.  --compare adds over-sampling with abort.  --measure
runs both schedules on the real engine of a tiny model too, with answers of these lengths.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from configs import ring_tiny
from configs.schema import (
  BudgetCounts,
  ConfigError,
  KVPolicy,
  OnPurge,
  RetentionCounts,
  RolloutConfig,
  RolloutSchedule,
  Unit,
)
from ring_jax.launch import app
from ring_jax.train.workdir import write_atomic
from rollout.events import EventLog
from rollout.simulator import calibration, report
from rollout.simulator.costs import SCALARS, Costs, costs_dict, read_costs
from rollout.simulator.lengths import PARAMETERS, Generator, Shape, Trace, read_trace
from rollout.simulator.outcome import Outcome
from rollout.simulator.simulation import Simulation, groups_of_budget, in_batches

FLAGS = flags.FLAGS
_RULES = {
  "unit": Unit,
  "budget_counts": BudgetCounts,
  "retention_counts": RetentionCounts,
  "on_purge": OnPurge,
  "kv_policy": KVPolicy,
}
_GROUP_SIZE = 8
_PROMPTS = 2000
_LONGEST = 512  # positions of the model of configs/ring_tiny.py


def define_flags() -> None:
  flags.DEFINE_string("trace", None, "Answers to schedule, a JSONL file.")
  flags.DEFINE_enum("generator", None, [shape.value for shape in Shape], "Draw the answers instead.")
  _define_generator()
  _define_scheduler()
  flags.DEFINE_string("costs", None, "Costs, a JSON file; what it leaves out has its default.")
  defaults = Costs()
  for name in SCALARS:
    flags.DEFINE_float(name, None, f"Seconds, see rollout/simulator/costs.py; default: {getattr(defaults, name):g}.")
  flags.DEFINE_integer("batch_prompts", None, "Of the batches compared with; default: about token_budget tokens.")
  flags.DEFINE_bool("compare", False, "Add over-sampling with abort, resumed and discarded.")
  flags.DEFINE_float("over_sampling", 2.0, "How many times as many prompts it launches as it trains on.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")
  flags.DEFINE_string("plot", None, "A PNG to write.")
  flags.DEFINE_string("series", None, "A JSONL file to write: one line an iteration of each schedule.")
  flags.DEFINE_bool("measure", False, "Run both on the real engine too, with the model of configs/ring_tiny.py.")
  flags.DEFINE_integer("repeats", 2, "How often --measure runs each, after once to compile.")
  flags.DEFINE_string(
    "events", None, "Where to write C3PO++'s event log (see rollout.timeline): simulated, or measured."
  )
  flags.DEFINE_string("calibrate", None, "A workdir: fit the costs to that run, and show how well they predict it.")
  flags.DEFINE_string("costs_out", None, "Where --calibrate writes the costs.")


def _define_generator() -> None:
  flags.DEFINE_integer("prompts", None, f"How many prompts to draw; default: {_PROMPTS}.")
  flags.DEFINE_integer(
    "group_size", None, f"Answers a prompt; default: as in the trace, {_GROUP_SIZE} for a generator."
  )
  for field in dataclasses.fields(Generator):
    if field.name != "shape":
      define = flags.DEFINE_integer if field.type in (int, "int") else flags.DEFINE_float
      define(field.name, None, f"Of the generator, see rollout/simulator/lengths.py; default: {field.default:g}.")


def _define_scheduler() -> None:
  config = {field.name: field.default for field in dataclasses.fields(RolloutConfig)}
  flags.DEFINE_integer("slots", 256, "Sequences decoded at once.")
  flags.DEFINE_integer("token_budget", None, "Phi; default: slots times the mean length.")
  flags.DEFINE_integer("retention", config["retention"], "sigma: iterations that a rollout may survive unfinished.")
  flags.DEFINE_integer("pool", config["pool"], "Rollouts in flight, in slots and waiting; 0: as many as slots.")
  for name, kind in _RULES.items():
    flags.DEFINE_enum(name, config[name].value, [choice.value for choice in kind], "See docs/scheduler.md.")
  flags.DEFINE_integer("steps_per_dispatch", 1, "Decode steps between two looks of the host.")
  flags.DEFINE_integer("prefill_batch", config["prefill_batch"], "Sequences prefilled by one dispatch.")


# ---------------------------------------------------------------------------------------------------------------------
# From flags to what is simulated


def _given(names: Any) -> dict[str, Any]:
  return {name: FLAGS[name].value for name in names if FLAGS[name].present}


def _with_flags(make: Any, **values: Any) -> Any:
  """A config class's complaint, in terms of flags."""
  try:
    return make(**values)
  except ConfigError as error:
    text = str(error)
    for where in ("rollout.", "generator.", "costs."):
      text = text.replace(where, "--")
    raise ConfigError(text) from None


def make_trace() -> Trace:
  own = [field.name for field in dataclasses.fields(Generator) if field.name != "shape"]
  size = FLAGS.group_size
  if size is not None and size < 1:
    raise ConfigError(f"--group_size={size}: must be at least 1")
  if bool(FLAGS.trace) == bool(FLAGS.generator):
    both = "contradict each other" if FLAGS.trace else "are missing"
    raise ConfigError(
      f"--trace and --generator {both}: give one, a file of answers or a distribution to draw them from"
    )
  if FLAGS.trace:
    useless = [f"--{name}" for name in _given([*own, "prompts"])]
    if useless:
      raise ConfigError(f"{', '.join(useless)}: for --generator only, contradicts --trace")
    return read_trace(FLAGS.trace, size)
  shape = Shape(FLAGS.generator)
  others = {name for names in PARAMETERS.values() for name in names} - set(PARAMETERS[shape])
  useless = [f"--{name}" for name in sorted(_given(others))]
  if useless:
    raise ConfigError(f"{', '.join(useless)}: not a parameter of --generator={shape.value}")
  generator = _with_flags(Generator, shape=shape, **_given(own))
  prompts = _PROMPTS if FLAGS.prompts is None else FLAGS.prompts
  if prompts < 1:
    raise ConfigError(f"--prompts={prompts}: must be at least 1")
  return generator.draw(prompts, size or _GROUP_SIZE)


def make_config(trace: Trace) -> RolloutConfig:
  names = ("slots", "retention", "pool", "steps_per_dispatch", "prefill_batch", *_RULES)
  budget = FLAGS.token_budget
  if budget is None:
    budget = max(1, round(FLAGS.slots * trace.mean))
  values = {name: FLAGS[name].value for name in names}
  return _with_flags(RolloutConfig, token_budget=budget, group_size=trace.group_size, **values)


def make_costs() -> Costs:
  given = _given(SCALARS)
  costs = read_costs(FLAGS.costs) if FLAGS.costs else Costs()
  line = [f"--{name}" for name in ("decode_step", "decode_per_slot") if name in given]
  if costs.decode_table and line:
    raise ConfigError(f"{', '.join(line)}: contradicts decode_table in --costs={FLAGS.costs}")
  return _with_flags(lambda **values: dataclasses.replace(costs, **values), **given)


def batch_prompts(trace: Trace, config: RolloutConfig) -> int:
  """Prompts of a synchronous batch: given, or as many as make the same tokens an update as C3PO++'s budget."""
  if FLAGS.batch_prompts is None:
    return groups_of_budget(trace, config)
  if FLAGS.batch_prompts < 1:
    raise ConfigError(f"--batch_prompts={FLAGS.batch_prompts}: must be at least 1")
  return FLAGS.batch_prompts


# ---------------------------------------------------------------------------------------------------------------------
# The two things that it does


def main() -> None:
  if FLAGS.calibrate:
    calibrate()
    return
  if FLAGS.costs_out:
    raise ConfigError("--costs_out: only --calibrate has costs to write")
  if FLAGS.over_sampling < 1:
    raise ConfigError(f"--over_sampling={FLAGS.over_sampling}: must be at least 1")
  trace, costs = make_trace(), make_costs()
  config = make_config(trace)
  groups = batch_prompts(trace, config)
  launched = max(groups, round(FLAGS.over_sampling * groups))
  batches = [in_batches(config, RolloutSchedule.SYNCHRONOUS, groups)]
  if FLAGS.compare:
    both = (RolloutSchedule.OVERSAMPLE_RESUME, RolloutSchedule.OVERSAMPLE_DISCARD)
    batches += [in_batches(config, schedule, groups, launched) for schedule in both]
  started = time.perf_counter()
  outcomes = [simulated(trace, config, costs), *(Simulation(trace, one, costs).run() for one in batches)]
  took = time.perf_counter() - started
  found = report.comparison(trace, outcomes[0], outcomes[1], outcomes[2:])
  found["settings"] = _settings(config, costs, groups, launched)
  if FLAGS.measure:
    found["measured"] = measure(trace, config, groups)
  _write(trace, outcomes)
  if FLAGS.json:
    print(json.dumps(found, allow_nan=False))
    return
  print("\n".join(report.lines(found)))
  print(f"simulated in {took:.1f} s: {len(outcomes) * len(trace.lengths) / took:,.0f} rollouts a second")
  print(
    f"C3PO++: slots={config.slots} pool={config.pool} token_budget={config.token_budget} retention={config.retention}"
    f" unit={config.unit} on_purge={config.on_purge} kv_policy={config.kv_policy}; batches of {groups} prompts"
  )
  if FLAGS.measure:
    print("\n".join(report.measured_lines(found["measured"])))


def simulated(trace: Trace, config: RolloutConfig, costs: Costs) -> Outcome:
  """C3PO++, with an event log where one is wanted of it."""
  if not FLAGS.events or FLAGS.measure:
    return Simulation(trace, config, costs).run()
  with new_log(lambda: simulation.clock.seconds) as log:
    simulation = Simulation(trace, config, costs, log)
    return simulation.run()


def new_log(clock: Callable[[], float] | None = None) -> contextlib.closing[EventLog]:
  """At --events, where nothing is left of what was there."""
  pathlib.Path(FLAGS.events).unlink(missing_ok=True)
  return contextlib.closing(EventLog(pathlib.Path(FLAGS.events), clock))


def measure(trace: Trace, config: RolloutConfig, groups: int) -> dict[str, Any]:
  """The same on the real engine."""
  from rollout import measured  # the engine takes seconds to import

  longest = max(trace.prompts) + max(trace.lengths)
  if longest > _LONGEST:
    raise ConfigError(
      f"--measure: prompt and answer of {longest} tokens; a tiny engine takes at most {_LONGEST} (--cap)"
    )
  if FLAGS.repeats < 1:
    raise ConfigError(f"--repeats={FLAGS.repeats}: must be at least 1")
  config = dataclasses.replace(config, max_prompt_tokens=max(trace.prompts), max_tokens=max(trace.lengths))
  measurement = measured.Measurement(ring_tiny.get_config().model, config, trace, groups)
  with new_log() if FLAGS.events else contextlib.nullcontext() as log:
    return measured.compare(measurement, FLAGS.repeats, log)


def _settings(config: RolloutConfig, costs: Costs, groups: int, launched: int) -> dict[str, Any]:
  names = ("token_budget", "slots", "pool", "retention", "group_size", "steps_per_dispatch", "prefill_batch", *_RULES)
  own = {name: getattr(config, name) for name in names}
  return {**own, "batch_prompts": groups, "launched_prompts": launched, "costs": costs_dict(costs)}


def _write(trace: Trace, outcomes: list[Outcome]) -> None:
  if FLAGS.series:
    entries = [
      {"schedule": outcome.schedule, "iteration": index, **dataclasses.asdict(iteration)}
      for outcome in outcomes
      for index, iteration in enumerate(outcome.series)
    ]
    write_atomic(pathlib.Path(FLAGS.series), "".join(json.dumps(entry) + "\n" for entry in entries))
  if FLAGS.plot:
    from rollout.simulator import picture  # matplotlib takes a second to import

    write_atomic(pathlib.Path(FLAGS.plot), picture.draw(trace, outcomes))


def calibrate() -> None:
  useless = [
    f"--{name}"
    for name in ("trace", "generator", "plot", "series", "compare", "measure", "events")
    if FLAGS[name].present
  ]
  if useless:
    raise ConfigError(f"{', '.join(useless)}: contradicts --calibrate, which simulates the run's own answers")
  from ring_jax.train.report import metrics  # TensorBoard takes a second to import

  workdir = pathlib.Path(FLAGS.calibrate)
  run = calibration.read_run(workdir, *metrics.read_logs(workdir))
  found = calibration.fit(run, make_costs() if FLAGS.costs else None)
  if FLAGS.costs_out:
    write_atomic(pathlib.Path(FLAGS.costs_out), json.dumps(costs_dict(found.costs), indent=2) + "\n")
  print(json.dumps(found.summary(), allow_nan=False) if FLAGS.json else "\n".join(found.lines()))


if __name__ == "__main__":
  define_flags()
  app.run(main)
