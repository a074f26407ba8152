"""Recorded rollouts: what a run or vLLM generated, as records that any training path can be fed with.

A run writes `rollouts/step_000123.jsonl` for every RL step (docs/workdir.md).  What has been read, or drawn from vLLM, is a
list of `ring_jax.records.Rollout` with tokens, log-probs and the version of every token, and can be replayed through the
JAX step and the PyTorch step alike.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from configs.schema import ConfigError
from parity.vllm.runner import Sample
from ring_jax.records import FinishReason, Rollout, read_lines


class Recorded(NamedTuple):
  rollouts: list[Rollout]
  advantages_R: np.ndarray  # float32, one a rollout, as the run computed them


def from_vllm(prompts: Sequence[Sequence[int]], samples: Sequence[Sequence[Sample]], version: int = 0) -> list[Rollout]:
  """vLLM's answers; each prompt is a group and a problem of its own."""
  rollouts = []
  for group, (prompt, answers) in enumerate(zip(prompts, samples, strict=True)):
    for answer in answers:
      rollout = Rollout(uid=len(rollouts), group=group, problem=group, prompt=list(prompt))
      rollout.tokens, rollout.logps = list(answer.tokens), list(answer.logps)
      rollout.versions = [version] * len(answer.tokens)
      rollout.finish_reason = FinishReason(answer.finish_reason)
      rollouts.append(rollout)
  return rollouts


def read(path: str | os.PathLike, step: int | None = None) -> Recorded:
  """The rollouts of one step of a run.

  Args:
    path: a jsonl file, a `rollouts` folder, or a workdir.
    step: which file of a folder; default: the last one.

  Raises:
    ConfigError: there is no such file, or a line of it is not a recorded rollout.
  """
  file = _find(pathlib.Path(path), step)
  rollouts, advantages = [], []
  for number, line in enumerate(read_lines(file), 1):
    try:
      data = json.loads(line)
      rollouts.append(_rollout(data))
      advantages.append(float(data["advantage"]))
    except (KeyError, TypeError, ValueError) as error:
      what = f"has no {error}" if isinstance(error, KeyError) else str(error)
      raise ConfigError(f"{file}: line {number} is not a recorded rollout: {what}") from None
  if not rollouts:
    raise ConfigError(f"{file}: holds no rollouts")
  return Recorded(rollouts, np.asarray(advantages, np.float32))


def _find(path: pathlib.Path, step: int | None) -> pathlib.Path:
  if path.is_file():
    return path
  folder = path / "rollouts" if (path / "rollouts").is_dir() else path
  pattern = "step_*.jsonl" if step is None else f"step_{step:06d}.jsonl"
  files = sorted(folder.glob(pattern))
  if not files:
    raise ConfigError(f"{path}: no {pattern} there; give a jsonl file, a rollouts folder or a workdir")
  return files[-1]


def _rollout(data: Mapping[str, Any]) -> Rollout:
  fields = {name: data[name] for name in ("uid", "group", "problem", "tokens", "logps", "versions", "reward")}
  if not len(fields["tokens"]) == len(fields["logps"]) == len(fields["versions"]):
    raise ValueError("tokens, logps and versions differ in length")
  reason = data["finish_reason"]
  return Rollout(**fields, prompt=data["prompt_tokens"], finish_reason=None if reason is None else FinishReason(reason))
