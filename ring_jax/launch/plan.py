"""Chooses placement and parallelism of a run, and says what to expect and why.

  python -m ring_jax.launch.plan --config=configs/ring_mini.py --topology=v5p:4x4x4
  python -m ring_jax.launch.plan --config=configs/ring_mini.py --topology=v5p:4x4x4 --apply=configs/placed.py
  python -m ring_jax.launch.plan --config=configs/ring_tiny.py --devices=8 --calibrate=runs/a,runs/b
  python -m ring_jax.launch.plan --config=configs/ring_tiny.py --calibrate=runs/a,runs/b --measured=runs/c,runs/d

Every strategy, split of the devices and layout is tried (sharding/candidates.py), what does not fit is discarded, and the
rest is ranked by the tokens a second that it trains on.  On a TPU seconds are by formula (ring_jax/planning/roofline.py):
lower bounds at stated efficiencies, not measurements.  --calibrate takes them from co-located runs on this machine instead,
and --measured compares them with other runs.  Answers are as long as --trace says, or log-normal.  Placement and layouts
of the config are replaced; rl.stream and rl.staleness are the config's, since they change what is trained.

Exit status 1: nothing fits.
"""

import json
import pathlib
import sys

from absl import flags

from configs.loading import differences, load
from configs.schema import ConfigError, RunConfig
from ring_jax.launch import app
from ring_jax.planning import measured, report
from ring_jax.planning.rollouts import Answers, Rollouts, repeated
from ring_jax.planning.roofline import Roofline
from ring_jax.train.report import metrics
from ring_jax.train.workdir import write_atomic
from rollout.simulator.lengths import Generator, Shape, read_trace
from sharding.planner import CostModel, Estimate, naive_estimate, search
from sharding.topology import Topology

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("topology", None, "Such as v5p:4x4x4 or v6e:16x16; one slice.")
  flags.DEFINE_integer("devices", None, "How many, for --calibrate.", lower_bound=1)
  flags.DEFINE_enum("phase", None, ["rl", "rlhf"], "Which phase to plan for; default: the last that has steps.")
  flags.DEFINE_string("trace", None, "Answers, a JSONL file as of rollout.simulate; default: log-normal lengths.")
  flags.DEFINE_float("mean", None, "Tokens of an answer; default: a quarter of rollout.max_tokens.")
  flags.DEFINE_float("sigma", 1.2, "Of the log length.")
  flags.DEFINE_integer("prompt_tokens", None, "Of a prompt; default: a quarter of rollout.max_prompt_tokens.")
  flags.DEFINE_list("calibrate", [], "Workdirs of co-located runs on this machine, to take seconds from.")
  flags.DEFINE_list("measured", [], "Workdirs of runs to compare predictions with; needs --calibrate.")
  flags.DEFINE_integer("top", 10, "How many candidates to show.", lower_bound=1)
  flags.DEFINE_string("apply", None, "A Python config file to write: this run as the winner places it.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(config: RunConfig) -> None:
  phase = FLAGS.phase or ("rlhf" if config.rlhf.steps else "rl")
  if not config.phase(phase).steps:
    raise ConfigError(f"{phase}.steps=0: there is no such phase to plan for")
  if FLAGS.apply and not FLAGS.apply.endswith(".py"):
    raise ConfigError(f"--apply={FLAGS.apply}: must be a Python file, such as configs/placed.py")
  if FLAGS.measured:
    compare(phase)
    return
  where, devices, costs = _machine(config, phase)
  ranking = search(config, phase, devices, costs, may_change=not FLAGS.calibrate)
  baseline = naive_estimate(config, phase, devices, costs, may_change=not FLAGS.calibrate)
  if FLAGS.apply and ranking.estimates:
    _apply(config, where, ranking.estimates[0])
  if FLAGS.json:
    print(json.dumps(report.summary(config, phase, where, devices, ranking, baseline, costs.limit, FLAGS.top)))
  else:
    print(f"{config.name}, {phase}, on {where}")
    print("\n".join(report.lines(ranking, baseline, costs.limit, FLAGS.top)))
    if FLAGS.apply and ranking.estimates:
      print(f"use it: python -m ring_jax.launch.train --config={FLAGS.apply} --workdir=DIR")
  if not ranking.estimates:
    sys.exit(1)


def _machine(config: RunConfig, phase: str) -> tuple[str, int, CostModel]:
  """Its name, its devices, and what stages cost on it."""
  if FLAGS.calibrate:
    if FLAGS.topology or not FLAGS.devices:
      raise ConfigError("--calibrate: is of this machine, give --devices=N and no --topology")
    return (
      f"{FLAGS.devices} devices of this machine",
      FLAGS.devices,
      measured.Measured(_runs(FLAGS.calibrate, phase), phase),
    )
  if not FLAGS.topology or FLAGS.devices:
    raise ConfigError("--topology is missing, such as v5p:4x4x4; --devices is for --calibrate")
  topology = Topology.parse(FLAGS.topology)
  if topology.slices > 1:
    raise ConfigError(f"--topology={topology}: one slice at a time; what travels between slices is not priced")
  return str(topology), topology.num_devices, Roofline(topology.chip, phase, Rollouts(_answers(config)))


def _answers(config: RunConfig) -> Answers:
  rollout = config.rollout
  if FLAGS.trace:
    if FLAGS.mean or FLAGS.prompt_tokens:
      raise ConfigError("--trace: contradicts --mean and --prompt_tokens")
    return repeated(read_trace(FLAGS.trace, rollout.group_size))
  return Generator(
    Shape.LOGNORMAL,
    mean=FLAGS.mean or max(rollout.max_tokens / 4, 1.0),
    sigma=FLAGS.sigma,
    cap=rollout.max_tokens,
    prompt_tokens=FLAGS.prompt_tokens or max(rollout.max_prompt_tokens // 4, 1),
  ).draw


def _runs(workdirs: list[str], phase: str) -> list[measured.Run]:
  folders = [pathlib.Path(one) for one in workdirs]
  return [measured.read_run(one, phase, *metrics.read_logs(one)) for one in folders]


def compare(phase: str) -> None:
  if not FLAGS.calibrate:
    raise ConfigError("--measured: needs --calibrate, runs to predict from")
  found = measured.compare(measured.Measured(_runs(FLAGS.calibrate, phase), phase), _runs(FLAGS.measured, phase), phase)
  print(json.dumps(found.summary()) if FLAGS.json else "\n".join(found.lines()))


def _apply(config: RunConfig, where: str, best: Estimate) -> None:
  target = pathlib.Path(FLAGS.apply)
  # Overrides of this command line are in `config` already: they become the file's.
  overrides = differences(load(FLAGS.config), best.config)
  write_atomic(target, report.config_file(FLAGS.config, target, where, best, overrides))


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True)
