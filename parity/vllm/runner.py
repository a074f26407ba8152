"""The parent's side of vLLM: starts the child, asks, waits, and turns everything that can go wrong into one line.

    with VLLM(interpreter) as vllm:                           # the import takes 7 to 17 s, once
      reply = vllm.run(folder, probe=probe, prompts=..., sampling=Sampling(max_tokens=16))

A handed-over checkpoint is proven by a probe: vLLM scores a fixed sequence with the engine that then samples, and what
it says must be what the trainer says.  Without that, a folder with another step's weights, or a reload that silently
failed, would look like a training problem (vllm_cpu.md trap 3).
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from parity.vllm.errors import VLLMError, WrongWeightsError
from parity.vllm.export import check_shapes
from ring_jax.checkpoint import hf_config
from rollout.line_process import LineProcess

_CHILD = pathlib.Path(__file__).with_name("child.py")


@dataclasses.dataclass(frozen=True)
class Sampling:
  max_tokens: int
  temperature: float = 1.0
  seed: int = 0
  n: int = 1  # answers to each prompt
  stop: tuple[int, ...] = ()  # token ids that end an answer; they are recorded


@dataclasses.dataclass(frozen=True)
class Sample:
  tokens: list[int]
  logps: list[float]  # of the distribution that was drawn from
  finish_reason: str  # "stop" or "length"


@dataclasses.dataclass(frozen=True)
class Reply:
  scored: list[np.ndarray]  # one a sequence: log-probs [T - 1] of its tokens from the second on
  samples: list[list[Sample]]  # n a prompt
  experts: list[dict[int, np.ndarray]]  # one a scored sequence: ids [T, K] by layer, where asked for


@dataclasses.dataclass(frozen=True)
class Probe:
  """A sequence, and what the trainer says of it."""

  tokens: list[int]
  logps: np.ndarray  # [T - 1]

  def check(self, logps: np.ndarray, dtype: str, folder: str | os.PathLike) -> None:
    """Raises:
    WrongWeightsError: the engine's log-probs are not the trainer's.

    float32 engines agree on every token.  In bfloat16 a few tokens take other experts, so the median is compared: it
    catches another checkpoint, not a single small step.
    """
    difference = np.abs(np.asarray(logps, np.float64) - self.logps)
    measured, limit, what = (
      (float(difference.max()), 1e-4, "largest")
      if dtype == "float32"
      else (float(np.median(difference)), 0.1, "median")
    )
    if not measured <= limit:
      raise WrongWeightsError(
        f"{folder}: vLLM does not hold the trainer's weights: the {what} difference of the probe's log-probs is"
        f" {measured:.3g}, at most {limit:g} is allowed in {dtype}; export the checkpoint again and start a new engine"
      )


class VLLM(LineProcess):
  """A child process with vLLM; requests are served in turn, each by a fresh engine.

  Args:
    interpreter: the Python that has vLLM; default: this one.
    timeout: seconds to wait for the start and for each reply.
    kv_cache_bytes: what each engine may take for keys and values.
    gpu_memory_utilization: on a GPU, the share of its memory that an engine may use.

  Raises:
    VLLMError: the interpreter cannot be started or has no vLLM.
  """

  def __init__(
    self,
    interpreter: str | None = None,
    *,
    timeout: float = 600.0,
    kv_cache_bytes: int = 64 << 20,
    gpu_memory_utilization: float = 0.5,
  ):
    self._memory = {"kv_cache_bytes": kv_cache_bytes, "gpu_memory_utilization": gpu_memory_utilization}
    command = [interpreter or sys.executable, str(_CHILD)]
    super().__init__(command, name="vLLM", error=VLLMError, timeout=timeout)
    self.versions: Mapping[str, str] = self.greeting["versions"]
    self.device: str = self.greeting["device"]

  def run(
    self,
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    probe: Probe | None = None,
    score: Sequence[Sequence[int]] = (),
    prompts: Sequence[Sequence[int]] = (),
    sampling: Sampling | None = None,
    experts: bool = False,
  ) -> Reply:
    """Opens a folder in a fresh engine, proves it with the probe, scores and samples.

    Args:
      folder: as `parity.vllm.export` writes it.
      dtype: the engine's, "float32" or "bfloat16".
      probe: what the trainer says of one sequence; checked before anything is returned.
      score: token sequences whose log-probs are wanted.
      prompts, sampling: what to sample from, and how.
      experts: also return the experts of the scored sequences.

    Raises:
      VLLMError: a request that vLLM cannot serve, or one that it failed on.
      WrongWeightsError: the probe says that the engine holds other weights.
    """
    sequences = [list(map(int, ids)) for ids in score]
    asked = [list(map(int, ids)) for ids in prompts]
    length = self._check(folder, [*sequences, *([probe.tokens] if probe else [])], asked, sampling)
    request = {
      "model": os.fspath(folder),
      "dtype": dtype,
      "score": [*([probe.tokens] if probe else []), *sequences],
      "prompts": asked,
      "sampling": dataclasses.asdict(sampling) if sampling else None,
      "experts": experts,
      "max_model_len": length,
      **self._memory,
    }
    reply = self.ask(request, f"running {request['model']}")
    scored = [np.asarray(logps, np.float32) for logps in reply["scored"]]
    chosen = [{int(layer): np.asarray(ids, np.int32) for layer, ids in one.items()} for one in reply["experts"]]
    if probe:
      probe.check(scored[0], dtype, folder)
      scored, chosen = scored[1:], chosen[1:]
    return Reply(scored, [[Sample(**one) for one in group] for group in reply["samples"]], chosen)

  def _check(
    self,
    folder: str | os.PathLike,
    scored: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None,
  ) -> int:
    """What vLLM would refuse with many lines, refused with one; returns the longest sequence to come."""
    config, raw = hf_config.read(pathlib.Path(folder))
    check_shapes(config)
    if "auto_map" not in raw:
      raise VLLMError(f"{folder}: config.json has no auto_map; write the folder with parity.vllm.export")
    if prompts and sampling is None:
      raise VLLMError("prompts without sampling: say how many tokens to draw")
    if any(len(ids) < 2 for ids in scored) or any(not ids for ids in prompts):
      raise VLLMError("a sequence to score needs at least 2 tokens, a prompt at least 1")
    outside = [token for ids in [*scored, *prompts] for token in ids if not 0 <= token < config.vocab_size]
    if outside:
      raise VLLMError(f"token id {outside[0]}: the model's vocabulary has {config.vocab_size}")
    answer = sampling.max_tokens if sampling and prompts else 0
    length = max([len(ids) + 1 for ids in scored] + [len(ids) + answer for ids in prompts], default=0)
    if not length:
      raise VLLMError("nothing to score and no prompts")
    if length > config.max_position_embeddings:
      raise VLLMError(f"a sequence of {length} tokens: model.max_position_embeddings={config.max_position_embeddings}")
    return length
