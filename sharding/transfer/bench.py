"""Bench of the transfer: Ring-shaped expert weights from fsdp x expert to tensor x expert, on the default devices.

    JAX_NUM_CPU_DEVICES=8 python -m sharding.transfer.bench [--json]

Half of the devices send to the other half; with one device it sends to itself.  Compared, in turns within one process,
per byte that the target needs:

    copy        numpy copies of the same bytes into memory of their own, one target shard after the other, in one thread:
                what the machine can do
    warm_copy   the same into the same memory every time
    move        the transfer without its checks
    transfer    moved and checked
    device_put  `jax.device_put` of the tree

Memory that is freed stays with the process, as in all that `make` runs: else whoever comes at the wrong time pays for
fresh pages, which can cost ten times the copy.
"""

import ctypes
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from kernels.timing import interleaved, ratio, show
from sharding.transfer import host, move
from sharding.transfer.plan import Route, TransferPlan, plan_transfer

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_MEGABYTES = flags.DEFINE_integer("megabytes", 64, "Size of each tensor.", lower_bound=1)
_TENSORS = flags.DEFINE_integer("tensors", 4, "How many.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32", "float8_e4m3fn"], "Of the tensors.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Counted rounds.", lower_bound=1)

_EXPERTS, _HIDDEN = 16, 1024
_KEPT = {-1: 1 << 30, -2: 1 << 28, -3: 1 << 30}  # glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def _shardings() -> tuple[Any, Any]:
  devices = jax.devices()
  half = len(devices) // 2
  if not half:
    return (SingleDeviceSharding(devices[0]),) * 2
  inner = 2 if half % 2 == 0 else 1
  train = Mesh(np.array(devices[:half]).reshape(-1, inner), ("fsdp", "expert"))
  rollout = Mesh(np.array(devices[half : 2 * half]).reshape(-1, inner), ("expert", "tensor"))
  return NamedSharding(train, P("expert", "fsdp")), NamedSharding(rollout, P("expert", None, "tensor"))


def measure() -> dict[str, Any]:
  """Runs the bench; rates in bytes per second of what the target needs."""
  rng = np.random.default_rng(0)
  dtype = jax.numpy.dtype(_DTYPE.value)
  width = _MEGABYTES.value * 2**20 // (_EXPERTS * _HIDDEN * dtype.itemsize)
  source, target = _shardings()
  shape = (_EXPERTS, _HIDDEN, width)
  sent = {f"w{i}": jax.device_put(rng.integers(0, 64, shape).astype(dtype), source) for i in range(_TENSORS.value)}
  wanted = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=target) for name in sent}
  plan = plan_transfer(sent, wanted)
  leaves = list(sent.values())
  movers = {Route.HOST_VIEWS: functools.partial(host.move, compare=False), Route.PIECES: move.in_pieces}
  programs = {
    **_references(plan),
    "move": lambda: movers[plan.route](plan, leaves).arrived,
    "transfer": lambda: move.execute(plan, sent, 1).tree,
    "device_put": lambda: jax.device_put(sent, target),
  }
  seconds = interleaved(programs, _ROUNDS.value)
  result = {
    "device": jax.devices()[0].device_kind,
    "devices": len(plan.devices),
    "route": str(plan.route),
    "bytes": plan.needed,
    "moved_over_needed": (plan.moved + plan.local) / plan.needed,
  }
  for name in programs:
    result |= {f"{name}_bytes_per_second": plan.needed / statistics.median(seconds[name])}
  for name in ("move", "transfer", "device_put"):
    result |= {f"{name}_fraction_of_{base}": ratio(seconds, base, name) for base in _references(plan)}
  return result


def _references(plan: TransferPlan) -> dict[str, Callable[[], Any]]:
  """Copies of as many bytes as the target needs, in pieces of its shards."""
  blocks = [np.ones(size, np.uint8) for leaf in plan.leaves for size in leaf.shard_bytes_T.tolist()]
  if plan.route is not Route.HOST_VIEWS:
    held = jax.device_put(blocks, [plan.devices[device] for leaf in plan.leaves for device in leaf.target.device_S])
    return {"copy": lambda: [block.copy() for block in held]}
  written = [block.copy() for block in blocks]
  return {
    "copy": lambda: [block.copy() for block in blocks],
    "warm_copy": lambda: [np.copyto(to, block) for to, block in zip(written, blocks, strict=True)],
  }


def _keep_memory() -> None:
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
  for option, value in _KEPT.items() if mallopt else ():
    mallopt(option, value)


def main(argv: list[str]) -> None:
  del argv
  _keep_memory()
  show(measure(), _JSON.value)


if __name__ == "__main__":
  app.run(main)
