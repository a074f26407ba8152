"""The quick form of every study, as a user starts it: all of its programs, its page, and a second call that measures nothing."""

import os
import subprocess
import sys

import pytest

from ring_jax.studies.catalogue import STUDIES
from ring_jax.studies.study import Settings


def study(name, workdir, *flags):
  command = [sys.executable, "-m", "ring_jax.launch.study", f"--name={name}", f"--workdir={workdir}", *flags]
  return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("name", STUDIES)
def test_the_quick_form(name, tmp_path):
  found = study(name, tmp_path, "--quick")
  assert found.returncode == 0, found.stdout + found.stderr
  text = (tmp_path / f"{name}.md").read_text()
  assert "## Found" in text and "nan" not in text and "The quick form" in text
  again = study(name, tmp_path, "--quick")
  count = len(STUDIES[name].points(Settings(quick=True)))
  assert again.returncode == 0 and f"{name}: {count} of {count} points are there" in again.stdout
