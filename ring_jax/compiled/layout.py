"""The default mesh of a topology, for a config that names none.

    training   experts over as many devices as divide them, at most 64 and at most what a slice has; the rest fsdp
    rollouts   experts likewise; heads over `tensor` where slots would not go round

One row of tokens a device: more rows are more microbatches, not more memory.
"""

import dataclasses
import math
from typing import Any

from configs.schema import ExpertParallel, MeshConfig, ParallelConfig, RunConfig
from sharding.topology import Topology

_MOST_EXPERT_PARALLEL = 64
# Rows of an exchange, in tokens: what a chunk of an MoE layer handles at a time.
_CHUNK_TOKENS = 4096


def laid_out(config: RunConfig, topology: Topology) -> tuple[RunConfig, dict[str, Any]]:
  """The config with a mesh for the topology, and the overrides that say so; a config that has a mesh keeps it."""
  if config.model.parallel.mesh.num_devices > 1 or topology.num_devices == 1:
    return config, {}
  devices = topology.num_devices
  expert = math.gcd(math.gcd(devices, config.model.num_experts), _MOST_EXPERT_PARALLEL)
  chunks = max(config.packing.length // _CHUNK_TOKENS, 1)
  train = ParallelConfig(
    MeshConfig(fsdp=devices // expert, expert=expert), expert_parallel=ExpertParallel.ALL_TO_ALL, moe_chunks=chunks
  )
  if expert == 1:
    train = dataclasses.replace(train, expert_parallel=ExpertParallel.LOCAL)
  rollout = dataclasses.replace(config.rollout, slots=_rounded(config.rollout.slots, devices))
  rollout = dataclasses.replace(
    rollout, pool=max(config.rollout.pool, rollout.slots), prefill_batch=_rounded(config.rollout.prefill_batch, devices)
  )
  changed = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, parallel=train),
    packing=dataclasses.replace(config.packing, rows=devices),
    rollout=rollout,
    eval=dataclasses.replace(config.eval, slots=_rounded(config.eval.slots, devices)),
  )
  overrides = {
    "model.parallel.mesh.fsdp": train.mesh.fsdp,
    "model.parallel.mesh.expert": train.mesh.expert,
    "model.parallel.expert_parallel": train.expert_parallel,
    "model.parallel.moe_chunks": train.moe_chunks,
    "packing.rows": devices,
    "rollout.slots": rollout.slots,
    "rollout.pool": rollout.pool,
    "rollout.prefill_batch": rollout.prefill_batch,
    "eval.slots": changed.eval.slots,
  }
  return changed, overrides


def _rounded(value: int, parts: int) -> int:
  return -(-value // parts) * parts
