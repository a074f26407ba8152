"""One of two processes that change the layout of an array together: `python -m ... PORT INDEX`; prints what came of it."""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.transfer import TransferError, execute, plan_transfer

VALUES = np.arange(48, dtype=np.float32).reshape(8, 6)


def run(source, target):
  sent = jax.make_array_from_callback(VALUES.shape, source, lambda index: VALUES[index])
  wanted = jax.ShapeDtypeStruct(sent.shape, sent.dtype, sharding=target)
  plan = plan_transfer({"w": sent}, {"w": wanted})
  try:
    got = execute(plan, {"w": sent}, 3).tree["w"]
  except TransferError as error:
    return str(error)
  for shard in got.addressable_shards:
    np.testing.assert_array_equal(np.asarray(shard.data), VALUES[shard.index])
  return f"{plan.route} {got.sharding == target}"


def main(port, index):
  jax.distributed.initialize(f"localhost:{port}", 2, index)
  devices = np.array(jax.devices())
  whole, halves = Mesh(devices.reshape(2, 2), ("a", "b")), (Mesh(devices[side::2], "c") for side in (0, 1))
  print("RESULT", run(NamedSharding(whole, P("a", "b")), NamedSharding(whole, P("b"))), flush=True)
  print("RESULT", run(NamedSharding(whole, P("a")), NamedSharding(Mesh(devices[::-1], "c"), P("c"))), flush=True)
  print("RESULT", run(*(NamedSharding(half, P("c")) for half in halves)), flush=True)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
