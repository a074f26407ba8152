"""What each role holds on its devices: the formulas of ring_jax/compiled/memory.py, role by role.

A frozen role keeps its weights as the trainer's are stored (`model.param_dtype`), as it is a copy of them; critic and reward
model are the trunk with a vector for a head.
"""

import dataclasses

from configs.placement import Role
from configs.schema import Memory, RLConfig, RunConfig
from ring_jax.compiled import memory
from ring_jax.compiled.programs import Kind
from sharding.planner import Holdings


def optimizer_memory(rl: RLConfig, role: Role) -> Memory:
  return (rl.optimizer if role is Role.ACTOR else rl.ppo.optimizer).memory


def holdings(config: RunConfig, phase: str, role: Role) -> Holdings:
  if role is Role.ROLLOUT:
    decode, prefill = (memory.of(config, kind, str(kind)) for kind in (Kind.DECODE, Kind.PREFILL))
    working = max(decode["temp"], prefill["temp"] + prefill["output"])
    return Holdings(decode["parameters"], cache=decode["kv_cache"], working=working)
  model = dataclasses.replace(config.model, parallel=config.seats[role].parallel)
  if role in (Role.ACTOR, Role.CRITIC):
    held = memory.trained(model, config.packing, optimizer_memory(config.phase(phase), role), role is Role.ACTOR)
    # Gradients lie beside either of the two programs of a step.
    working = held["parameters"] + max(held["batch"] + held["temp"], held["update"])
    return Holdings(held["parameters"], held["optimizer"], working=working)
  held = memory.frozen(model, config.packing, role is Role.REFERENCE)
  return Holdings(held["parameters"], working=held["batch"] + held["temp"])
