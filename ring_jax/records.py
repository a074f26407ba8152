"""The records that travel on the host side, from the scheduler to the training batch (architecture decision 8).

Plain data: no JAX, no arrays.  Everything here turns into JSON and back without loss.
"""

import base64
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from configs.schema import Enum


def read_lines(path: pathlib.Path) -> list[str]:
  """Of a file of records; `splitlines` would also cut at characters that a model may write, such as U+2028."""
  return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


class FinishReason(Enum):
  STOP = "stop"  # the model ended its turn
  LENGTH = "length"  # the answer reached its limit
  CACHE = "cache"  # prompt and answer together reached the end of the engine's cache
  PURGED = "purged"  # unfinished for longer than the retention limit
  ABORTED = "aborted"  # taken away by the caller, or lost with a second worker


@dataclasses.dataclass
class Rollout:
  """One answer to one prompt, as it grows, possibly over several weight versions."""

  uid: int  # unique in a run; with the position it keys the randomness (architecture decision 6)
  group: int  # uid of the group: the G answers to one prompt
  problem: int  # index of the problem in its task's training order
  prompt: list[int]  # token ids
  tokens: list[int] = dataclasses.field(default_factory=list)  # sampled so far
  logps: list[float] = dataclasses.field(default_factory=list)  # one a token, of the distribution it was drawn from
  versions: list[int] = dataclasses.field(default_factory=list)  # one a token: the weights that sampled it
  # One a token: the experts that predicted it, see `ring_jax.rl.replay`; empty bytes where nobody knows.  No entries: not recorded.
  experts: list[bytes] = dataclasses.field(default_factory=list)
  finish_reason: FinishReason | None = None  # None while unfinished
  reward: float | None = None  # None until scored
  retention: int = 0  # iterations it has survived unfinished
  losses: int = 0  # slots that were lost with it

  # What the scheduler does with the content of a rollout, and all it knows of it.  The simulator's rollouts have none,
  # only a length, and answer the same.

  @property
  def length(self) -> int:
    """Tokens sampled so far."""
    return len(self.tokens)

  def extend(self, tokens: Sequence[int], logps: Sequence[float], version: int, experts: Sequence[bytes] = ()) -> None:
    """Appends what the weights `version` sampled; experts: one entry a token, or none at all."""
    if experts or self.experts:
      self.experts.extend([b""] * (len(self.tokens) - len(self.experts)))
      self.experts.extend(experts or [b""] * len(tokens))
    self.tokens.extend(tokens)
    self.logps.extend(logps)
    self.versions.extend(itertools.repeat(version, len(tokens)))

  def restart(self) -> None:
    """Back to the prompt."""
    self.tokens, self.logps, self.versions, self.experts = [], [], [], []

  def staleness(self, version: int) -> tuple[int, int]:
    """Versions that have passed at `version` since each token was sampled: their sum, and the most; needs a token."""
    return len(self.versions) * version - sum(self.versions), version - min(self.versions)

  def to_dict(self) -> dict[str, Any]:
    """Plain data that shares nothing with the record."""
    data = {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}
    data["finish_reason"] = None if self.finish_reason is None else self.finish_reason.value
    data["experts"] = [base64.b64encode(entry).decode() for entry in self.experts]
    return data

  @classmethod
  def from_dict(cls, data: dict[str, Any]) -> "Rollout":
    data = dict(data)
    if data["finish_reason"] is not None:
      data["finish_reason"] = FinishReason(data["finish_reason"])
    data["experts"] = [base64.b64decode(entry) for entry in data.get("experts", [])]
    return cls(**data)
