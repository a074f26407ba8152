"""What a step of RL takes under a placement: its stages played through on the devices, and the memory of each device.

    to host -> sync -> generate -> { score, logp, reference, reward, values } -> from host -> { train, critic } -> sync ...

The graph of a step (papers.md 1.4, 2.3, 2.4), with roles where `RunConfig.seats` puts them: stages whose roles share a
device take turns, all others overlap (sharding/timeline.py).  The answers of a step come in parts: one, or with rl.stream > 0
as many as there are minibatches; each part is judged and trained on as soon as it has ended, after the part before it.

    rollouts of step s     need the weights of version s - rl.staleness, and the engine
    step time              (end of step b - end of step a) / (b - a), once the pipeline is full
    bottleneck             the stage with most of the critical path between these two moments

Memory of a device: the weights of all roles on it, and the larger of two moments: generation with its cache, or the other
stages with the optimizer's state.  placement.switching=host takes the state away at the first and the cache at the second.

What a stage takes and a role holds comes from a `CostModel`; nothing here knows a chip, a model or the simulator
(architecture decision 12).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from configs import placement as placing
from configs.base import ConfigError, Enum
from configs.objective import Advantage, Denominator, OldPolicy, Reward
from configs.optimizer import Memory
from configs.placement import Role, Strategy, Switching
from configs.schema import RLConfig, RunConfig
from sharding.candidates import candidates, fewer_slots, naive, saving
from sharding.timeline import Span, Task, Timeline, groups_of

_STEPS, _FROM, _TO = 7, 3, 5  # steps that are played, and the two between whose ends is measured
_MOST_PARTS = 8  # of a step's answers; more are joined, which changes little


class Stage(Enum):
  TO_HOST = "to_host"  # the optimizer's state leaves for the host
  SYNC = "sync"  # the actor's weights to the engine
  SYNC_CRITIC = "sync_critic"  # the critic's to its shadow
  GENERATE = "generate"
  SCORE = "score"  # the verifier, on the host
  LOGP = "logp"  # the actor's log-probs at theta_old
  REFERENCE = "reference"
  REWARD = "reward"
  VALUES = "values"
  FROM_HOST = "from_host"
  TRAIN = "train"
  CRITIC = "critic"


@dataclasses.dataclass(frozen=True)
class Price:
  """Of a stage."""

  seconds: float
  bound: str  # what it mostly waits for: flops, hbm, links, host
  load: float = 0.0  # see timeline.Task


@dataclasses.dataclass(frozen=True)
class Generation:
  """The rollouts of a step."""

  price: Price
  ended: tuple[float, ...]  # share of its time after which each part has ended; the last is 1
  rollouts: float  # that a step trains on
  tokens: float  # of their answers


@dataclasses.dataclass(frozen=True)
class Holdings:
  """What a role holds on each of its devices, in bytes."""

  weights: int
  optimizer: int = 0
  cache: int = 0  # keys and values
  working: int = 0  # the most that its work needs beside


class CostModel(Protocol):
  capacity: float  # see timeline.py
  limit: float  # bytes of a device

  def generation(self, config: RunConfig, parts: int) -> Generation: ...

  def price(self, config: RunConfig, stage: Stage) -> Price:
    """Of all of a step's work in a stage other than `generate`."""

  def holdings(self, config: RunConfig, role: Role) -> Holdings: ...


@dataclasses.dataclass(frozen=True)
class Tightest:
  """The devices with the least room."""

  devices: range
  bytes: int
  roles: tuple[Role, ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A config on its devices."""

  config: RunConfig
  seconds: float  # of a step
  tokens: float  # of answers, in a step
  path: dict[Stage, float]  # seconds of a step on the critical path
  prices: dict[Stage, Price]  # of all stages
  idle: dict[range, float]  # share of the time in which devices do nothing
  tightest: Tightest

  @property
  def bottleneck(self) -> Stage:
    return max(self.path, key=self.path.get)

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds

  @property
  def mean_idle(self) -> float:
    count = sum(len(group) for group in self.idle)
    return sum(len(group) * share for group, share in self.idle.items()) / count


def phase_roles(config: RunConfig, phase: str) -> frozenset[Role]:
  """The roles that work in a phase of the run."""
  roles = config.phase(phase).roles
  return roles | {Role.SHADOW_CRITIC} if Role.CRITIC in roles and Role.SHADOW_CRITIC in config.seats else roles


def work(config: RunConfig, phase: str) -> dict[Stage, tuple[Role, ...]]:
  """The stages of a step, with the roles whose devices each needs."""
  roles, seats, rl = phase_roles(config, phase), config.seats, config.phase(phase)
  found: dict[Stage, tuple[Role, ...]] = {
    Stage.SYNC: (Role.ACTOR, Role.ROLLOUT),
    Stage.GENERATE: (Role.ROLLOUT,),
    Stage.TRAIN: (Role.ACTOR,),
  }
  if rl.reward is Reward.VERIFIER:
    found[Stage.SCORE] = ()
  if needs_logp(rl):
    found[Stage.LOGP] = (Role.ACTOR,)
  for role, name in ((Role.REFERENCE, Stage.REFERENCE), (Role.REWARD, Stage.REWARD)):
    if role in roles:
      found[name] = (role,)
  if Role.CRITIC in roles:
    found |= {Stage.CRITIC: (Role.CRITIC,), Stage.VALUES: (Role.CRITIC,)}
  if Role.SHADOW_CRITIC in roles:
    found |= {Stage.VALUES: (Role.SHADOW_CRITIC,), Stage.SYNC_CRITIC: (Role.CRITIC, Role.SHADOW_CRITIC)}
  leaving = tuple(role for role in switched(config, phase) if meets(seats, role, Role.ROLLOUT))
  if leaving:
    found |= {Stage.TO_HOST: leaving, Stage.FROM_HOST: leaving}
  return found


def switched(config: RunConfig, phase: str) -> tuple[Role, ...]:
  """The trained roles whose optimizer state leaves its devices during rollouts."""
  if config.placement.switching is not Switching.HOST:
    return ()
  rl = config.phase(phase)
  memories = {Role.ACTOR: rl.optimizer.memory, Role.CRITIC: rl.ppo.optimizer.memory}
  return tuple(role for role, memory in memories.items() if role in rl.roles and memory is Memory.DEVICE)


def needs_logp(rl: RLConfig) -> bool:
  """Whether log-probs at theta_old are a pass of their own; else the gradient pass gives them."""
  in_reward = rl.advantage is Advantage.GAE and rl.ppo.kl_coef > 0
  objective = rl.objective
  read = objective.old is OldPolicy.RECOMPUTED and (rl.minibatches > 1 or objective.denominator is Denominator.KEPT)
  return in_reward or read


def meets(seats: placing.Seats, one: Role, other: Role) -> bool:
  """Whether two roles have a device in common."""
  first, second = seats[one].devices, seats[other].devices
  return first.start < second.stop and second.start < first.stop


def parts_of(rl: RLConfig, rollouts: float) -> int:
  """In how many parts the answers of a step are handed over."""
  return min(max(math.ceil(rollouts / rl.stream), 1), _MOST_PARTS) if rl.stream else 1


def estimate(config: RunConfig, phase: str, costs: CostModel) -> Estimate:
  """What a step takes, and why.

  Args:
    config: with the placement in question.
    phase: rl or rlhf.
  """
  needs = work(config, phase)
  generation = costs.generation(config, 1)
  if (parts := parts_of(config.phase(phase), generation.rollouts)) > 1:
    generation = costs.generation(config, parts)
  prices = {one: costs.price(config, one) for one in needs if one is not Stage.GENERATE}
  prices[Stage.GENERATE] = generation.price
  seats = config.seats
  groups, of_role = groups_of({role: seat.devices for role, seat in seats.items()})
  places = {one: frozenset().union(*(of_role[role] for role in roles)) for one, roles in needs.items()}
  tasks = _Graph(config.phase(phase), prices, places, generation.ended).tasks()
  timeline = Timeline(tasks, costs.capacity)
  ends = [max(timeline.spans[name].end for name in names) for names in _lasts(tasks)]
  start, end, count = ends[_FROM], ends[_TO], _TO - _FROM
  last = max(_lasts(tasks)[_TO], key=lambda name: timeline.spans[name].end)
  return Estimate(
    config=config,
    seconds=(end - start) / count,
    tokens=generation.tokens,
    path=_by_stage(timeline.path(last), start, end, count),
    prices={one: prices[one] for one in Stage if one in prices},
    idle={
      group: 1 - timeline.busy(index, start, end) / (end - start) if end > start else 0.0
      for index, group in enumerate(groups)
    },
    tightest=tightest(config, phase, costs),
  )


class _Graph:
  """The tasks of `_STEPS` steps."""

  def __init__(self, rl: RLConfig, prices: Mapping[Stage, Price], places: Mapping, ended: Sequence[float]):
    self._rl, self._prices, self._places, self._ended = rl, prices, places, ended
    self._tasks: list[Task] = []

  def tasks(self) -> list[Task]:
    for step in range(_STEPS):
      self._step(step)
    return self._tasks

  def _add(self, stage: Stage, step: int, part: int, share: float, after: Iterable[str]) -> None:
    if stage in self._prices:
      price = self._prices[stage]
      known = tuple(name for name in after if name)
      self._tasks.append(
        Task(self._name(stage, step, part), share * price.seconds, self._places[stage], known, price.load)
      )

  def _name(self, stage: Stage, step: int, part: int) -> str:
    """Empty where there is no such task."""
    return f"{stage}/{step}/{part}" if stage in self._prices and step >= 0 else ""

  def _step(self, step: int) -> None:
    last = len(self._ended) - 1
    trained = [self._name(stage, step - 1, last) for stage in (Stage.TRAIN, Stage.CRITIC)]
    for stage, after in ((Stage.TO_HOST, trained), (Stage.SYNC, trained[:1]), (Stage.SYNC_CRITIC, trained[1:])):
      self._add(stage, step, 0, 1.0, after)
    source = max(step - self._rl.staleness, 0)
    weights = [self._name(Stage.SYNC, source, 0), self._name(Stage.TO_HOST, source, 0)]
    before = self._name(Stage.GENERATE, step - 1, last)
    for part, (begun, ended) in enumerate(zip([0.0, *self._ended], self._ended, strict=False)):
      self._add(Stage.GENERATE, step, part, ended - begun, [before, *weights])
      before = self._name(Stage.GENERATE, step, part)
      self._train(step, part, 1 / len(self._ended))

  def _train(self, step: int, part: int, share: float) -> None:
    """What a part of the answers goes through."""
    drawn = self._name(Stage.GENERATE, step, part)
    earlier = [
      self._name(stage, step if part else step - 1, (part or len(self._ended)) - 1)
      for stage in (Stage.TRAIN, Stage.CRITIC)
    ]
    self._add(Stage.SCORE, step, part, share, [drawn])
    self._add(Stage.LOGP, step, part, share, [drawn, earlier[0]])
    self._add(Stage.REFERENCE, step, part, share, [drawn])
    self._add(Stage.REWARD, step, part, share, [drawn])
    shadow = self._name(Stage.SYNC_CRITIC, step, 0)
    self._add(Stage.VALUES, step, part, share, [drawn, shadow or (earlier[1] if not part else "")])
    judged = [
      self._name(stage, step, part)
      for stage in (Stage.GENERATE, Stage.SCORE, Stage.LOGP, Stage.REFERENCE, Stage.REWARD, Stage.VALUES)
    ]
    if not part:
      self._add(Stage.FROM_HOST, step, 0, 1.0, judged)
    ready = [*judged, self._name(Stage.FROM_HOST, step, 0)]
    for stage, before in zip((Stage.TRAIN, Stage.CRITIC), earlier, strict=True):
      self._add(stage, step, part, share, [*ready, before])


def _lasts(tasks: Sequence[Task]) -> list[list[str]]:
  """By step: the names of its training tasks."""
  found: list[list[str]] = [[] for _ in range(_STEPS)]
  for task in tasks:
    stage, step, _ = task.name.split("/")
    if stage in (Stage.TRAIN, Stage.CRITIC):
      found[int(step)].append(task.name)
  return found


def _by_stage(path: Sequence[Span], start: float, end: float, count: int) -> dict[Stage, float]:
  found: dict[Stage, float] = {}
  for span in path:
    inside = min(span.end, end) - max(span.start, start)
    if inside > 0:
      stage = Stage(span.task.name.split("/")[0])
      found[stage] = found.get(stage, 0.0) + inside / count
  return found


def tightest(config: RunConfig, phase: str, costs: CostModel) -> Tightest:
  """Of the devices with the least room: what their roles hold together."""
  seats, roles = config.seats, phase_roles(config, phase)
  held = {role: costs.holdings(config, role) for role in placing.ordered(roles)}
  away = switched(config, phase)
  groups, of_role = groups_of({role: seats[role].devices for role in held})
  found = []
  for index, group in enumerate(groups):
    here = tuple(role for role in held if index in of_role[role])
    weights = sum(held[role].weights for role in here)
    state = sum(held[role].optimizer for role in here)
    leaves = sum(held[role].optimizer for role in here if role in away)
    moments = [held[role].working + state for role in here if role is not Role.ROLLOUT]
    if Role.ROLLOUT in here:
      cache = held[Role.ROLLOUT].cache
      kept = cache if config.placement.switching is Switching.KEEP else 0
      moments = [moment + kept for moment in moments]
      moments.append(cache + held[Role.ROLLOUT].working + state - leaves)
    found.append(Tightest(group, weights + max(moments), here))
  return max(found, key=lambda one: one.bytes)


@dataclasses.dataclass(frozen=True)
class Ranking:
  """What was tried."""

  estimates: list[Estimate]  # of what fits, best first
  discarded: dict[Strategy, tuple[int, str]]  # how many do not fit or cannot be, and why the nearest does not


def search(config: RunConfig, phase: str, devices: int, costs: CostModel, may_change: bool) -> Ranking:
  """Estimates every candidate that fits.

  Args:
    phase: rl or rlhf.
    may_change: whether slots may become more, or fewer, placement.switching another, and optimizer state and layer inputs go to the host where a
      candidate does not fit otherwise.
  """
  found: list[Estimate] = []
  misses: dict[Strategy, list[Tightest]] = {}
  for candidate in candidates(config, devices, may_change):
    fitted, nearest = _fitted(candidate, phase, costs, may_change)
    if fitted is None:
      misses.setdefault(candidate.placement.strategy, []).append(nearest)
    else:
      found.append(estimate(fitted, phase, costs))
  discarded = {
    strategy: (len(all_), _too_large(min(all_, key=lambda one: one.bytes), costs.limit))
    for strategy, all_ in misses.items()
  }
  tried = {one.config.placement.strategy for one in found} | discarded.keys()
  if Strategy.INTERLEAVING not in tried:
    discarded[Strategy.INTERLEAVING] = (0, "needs a reference and a reward model, and an even number of devices")
  if Strategy.DISAGGREGATED not in tried:
    discarded[Strategy.DISAGGREGATED] = (0, f"no split of {devices} device(s) cuts the model into equal parts")
  return Ranking(rank(found), discarded)


def naive_estimate(config: RunConfig, phase: str, devices: int, costs: CostModel, may_change: bool) -> Estimate | None:
  """Of all models as one entity (`candidates.naive`); None where the model cannot be cut so, or does not fit."""
  try:
    entity = naive(config, devices)
  except ConfigError:
    return None
  fitted, _ = _fitted(entity, phase, costs, may_change)
  return estimate(fitted, phase, costs) if fitted else None


def _fitted(
  candidate: RunConfig, phase: str, costs: CostModel, may_change: bool
) -> tuple[RunConfig | None, Tightest | None]:
  """The candidate with as many slots as fit; state and inputs go to the host only where that is not enough."""
  nearest = None
  for config in (candidate, saving(candidate)) if may_change else (candidate,):
    smaller: RunConfig | None = config
    while smaller is not None:
      held = tightest(smaller, phase, costs)
      if held.bytes <= costs.limit:
        return smaller, None
      nearest = min(nearest or held, held, key=lambda one: one.bytes)
      smaller = fewer_slots(smaller) if may_change else None
  return None, nearest


def _too_large(held: Tightest, limit: float) -> str:
  first, last = held.devices.start, held.devices.stop - 1
  return (
    f"the nearest needs {held.bytes / 2**30:.1f} GiB a device, of {limit / 2**30:.1f}, on devices {first}-{last}"
    f" ({', '.join(held.roles)})"
  )


def rank(estimates: Iterable[Estimate]) -> list[Estimate]:
  """Most tokens a second first; of equals the one that needs less memory."""
  return sorted(estimates, key=lambda one: (-one.tokens_per_second, one.tightest.bytes))
