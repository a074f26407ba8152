"""vLLM as the shadow actor: it draws the rollouts of every step from the weights that were just handed to it.

It stands on the first rank of the rollout role (torch_twin/placed.py), which has the weights whole once they have crossed.
Each step exports them, opens them in a fresh engine and proves the hand-over by a probe before a token is drawn.
"""

import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from configs.schema import ModelConfig
from parity import recorded
from parity.rlhf import Minibatches
from parity.torch_twin import step, weights
from parity.vllm.export import export
from parity.vllm.runner import VLLM, Probe, Sampling
from ring_jax.records import Rollout

_PROBE_LENGTH = 48


class ShadowActor:
  """A `placed.Draw`.

  Args:
    config: the actor's.
    prompts: of each step; each is a group.
    sampling: its seed grows with the version, so that steps do not draw the same.
    verify: rollout -> reward; must be picklable.
    interpreter: the Python that has vLLM; default: this one.
  """

  def __init__(
    self, config: ModelConfig, prompts: Sequence[Sequence[Sequence[int]]], sampling: Sampling,
    verify: Callable[[Rollout], float], interpreter: str | None = None,
  ):  # fmt: skip
    self._config, self._prompts, self._sampling = config, prompts, sampling
    self._verify, self._interpreter = verify, interpreter
    self._vllm: VLLM | None = None  # starts in the process that draws

  def draw(self, params: Mapping[str, Any], version: int) -> Minibatches:
    """All rollouts of a step, as one minibatch.

    Raises:
      VLLMError: vLLM is not there, or does not hold these weights.
    """
    if self._vllm is None:
      self._vllm = VLLM(self._interpreter)
    sampling = Sampling(**(vars(self._sampling) | {"seed": self._sampling.seed + version}))
    with tempfile.TemporaryDirectory() as folder:
      exported = export(pathlib.Path(folder) / "model", self._config, params)
      prompts = self._prompts[version]
      reply = self._vllm.run(exported, probe=self._probe(params), prompts=prompts, sampling=sampling)
    rollouts = recorded.from_vllm(prompts, reply.samples, version)
    for rollout in rollouts:
      rollout.reward = self._verify(rollout)
    return [rollouts]

  def close(self) -> None:
    if self._vllm is not None:
      self._vllm.close()

  def _probe(self, params: Mapping[str, Any]) -> Probe:
    """A random sequence, and what the twin says of it."""
    ids = np.random.default_rng(0).integers(0, self._config.vocab_size, _PROBE_LENGTH).tolist()
    sequence = Rollout(0, 0, 0, ids[:1], ids[1:])
    return Probe(ids, step.answer_logps(weights.build(self._config, params), [sequence], step.Scorer())[0])
