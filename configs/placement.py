"""Where each role of RL lives: which devices, and how its arrays lie on them (architecture decision 12).

    colocated       every role on all devices, one after the other
    interleaving    actor, critic and engine on all devices; the reference on one half, the reward model on the other half, at
                    the same time
    disaggregated   the trainer's devices and the engine's are different ones, so that both work at the same time; shadow
                    models, copies of the actor and the critic, generate and judge on the engine's side
    explicit        as `devices` says

The engine is the shadow actor: it always has a copy of the weights of its own.  Its replicas are the `data` axis of its
mesh.  A role without a mesh of its own shares the devices and the layout of its host:

    critic -> actor     shadow_critic, reference -> rollout     reward -> reference, or without one rollout

Source: the placement paper (papers.md 2.2 to 2.4).
"""

import dataclasses
import re
from collections.abc import Collection, Mapping

from configs.base import ConfigError, Enum, coerce_enum, require
from configs.parallel import MeshConfig, ParallelConfig


class Role(Enum):
  ACTOR = "actor"  # trained
  CRITIC = "critic"  # trained: values of PPO
  ROLLOUT = "rollout"  # the engine, on a copy of the actor's weights: the shadow actor
  SHADOW_CRITIC = "shadow_critic"  # a copy of the critic that only judges
  REFERENCE = "reference"  # frozen: what the KL terms pull towards
  REWARD = "reward"  # frozen: the reward model


class Strategy(Enum):
  COLOCATED = "colocated"
  INTERLEAVING = "interleaving"
  DISAGGREGATED = "disaggregated"
  EXPLICIT = "explicit"


class Switching(Enum):
  """What becomes of memory between rollouts and training, where both use the same devices."""

  KEEP = "keep"  # everything stays on the device
  HOST = "host"  # optimizer state leaves for host memory during rollouts; the engine's cache is freed during training


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
  """Devices and layouts of the roles.  The actor's layout is `model.parallel`, the engine's `rollout.parallel`."""

  strategy: Strategy = Strategy.COLOCATED
  critic: ParallelConfig | None = None  # None: as its host, see the module's docstring
  reference: ParallelConfig | None = None
  reward: ParallelConfig | None = None
  shadow_critic: ParallelConfig | None = None
  devices: Mapping[str, str] = dataclasses.field(default_factory=dict)  # explicit: role -> "first:stop"
  switching: Switching = Switching.KEEP

  def __post_init__(self):
    coerce_enum(self, "strategy", Strategy, "placement")
    coerce_enum(self, "switching", Switching, "placement")
    require(
      not self.devices or self.strategy is Strategy.EXPLICIT,
      f"placement.devices needs placement.strategy=explicit, not {self.strategy}",
    )
    for role, text in self.devices.items():
      require(role in {str(one) for one in Role}, f"placement.devices: {role!r} is no role: {', '.join(Role)}")
      require(
        re.fullmatch(r"\d+:\d+", str(text)) is not None,
        f"placement.devices.{role}={text!r}: first:stop, such as 0:4",
      )


@dataclasses.dataclass(frozen=True)
class Seat:
  """Where one role sits."""

  devices: range  # positions in the list of all devices
  parallel: ParallelConfig


Seats = dict[Role, Seat]

_HOSTS = {
  Role.CRITIC: (Role.ACTOR,),
  Role.SHADOW_CRITIC: (Role.ROLLOUT,),
  Role.REFERENCE: (Role.ROLLOUT,),
  Role.REWARD: (Role.REFERENCE, Role.ROLLOUT),
}


def seats(placement: PlacementConfig, roles: frozenset[Role], actor: ParallelConfig, rollout: ParallelConfig) -> Seats:
  """The seat of every role.

  Args:
    roles: that there are; actor and rollout always.
    actor, rollout: layouts of the trainer and the engine.

  Raises:
    ConfigError: sizes that contradict the strategy.
  """
  match placement.strategy:
    case Strategy.COLOCATED:
      return _together(placement, roles, actor, rollout)
    case Strategy.INTERLEAVING:
      return _interleaved(placement, roles, actor, rollout)
    case Strategy.DISAGGREGATED:
      return _apart(placement, roles, actor, rollout)
    case Strategy.EXPLICIT:
      return _explicit(placement, roles, actor, rollout)


def num_devices(found: Seats) -> int:
  return max(seat.devices.stop for seat in found.values())


def ordered(roles: frozenset[Role]) -> list[Role]:
  """As `Role` lists them."""
  return [role for role in Role if role in roles]


def host(role: Role, roles: Collection[Role]) -> Role | None:
  """The role whose devices it shares where it has none of its own; None: it must have some."""
  return next((one for one in _HOSTS.get(role, ()) if one in roles), None)


def _own(placement: PlacementConfig, role: Role) -> ParallelConfig | None:
  return getattr(placement, role.value, None)


def _together(placement, roles, actor: ParallelConfig, rollout: ParallelConfig) -> Seats:
  every = range(actor.mesh.num_devices)
  found = {Role.ACTOR: Seat(every, actor), Role.ROLLOUT: Seat(every, rollout)}
  for role in ordered(roles - found.keys()):
    found[role] = Seat(every, _own(placement, role) or actor)
  for role, seat in found.items():
    _check_size(role, seat, f"{placement.strategy}: all roles share the devices of model.parallel.mesh")
  return found


def _interleaved(placement, roles, actor: ParallelConfig, rollout: ParallelConfig) -> Seats:
  pair = (Role.REFERENCE, Role.REWARD)
  require(
    roles >= set(pair),
    "placement.strategy=interleaving needs a reference and a reward model, which take a half of the devices each;"
    " this run has " + ", ".join(ordered(roles)),
  )
  found = _together(placement, roles - set(pair), actor, rollout)
  size = actor.mesh.num_devices
  require(
    size % 2 == 0, f"placement.strategy=interleaving: model.parallel.mesh has {size} devices, which have no halves"
  )
  for role, half in zip(pair, (range(size // 2), range(size // 2, size)), strict=True):
    found[role] = Seat(half, _own(placement, role) or _halved(actor))
    _check_size(role, found[role], "interleaving: a half of the devices of model.parallel.mesh")
  return found


def _halved(parallel: ParallelConfig) -> ParallelConfig:
  """The layout on half of the devices: fewer replicas, or larger parts of the parameters."""
  mesh = parallel.mesh
  for axis in ("data", "fsdp", "tensor", "expert"):
    if getattr(mesh, axis) % 2 == 0:
      return dataclasses.replace(parallel, mesh=dataclasses.replace(mesh, **{axis: getattr(mesh, axis) // 2}))
  return parallel


def _apart(placement, roles, actor: ParallelConfig, rollout: ParallelConfig) -> Seats:
  """One after the other in the order of roles; hosts come before their guests."""
  found: Seats = {}
  first = 0
  for role in ordered(roles):
    layout = {Role.ACTOR: actor, Role.ROLLOUT: rollout}.get(role) or _own(placement, role)
    if layout is None:
      found[role] = found[host(role, roles)]
      continue
    found[role] = Seat(range(first, first + layout.mesh.num_devices), layout)
    first += layout.mesh.num_devices
  return found


def _explicit(placement, roles, actor: ParallelConfig, rollout: ParallelConfig) -> Seats:
  found: Seats = {}
  for role in ordered(roles):
    text = placement.devices.get(role.value)
    if text is None:
      beside = host(role, roles)
      require(beside is not None, f"placement.devices: says nothing of {role}")
      found[role] = found[beside]
      continue
    start, stop = map(int, text.split(":"))
    require(start < stop, f"placement.devices.{role}={text}: holds no device")
    layout = {Role.ACTOR: actor, Role.ROLLOUT: rollout}.get(role) or _own(placement, role)
    layout = layout or ParallelConfig(MeshConfig(fsdp=stop - start))
    found[role] = Seat(range(start, stop), layout)
    _check_size(role, found[role], f"placement.devices.{role}={text}")
  taken = {position for seat in found.values() for position in seat.devices}
  idle = sorted(set(range(num_devices(found))) - taken)
  require(not idle, f"placement.devices: nobody uses device {idle[0]}" if idle else "")
  return found


def _check_size(role: Role, seat: Seat, why: str) -> None:
  name = {Role.ACTOR: "model.parallel", Role.ROLLOUT: "rollout.parallel"}.get(role, f"placement.{role}")
  size = seat.parallel.mesh.num_devices
  if size != len(seat.devices):
    raise ConfigError(f"{name}.mesh has {size} devices, but there are {len(seat.devices)} for it ({why})")
