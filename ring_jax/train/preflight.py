"""What a run needs of the machine, looked at before any weights are: devices for the mesh, room for checkpoints."""

import collections
import itertools
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from configs.parallel import AXES
from configs.placement import num_devices
from configs.schema import RunConfig, Strategy, require
from ring_jax.checkpoint.store import steps
from sharding import processes
from sharding.mesh import make_mesh, run_in_turn


def prepare_devices(config: RunConfig) -> None:
  """Brings the devices up, which must be those of the placement: all of all processes.

  One device may also be the first of several in a single process.
  """
  seats, count = config.seats, processes.group().count
  needed = num_devices(seats)
  if needed > 1:
    run_in_turn()
  devices = jax.devices()
  if needed == 1 and count == 1:
    return
  there = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)}"
  there += f" in {count} processes" if count > 1 else ""
  strategy = config.placement.strategy
  if strategy is Strategy.COLOCATED:
    mesh = config.model.parallel.mesh
    sizes = " x ".join(f"{name}={size}" for name, size in zip(AXES, mesh.sizes, strict=True))
    what = f"model.parallel.mesh: {sizes} is {needed} devices"
  else:
    what = f"placement.strategy={strategy}: its roles take {needed} devices"
  require(needed == len(devices), f"{what}, but there are {there}")
  held = collections.Counter(device.process_index for device in devices)
  require(len(set(held.values())) == 1, f"processes have different numbers of devices: {dict(held)}")
  if count == 1:
    return
  for role, seat in seats.items():
    require(
      len(seat.devices) == needed,
      f"placement.strategy={strategy}: {role} has {len(seat.devices)} of {needed} devices, but in several processes all"
      " roles must be on all devices, as every process takes part in every program; a single controller (Pathways)"
      " can place them apart",
    )
  if devices[0].platform == "cpu":
    for mesh in {seat.parallel.mesh for seat in seats.values()}:
      _introduce(make_mesh(mesh))


def _introduce(mesh: Mesh) -> None:
  """Sums over every set of mesh axes once.

  Devices of a CPU backend must find each other within 30 s when they first sum together, and never again.  Now they
  are all at the same place; later one process may still compile what another had in its cache.
  """
  axes = [axis for axis in AXES if mesh.shape[axis] > 1]
  sets = [chosen for size in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, size)]

  def sums(x: jax.Array) -> list[jax.Array]:
    return [jax.lax.psum(x, chosen) for chosen in sets]

  with jax.set_mesh(mesh):
    every = jax.jit(jax.shard_map(sums, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False))
    jax.block_until_ready(every(np.float32(1)))


def check_disk(checkpoints: pathlib.Path, keep: int, trees: Any) -> None:
  """The checkpoints that the run will keep, and the one under way, have room beside those that are there.

  Args:
    trees: what a checkpoint holds, arrays or their shapes.
  """
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
  there, free = processes.group().from_first(
    "disk", lambda: [len(steps(checkpoints)), shutil.disk_usage(checkpoints).free]
  )
  more = max(1, keep + 1 - there)
  require(
    more * size <= free,
    f"{checkpoints}: {more} more checkpoint{'s' * (more > 1)} of {size / 1e9:,.3f} GB are to come (checkpoint.keep={keep}"
    f" and one being written), but only {free / 1e9:,.3f} GB are free",
  )
