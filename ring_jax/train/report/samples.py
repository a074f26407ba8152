"""What was generated, rewarded and trained on: one file of records and one to read, for every RL step.

    rollouts/step_000123.jsonl   one JSON object a trained rollout
    rollouts/step_000123.txt     a few groups as text

Each file is written as a whole, so a run that was killed and resumed ends with the same files.
"""

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from ring_jax.records import Rollout
from ring_jax.train.workdir import write_atomic

# A rollout -> its prompt and its answer as text.
Describe = Callable[[Rollout], tuple[str, str]]

_NAME = re.compile(r"\.?step_(\d+)\.(jsonl|txt)(\.tmp)?")


class SampleLog:
  """Args:
  folder: the workdir's `rollouts`.
  groups: how many groups of a step the text shows.
  """

  def __init__(self, folder: pathlib.Path, groups: int = 2):
    self._folder, self._groups = folder, groups

  def write(
    self, step: int, version: int, rollouts: Sequence[Rollout], advantages: Sequence[float], describe: Describe
  ) -> None:
    """Writes both files of a step.

    Args:
      step: steps of all phases that are finished, as in metrics.jsonl.
      version: of the weights that these rollouts updated; a token's staleness is this minus its own version.
      rollouts: with their rewards, members of a group together.
      advantages: one a rollout.
    """
    records = [
      _record(rollout, float(advantage), *describe(rollout))
      for rollout, advantage in zip(rollouts, advantages, strict=True)
    ]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomic(self._path(step, "jsonl"), "".join(lines))
    write_atomic(self._path(step, "txt"), self._text(step, version, records))

  def truncate(self, step: int) -> None:
    """Removes the files of later steps (-1: all), and what a killed write left."""
    for path in sorted(self._folder.iterdir()):
      match = _NAME.fullmatch(path.name)
      if match and (int(match[1]) > step or match[3]):
        path.unlink()

  def _path(self, step: int, kind: str) -> pathlib.Path:
    return self._folder / f"step_{step:06d}.{kind}"

  def _text(self, step: int, version: int, records: Sequence[dict[str, Any]]) -> str:
    groups = list(dict.fromkeys(record["group"] for record in records))
    parts = [f"step {step}: {len(records)} rollouts of {len(groups)} groups; the first {self._groups} groups\n"]
    for group in groups[: self._groups]:
      members = [record for record in records if record["group"] == group]
      parts.append(f"\n{'=' * 100}\nproblem {members[0]['problem']}, group {group}\n\n{members[0]['prompt']}\n")
      parts.extend(f"\n{_headline(member, version)}\n{member['completion']}\n" for member in members)
    return "".join(parts)


def _record(rollout: Rollout, advantage: float, prompt: str, completion: str) -> dict[str, Any]:
  return {
    "uid": rollout.uid,
    "group": rollout.group,
    "problem": rollout.problem,
    "prompt": prompt,
    "completion": completion,
    "prompt_tokens": rollout.prompt,
    "tokens": rollout.tokens,
    "logps": rollout.logps,
    "versions": rollout.versions,
    "reward": rollout.reward,
    "advantage": advantage,
    "finish_reason": None if rollout.finish_reason is None else rollout.finish_reason.value,
  }


def _headline(record: dict[str, Any], version: int) -> str:
  stale = [version - used for used in record["versions"]]
  age = f", up to {max(stale)} versions stale" if max(stale, default=0) else ""
  reward = "none" if record["reward"] is None else f"{record['reward']:g}"
  return (
    f"--- rollout {record['uid']}: reward {reward}, advantage {record['advantage']:+.3f},"
    f" {len(record['tokens'])} tokens, {record['finish_reason']}{age}"
  )
