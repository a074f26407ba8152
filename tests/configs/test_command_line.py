"""The front of the commands: what a person sees after a mistake is one line, and exit status 2."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from configs import loading
from configs.schema import to_dict

COMMAND = '''"""Prints the run.

    python show.py --config=configs/ring_tiny.py --config.seed=3
"""
import json, os, signal, sys
from absl import flags
from configs.schema import to_dict
from ring_jax.launch import app

_DO = flags.DEFINE_string("do", "", "What to do.")

def main(config):
  if _DO.value == "missing":
    open("/nowhere/file")
  if _DO.value == "bug":
    raise ValueError("a bug")
  if _DO.value == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
  print(json.dumps(to_dict(config)))

if __name__ == "__main__":
  app.run(main, config_flag=True)
'''
PATH = pathlib.Path(__file__).parent / "small_run.py"
SMALL = f"--config={PATH}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("command") / "show.py"
  path.write_text(COMMAND)

  def call(*arguments: str) -> subprocess.CompletedProcess:
    # A test runner in the background ignores SIGINT, and its children inherit that.
    return subprocess.run(
      [sys.executable, str(path), *arguments],
      capture_output=True,
      text=True,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  return call


def test_overrides_reach_the_config(run):
  done = run(SMALL, "--config.seed=3", "--config.rollout.retention", "5", "-config.name=a b", "--do=x")
  assert done.returncode == 0 and done.stderr == ""
  expected = loading.override(loading.load(PATH), {"seed": "3", "rollout.retention": "5", "name": "a b"})
  assert json.loads(done.stdout) == to_dict(expected)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--config is missing: a Python file with get_config(), such as configs/ring_tiny.py"),
    (["--config=none.py"], "config file none.py: does not exist"),
    ([SMALL, "--config.rollout.slotz=3"], "rollout.slotz: unknown field; did you mean slots?"),
    ([SMALL, "--config.seed"], "--config.seed: needs a value, as in --config.seed=VALUE"),
    ([SMALL, "--config.rollout.pool=4"], "rollout.pool=4: smaller than rollout.slots=128"),
    ([SMALL, "--confg.seed=3"], "Unknown command line flag 'confg.seed'"),
    ([SMALL, "--dø=3"], "Unknown command line flag 'dø'"),
    ([SMALL, "stray"], "unexpected argument 'stray': everything is given by flags, see --help"),
    ([SMALL, "--do=missing"], "[Errno 2] No such file or directory: '/nowhere/file'"),
  ],
)
def test_mistakes_are_one_line(run, arguments, message):
  done = run(*arguments)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_bugs_keep_their_traceback_and_debug_shows_all(run):
  done = run(SMALL, "--do=bug")
  assert done.returncode == 1 and "Traceback" in done.stderr and done.stderr.endswith("ValueError: a bug\n")
  done = run(SMALL, "--config.rollout.pool=4", "--debug")
  assert done.returncode == 1 and "Traceback" in done.stderr and "ConfigError: rollout.pool=4" in done.stderr


def test_interrupt(run):
  done = run(SMALL, "--do=interrupt")
  assert done.returncode == 128 + signal.SIGINT and done.stderr == "interrupted\n"


def test_help_shows_the_example_and_the_flags(run):
  done = run("--help")
  assert done.returncode == 0 and done.stderr == ""
  for text in ("python show.py --config=configs/ring_tiny.py --config.seed=3", "--config:", "--do:", "--[no]debug:"):
    assert text in done.stdout
  done = subprocess.run([sys.executable, "-m", "ring_jax.launch.score", "--help"], capture_output=True, text=True)
  assert "--checkpoint=Ring-mini-2.0 --tokens=ids.npy" in done.stdout and "--dtype:" in done.stdout


def test_score_and_digest_name_what_is_missing(tmp_path):
  def call(command, *arguments):
    module = f"ring_jax.launch.{command}"
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)

  done = call("digest")
  assert done.returncode == 2 and "--checkpoint must have a value other than None" in done.stderr
  done = call("digest", f"--checkpoint={tmp_path}/x")
  assert done.returncode == 2 and done.stderr.startswith(
    f"error: {tmp_path}/x: is no checkpoint (no such folder); give"
  )
  done = call("score", f"--checkpoint={tmp_path}", f"--tokens={tmp_path}/ids.npy", "--out=x.npz")
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert done.stderr == f"error: [Errno 2] No such file or directory: '{tmp_path}/ids.npy'\n"
