"""The quick form of every study, as a user starts it: all of its programs, and its page."""

import os
import subprocess
import sys

import pytest

from ring_jax.studies.catalogue import STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_the_quick_form(name, tmp_path):
  command = [sys.executable, "-m", "ring_jax.launch.study", f"--name={name}", f"--workdir={tmp_path}", "--quick"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  found = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
  assert found.returncode == 0, found.stdout + found.stderr
  text = (tmp_path / f"{name}.md").read_text()
  assert "## Found" in text and "nan" not in text and "The quick form" in text
