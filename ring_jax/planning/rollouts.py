"""What the engine does in one step of RL: C3PO++ over answers of a given distribution, counted without prices.

The scheduler's decisions do not depend on what a step costs, so that one simulation (rollout/simulator) serves every
layout of an engine with so many slots.  The first iterations, in which the pool fills up, are left out; the others are
averaged.  A large run is simulated as one of a few hundred rollouts with slots, pool and budget in proportion: every slot
then does the same as before.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from configs.schema import RLConfig, RolloutConfig, RunConfig, Unit
from rollout.simulator.costs import Costs
from rollout.simulator.lengths import Trace
from rollout.simulator.simulation import Simulation

FILL = 0.95  # of a packed row

Answers = Callable[[int, int], Trace]  # asked for so many groups of a size

_WARM_UP, _COUNTED = 3, 3  # iterations
_SAMPLE = 512  # groups that the mean length is estimated from
_MARGIN = 1.5  # groups at hand, beyond what the means say
_ENOUGH = 512  # rollouts in flight; more are simulated in proportion


@dataclasses.dataclass(frozen=True)
class RolloutWork:
  """One iteration."""

  steps_by_active: Mapping[int, float]  # decode steps, by how many slots have a sequence
  cached: float  # tokens in the caches, summed over the steps
  prefill_tokens: float
  rollouts: float  # that end and are trained on
  tokens: float  # of their answers
  positions: float  # of prompts and answers
  attended: float  # earlier tokens of its sequence that a token sees, on average
  ended: tuple[float, ...]  # of each trained rollout, rising: the share of the iteration after which it was handed over

  @property
  def steps(self) -> float:
    return sum(self.steps_by_active.values())

  def parts(self, count: int) -> tuple[float, ...]:
    """The shares of the iteration after which each of `count` equal parts of the rollouts has ended."""
    if not self.ended:
      return tuple((part + 1) / count for part in range(count))
    lasts = [math.ceil((part + 1) * len(self.ended) / count) - 1 for part in range(count)]
    return (*(self.ended[last] for last in lasts[:-1]), 1.0)


class Rollouts:
  """`RolloutWork` of any engine, for one distribution of answers."""

  def __init__(self, answers: Answers):
    self._answers = answers
    self._simulated = functools.cache(self._simulate)

  def work(self, config: RolloutConfig) -> RolloutWork:
    # Neither of these decides anything.
    return self._simulated(dataclasses.replace(config, parallel=None, prefill_batch=1))

  def _simulate(self, whole: RolloutConfig) -> RolloutWork:
    scale = _scale(whole)
    part = lambda count: -(-count // scale)  # noqa: E731
    config = dataclasses.replace(
      whole, slots=whole.slots // scale, pool=max(whole.pool // scale, part(whole.launched) * whole.group_size),
      token_budget=part(whole.token_budget), batch_groups=part(whole.batch_groups), launch_groups=part(whole.launch_groups),
    )  # fmt: skip
    size, answers = config.group_size, functools.partial(_within, self._answers, config.max_tokens)
    sample = answers(_SAMPLE, size)
    an_iteration = config.batch_groups * size or config.token_budget / sample.mean
    rollouts = (_WARM_UP + _COUNTED) * an_iteration + config.pool
    trace = answers(math.ceil(_MARGIN * rollouts / size) + 1, size)
    simulation = Simulation(trace, config, Costs(decode_step=1.0, decode_per_slot=0.0))
    for _ in range(_WARM_UP):
      simulation.iterate()
    clock = simulation.clock
    before = (collections.Counter(clock.steps_by_active), clock.cached, clock.prefill_tokens)
    trained, ended = [], []
    for _ in range(_COUNTED):
      begun = clock.dispatches
      found = simulation.iterate().rollouts
      trained += found
      ended += _handed_over(found, simulation.ended, config.unit, begun, clock.dispatches)
    steps = clock.steps_by_active - before[0]
    lengths = [rollout.length + trace.prompts[rollout.uid] for rollout in trained]
    positions = sum(lengths)
    each = scale / _COUNTED
    return RolloutWork(
      steps_by_active={active * scale: count / _COUNTED for active, count in steps.items()},
      cached=(clock.cached - before[1]) * each,
      prefill_tokens=(clock.prefill_tokens - before[2]) * each,
      rollouts=len(trained) * each,
      tokens=sum(rollout.length for rollout in trained) * each,
      positions=positions * each,
      attended=sum(length * length for length in lengths) / (2 * positions) if positions else 0.0,
      ended=tuple(sorted(ended)),
    )


def _within(answers: Answers, most: int, groups: int, group_size: int) -> Trace:
  """Answers of at most so many tokens: where they come from, the engine may have been allowed more."""
  trace = answers(groups, group_size)
  return dataclasses.replace(trace, lengths=[min(length, most) for length in trace.lengths])


def _scale(config: RolloutConfig) -> int:
  """The power of two that slots and pool can be divided by, so that enough is left."""
  scale = 1
  while config.slots % (2 * scale) == 0 and config.pool >= 2 * scale * _ENOUGH:
    scale *= 2
  return scale


def _handed_over(rollouts, ended: Mapping[int, int], unit: Unit, begun: int, stopped: int) -> list[float]:
  """Shares of an iteration; a group is handed over with its last member."""
  lasts: dict[int, int] = collections.defaultdict(lambda: begun)
  key = (lambda rollout: rollout.group) if unit is Unit.GROUP else (lambda rollout: rollout.uid)
  for rollout in rollouts:  # what was purged and trained on has not ended by itself
    lasts[key(rollout)] = max(lasts[key(rollout)], ended.get(rollout.uid, stopped))
  return [(lasts[key(rollout)] - begun) / max(stopped - begun, 1) for rollout in rollouts]


def minibatches(rl: RLConfig, work: RolloutWork) -> int:
  """Optimizer steps of a step of RL."""
  return max(math.ceil(work.rollouts / rl.stream), 1) if rl.stream else rl.minibatches


def microbatches(config: RunConfig, phase: str, work: RolloutWork, share: float = 1.0) -> int:
  """Of a step of RL: each minibatch fills whole ones.

  Args:
    share: of the answers, that are trained on.
  """
  parts = minibatches(config.phase(phase), work)
  room = config.packing.rows * config.packing.length * FILL
  return parts * math.ceil(share * work.positions / parts / room)


def repeated(trace: Trace) -> Answers:
  """Those of a trace, from the start again where it has too few."""

  def draw(groups: int, group_size: int) -> Trace:
    count = groups * group_size
    times = -(-count // len(trace.lengths))
    return Trace(group_size, (trace.lengths * times)[:count], (trace.prompts * times)[:count])

  return draw
