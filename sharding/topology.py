"""TPU pods described by a name, and the real TPU compiler for them on a machine without a TPU.

    v5p:4x4x4      64 chips in a 4 x 4 x 4 torus          v5e:4x4, v6e:16x16: two dimensions
    tpu7x:2x2x1    4 chips, 8 devices: JAX lists two a chip
    2*v5p:4x4x4    two slices of it, joined by the data-centre network

`devices` are abstract: programs can be lowered and compiled for them, not run (architecture decision 11).  It needs the
package libtpu in the version that the installed jaxlib was built with.  `make` puts it into a folder of its own beside
the environment's packages: what finds it among them, JAX and vLLM for two, takes the machine for one with a TPU.

Source: reference notes, pallas.md section 3.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re
import sys
from typing import Any

from configs.base import ConfigError
from sharding.hardware import Chip, chip_named

_LIBRARY = pathlib.Path(sys.prefix) / "tpu_compiler" / "libtpu" / "libtpu.so"
_ENVIRONMENT = {
  # No metadata server is asked, and several processes may load the library: nothing of it touches hardware here.
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  # Neither says anything about the topology that is compiled for; without them the library warns.
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
}
_NAME = re.compile(r"(?:(?P<slices>[1-9]\d*)\*)?(?P<chip>[a-z0-9]+):(?P<shape>[1-9]\d*(?:x[1-9]\d*){1,2})")


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of one kind and shape."""

  chip: Chip
  shape: tuple[int, ...]  # chips along each dimension of a slice
  slices: int = 1

  @classmethod
  def parse(cls, name: str) -> "Topology":
    """Raises ConfigError for a name that is not of the module docstring's form."""
    match = _NAME.fullmatch(name)
    if match is None:
      raise ConfigError(
        f"topology {name!r}: expected CHIP:AxB or CHIP:AxBxC, such as v5p:4x4x4, v5e:4x4 or 2*v6e:16x16"
      )
    shape = tuple(map(int, match["shape"].split("x")))
    chip = chip_named(match["chip"])
    if len(shape) != chip.torus_dims:
      raise ConfigError(f"topology {name!r}: {chip.name} has {chip.torus_dims} dimensions")
    return cls(chip, shape, int(match["slices"] or 1))

  def __str__(self) -> str:
    slices = f"{self.slices}*" if self.slices > 1 else ""
    return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def num_chips(self) -> int:
    return self.slices * math.prod(self.shape)

  @property
  def num_devices(self) -> int:
    return self.num_chips * self.chip.devices_per_chip

  def devices(self) -> list[Any]:
    """Abstract devices to compile for, slice after slice.

    Raises:
      ConfigError: libtpu is missing, or it knows no such topology.
    """
    return list(_devices(self))


@functools.lru_cache(maxsize=8)
def _devices(topology: Topology) -> tuple[Any, ...]:
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  if _LIBRARY.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(_LIBRARY))
  from jax.experimental import topologies  # imported late: parsing a name needs no JAX

  name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=topology.slices)
  except Exception as error:
    text = " ".join(str(error).split())
    missing = "libtpu" in text and any(word in text for word in ("find", "open", "No module"))
    if missing or "TPU support not installed" in text:
      raise ConfigError(
        f"topology {topology}: the TPU compiler is missing: pip install --no-deps --target {_LIBRARY.parents[1]} libtpu==0.0.42.1"
      ) from error
    raise ConfigError(f"topology {topology}: the TPU compiler knows none such: {text[:200]}") from error
  return tuple(described.devices)
