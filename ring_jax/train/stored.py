"""The rollouts that a run has stored: found again, and scored again.

Reads `rollouts/step_*.jsonl` of a workdir (report/samples.py writes them), step by step, of a running run too.  Scoring
again asks the verifiers of the run's own config about the stored tokens; where a scorer was changed, or a deadline was met
the one time and not the other, the scores differ.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.schema import ConfigError, Reward, RunConfig
from ring_jax.records import FinishReason, Rollout, read_lines
from ring_jax.rewards.pool import ScoringPool
from ring_jax.train.assets import prepare_tasks, require_built
from ring_jax.train.report import metrics
from ring_jax.train.scoring import Scorer

_NAME = re.compile(r"step_(\d+)\.jsonl")
_FIELDS = [field.name for field in dataclasses.fields(Rollout)]


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`, both included."""

  low: float = -math.inf
  high: float = math.inf

  def __contains__(self, value: float | None) -> bool:
    return value is not None and self.low <= value <= self.high

  @classmethod
  def parse(cls, name: str, text: str) -> "Range":
    """From "3", "3:7", "3:" or ":7".

    Args:
      name: of the flag, for the error.
    """
    low, colon, high = text.partition(":")
    try:
      chosen = cls(float(low or "-inf"), float(high or "inf") if colon else float(low))
    except ValueError:
      raise ConfigError(f"--{name}={text}: must be a number, or LOW:HIGH with one of both left out at most") from None
    if not chosen.low <= chosen.high or text == ":":
      raise ConfigError(f"--{name}={text}: holds no number; LOW:HIGH with LOW at most HIGH")
    return chosen


@dataclasses.dataclass(frozen=True)
class Query:
  """Which rollouts; None: all."""

  step: Range | None = None
  problem: Range | None = None
  group: Range | None = None
  uid: Range | None = None
  reward: Range | None = None
  length: Range | None = None  # tokens of the answer
  finish_reason: FinishReason | None = None

  def takes(self, record: Mapping[str, Any]) -> bool:
    numbers = {name: record[name] for name in ("step", "problem", "group", "uid", "reward")}
    numbers["length"] = len(record["tokens"])
    reason = self.finish_reason is None or record["finish_reason"] == self.finish_reason.value
    return reason and all(
      chosen is None or number in chosen for name, number in numbers.items() if (chosen := getattr(self, name))
    )


def find(workdir: pathlib.Path, query: Query) -> Iterator[dict[str, Any]]:
  """Records with their step, in the order of steps.

  Raises:
    ConfigError: there are no rollouts, or a file holds something else.
  """
  folder = workdir / "rollouts"
  files = sorted((int(match[1]), path) for path in folder.glob("*") if (match := _NAME.fullmatch(path.name)))
  if not files:
    raise ConfigError(f"--workdir={workdir}: rollouts/ holds no steps; they come with the first RL step")
  for step, path in files:
    if query.step is None or step in query.step:
      for number, line in enumerate(read_lines(path), 1):
        try:
          record = {"step": step, **json.loads(line)}
          taken = query.takes(record)
        except (ValueError, KeyError, TypeError):
          raise ConfigError(f"{path}: line {number} is no rollout: {line[:60]!r}") from None
        if taken:
          yield record


@dataclasses.dataclass(frozen=True)
class Rescored:
  """What the verifiers say now."""

  scored: int
  left_out: int  # what no verifier had scored: the reward model's phases
  kinds: dict[str, int]  # how many were scored, had no answer, timed out, ...
  differing: list[dict[str, Any]]  # step, uid, problem, stored and new reward

  def lines(self) -> list[str]:
    """For a person."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
    rest = f"; {self.left_out} left out, whose reward is a reward model's" if self.left_out else ""
    lines = [f"{self.scored} scored again ({kinds}): {len(self.differing)} rewards differ{rest}"]
    return lines + [
      f"  step {one['step']}, rollout {one['uid']}, problem {one['problem']}: {one['stored']} stored, {one['now']} now"
      for one in self.differing
    ]


def rescore(workdir: pathlib.Path, config: RunConfig, records: Sequence[Mapping[str, Any]]) -> Rescored:
  """Asks the run's verifiers again.

  Raises:
    ConfigError: the run's tokenizer is gone.
  """
  require_built(config.tokenizer, config.init, workdir)
  phases = {record["step"]: record["phase"] for record in metrics.read(workdir / "metrics.jsonl")}
  phase_of = lambda record: "rlhf" if phases.get(record["step"]) == "rlhf" else "rl"  # noqa: E731
  asked = [record for record in records if config.phase(phase_of(record)).reward is Reward.VERIFIER]
  tokenizer, tasks = prepare_tasks(config.task, config.tokenizer, config.rollout, config.seed, config.init, workdir)
  rollouts = [_rollout(record) for record in asked]
  with ScoringPool(config.task, thinking=config.tokenizer.thinking) as pool:
    kinds = Scorer(pool, tokenizer).score(rollouts, lambda rollout: tasks.train(rollout.problem))
  differing = [
    {**{name: record[name] for name in ("step", "uid", "problem")}, "stored": record["reward"], "now": rollout.reward}
    for record, rollout in zip(asked, rollouts, strict=True)
    if record["reward"] != rollout.reward
  ]
  counts = collections.Counter({kind.value: count for kind, count in kinds.items()})
  return Rescored(len(asked), len(records) - len(asked), dict(counts.most_common()), differing)


def _rollout(record: Mapping[str, Any]) -> Rollout:
  stored = {name: record[name] for name in _FIELDS if name in record}
  return Rollout.from_dict({**stored, "prompt": record["prompt_tokens"], "reward": None})


def text(record: Mapping[str, Any]) -> str:
  """For a person."""
  versions = record["versions"]
  drawn_by = f", weights {min(versions)} to {max(versions)}" if versions else ""
  return (
    f"--- step {record['step']}, rollout {record['uid']}, group {record['group']}, problem {record['problem']}:"
    f" reward {record['reward']}, {len(record['tokens'])} tokens, {record['finish_reason']}{drawn_by}\n"
    f"{record['prompt']}\n{record['completion']}\n"
  )
