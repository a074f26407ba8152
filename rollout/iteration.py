"""What an iteration of C3PO++ leaves behind: the rollouts to train on, and counts of what became of all others.

Plain data, as it is handed to the trainer, logged and stored.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ring_jax.records import Rollout

Histogram = collections.Counter[int]


@dataclasses.dataclass
class Counts:
  """What became of tokens and rollouts, over one iteration or over a whole run.

  At any moment, over a run: generated = trained + wasted + held (in the pool, the group buffer and Q_train).
  """

  generated: int = 0  # tokens sampled
  trained: int = 0  # tokens handed to the trainer
  wasted: int = 0  # tokens of rollouts that were dropped, aborted or started again
  finished: int = 0  # rollouts that ended, those cut short for training included
  trained_rollouts: int = 0
  trained_groups: int = 0  # distinct groups among them, an iteration
  dropped: int = 0  # rollouts purged and forgotten
  requeued: int = 0  # rollouts purged and started again
  cut: int = 0  # rollouts purged and trained on as they are
  aborted: int = 0  # rollouts taken away by the caller, or with their second slot, or late for their batch
  evicted: int = 0  # times that a slot gave its rollout back for want of cache
  redispatched: int = 0  # rollouts whose slot was lost, and that went on in another
  max_staleness: int = 0  # versions between the sampling of a trained token and its training
  staleness_sum: int = 0  # of the same, over all trained tokens
  # Histograms: number of tokens -> how many rollouts.
  lengths_finished: Histogram = dataclasses.field(default_factory=collections.Counter)
  lengths_trained: Histogram = dataclasses.field(default_factory=collections.Counter)
  lengths_wasted: Histogram = dataclasses.field(default_factory=collections.Counter)

  @property
  def mean_staleness(self) -> float:
    """Versions, over trained tokens; 0 where there are none."""
    return self.staleness_sum / self.trained if self.trained else 0.0

  def add(self, other: "Counts") -> None:
    for field in dataclasses.fields(self):
      mine, theirs = getattr(self, field.name), getattr(other, field.name)
      if field.name == "max_staleness":
        setattr(self, field.name, max(mine, theirs))
      elif isinstance(mine, collections.Counter):
        mine.update(theirs)
      else:
        setattr(self, field.name, mine + theirs)

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON data; a histogram is a list of [length, how many], shortest first."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {
      name: sorted([length, number] for length, number in value.items())
      if isinstance(value, collections.Counter)
      else value
      for name, value in values.items()
    }

  @classmethod
  def from_dict(cls, data: Mapping[str, Any]) -> "Counts":
    return cls(
      **{name: collections.Counter(dict(value)) if isinstance(value, list) else value for name, value in data.items()}
    )


@dataclasses.dataclass(frozen=True)
class IterationResult:
  """What one iteration hands to the trainer."""

  iteration: int  # from 0
  version: int  # the weights that are about to be updated
  rollouts: list[Rollout]  # Q_train, by uid, so that a group's members stand together
  purged: list[Rollout]  # as they were when their retention ran out, tokens included
  counted: int  # C: tokens that the budget counted
  counts: Counts  # of this iteration
  in_flight: int  # unfinished rollouts that the next iteration goes on with
  buffered: int  # finished rollouts that wait for their siblings

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON data that shares nothing with the result."""
    return vars(self) | {
      "rollouts": dump(self.rollouts),
      "purged": dump(self.purged),
      "counts": self.counts.to_dict(),
    }

  @classmethod
  def from_dict(cls, data: Mapping[str, Any]) -> "IterationResult":
    lists = {name: [Rollout.from_dict(entry) for entry in data[name]] for name in ("rollouts", "purged")}
    return cls(**{**data, **lists, "counts": Counts.from_dict(data["counts"])})

  def metrics(self) -> dict[str, float]:
    """Scalars for a log.  Lengths, in tokens, are those of all that ended and of all that is trained on: where the two
    differ for long, what is trained on is biased."""
    counts = self.counts
    return {
      "scheduler/tokens_generated": counts.generated,
      "scheduler/tokens_counted": self.counted,
      "scheduler/tokens_trained": counts.trained,
      "scheduler/tokens_wasted": counts.wasted,
      "scheduler/purged": len(self.purged),
      "scheduler/aborted": counts.aborted,
      "scheduler/evicted": counts.evicted,
      "scheduler/redispatched": counts.redispatched,
      "scheduler/in_flight": self.in_flight,
      "scheduler/buffered": self.buffered,
      "scheduler/staleness_mean": counts.mean_staleness,
      "scheduler/staleness_max": counts.max_staleness,
      **_summary("scheduler/length_finished", counts.lengths_finished),
      **_summary("scheduler/length_trained", counts.lengths_trained),
    }


def _summary(name: str, lengths: Histogram) -> dict[str, float]:
  """Mean, median, 95th percentile (nearest rank) and maximum; empty where nothing ended."""
  total = lengths.total()
  if not total:
    return {}
  summary = {f"{name}_mean": sum(length * number for length, number in lengths.items()) / total}
  below, wanted = 0, [("p50", 0.5), ("p95", 0.95), ("max", 1.0)]
  for length in sorted(lengths):
    below += lengths[length]
    while wanted and below >= wanted[0][1] * total:
      summary[f"{name}_{wanted.pop(0)[0]}"] = length
  return summary


def dump(rollouts: Iterable[Rollout]) -> list[dict[str, Any]]:
  """Plain data, in their order."""
  return [rollout.to_dict() for rollout in rollouts]
