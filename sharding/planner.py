"""What a step of RL takes under a placement: its phases played through on the devices, and the memory of each device.

    to host -> sync -> generate -> { score, logp, reference, reward, values } -> from host -> { train, critic } -> sync ...

The graph of a step (papers.md 1.4, 2.3, 2.4), with roles where `RunConfig.seats` puts them: phases whose roles share a
device take turns, all others overlap (sharding/timeline.py).  The answers of a step come in parts: one, or with rl.stream > 0
as many as there are minibatches; each part is judged and trained on as soon as it has ended, after the part before it.

    rollouts of step s     need the weights of version s - rl.staleness, and the engine
    step time              (end of step b - end of step a) / (b - a), once the pipeline is full
    bottleneck             the phase with most of the critical path between these two moments

Memory of a device: the weights of all roles on it, and the larger of two moments: generation with its cache, or the other
phases with the optimizer's state.  placement.switching=host takes the state away at the first and the cache at the second.

What a phase takes and a role holds comes from a `CostModel`; nothing here knows a chip, a model or the simulator
(architecture decision 12).
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from configs import placement as placing
from configs.base import ConfigError, Enum
from configs.objective import Advantage, Denominator, Reward
from configs.optimizer import Memory
from configs.placement import Role, Strategy, Switching
from configs.schema import RLConfig, RunConfig
from sharding.timeline import Span, Task, Timeline, groups_of

_STEPS, _FROM, _TO = 7, 3, 5  # steps that are played, and the two between whose ends is measured
_MOST_PARTS = 16  # of a step's answers; more are joined, which changes little


class Phase(Enum):
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
  """Of a phase, or of a part of it."""

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

  def price(self, config: RunConfig, phase: Phase, generation: Generation) -> Price:
    """Of all of a step's work in a phase other than `generate`."""

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
  path: dict[Phase, float]  # seconds of a step on the critical path
  prices: dict[Phase, Price]  # of all phases
  idle: dict[range, float]  # share of the time in which devices do nothing
  tightest: Tightest

  @property
  def bottleneck(self) -> Phase:
    return max(self.path, key=self.path.get)

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds

  @property
  def mean_idle(self) -> float:
    count = sum(len(group) for group in self.idle)
    return sum(len(group) * share for group, share in self.idle.items()) / count


def phase_roles(config: RunConfig, phase: RLConfig) -> frozenset[Role]:
  """The roles that work in a phase of the run."""
  shadow = {Role.SHADOW_CRITIC} if Role.CRITIC in phase.roles and Role.SHADOW_CRITIC in config.seats else set()
  return phase.roles | shadow


def work(config: RunConfig, phase: RLConfig) -> dict[Phase, tuple[Role, ...]]:
  """The phases of a step, with the roles whose devices each needs."""
  roles, seats = phase_roles(config, phase), config.seats
  found: dict[Phase, tuple[Role, ...]] = {
    Phase.SYNC: (Role.ACTOR, Role.ROLLOUT),
    Phase.GENERATE: (Role.ROLLOUT,),
    Phase.TRAIN: (Role.ACTOR,),
  }
  if phase.reward is Reward.VERIFIER:
    found[Phase.SCORE] = ()
  if needs_logp(phase):
    found[Phase.LOGP] = (Role.ACTOR,)
  for role, name in ((Role.REFERENCE, Phase.REFERENCE), (Role.REWARD, Phase.REWARD)):
    if role in roles:
      found[name] = (role,)
  if Role.CRITIC in roles:
    found |= {Phase.CRITIC: (Role.CRITIC,), Phase.VALUES: (Role.CRITIC,)}
  if Role.SHADOW_CRITIC in roles:
    found |= {Phase.VALUES: (Role.SHADOW_CRITIC,), Phase.SYNC_CRITIC: (Role.CRITIC, Role.SHADOW_CRITIC)}
  leaving = tuple(role for role in switched(config, phase) if meets(seats, role, Role.ROLLOUT))
  if leaving:
    found |= {Phase.TO_HOST: leaving, Phase.FROM_HOST: leaving}
  return found


def switched(config: RunConfig, phase: RLConfig) -> tuple[Role, ...]:
  """The trained roles whose optimizer state leaves its devices during rollouts."""
  if config.placement.switching is not Switching.HOST:
    return ()
  memories = {Role.ACTOR: phase.optimizer.memory, Role.CRITIC: phase.ppo.optimizer.memory}
  return tuple(role for role, memory in memories.items() if role in phase.roles and memory is Memory.DEVICE)


def needs_logp(phase: RLConfig) -> bool:
  """Whether log-probs at theta_old are a pass of their own; else the gradient pass gives them."""
  in_reward = phase.advantage is Advantage.GAE and phase.ppo.kl_coef > 0
  return in_reward or phase.minibatches > 1 or phase.objective.denominator is Denominator.KEPT


def meets(seats: placing.Seats, one: Role, other: Role) -> bool:
  """Whether two roles have a device in common."""
  first, second = seats[one].devices, seats[other].devices
  return first.start < second.stop and second.start < first.stop


def parts_of(phase: RLConfig, rollouts: float) -> int:
  """In how many parts the answers of a step are handed over."""
  return min(max(math.ceil(rollouts / phase.stream), 1), _MOST_PARTS) if phase.stream else 1


def estimate(config: RunConfig, phase: RLConfig, costs: CostModel) -> Estimate:
  """Args:
  config: with the placement in question.
  phase: `config.rl` or `config.rlhf`.
  """
  needs = work(config, phase)
  generation = costs.generation(config, 1)
  if (parts := parts_of(phase, generation.rollouts)) > 1:
    generation = costs.generation(config, parts)
  prices = {one: costs.price(config, one, generation) for one in needs if one is not Phase.GENERATE}
  prices[Phase.GENERATE] = generation.price
  seats = config.seats
  groups, of_role = groups_of({role: seat.devices for role, seat in seats.items()})
  places = {one: frozenset().union(*(of_role[role] for role in roles)) for one, roles in needs.items()}
  tasks = _Graph(phase, prices, places, generation.ended).tasks()
  timeline = Timeline(tasks, costs.capacity)
  ends = [max(timeline.spans[name].end for name in names) for names in _lasts(tasks)]
  start, end, count = ends[_FROM], ends[_TO], _TO - _FROM
  last = max(_lasts(tasks)[_TO], key=lambda name: timeline.spans[name].end)
  return Estimate(
    config=config,
    seconds=(end - start) / count,
    tokens=generation.tokens,
    path=_by_phase(timeline.path(last), start, end, count),
    prices={one: prices[one] for one in Phase if one in prices},
    idle={
      group: 1 - timeline.busy(index, start, end) / (end - start) if end > start else 0.0
      for index, group in enumerate(groups)
    },
    tightest=tightest(config, phase, costs),
  )


class _Graph:
  """The tasks of `_STEPS` steps."""

  def __init__(self, phase: RLConfig, prices: dict[Phase, Price], places, ended: Sequence[float]):
    self._phase, self._prices, self._places, self._ended = phase, prices, places, ended
    self._tasks: list[Task] = []

  def tasks(self) -> list[Task]:
    for step in range(_STEPS):
      self._step(step)
    return self._tasks

  def _add(self, phase: Phase, step: int, part: int, share: float, after: Iterable[str]) -> None:
    if phase in self._prices:
      price = self._prices[phase]
      known = tuple(name for name in after if name)
      self._tasks.append(
        Task(self._name(phase, step, part), share * price.seconds, self._places[phase], known, price.load)
      )

  def _name(self, phase: Phase, step: int, part: int) -> str:
    """Empty where there is no such task."""
    return f"{phase}/{step}/{part}" if phase in self._prices and step >= 0 else ""

  def _step(self, step: int) -> None:
    last = len(self._ended) - 1
    trained = [self._name(phase, step - 1, last) for phase in (Phase.TRAIN, Phase.CRITIC)]
    for phase, after in ((Phase.TO_HOST, trained), (Phase.SYNC, trained[:1]), (Phase.SYNC_CRITIC, trained[1:])):
      self._add(phase, step, 0, 1.0, after)
    source = max(step - self._phase.staleness, 0)
    weights = [self._name(Phase.SYNC, source, 0), self._name(Phase.TO_HOST, source, 0)]
    before = self._name(Phase.GENERATE, step - 1, last)
    for part, (begun, ended) in enumerate(zip([0.0, *self._ended], self._ended, strict=False)):
      self._add(Phase.GENERATE, step, part, ended - begun, [before, *weights])
      before = self._name(Phase.GENERATE, step, part)
      self._train(step, part, 1 / len(self._ended))

  def _train(self, step: int, part: int, share: float) -> None:
    """What a part of the answers goes through."""
    drawn = self._name(Phase.GENERATE, step, part)
    earlier = [
      self._name(phase, step if part else step - 1, (part or len(self._ended)) - 1)
      for phase in (Phase.TRAIN, Phase.CRITIC)
    ]
    self._add(Phase.SCORE, step, part, share, [drawn])
    self._add(Phase.LOGP, step, part, share, [drawn, earlier[0]])
    self._add(Phase.REFERENCE, step, part, share, [drawn])
    self._add(Phase.REWARD, step, part, share, [drawn])
    shadow = self._name(Phase.SYNC_CRITIC, step, 0)
    self._add(Phase.VALUES, step, part, share, [drawn, shadow or (earlier[1] if not part else "")])
    judged = [
      self._name(phase, step, part)
      for phase in (Phase.GENERATE, Phase.SCORE, Phase.LOGP, Phase.REFERENCE, Phase.REWARD, Phase.VALUES)
    ]
    if not part:
      self._add(Phase.FROM_HOST, step, 0, 1.0, judged)
    ready = [*judged, self._name(Phase.FROM_HOST, step, 0)]
    for phase, before in zip((Phase.TRAIN, Phase.CRITIC), earlier, strict=True):
      self._add(phase, step, part, share, [*ready, before])


def _lasts(tasks: Sequence[Task]) -> list[list[str]]:
  """By step: the names of its training tasks."""
  found: list[list[str]] = [[] for _ in range(_STEPS)]
  for task in tasks:
    phase, step, _ = task.name.split("/")
    if phase in (Phase.TRAIN, Phase.CRITIC):
      found[int(step)].append(task.name)
  return found


def _by_phase(path: Sequence[Span], start: float, end: float, count: int) -> dict[Phase, float]:
  found: dict[Phase, float] = {}
  for span in path:
    inside = min(span.end, end) - max(span.start, start)
    if inside > 0:
      phase = Phase(span.task.name.split("/")[0])
      found[phase] = found.get(phase, 0.0) + inside / count
  return found


def tightest(config: RunConfig, phase: RLConfig, costs: CostModel) -> Tightest:
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


def strategy_of(config: RunConfig) -> Strategy:
  return config.placement.strategy


def rank(estimates: Iterable[Estimate]) -> list[Estimate]:
  """Fastest first; of equals the one that needs less memory, then fewer devices that idle."""
  return sorted(estimates, key=lambda one: (one.seconds, one.tightest.bytes, one.mean_idle))


def check_fits(found: Tightest, limit: float) -> None:
  """Raises ConfigError: by how much it does not."""
  if found.bytes > limit:
    over, first, last = (found.bytes - limit) / 2**30, found.devices.start, found.devices.stop - 1
    raise ConfigError(f"needs {over:.1f} GiB more than there is on devices {first}-{last} ({', '.join(found.roles)})")
