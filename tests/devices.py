"""Tests that need several devices: a function in a process of its own, where the CPU plays as many as asked for.

    run_on_devices(8, "tests.kernels.partitioned_cases:values_and_gradients")

The tests' own process keeps one device, as JAX fixes their number when it starts.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# XLA_FLAGS of processes that spend their time in XLA and not in what it makes; the Makefile has the same for whole modules.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def run_on_devices(count: int, target: str, timeout: float = 600) -> str:
  """Runs "module:function" without arguments and returns what it printed; raises AssertionError if it fails."""
  module, function = target.split(":")
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
  code = f"import {module} as m; m.{function}()"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
  )
  assert done.returncode == 0, f"{target} on {count} devices:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
  return done.stdout
