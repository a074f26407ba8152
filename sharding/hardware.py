"""Chip figures: what a program of known FLOPs and bytes costs at best.

Peak rates and bandwidths are the vendor's published ones; `hbm_bytes` is what the TPU compiler says a program may use
(the limit in its own out-of-memory message), which is a little less than the data sheet's.  On tpu7x JAX lists two
devices a chip, and every figure here is of one device.

Source: reference notes pallas.md section 5 and jax_practice.md section 4; limits measured with libtpu 0.0.42.1.
"""

import dataclasses

from configs.base import require


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX sees it."""

  name: str  # as in a topology: v5p:4x4x4
  device_kind: str  # as `jax.Device.device_kind` says it
  hbm_bytes: int  # usable by a program
  vmem_bytes: int
  flops: float  # bfloat16 peak, FLOP/s
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s of one inter-chip link, one direction
  torus_dims: int  # dimensions of the inter-chip torus
  devices_per_chip: int = 1
  dcn_bandwidth: float = 6.25e9  # bytes/s to another slice or host, one direction
  host_bandwidth: float = 16e9  # bytes/s between device and host memory


_GIB = 1 << 30
_MIB = 1 << 20

CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v5e", "TPU v5 lite", int(15.75 * _GIB), 128 * _MIB, 197e12, 0.82e12, 45e9, 2),
    Chip("v5p", "TPU v5", int(95.74 * _GIB), 64 * _MIB, 459e12, 2.77e12, 90e9, 3),
    Chip("v6e", "TPU v6 lite", int(31.25 * _GIB), 128 * _MIB, 920e12, 1.64e12, 90e9, 2),
    Chip("tpu7x", "TPU7x", int(94.75 * _GIB), 64 * _MIB, 1155e12, 3.7e12, 90e9, 3, devices_per_chip=2),
  )
}


def chip_named(name: str) -> Chip:
  """Raises ConfigError for a chip that is not in the table."""
  require(name in CHIPS, f"chip {name!r}: one of {', '.join(CHIPS)}")
  return CHIPS[name]
