"""Runs the cold start only: SFT until the measured accuracy or the step limit of the config is reached.

  python -m ring_jax.launch.sft --config=configs/ring_tiny.py --workdir=runs/ring_tiny

`launch.train` with the same config and workdir goes on with RL from there.
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
    run_job(config, FLAGS.workdir, until="sft", watchdog=FLAGS.watchdog)
  except Stopped as stopped:
    return stopped.status
  return None


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True, several=True)
