"""Whether JAX runs on Pathways is told as its utilities tell it, which nobody else has to import."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from ring_jax.launch import app
from sharding import pathways
assert "pathwaysutils" not in sys.modules
import pathwaysutils
assert pathways.used() == bool(pathwaysutils.is_pathways_backend_used())
pathways.initialize()
from jax._src import xla_bridge
print(pathways.used(), "proxy" in xla_bridge._backend_factories)
"""


@pytest.mark.parametrize(
  ("platforms", "found"), [("cpu", "False False"), ("proxy,cpu", "True True"), ("", "False False")]
)
def test_used_and_prepared_where_the_platform_is_the_proxy(platforms, found):
  environment = os.environ | {"JAX_PLATFORMS": platforms}
  done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split("\n")[-2] == found
