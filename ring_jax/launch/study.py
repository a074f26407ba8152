"""Shows one of the papers' claims in kind: measures, and writes a page with tables and pictures.

    python -m ring_jax.launch.study --name=stability --workdir=runs/studies
    python -m ring_jax.launch.study --name=stability --workdir=runs/quick --quick
    python -m ring_jax.launch.study --name=all --workdir=runs/studies --pages=docs/evidence

Points are measured side by side, a core each.  The same command goes on where it was stopped; what is measured stays.  The page
lies in the workdir, or where --pages says.  docs/evidence.md has what they showed.
"""

import pathlib
import signal
import sys
from typing import Any

from absl import flags

from configs.schema import ConfigError
from configs.status import ExitStatus
from ring_jax.launch import app
from ring_jax.studies import page
from ring_jax.studies.catalogue import STUDIES
from ring_jax.studies.runner import Runner
from ring_jax.studies.study import Settings

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_enum("name", None, [*STUDIES, "all"], "Which study.", required=True)
  flags.DEFINE_string("workdir", None, "Folder of the studies; made if it is not there.", required=True)
  flags.DEFINE_integer("seeds", Settings.seeds, "Seeds of each point.", lower_bound=1)
  flags.DEFINE_bool("quick", False, "A form of at most two minutes, which shows that it works and not what it says.")
  flags.DEFINE_string("pages", None, "Where the page goes; default: into the workdir.")
  flags.DEFINE_bool("measure", True, "False: write the page of what has been measured.")


def _leave(*_: Any) -> None:
  sys.exit(ExitStatus.PREEMPTED)  # the runner sees it, and lets its points save what they have


def main() -> None:
  signal.signal(signal.SIGTERM, _leave)
  settings = Settings(seeds=FLAGS.seeds, quick=FLAGS.quick)
  workdir = pathlib.Path(FLAGS.workdir)
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"--workdir={workdir}: is a file; a folder is needed")
  for study in STUDIES.values() if FLAGS.name == "all" else (STUDIES[FLAGS.name],):
    runner = Runner(study, settings, workdir / study.name, say=lambda line: print(line, flush=True))
    if FLAGS.measure:
      runner.run()
    results, minutes = runner.results()
    if not results.arms():
      raise ConfigError(f"--workdir={workdir}: nothing of {study.name} has been measured")
    written = page.write(
      pathlib.Path(FLAGS.pages or workdir), study, settings, study.report(settings, results), minutes
    )
    print(f"{study.name}: {written}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
