"""Does the scheduling of a run again, from its event log, and checks every decision.

    python -m rollout.replay --workdir=runs/ring_tiny
    python -m rollout.replay --workdir=runs/ring_tiny --json

A fresh scheduler of the run's config is told what the run's was told, in the same order: prompts that came, tokens that were
drawn, what ended, which slots were lost, what others gave up.  Everything that it decides must be what the log says: what is
purged, how many prompts are wanted, who gets which slot, when an iteration is over, and what is trained on.  Exit status 1
and one line about the first difference where it is not.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from configs import loading
from configs.schema import ConfigError, RolloutConfig
from ring_jax.launch import app
from ring_jax.records import FinishReason
from rollout import events
from rollout.events import Entry
from rollout.scheduler import C3POScheduler, SchedulerError
from rollout.simulator.simulation import CountedRollout

FLAGS = flags.FLAGS
_SHOWN = 160  # characters of a decision


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Of a run, finished or not.", required=True)
  flags.DEFINE_bool("json", False, "Print one JSON object.")


@dataclasses.dataclass(frozen=True)
class Difference:
  """The first decision that is not the log's."""

  iteration: int
  line: int  # of the log, from 1
  decision: str
  logged: Any
  replayed: Any

  def __str__(self) -> str:
    return (
      f"iteration {self.iteration}, line {self.line}: {self.decision} was {_short(self.logged)},"
      f" replayed {_short(self.replayed)}"
    )


@dataclasses.dataclass
class Replayed:
  """What a replay went through."""

  iterations: int = 0
  events: int = 0
  rollouts_trained: int = 0
  tokens: int = 0  # drawn
  difference: Difference | None = None


class _Differs(Exception):
  def __init__(self, decision: str, logged: Any, replayed: Any):
    self.found = (decision, logged, replayed)


def replay(entries: Sequence[Entry], config: RolloutConfig) -> Replayed:
  """Up to the end of the log, or to the first difference."""
  if entries and not (isinstance(entries[0].event, events.Begin) and entries[0].event.iteration == 0):
    raise ConfigError(f"the event log begins with {_short(entries[0].event)}, not with the run's first iteration")
  told, replayed = _Told(config), Replayed()
  for line, (_, event) in enumerate(entries, 1):
    try:
      told.hear(event)
    except _Differs as error:
      replayed.difference = Difference(told.scheduler.iteration, line, *error.found)
      break
    except SchedulerError as error:
      decision = f"{type(event).__name__.lower()}, which the log has,"
      replayed.difference = Difference(told.scheduler.iteration, line, decision, "allowed", str(error))
      break
    replayed.events = line
  totals = told.scheduler.totals
  replayed.iterations, replayed.tokens = told.scheduler.iteration, totals.generated
  replayed.rollouts_trained = totals.trained_rollouts
  return replayed


class _Told:
  """A scheduler that hears of one event after the other."""

  def __init__(self, config: RolloutConfig):
    self.scheduler = C3POScheduler(config, CountedRollout)
    self._between = False  # two turns of the driver's loop: there it asks whether the iteration is over

  def hear(self, event: events.Event) -> None:
    scheduler = self.scheduler
    if self._between and isinstance(event, events.Abort | events.Admit | events.Place | events.Draw):
      _same("whether the iteration is over", False, scheduler.iteration_done)
    self._between = isinstance(event, events.Begin | events.Draw | events.Evict | events.Slots)
    match event:
      case events.Begin():
        self._begin(event)
      case events.Admit(wanted, prompts):
        _same("wanted groups", wanted, scheduler.wanted_groups)
        scheduler.admit([(problem, ()) for problem, _ in prompts])
        if len(prompts) < wanted:
          scheduler.close()
      case events.Place(placed):
        _same("wanted groups", 0, scheduler.wanted_groups)
        _same("placements", placed, [[slot, rollout.uid] for slot, rollout in scheduler.place()])
      case events.Draw(drawn=drawn):
        self._draw(drawn)
      case events.Evict(evicted):
        self._check_slots([[slot, uid] for slot, uid in evicted])
        for _, uid in evicted:
          scheduler.evict(uid)
      case events.Slots(slots):
        scheduler.set_slots(slots)
      case events.Abort(uids):
        for uid in uids:
          scheduler.finish(uid, FinishReason.ABORTED)
      case events.End():
        self._end(event)

  def _begin(self, event: events.Begin) -> None:
    scheduler = self.scheduler
    _same("the iteration", event.iteration, scheduler.iteration)
    scheduler.set_slots(event.slots)
    _same("what is purged", event.purged, [rollout.uid for rollout in scheduler.begin_iteration()])
    _same("what is in slots", event.running, [[slot, rollout.uid] for slot, rollout in scheduler.running().items()])

  def _draw(self, drawn: Sequence[Sequence[Any]]) -> None:
    self._check_slots([[slot, uid] for slot, uid, *_ in drawn])
    for _, uid, count, version, reason in drawn:
      self.scheduler.record(uid, range(count), range(count), version)
      if reason is not None:
        self.scheduler.finish(uid, FinishReason(reason))

  def _check_slots(self, logged: list[list[int]]) -> None:
    running = self.scheduler.running()
    for slot, uid in logged:
      _same(f"the rollout in slot {slot}", uid, running[slot].uid if slot in running else None)

  def _end(self, event: events.End) -> None:
    _same("whether the iteration is over", event.done, self.scheduler.iteration_done)
    result = self.scheduler.end_iteration(event.version)
    _same("what is trained on", event.trained, [rollout.uid for rollout in result.rollouts])
    for name in ("iteration", "counted", "in_flight", "buffered"):
      _same(name, getattr(event, name), getattr(result, name))


def _same(decision: str, logged: Any, replayed: Any) -> None:
  if logged != replayed:
    raise _Differs(decision, logged, replayed)


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def main() -> None:
  workdir = pathlib.Path(FLAGS.workdir).expanduser()
  config = loading.of_run(workdir, f"--workdir={workdir}").rollout
  found = replay(events.read(workdir / "events.jsonl"), config)
  if FLAGS.json:
    print(json.dumps({"same": found.difference is None, **dataclasses.asdict(found)}))
  elif found.difference is None:
    print(
      f"{found.iterations} iterations, {found.events} events, {found.tokens} tokens, {found.rollouts_trained} rollouts"
      " trained on: every decision is the same"
    )
  else:
    print(found.difference)
  if found.difference is not None:
    sys.exit(1)


if __name__ == "__main__":
  define_flags()
  app.run(main)
