"""One RL step on the PyTorch/vLLM path, and the same step in JAX: they end with the same parameters.

    vLLM's rollouts -> verifier -> advantages -> IcePop -> AdamW

The rollouts are made once, by real vLLM in its own process, with its own log-probs as the sampling policy's.  Both trainers
then take three optimizer steps from them: the twin in PyTorch, one sequence a row, and the real `Programs` in JAX over packed
microbatches.
"""

import pathlib
import tempfile
import time

from configs.schema import IcePopConfig
from parity.cases import Case
from parity.compare import Row, Suite, Tier
from parity.suites import engine
from parity.suites.model import JAX_TWIN
from parity.suites.objective import TEMPERATURE, Objective, Training
from parity.torch_twin import weights
from parity.vllm.export import export
from parity.vllm.runner import VLLM
from parity.vllm.trainer import make_probe
from ring_jax.records import Rollout

_MAX_TOKENS = 8  # with the longest prompt, a row of the objective suite


def vllm_rollouts(interpreter: str | None, groups: int) -> list[Rollout]:
  """Scored rollouts of the engine suite's model, from vLLM in float32."""
  params = engine.random_model()
  with tempfile.TemporaryDirectory() as folder, VLLM(interpreter) as vllm:
    exported = export(pathlib.Path(folder) / "model", engine.MODEL, params)
    probe = make_probe(engine.MODEL, params)
    rollouts, _ = engine.one_step(
      vllm, exported, probe, engine.MODEL, groups, max_tokens=_MAX_TOKENS, temperature=TEMPERATURE
    )
  return rollouts


def run(quick: bool = True, interpreter: str | None = None) -> Suite:
  """Both tiers.

  Raises:
    VLLMError: vLLM is not there, or does not hold the trainer's weights.
  """
  started = time.perf_counter()
  rollouts = vllm_rollouts(interpreter, 4 if quick else 16)
  case = Case("vLLM's rollouts", engine.MODEL)
  training = Training(case, Objective("three steps", IcePopConfig(), 1), weights.build, lambda _: rollouts)
  tiers = [
    _tier("step", "From vLLM's rollouts both trainers compute the same objective.", training.objective_rows(), started)
  ]
  started = time.perf_counter()
  proves = "One step after another, both trainers end with the same parameters."
  tiers.append(_tier("step parameters", proves, training.parameter_rows(), started))
  return Suite("step", tiers)


def _tier(name: str, proves: str, rows: list[Row], started: float) -> Tier:
  return Tier(name, proves, JAX_TWIN, rows, time.perf_counter() - started)
