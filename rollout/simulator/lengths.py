"""Traces: how long each answer is, read from a file or drawn from a distribution.

A trace file is JSONL, one answer a line, siblings together or not:

    {"prompt_id": 17, "sample_id": 0, "prompt_tokens": 210, "response_tokens": 3907}

The three generators draw a normal z for every rollout, correlated inside a group by a share rho of common variance
(z = sqrt(rho) z_group + sqrt(1 - rho) z_own), and map it to a length:

    lognormal   exp(mu + sigma z)
    pareto      x_m (1 - Phi(z))^(-1 / alpha)           tail index alpha > 1
    bimodal     log-normal about an easy or, where z is among the upper `hard_share`, a hard mean `hard_factor` times as large

`mean` is that of the distribution before lengths are rounded up and cut at `cap`.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np

from configs.base import ConfigError, Enum, coerce_enum, require

_FIELDS = ("prompt_id", "sample_id", "prompt_tokens", "response_tokens")


class Shape(Enum):
  LOGNORMAL = "lognormal"
  PARETO = "pareto"
  BIMODAL = "bimodal"


# What each shape needs beside mean, cap, correlation.
PARAMETERS = {
  Shape.LOGNORMAL: ("sigma",),
  Shape.PARETO: ("alpha",),
  Shape.BIMODAL: ("sigma", "hard_share", "hard_factor"),
}


@dataclasses.dataclass(frozen=True)
class Trace:
  """Answers in the order in which prompts enter; entry u is the scheduler's rollout u, of group u // group_size."""

  group_size: int
  lengths: list[int]  # tokens of the answer, at least 1
  prompts: list[int]  # tokens of its prompt

  def __post_init__(self):
    if len(self.lengths) != len(self.prompts) or len(self.lengths) % self.group_size:
      raise ValueError(
        f"{len(self.lengths)} lengths and {len(self.prompts)} prompts do not make groups of {self.group_size}"
      )

  @property
  def groups(self) -> int:
    return len(self.lengths) // self.group_size

  @property
  def mean(self) -> float:
    return sum(self.lengths) / len(self.lengths)


@dataclasses.dataclass(frozen=True)
class Generator:
  """A distribution of answer lengths (module docstring)."""

  shape: Shape
  mean: float = 4096.0
  cap: int = 32_768  # the answer's limit: longer ones end there
  sigma: float = 1.2  # of the log length
  alpha: float = 1.5
  hard_share: float = 0.2
  hard_factor: float = 8.0
  correlation: float = 0.0  # rho
  prompt_tokens: int = 256
  seed: int = 0

  def __post_init__(self):
    coerce_enum(self, "shape", Shape, "generator")
    require(self.mean >= 1, f"generator.mean={self.mean}: must be at least 1 token")
    require(self.cap >= 1, f"generator.cap={self.cap}: must be at least 1 token")
    require(0 <= self.sigma <= 10, f"generator.sigma={self.sigma}: from 0 to 10")
    require(self.alpha > 1, f"generator.alpha={self.alpha}: must be > 1, else the distribution has no mean")
    require(0 < self.hard_share < 1, f"generator.hard_share={self.hard_share}: between 0 and 1")
    require(self.hard_factor >= 1, f"generator.hard_factor={self.hard_factor}: must be at least 1")
    require(0 <= self.correlation <= 1, f"generator.correlation={self.correlation}: from 0 to 1")
    require(self.prompt_tokens >= 1, f"generator.prompt_tokens={self.prompt_tokens}: must be at least 1")
    require(self.seed >= 0, f"generator.seed={self.seed}: must be at least 0")

  def draw(self, groups: int, group_size: int) -> Trace:
    rng = np.random.default_rng(self.seed)
    shape = (groups, group_size)
    common = rng.standard_normal((groups, 1))
    z = math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * rng.standard_normal(shape)
    lengths = self._lengths(z, rng)
    lengths = np.clip(np.ceil(lengths), 1, self.cap).astype(np.int64).ravel().tolist()
    return Trace(group_size, lengths, [self.prompt_tokens] * len(lengths))

  def _lengths(self, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if self.shape is Shape.PARETO:
      upper = np.array([math.erfc(value / math.sqrt(2)) / 2 for value in z.ravel().tolist()]).reshape(z.shape)
      smallest = self.mean * (self.alpha - 1) / self.alpha
      return smallest * upper ** (-1 / self.alpha)
    log_mean = math.log(self.mean)
    if self.shape is Shape.BIMODAL:
      hard = z > statistics.NormalDist().inv_cdf(1 - self.hard_share)
      log_mean = log_mean - math.log(1 + self.hard_share * (self.hard_factor - 1))
      log_mean = log_mean + np.where(hard, math.log(self.hard_factor), 0.0)
      z = rng.standard_normal(z.shape)
    return np.exp(log_mean - self.sigma**2 / 2 + self.sigma * z)


def read_trace(path: str, group_size: int | None = None) -> Trace:
  """Reads a trace file; prompts keep the order in which they first appear, samples that of their lines.

  Args:
    path: of the file.
    group_size: how many samples every prompt must have; None: as many as the first has.  1: every line is a prompt of its
      own, whatever its prompt_id.

  Raises:
    ConfigError: what is wrong, with the number of the line.
  """
  alone = group_size == 1
  groups: dict[Any, list[tuple[int, int]]] = {}
  seen: set[tuple[Any, Any]] = set()
  try:
    with pathlib.Path(path).open(encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        prompt, sample, prompt_tokens, tokens = _parse(line, f"{path}, line {number}")
        if (prompt, sample) in seen and not alone:
          raise ConfigError(f"{path}, line {number}: sample {sample!r} of prompt {prompt!r} stands there twice")
        seen.add((prompt, sample))
        groups.setdefault(number if alone else prompt, []).append((prompt_tokens, tokens))
  except UnicodeDecodeError:
    raise ConfigError(f"{path}: is not a text file") from None
  except OSError as error:
    raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
  if not groups:
    raise ConfigError(f"{path}: holds no answer")
  size = group_size or len(next(iter(groups.values())))
  for prompt, samples in groups.items():
    if len(samples) != size:
      wanted = f"--group_size={size}" if group_size else f"the first prompt has {size}"
      raise ConfigError(
        f"{path}: prompt {prompt!r} has {len(samples)} samples, but {wanted}; --group_size=1 takes every line by itself"
      )
  return _from_groups(groups.values(), size)


def _from_groups(groups: Iterable[list[tuple[int, int]]], size: int) -> Trace:
  pairs = [pair for group in groups for pair in group]
  return Trace(size, [tokens for _, tokens in pairs], [prompt for prompt, _ in pairs])


def _parse(line: str, where: str) -> tuple[Any, Any, int, int]:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ConfigError(f"{where}: is not JSON ({error})") from None
  if not isinstance(record, dict):
    raise ConfigError(f"{where}: is {type(record).__name__}, must be an object with {', '.join(_FIELDS)}")
  missing = [name for name in _FIELDS if name not in record]
  if missing:
    raise ConfigError(f"{where}: lacks {', '.join(missing)}")
  for name in ("prompt_id", "sample_id"):
    if not isinstance(record[name], (int, str)):
      raise ConfigError(f"{where}: {name}={record[name]!r} must be an integer or a string")
  for name in ("prompt_tokens", "response_tokens"):
    value = record[name]
    if type(value) is not int or value < 1:
      raise ConfigError(f"{where}: {name}={value!r} must be an integer of at least 1")
  return tuple(record[name] for name in _FIELDS)
