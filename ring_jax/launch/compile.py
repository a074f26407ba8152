"""Compiles a run's programs for TPUs that are not here, and says what they need and whether they fit.

  python -m ring_jax.launch.compile --config=configs/ring_mini.py --topology=v5p:2x2x1 --program=train_step

The real TPU compiler runs on any x86 Linux machine (`make test` installs it); minutes, not hours, whatever the size of the
pod.  The mesh is the config's; where that is one device, the default one for the topology is taken and printed as the
overrides that would say so.  --report=DIR keeps the report as JSON.  Exit status 1: it does not fit.

Memory is the compiler's count, FLOPs are by formula, the roofline time is a lower bound.  Nothing is run.
"""

import json
import pathlib
import sys
import time

from absl import flags

from configs.schema import RunConfig
from ring_jax.compiled import fit, layout
from ring_jax.compiled.programs import Kind, lower
from ring_jax.launch import app
from sharding.topology import Topology

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("topology", None, "Such as v5p:4x4x4, v6e:16x16, 2*v5e:4x4.", required=True)
  flags.DEFINE_enum_class("program", Kind.TRAIN_STEP, Kind, "What to compile.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")
  flags.DEFINE_string("report", None, "Folder for the report as JSON; made if it is not there.")


def main(config: RunConfig) -> None:
  topology = Topology.parse(FLAGS.topology)
  config, overrides = layout.laid_out(config, topology)
  say = (lambda text: None) if FLAGS.json else print
  if overrides:
    say("mesh for this topology: " + " ".join(f"--config.{name}={value}" for name, value in overrides.items()))
  started = time.perf_counter()
  reports = []
  for unit in lower(config, FLAGS.program, topology.devices()):
    say(f"compiling {unit.name} for {topology} ({topology.num_devices} devices) ...")
    reports.append(fit.compiled(config, FLAGS.program, unit, topology.chip))
  found = fit.summary(FLAGS.program, topology, overrides, reports, time.perf_counter() - started)
  if FLAGS.report:
    folder = pathlib.Path(FLAGS.report)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{config.name}_{str(topology).replace(':', '_').replace('*', 'x')}_{FLAGS.program}.json"
    (folder / name).write_text(json.dumps(found, indent=2) + "\n")
  print(json.dumps(found) if FLAGS.json else fit.text(found, config, topology.chip))
  if not found["fits"]:
    sys.exit(1)


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True)
