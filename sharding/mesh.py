"""Meshes: the devices of a program in the order that its axes want.

Axes are explicit (architecture decision 3): every array's type says how it lies, and a contradiction is an error when
the program is traced, on any machine.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from configs.base import ConfigError, require
from configs.parallel import AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over `devices` (default: all), neighbours on the torus along the last axes, slices along the first.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if config.num_devices != len(devices):
    sizes = " x ".join(f"{name}={size}" for name, size in zip(AXES, config.sizes, strict=True))
    raise ConfigError(f"parallel.mesh: {sizes} is {config.num_devices} devices, but there are {len(devices)}")
  return Mesh(_arrange(config.sizes, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def run_in_turn() -> None:
  """Programs over several devices of the CPU backend one after the other; to be said before the devices come up.

  Under way at the same time they can starve each other of threads inside of a collective, and nothing keeps their
  collectives in one order between processes.  Accelerators have queues for that.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)


def engine_mesh(config: MeshConfig, where: str) -> Mesh | None:
  """The mesh of an engine that has this process to itself, over its first devices; None: one device needs none.

  Args:
    where: how an error begins: the flag or the field that says the sizes.

  Raises:
    ConfigError: there are fewer devices.
  """
  if config.num_devices == 1:
    return None
  run_in_turn()
  devices = jax.devices()
  require(
    config.num_devices <= len(devices),
    f"{where}: {config.num_devices} devices are wanted, but there are {len(devices)}",
  )
  return make_mesh(config, devices[: config.num_devices])


def _arrange(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(sizes)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  across = _across_slices(sizes, slices)
  within = tuple(size // part for size, part in zip(sizes, across, strict=True))
  return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def _across_slices(sizes: tuple[int, ...], slices: int) -> tuple[int, ...]:
  """How many parts of each axis lie in different slices: as much of the first axes as it takes (they talk least)."""
  across, left = [], slices
  for size in sizes:
    part = next(n for n in range(min(size, left), 0, -1) if size % n == 0 and left % n == 0)
    across.append(part)
    left //= part
  if left > 1:
    raise ConfigError(f"parallel.mesh: {slices} slices do not divide the axes data, fsdp, expert, tensor = {sizes}")
  return tuple(across)
