"""Roles on devices: the three strategies of the placement paper, and any map of one's own (papers.md 2.2 to 2.4).

    placement = Placement.disaggregated(jax.devices(), shares={"actor": 0.4, "critic": 0.2, "rollout": 0.4})
    placement.devices_of("rollout")     a contiguous part of the list
    placement.mesh("rollout", MeshConfig(data=2, tensor=2))
    print(placement.picture())

Every part is contiguous, since neighbours in the list are neighbours on the torus.  Parts of different sizes follow one
another without a gap; roles on the same part share it, and on any other two parts they work at the same time.
"""

import dataclasses
import fractions
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from configs import placement as placing
from configs.base import ConfigError, require
from configs.parallel import MeshConfig
from configs.placement import Role, Strategy
from sharding.mesh import make_mesh

_ALL = (Role.ACTOR, Role.CRITIC, Role.ROLLOUT, Role.REFERENCE, Role.REWARD)
# Of the devices, where nothing else is asked for: half train, half generate and judge.
_SHARES = {Role.ACTOR: 0.25, Role.CRITIC: 0.25, Role.ROLLOUT: 0.25, Role.REFERENCE: 0.125, Role.REWARD: 0.125}

Roles = Iterable[Role | str]


def split(count: int, shares: Sequence[float]) -> list[range]:
  """`count` devices in contiguous parts, as near to the shares as whole devices allow, at least one each.

  Largest remainders get what rounding down leaves over; ties go to the first.

  Raises:
    ConfigError: a share that is not positive, or fewer devices than parts.
  """
  require(all(share > 0 for share in shares), f"shares {list(shares)}: must be > 0")
  require(len(shares) <= count, f"{len(shares)} parts of {count} device{'s' * (count != 1)}: each needs at least one")
  exact = [fractions.Fraction(share).limit_denominator(1 << 20) for share in shares]
  wanted = [count * share / sum(exact) for share in exact]
  sizes = [max(1, int(one)) for one in wanted]
  by_need = sorted(range(len(sizes)), key=lambda i: (sizes[i] - wanted[i], i))  # what is farthest below its share first
  while sum(sizes) < count:
    sizes[min(by_need, key=lambda i: sizes[i] - wanted[i])] += 1
  while sum(sizes) > count:  # the minimum of one took too many
    sizes[max((i for i in by_need if sizes[i] > 1), key=lambda i: sizes[i] - wanted[i])] -= 1
  stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
  return [range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


@dataclasses.dataclass(frozen=True)
class Placement:
  """Which of `devices` each role works on."""

  strategy: Strategy
  devices: tuple[Any, ...]
  parts: Mapping[Role, range]  # positions in `devices`

  def __post_init__(self):
    require(Role.ACTOR in self.parts and Role.ROLLOUT in self.parts, "placement: needs at least an actor and a rollout")
    for role, part in self.parts.items():
      require(
        len(part) > 0 and part.step == 1 and part.start >= 0 and part.stop <= len(self.devices),
        f"placement: {role} on devices {part.start}:{part.stop}, but there are {len(self.devices)}",
      )
    for one, other in _pairs(self.parts):
      apart = self.parts[one].stop <= self.parts[other].start or self.parts[other].stop <= self.parts[one].start
      nested = _inside(self.parts[one], self.parts[other]) or _inside(self.parts[other], self.parts[one])
      require(
        apart or nested,
        f"placement: {one} on {_text(self.parts[one])} and {other} on {_text(self.parts[other])} overlap in part;"
        " one must hold the other, or neither",
      )

  @classmethod
  def colocated(cls, devices: Sequence[Any], roles: Roles = _ALL) -> "Placement":
    """Every role on all devices."""
    every = range(len(devices))
    return cls(Strategy.COLOCATED, tuple(devices), {role: every for role in _roles(roles)})

  @classmethod
  def interleaving(cls, devices: Sequence[Any], roles: Roles = _ALL, reference: float = 0.5) -> "Placement":
    """Reference and reward model on a part each, at the same time; the others on all devices.

    Args:
      reference: the share of the devices that the reference gets; the reward model gets the rest.
    """
    found = _roles(roles)
    require(
      {Role.REFERENCE, Role.REWARD} <= set(found),
      "interleaving: needs a reference and a reward model to lie side by side",
    )
    require(0 < reference < 1, f"interleaving: reference={reference}: between 0 and 1")
    halves = dict(zip((Role.REFERENCE, Role.REWARD), split(len(devices), (reference, 1 - reference)), strict=True))
    every = range(len(devices))
    return cls(Strategy.INTERLEAVING, tuple(devices), {role: halves.get(role, every) for role in found})

  @classmethod
  def disaggregated(
    cls, devices: Sequence[Any], roles: Roles = _ALL, shares: Mapping[Role | str, float] | None = None
  ) -> "Placement":
    """Every role that has a share on devices of its own; the others with their host (configs/placement.py).

    Args:
      roles: a shadow critic comes with the critic.
      shares: of the devices, in any unit; default: half train, half generate and judge.
    """
    found = _roles([*roles, *([Role.SHADOW_CRITIC] if Role.CRITIC in _roles(roles) else [])])
    wanted = _SHARES if shares is None else {_role(role): share for role, share in shares.items()}
    unknown = [role for role in wanted if role not in found] if shares is not None else []
    require(not unknown, f"disaggregated: a share for {unknown[0]}, which is not placed" if unknown else "")
    own = [role for role in found if role in wanted]
    for role in (Role.ACTOR, Role.ROLLOUT):
      require(role in own, f"disaggregated: {role} needs a share")
    parts = dict(zip(own, split(len(devices), [wanted[role] for role in own]), strict=True))
    for role in found:
      parts.setdefault(role, parts.get(placing.host(role, found)))
    return cls(Strategy.DISAGGREGATED, tuple(devices), {role: parts[role] for role in found})

  @classmethod
  def explicit(cls, devices: Sequence[Any], parts: Mapping[Role | str, range]) -> "Placement":
    """Roles on the parts given, each a range of positions."""
    return cls(Strategy.EXPLICIT, tuple(devices), {_role(role): part for role, part in parts.items()})

  @classmethod
  def of_seats(cls, strategy: Strategy, seats: placing.Seats, devices: Sequence[Any]) -> "Placement":
    """As a run's config says (`RunConfig.seats`).

    Raises:
      ConfigError: it is for another number of devices.
    """
    needed = placing.num_devices(seats)
    require(needed == len(devices), f"placement: is for {needed} devices, but there are {len(devices)}")
    return cls(strategy, tuple(devices), {role: seat.devices for role, seat in seats.items()})

  @property
  def roles(self) -> list[Role]:
    return placing.ordered(frozenset(self.parts))

  def devices_of(self, role: Role | str) -> list[Any]:
    return [self.devices[position] for position in self.parts[_role(role)]]

  def mesh(self, role: Role | str, sizes: MeshConfig) -> Mesh:
    """The role's mesh.  Raises ConfigError: the sizes are for another number of devices."""
    return make_mesh(sizes, self.devices_of(role))

  def share(self, one: Role | str, other: Role | str) -> bool:
    """Whether two roles have a device in common, and so must take turns."""
    first, second = self.parts[_role(one)], self.parts[_role(other)]
    return first.start < second.stop and second.start < first.stop

  def picture(self, width: int = 64) -> str:
    """One line a role, one column a device (several devices a column where there are many)."""
    count = len(self.devices)
    scale = -(-count // width)
    columns = -(-count // scale)
    name = max(len(role) for role in self.roles)
    lines = [f"{count} devices, {scale} a column" if scale > 1 else f"{count} device{'s' * (count > 1)}, one a column"]
    for role in self.roles:
      part = self.parts[role]
      cells = [
        "#" if any(position in part for position in range(c * scale, min((c + 1) * scale, count))) else "."
        for c in range(columns)
      ]
      lines.append(f"{role:<{name}}  {''.join(cells)}  {_text(part)}")
    return "\n".join(lines)


def _pairs(parts: Mapping[Role, range]) -> list[tuple[Role, Role]]:
  roles = list(parts)
  return [(one, other) for i, one in enumerate(roles) for other in roles[i + 1 :]]


def _inside(one: range, other: range) -> bool:
  return other.start <= one.start and one.stop <= other.stop


def _text(part: range) -> str:
  return f"{part.start}" if len(part) == 1 else f"{part.start}-{part.stop - 1}"


@functools.cache
def _role(name: Role | str) -> Role:
  try:
    return Role(name)
  except ValueError:
    raise ConfigError(f"placement: {name!r} is no role: {', '.join(Role)}") from None


def _roles(names: Roles) -> list[Role]:
  return placing.ordered(frozenset(map(_role, names)))
