"""Runs the cold start only: SFT until the measured accuracy or the step limit of the config is reached.

  python -m ring_jax.launch.sft --config=configs/ring_tiny.py --workdir=runs/ring_tiny

`launch.train` with the same config and workdir goes on with RL from there.
"""

import sys

from absl import flags

from configs.schema import RunConfig
from ring_jax.launch import app
from ring_jax.train.job import Stopped, run_job

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.", required=True)


def main(config: RunConfig) -> None:
  try:
    run_job(config, FLAGS.workdir, until="sft")
  except Stopped:
    sys.exit(130)


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True)
