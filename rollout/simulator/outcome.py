"""What a schedule did: totals, one entry an iteration, and how both compare with another schedule.

ideal          every trained token drawn in a full batch, no token for nothing: trained tokens / slots steps
utilisation    ideal steps / steps taken
speedup        seconds a trained token of the other schedule / seconds a trained token of this one, since schedules that
               throw answers away train on less of the same trace
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from rollout.simulator.clock import Clock
from rollout.simulator.costs import Costs
from rollout.simulator.lengths import Trace

Runs = list[tuple[int, int]]  # [version, tokens it drew], oldest first


@dataclasses.dataclass(frozen=True)
class Iteration:
  """One rollout phase and the update after it."""

  rollout_seconds: float
  prefill_seconds: float  # of these
  update_seconds: float  # weight sync and training
  steps: int
  busy: int  # slot-steps with a sequence
  tokens_generated: int
  tokens_trained: int
  tokens_wasted: int
  rollouts_trained: int
  max_staleness: int
  staleness_sum: int  # over trained tokens
  in_flight: int  # unfinished at its end


@dataclasses.dataclass
class Outcome:
  """A whole run over a trace."""

  schedule: str
  slots: int
  series: list[Iteration] = dataclasses.field(default_factory=list)
  lengths: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)  # of trained rollouts
  staleness: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)  # versions -> tokens
  lost: int = 0  # rollouts dropped or aborted
  fed: int | None = None  # iterations until the prompts ran out
  ideal_seconds: float = 0.0
  clock: Clock | None = None

  def total(self, name: str) -> float:
    return sum(getattr(iteration, name) for iteration in self.series)

  @property
  def tokens_trained(self) -> int:
    return self.total("tokens_trained")

  @property
  def rollout_seconds(self) -> float:
    return self.total("rollout_seconds")

  @property
  def seconds(self) -> float:
    return self.rollout_seconds + self.total("update_seconds")

  @property
  def utilisation(self) -> float | None:
    return _ratio(self.tokens_trained, self.slots * self.total("steps"))

  @property
  def fed_utilisation(self) -> float | None:
    """Up to the iteration in which the prompts ran out, without the end of the trace: drawn and not thrown away since."""
    fed = self.series[: self.fed]
    useful = sum(iteration.tokens_generated - iteration.tokens_wasted for iteration in fed)
    return _ratio(useful, self.slots * sum(iteration.steps for iteration in fed))

  def speedup_over(self, other: "Outcome", name: str) -> float | None:
    """By `name` (`rollout_seconds` or `seconds`) a trained token; None where one of them trained on nothing."""
    mine, theirs = (_ratio(getattr(one, name), one.tokens_trained) for one in (self, other))
    return _ratio(theirs, mine) if mine and theirs else None

  def summary(self, trace: Trace) -> dict[str, Any]:
    """Plain JSON data."""
    trained, steps = self.tokens_trained, self.total("steps")
    return {
      "iterations": len(self.series),
      "rollout_seconds": self.rollout_seconds,
      "end_to_end_seconds": self.seconds,
      "prefill_seconds": self.total("prefill_seconds"),
      "steps": steps,
      "utilisation": self.utilisation,
      "utilisation_while_fed": self.fed_utilisation,
      "time_utilisation": _ratio(self.ideal_seconds, self.rollout_seconds),
      "occupancy": _ratio(self.total("busy"), self.slots * steps),
      "tokens_generated": self.total("tokens_generated"),
      "tokens_trained": trained,
      "tokens_wasted": self.total("tokens_wasted"),
      "prefill_tokens": self.clock.prefill_tokens,
      "rollouts_trained": self.total("rollouts_trained"),
      "rollouts_lost": self.lost,
      "max_staleness": max((iteration.max_staleness for iteration in self.series), default=0),
      "mean_staleness": _ratio(self.total("staleness_sum"), trained) or 0.0,
      "staleness": {str(versions): self.staleness[versions] for versions in sorted(self.staleness)},
      "length_bias": length_bias(collections.Counter(trace.lengths), self.lengths),
    }


class Recorder:
  """Writes an `Outcome`, iteration by iteration."""

  def __init__(self, schedule: str, slots: int, costs: Costs, clock: Clock):
    self.outcome = Outcome(schedule, slots, clock=clock)
    self._costs, self._clock = costs, clock
    self._before = (0.0, 0.0, 0, 0)

  def end(self, version: int, trained: Iterable[tuple[int, Runs]], generated: int, wasted: int, in_flight: int) -> None:
    """Closes an iteration: `trained` are (length, runs), `generated` and `wasted` are tokens."""
    clock, outcome = self._clock, self.outcome
    staleness: collections.Counter[int] = collections.Counter()
    rollouts = tokens = 0
    for length, runs in trained:
      rollouts += 1
      tokens += length
      outcome.lengths[length] += 1
      for drawn_by, count in runs:
        staleness[version - drawn_by] += count
    now = (clock.prefill_seconds, clock.decode_seconds, clock.steps, clock.busy)
    prefill, decode, steps, busy = (after - before for after, before in zip(now, self._before, strict=True))
    self._before = now
    update = self._costs.sync + (self._costs.update_seconds(tokens) if tokens else 0.0)
    clock.wait(update)
    outcome.staleness.update(staleness)
    outcome.series.append(
      Iteration(
        rollout_seconds=prefill + decode,
        prefill_seconds=prefill,
        update_seconds=update,
        steps=steps,
        busy=busy,
        tokens_generated=generated,
        tokens_trained=tokens,
        tokens_wasted=wasted,
        rollouts_trained=rollouts,
        max_staleness=max(staleness, default=0),
        staleness_sum=sum(age * count for age, count in staleness.items()),
        in_flight=in_flight,
      )
    )

  def close(self, lost: int) -> Outcome:
    outcome = self.outcome
    outcome.lost = lost
    outcome.ideal_seconds = outcome.tokens_trained / outcome.slots * self._costs.decode_seconds(outcome.slots)
    return outcome


def length_bias(generated: collections.Counter[int], trained: collections.Counter[int]) -> dict[str, Any]:
  """How the lengths trained on differ from those of the trace; `distance` is Kolmogorov's: 0 alike, 1 apart."""
  total, count = generated.total(), trained.total()
  below_generated = below_trained = 0
  distance = 0.0
  for length in sorted(generated.keys() | trained.keys()):
    below_generated += generated[length]
    below_trained += trained[length]
    if count:
      distance = max(distance, abs(below_generated / total - below_trained / count))
  return {
    "mean_generated": _mean(generated),
    "mean_trained": _mean(trained),
    "max_generated": max(generated, default=None),
    "max_trained": max(trained, default=None),
    "distance": distance if count else None,
  }


def _mean(lengths: collections.Counter[int]) -> float | None:
  return _ratio(sum(length * number for length, number in lengths.items()), lengths.total())


def _ratio(part: float, whole: float) -> float | None:
  return part / whole if whole else None
