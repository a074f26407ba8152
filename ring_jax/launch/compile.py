"""Compiles a run's programs for TPUs that are not here, and says what they need and whether they fit.

  python -m ring_jax.launch.compile --config=configs/ring_mini.py --topology=v5p:2x2x1 --program=train_step
  python -m ring_jax.launch.compile --config=configs/ring_1t.py --topology=v5p --length=32768   # the smallest that fits

The real TPU compiler runs on any x86 Linux machine (`make test` installs it); minutes, not hours, whatever the size of the
pod.  The mesh is the config's; where that is one device, the default one for the topology is taken and printed as the
overrides that would say so.  Of a chip without a shape, slices are tried from the smallest on: by formula, until one
fits, and from there by the compiler.  --report=DIR keeps the report as JSON.  Exit status 1: it does not fit.

Memory is the compiler's count, FLOPs are by formula, the roofline time is a lower bound.  Nothing is run.
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
from absl import flags

from configs.scaling import at_length
from configs.schema import RunConfig
from ring_jax.compiled import fit, layout
from ring_jax.compiled.programs import Kind, lower
from ring_jax.launch import app
from sharding.hardware import CHIPS
from sharding.topology import Topology

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string(
    "topology", None, "Such as v5p:4x4x4, v6e:16x16, 2*v5e:4x4; v5p alone: its smallest slice that fits.", required=True
  )
  flags.DEFINE_enum_class("program", Kind.TRAIN_STEP, Kind, "What to compile.")
  flags.DEFINE_integer("length", None, "Tokens of a rollout and of a row; default: the config's.", lower_bound=2)
  flags.DEFINE_bool("json", False, "Print one JSON object.")
  flags.DEFINE_string("report", None, "Folder for the report as JSON; made if it is not there.")


def main(config: RunConfig) -> None:
  jax.config.update("jax_enable_compilation_cache", False)  # what has no device cannot be read back from it
  if FLAGS.length:
    config = at_length(config, FLAGS.length)
  if FLAGS.topology in CHIPS:
    found = _smallest(config)
  else:
    found = _compiled(config, Topology.parse(FLAGS.topology))
  if FLAGS.report:
    folder = pathlib.Path(FLAGS.report)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{config.name}_{found['topology'].replace(':', '_').replace('*', 'x')}_{FLAGS.program}.json"
    (folder / name).write_text(json.dumps(found, indent=2) + "\n")
  if FLAGS.json:
    print(json.dumps(found))
  if not found["fits"]:
    sys.exit(1)


def _say(text: str) -> None:
  if not FLAGS.json:
    print(text, flush=True)


def _smallest(config: RunConfig) -> dict[str, Any]:
  """The report of the smallest slice that the compiler says fits, with those that the formula ruled out."""
  tried = layout.candidates(config, FLAGS.program, CHIPS[FLAGS.topology])
  limit = tried[-1].topology.chip.hbm_bytes
  for one in tried:
    _say(f"{one.topology}: {one.hbm_bytes / 2**30:.1f} of {limit / 2**30:.1f} GiB by formula")
  found = {}
  for topology in layout.from_slice(tried[-1].topology):
    found = _compiled(config, topology)
    if found["fits"]:
      break
  return found | {"by_formula": {str(one.topology): one.hbm_bytes for one in tried}}


def _compiled(config: RunConfig, topology: Topology) -> dict[str, Any]:
  config, overrides = layout.laid_out(config, topology)
  if overrides:
    _say("mesh for this topology: " + " ".join(f"--config.{name}='{value}'" for name, value in overrides.items()))
  started = time.perf_counter()
  reports = []
  for unit in lower(config, FLAGS.program, topology.devices()):
    _say(f"compiling {unit.name} for {topology} ({topology.num_devices} devices) ...")
    reports.append(fit.compiled(config, FLAGS.program, unit, topology.chip))
  found = fit.summary(config, FLAGS.program, topology, overrides, reports, time.perf_counter() - started)
  _say(fit.text(found, config))
  return found


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True)
