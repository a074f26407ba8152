"""Weights from a trainer's layout to an engine's, on other devices or the same (docs/transfer.md).

    link = WeightLink(engine_tree)               shapes and shardings, as the engine stores them
    stored = link.send(pack(params), version)    every step: planned once, moved, checked, then committed

    link.py      the class above: which plan, which version
    plan.py      which bytes go from which device to which, in which buckets
    fan_out.py   replicas at the target that complete one another, where that costs less
    move.py      moves them
    host.py      moves them from host memory to host memory
    shards.py    the parts of an array, and whether two are the same bits
    check.py     whether what arrived is what was sent, and the probe
    predict.py   the time on a pod, and the link that limits it

What is cast or quantised is so at the source, before anything travels: `pack` is the caller's.
"""

from sharding.transfer.check import Delivered, Probe, TransferError
from sharding.transfer.fan_out import plan_fan_out
from sharding.transfer.link import Keep, WeightLink
from sharding.transfer.move import execute
from sharding.transfer.plan import BUCKET_BYTES, Route, TransferPlan, plan_transfer

__all__ = [
  "BUCKET_BYTES", "Delivered", "Keep", "Probe", "Route", "TransferError", "TransferPlan", "WeightLink", "execute", "plan_fan_out",
  "plan_transfer",
]  # fmt: skip
