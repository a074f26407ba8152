"""Weights from a trainer's layout to an engine's, on other devices or the same (docs/transfer.md).

    plan = plan_transfer(engine_tree_as_packed_by_the_trainer, engine_tree)     once: geometry, no data
    weights = Holder()
    weights.receive(plan, pack(params), version, probe)                         every step: moved, checked, then committed
    weights.current.tree

    plan.py      which bytes go from which device to which, in which buckets
    fan_out.py   replicas at the target that complete one another
    move.py      moves them, and the holder that commits a version or keeps the old one
    check.py     fingerprints of what was sent and what arrived, and the probe
    predict.py   the time on a pod, and the link that limits it

What is cast or quantised is so at the source, before anything travels: `pack` is the caller's.
"""

from sharding.transfer.check import Probe, TransferError
from sharding.transfer.fan_out import plan_fan_out
from sharding.transfer.move import Delivered, Holder, execute
from sharding.transfer.plan import BUCKET_BYTES, Route, TransferPlan, plan_transfer

__all__ = [
  "BUCKET_BYTES", "Delivered", "Holder", "Probe", "Route", "TransferError", "TransferPlan", "execute", "plan_fan_out", "plan_transfer",
]  # fmt: skip
