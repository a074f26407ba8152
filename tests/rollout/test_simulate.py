"""The command: what it prints, what it writes, what it refuses; and prices fitted to a run."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from configs.base import ConfigError, to_dict
from configs.ring_tiny import get_config
from configs.schema import OnPurge
from ring_jax.records import FinishReason
from ring_jax.train.report import metrics
from ring_jax.train.report.samples import SampleLog
from ring_jax.train.workdir import Workdir
from rollout.scheduler import C3POScheduler
from rollout.simulator import calibration
from rollout.simulator.costs import Costs, costs_dict, read_costs
from rollout.simulator.lengths import Generator, Shape
from rollout.simulator.simulation import Simulation

# One interpreter for many command lines: a run ends at the first mistake, before it simulates.
_MISTAKES = """
import json, sys
from absl import flags
from configs.base import ConfigError
from rollout import simulate
simulate.define_flags()
for arguments in json.load(sys.stdin):
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  try:
    flags.FLAGS(["simulate", *arguments])
    simulate.main()
    print("no mistake")
  except (ConfigError, flags.Error) as error:
    print(str(error))
"""


def run(*arguments, **options):
  command = [sys.executable, *(arguments or ("-c", _MISTAKES))]
  return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def write_trace(path, groups=60, group_size=4):
  trace = Generator(Shape.LOGNORMAL, mean=60, cap=500).draw(groups, group_size)
  with path.open("w") as file:
    for uid, length in enumerate(trace.lengths):
      line = {"prompt_id": uid // group_size, "sample_id": uid % group_size, "prompt_tokens": 9}
      file.write(json.dumps(line | {"response_tokens": length}) + "\n")
  return trace


def test_the_contract(tmp_path):
  """Two identical runs: one JSON object each, with what the architecture promises, and the files that were asked for."""
  trace = write_trace(tmp_path / "trace.jsonl")
  arguments = (
    "-m", "rollout.simulate", f"--trace={tmp_path}/trace.jsonl", "--slots=16", "--token_budget=960", "--retention=9",
    "--compare", "--json", f"--series={tmp_path}/series.jsonl", f"--plot={tmp_path}/plot.png",
  )  # fmt: skip
  done = run(*arguments)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert done.stdout.count("\n") == 1
  assert found["rollout_speedup"] > 1.5 and found["end_to_end_speedup"] > 1 and 0.5 < found["utilisation"] <= 1
  assert found["tokens_generated"] == found["tokens_trained"] + found["tokens_wasted"]
  assert found["tokens_trained"] == sum(trace.lengths) and found["max_staleness"] <= 10
  assert list(found["schedules"]) == ["c3po", "synchronous", "oversample_resume", "oversample_discard"]
  assert found["schedules"]["synchronous"]["rollout_speedup"] == 1.0
  assert found["settings"]["group_size"] == 4 and found["settings"]["pool"] == 16
  series = [json.loads(line) for line in (tmp_path / "series.jsonl").read_text().splitlines()]
  for name, one in found["schedules"].items():
    own = [entry for entry in series if entry["schedule"] == name]
    assert len(own) == one["iterations"]
    assert sum(entry["tokens_trained"] for entry in own) == one["tokens_trained"]
  assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes(tmp_path):
  write_trace(tmp_path / "trace.jsonl")
  (tmp_path / "bad.jsonl").write_text('{"prompt_id": 1}\n')
  (tmp_path / "table.json").write_text('{"decode_table": [[1, 0.1]]}')
  trace, draw = f"--trace={tmp_path}/trace.jsonl", "--generator=lognormal"
  cases = {
    ("--slots=4",): "--trace and --generator are missing",
    (trace, draw): "--trace and --generator contradict each other",
    (f"--trace={tmp_path}/absent.jsonl",): "absent.jsonl: cannot be read (No such file or directory)",
    (f"--trace={tmp_path}/bad.jsonl",): "bad.jsonl, line 1: lacks sample_id",
    (trace, "--sigma=1", "--prompts=3"): "--sigma, --prompts: for --generator only",
    (trace, "--group_size=3"): "prompt 0 has 4 samples, but --group_size=3",
    (trace, "--group_size=0"): "--group_size=0: must be at least 1",
    (draw, "--alpha=2"): "--alpha: not a parameter of --generator=lognormal",
    (draw, "--cap=0"): "--cap=0: must be at least 1",
    (draw, "--correlation=2"): "--correlation=2.0: from 0 to 1",
    (draw, "--prompts=0"): "--prompts=0: must be at least 1",
    ("--generator=normal",): "generator=normal: value should be one of",
    (draw, "--slots=0"): "--slots=0: must be at least 1",
    (draw, "--slots=64", "--pool=32"): "--pool=32: smaller than --slots=64",
    (draw, "--pool=8", "--slots=4", "--group_size=16"): "--pool=8: a group of 16 rollouts would never fit",
    (draw, "--token_budget=0"): "--token_budget=0: must be at least 1",
    (draw, "--retention=-1"): "--retention=-1: must be at least 0",
    (draw, "--batch_prompts=0"): "--batch_prompts=0: must be at least 1",
    (draw, "--over_sampling=0.5"): "--over_sampling=0.5: must be at least 1",
    (draw, "--sync=-1"): "--sync=-1.0: must be a number of at least 0",
    (draw, f"--costs={tmp_path}/none.json"): "none.json: cannot be read",
    (draw, f"--costs={tmp_path}/table.json", "--decode_step=1"): "--decode_step: contradicts decode_table",
    (draw, "--costs_out=x.json"): "--costs_out: only --calibrate has costs to write",
    (draw, f"--calibrate={tmp_path}"): "--generator: contradicts --calibrate",
    (f"--calibrate={tmp_path}/absent",): "absent: config.json cannot be read",
  }
  done = run(input=json.dumps(list(cases)))
  lines = done.stdout.splitlines()
  assert len(lines) == len(cases), done.stderr
  for message, line in zip(cases.values(), lines, strict=True):
    assert message in line


def test_a_mistake_is_one_line_and_status_2_and_help_shows_an_example(tmp_path):
  done = run("-m", "rollout.simulate", f"--trace={tmp_path}/absent.jsonl", "--json")
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  done = run("-m", "rollout.simulate", "--help")
  assert done.returncode == 0 and "python -m rollout.simulate --trace=" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


TRUE = Costs(
  decode_step=0.02, decode_per_slot=3e-4, prefill_call=0.004, prefill_per_token=2e-5, sync=0.05, train_update=0.2,
  train_per_token=1e-4,
)  # fmt: skip


def make_run(folder, iterations=40, seed=0, costs=TRUE, **changes):
  """A workdir as training writes it, of real rollouts whose seconds follow `costs`; some iterations compiled."""
  rules = dataclasses.replace(
    get_config().rollout, slots=32, pool=40, token_budget=1500, group_size=4, retention=1, max_tokens=200,
    steps_per_dispatch=4, prefill_batch=4, on_purge=OnPurge.TRAIN, max_prompt_tokens=20,
  )  # fmt: skip
  rules = dataclasses.replace(rules, **changes)
  config = dataclasses.replace(
    get_config(), rollout=rules, packing=dataclasses.replace(get_config().packing, length=256)
  )
  trace = Generator(Shape.LOGNORMAL, mean=40, cap=200, prompt_tokens=7, seed=seed).draw(1000, rules.group_size)
  simulation = Simulation(trace, rules, costs)
  workdir, rng = Workdir(folder), np.random.default_rng(seed)
  workdir.config.write_text(json.dumps(to_dict(config)))
  log, samples = metrics.MetricsLog(workdir), SampleLog(workdir.rollouts)
  scheduler, cursor = C3POScheduler(rules), 0
  for version in range(iterations):
    clock = simulation.clock
    before = (clock.prefill_seconds, clock.decode_seconds)
    simulation.iterate()
    prefill, decode = clock.prefill_seconds - before[0], clock.decode_seconds - before[1]
    result, cursor = play(scheduler, trace, version, cursor)
    noise = rng.uniform(0.97, 1.03, 4)
    compiled = 9.0 * (version in (0, 1, 5, 13, 26))
    seconds = {
      "prefill": prefill * noise[0] + compiled,
      "decode": decode * noise[1],
      "sync": costs.sync * noise[2],
      "train": costs.update_seconds(result.counts.trained) * noise[3] + compiled,
      "logp": 0.0,
      "score": 0.0,
    }
    seconds["rollout"] = seconds["prefill"] + seconds["decode"]
    step = 100 + version
    values = result.metrics() | {"version": version, "problems_seen": cursor}
    log.log("rl", step, values, {f"seconds/{name}": value for name, value in seconds.items()})
    for rollout in result.rollouts:
      rollout.reward = 0.0
    samples.write(step, version, result.rollouts, [0.0] * len(result.rollouts), lambda rollout: ("", ""))
  log.close()
  return workdir.path


def play(scheduler, trace, version, cursor):
  """One iteration as the driver plays it, with tokens."""
  scheduler.begin_iteration()
  while not scheduler.iteration_done:
    wanted = scheduler.wanted_groups
    scheduler.admit([(group, [1] * 7) for group in range(cursor, cursor + wanted)])
    cursor += wanted
    scheduler.place()
    for rollout in scheduler.running().values():
      count = min(4, trace.lengths[rollout.uid] - len(rollout.tokens))
      scheduler.record(rollout.uid, [5] * count, [-1.0] * count, version)
      if len(rollout.tokens) == trace.lengths[rollout.uid]:
        scheduler.finish(rollout.uid, FinishReason.STOP)
  return scheduler.end_iteration(version), cursor


def read(path):
  return calibration.read_run(path, metrics.read(path / "metrics.jsonl"), metrics.read(path / "timings.jsonl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("run"))


def test_prices_are_found_again(folder):
  found = calibration.fit(read(folder))
  summary = found.summary()
  # What had not ended when the run stopped is not known to have ended: the last iterations may differ.
  assert summary["iterations"] == 40 and summary["replayed_exactly"] >= 36
  assert summary["mean_slots_in_use"] > 31  # so that only the price of a full step can be known
  assert found.costs.decode_per_slot == 0
  assert found.costs.decode_step == pytest.approx(TRUE.decode_seconds(32), rel=0.03)
  assert found.costs.sync == pytest.approx(TRUE.sync, rel=0.03)
  assert found.costs.update_seconds(1500) == pytest.approx(TRUE.update_seconds(1500), rel=0.03)
  for fit in summary["prediction"].values():
    assert fit["ratio"] == pytest.approx(1, abs=0.04) and fit["ratio_p10"] > 0.9 and fit["ratio_p90"] < 1.1
  assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_step_and_a_slot_are_told_apart_where_their_use_varied(tmp_path):
  """Groups of 16 in 20 slots leave up to 15 of them empty."""
  true = dataclasses.replace(TRUE, decode_per_slot=2e-3)
  found = calibration.fit(
    read(make_run(tmp_path, costs=true, group_size=16, slots=20, pool=20, token_budget=700))
  ).costs
  assert found.decode_step == pytest.approx(true.decode_step, rel=0.2)
  assert found.decode_per_slot == pytest.approx(true.decode_per_slot, rel=0.2)


def test_given_prices_are_tried_on_the_whole_run(folder):
  right = calibration.fit(read(folder), TRUE).summary()["prediction"]["rollout"]
  wrong = calibration.fit(read(folder), dataclasses.replace(TRUE, decode_step=0.1)).summary()["prediction"]["rollout"]
  assert right["ratio"] == pytest.approx(1, abs=0.03) and wrong["ratio"] > 2


def test_calibrate_writes_costs_that_a_simulation_takes(folder, tmp_path):
  done = run("-m", "rollout.simulate", f"--calibrate={folder}", f"--costs_out={tmp_path}/costs.json")
  assert done.returncode == 0, done.stderr
  assert "40 iterations" in done.stdout and "predicted / measured" in done.stdout
  assert costs_dict(read_costs(f"{tmp_path}/costs.json")) == calibration.fit(read(folder)).summary()["costs"]


def test_a_run_that_is_too_short(folder, tmp_path):
  records = metrics.read(folder / "metrics.jsonl")[:3], metrics.read(folder / "timings.jsonl")
  with pytest.raises(ConfigError, match="holds 3 timed RL steps from the first on, needs 6"):
    calibration.read_run(folder, *records)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match=r"config.json is not a run's"):
    calibration.read_run(tmp_path, *records)
