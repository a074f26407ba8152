"""The default layout of a config on a topology, and the smallest topology that a program fits.

    training   experts over as many devices as divide them, at most 64; the rest fsdp
    memory     where the formula says that a training step does not fit: optimizer state and layer inputs in host memory
    slots      halved until the formula says that decoding fits

What is tried are the slices that are offered of each chip, up to a whole pod.
"""

import dataclasses
import functools
import math

from configs.loading import differences
from configs.scaling import spread
from configs.schema import ConfigError, RunConfig
from ring_jax.compiled import memory
from ring_jax.compiled.programs import Kind
from sharding.hardware import Chip
from sharding.topology import Topology

_MOST_EXPERT_PARALLEL = 64
_SLICES = {
  2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}


def laid_out(config: RunConfig, topology: Topology) -> tuple[RunConfig, dict[str, str]]:
  """The config with a mesh for the topology, and the overrides that say so; a config that has a mesh keeps it."""
  devices = topology.num_devices
  if config.model.parallel.mesh.num_devices > 1 or devices == 1:
    return config, {}
  expert = math.gcd(math.gcd(devices, config.model.num_experts), _MOST_EXPERT_PARALLEL)
  fits = lambda config, kind: memory.total(config, kind) <= topology.chip.hbm_bytes  # noqa: E731
  layout = functools.partial(spread, config, fsdp=devices // expert, expert=expert)
  small = not fits(layout(), Kind.TRAIN_STEP)
  changed = layout(small=small)
  while changed.rollout.slots > devices and not fits(changed, Kind.DECODE):
    changed = layout(small=small, slots=changed.rollout.slots // 2)
  return changed, differences(config, changed)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A topology, and what the program would need of each of its devices."""

  topology: Topology
  hbm_bytes: int

  @property
  def fits(self) -> bool:
    return self.hbm_bytes <= self.topology.chip.hbm_bytes


def _slices(chip: Chip) -> list[Topology]:
  return [Topology.parse(f"{chip.name}:{shape}") for shape in _SLICES[chip.torus_dims]]


def from_slice(topology: Topology) -> list[Topology]:
  """It, and the larger slices of its chip."""
  return [one for one in _slices(topology.chip) if one.num_devices >= topology.num_devices]


def candidates(config: RunConfig, kind: Kind, chip: Chip) -> list[Candidate]:
  """From the smallest topology of a chip to the first that the program fits by formula.

  Raises:
    ConfigError: it fits none.
  """
  found = []
  for topology in _slices(chip):
    try:
      changed, _ = laid_out(config, topology)
    except ConfigError:
      continue  # a width that so many devices do not divide
    found.append(Candidate(topology, memory.total(changed, kind)))
    if found[-1].fits:
      return found
  needs = f"; {found[-1].topology} would need {found[-1].hbm_bytes / 2**30:.1f} GiB a device" if found else ""
  raise ConfigError(f"{config.name}: {kind} fits no slice of {chip.name}{needs}")
