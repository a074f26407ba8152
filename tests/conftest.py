"""What every test shares: the CPU backend as eight devices, and a compilation cache so that a second run is quick."""

import gc
import os
import pathlib
import sys

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # programs without a mesh run on the first
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
# Small programs too: a job is dozens of them, and many tests start jobs.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Machines are shared: how long an example takes tells nothing.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


def pytest_collection_finish():
  """What all modules imported stays: no collection has to look at it again."""
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forgotten():
  """What a module has traced and compiled: a worker that keeps that of all of them grows by gigabytes, and slows down."""
  yield
  if "jax" in sys.modules:
    sys.modules["jax"].clear_caches()
