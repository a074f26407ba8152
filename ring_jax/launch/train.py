"""Trains a model: cold-start SFT, then RL with IcePop under the C3PO++ scheduler, in one workdir.

  python -m ring_jax.launch.train --config=configs/ring_tiny.py --workdir=runs/ring_tiny

Any value of the config can be set: --config.rl.steps=300 --config.rollout.dtype=int8 --config.seed=1
The same command resumes a run that was stopped or killed, exactly.  Ctrl-C stops after the current step, a second one at
once; both resume.  docs/workdir.md says what the workdir holds.
"""

from absl import flags

from configs.schema import RunConfig
from configs.status import ExitStatus
from ring_jax.launch import app
from ring_jax.train.job import Stopped, run_job
from ring_jax.train.watchdog import DEFAULT_SECONDS

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.", required=True)
  flags.DEFINE_float("watchdog", DEFAULT_SECONDS, "Seconds without progress after which the run ends; 0: never.")


def main(config: RunConfig) -> ExitStatus | None:
  try:
    run_job(config, FLAGS.workdir, watchdog=FLAGS.watchdog)
  except Stopped as stopped:
    return stopped.status
  return None


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True, several=True)
