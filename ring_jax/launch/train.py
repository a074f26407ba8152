"""Trains a model: cold-start SFT, then RL with IcePop under the C3PO++ scheduler, in one workdir.

  python -m ring_jax.launch.train --config=configs/ring_tiny.py --workdir=runs/ring_tiny

Any value of the config can be set: --config.rl.steps=300 --config.rollout.dtype=int8 --config.seed=1
The same command resumes a run that was stopped or killed, exactly.  Ctrl-C stops after the current step, a second one at
once; both resume.  docs/workdir.md says what the workdir holds.
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
    run_job(config, FLAGS.workdir)
  except Stopped:
    sys.exit(130)


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True)
