"""The time of a transfer on a pod, at best, and what limits it.

    between    all that crosses from one half to the other, over the links that join them: a torus cut in two, or every
               device's share of the data-centre network between two slices
    source     the device that sends most, over all of its links
    target     the device that receives most
    host       between slices, what one device sends through its host's memory
    fan_out    within the target's half, after the rest: see below

The first four overlap, so that the longest of them counts.  Two ways are compared: `direct`, where each device is sent all
that it needs, replicas from afar too, and `fan_out`, where replicas complete one another (fan_out.py).

Latency, contention within a half, and the cast at the source are not in it.  Nothing here was measured on a TPU.
"""

import dataclasses
from typing import Any

from configs.base import require
from sharding.hardware import Chip
from sharding.topology import Topology
from sharding.transfer.fan_out import plan_fan_out
from sharding.transfer.plan import PyTree, TransferPlan, plan_transfer

_CUBE = 4  # chips along each side of what a three-dimensional torus is made of; smaller ones have no wrap-around links
_POD = 16  # along each side of a two-dimensional torus


@dataclasses.dataclass(frozen=True)
class Halves:
  """Two sets of devices, and what joins them."""

  first: list[Any]
  second: list[Any]
  links: str
  bandwidth: float  # bytes/s from one to the other, all together
  device_bandwidth: float  # bytes/s in or out of one device
  host_bandwidth: float | None  # where the way leads through host memory
  chip: Chip


def halves(topology: Topology) -> Halves:
  """The first and the second half of the slices; of one slice, cut across its longest side.

  Raises:
    ConfigError: an odd number to cut.
  """
  devices, chip = topology.devices(), topology.chip
  if topology.slices > 1:
    require(topology.slices % 2 == 0, f"topology {topology}: {topology.slices} slices have no halves")
    half = len(devices) // 2
    return Halves(
      devices[:half], devices[half:], f"{half} devices' share of the data-centre network", half * chip.dcn_bandwidth,
      chip.dcn_bandwidth, chip.host_bandwidth, chip,
    )  # fmt: skip
  side = max(range(len(topology.shape)), key=lambda axis: topology.shape[axis])
  length = topology.shape[side]
  require(length % 2 == 0, f"topology {topology}: the longest side is {length} chips and has no halves")
  first = [device for device in devices if device.coords[side] < length // 2]
  second = [device for device in devices if device.coords[side] >= length // 2]
  block = _CUBE if chip.torus_dims == 3 else _POD
  wraps = all(chips % block == 0 for chips in topology.shape)
  links = topology.num_chips // length * (2 if wraps else 1)
  return Halves(first, second, f"{links} links of the torus", links * chip.link_bandwidth, _own_links(chip), None, chip)


def _own_links(chip: Chip) -> float:
  return 2 * chip.torus_dims * chip.link_bandwidth / chip.devices_per_chip


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Of one way."""

  way: str
  needed: int
  moved: int
  seconds: dict[str, float]
  buckets: int
  extra_bytes: int  # under way, on one device

  @property
  def total(self) -> float:
    together = max(value for name, value in self.seconds.items() if name != "fan_out")
    return together + self.seconds.get("fan_out", 0.0)

  @property
  def limit(self) -> str:
    return max(self.seconds, key=lambda name: self.seconds[name])

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"total": self.total, "limit": self.limit}


def predict(source: PyTree, target: PyTree, between: Halves) -> list[Prediction]:
  """Both ways from `source`, on the first half, to `target`, on the second."""
  direct = plan_transfer(source, target)
  found = [Prediction("direct", direct.needed, direct.moved, _seconds(direct, between), *_buckets(direct))]
  plan = plan_fan_out(source, target)
  received = 0.0 if plan.then is None else float(plan.then.received_D.max(initial=0))
  seconds = _seconds(plan, between) | {"fan_out": received / _own_links(between.chip)}
  found.append(Prediction("fan_out", direct.needed, plan.moved, seconds, *_buckets(plan)))
  return found


def _buckets(plan: TransferPlan) -> tuple[int, int]:
  return len(plan.buckets), plan.extra_bytes


def _seconds(plan: TransferPlan, between: Halves) -> dict[str, float]:
  sent, received = float(plan.sent_D.max(initial=0)), float(plan.received_D.max(initial=0))
  seconds = {
    "between": plan.moved / between.bandwidth,
    "source": sent / between.device_bandwidth,
    "target": received / between.device_bandwidth,
  }
  if between.host_bandwidth is not None:
    seconds["host"] = max(sent, received) / between.host_bandwidth
  return seconds
