"""What a worker says to a mistake, before it takes the time to build an engine."""

import os
import pathlib
import subprocess
import sys

import pytest

from rollout.remote import wire

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=configs/ring_tiny.py"


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ([], "--config or --checkpoint is missing"),
    (["--checkpoint=configs"], "--checkpoint=configs: config.json cannot be read"),
    ([CONFIG, "--host=0.0.0.0"], "--host=0.0.0.0: whoever can reach it could use this worker; set a token"),
    ([CONFIG, "--token_file=/nowhere/token"], "/nowhere/token"),
    ([CONFIG, '--config.rollout.workers=["a"]'], "rollout.workers.0='a': must be HOST:PORT"),
  ],
)
def test_a_mistake_is_one_line_and_status_2(flags, says):
  environment = {name: value for name, value in os.environ.items() if name != wire.TOKEN_VARIABLE}
  done = subprocess.run(
    [sys.executable, "-m", "ring_jax.launch.worker", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
