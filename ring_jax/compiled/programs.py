"""The programs of a run, lowered for abstract devices: exactly those that the job runs (architecture decision 11).

    train_step   `gradients`: forward and backward pass of one microbatch;  `update`: the optimizer's step
    prefill      the keys and values of `rollout.prefill_batch` prompts
    decode       `rollout.steps_per_dispatch` tokens for all slots
    transfer     the trainer's weights as the engine stores and lays them out

Nothing is allocated: arguments are shapes with shardings, taken from the abstract parameter tree.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import Enum, RunConfig
from ring_jax import model as ring_model
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.programs import Programs, RLFields, Tokens
from rollout.engine import RingEngine
from sharding.mesh import make_mesh

_PHASE = "rl"


class Kind(Enum):
  TRAIN_STEP = "train_step"
  PREFILL = "prefill"
  DECODE = "decode"
  TRANSFER = "transfer"


@dataclasses.dataclass(frozen=True)
class Unit:
  """One compiled program of a kind."""

  name: str
  lowered: jax.stages.Lowered
  arguments: dict[str, Any]  # by what they are: trees of `jax.ShapeDtypeStruct`
  resident: dict[str, Any]  # what lies in device memory meanwhile without being an argument


def lower(config: RunConfig, kind: Kind, devices: Sequence[Any]) -> Iterator[Unit]:
  """Lowers a kind's programs, one after the other."""
  match kind:
    case Kind.TRAIN_STEP:
      yield from _train_step(config, devices)
    case Kind.PREFILL:
      yield _prefill(config, devices)
    case Kind.DECODE:
      yield _decode(config, devices)
    case Kind.TRANSFER:
      yield _transfer(config, devices)


def _train_step(config: RunConfig, devices: Sequence[Any]) -> Iterator[Unit]:
  mesh = make_mesh(config.model.parallel.mesh, devices)
  optimizer = make_optimizer(config.rl.optimizer, config.rl.steps)
  programs = Programs(config, np.ones(config.model.vocab_size, bool), {_PHASE: optimizer}, mesh)
  params = ring_model.abstract_params(config.model, mesh)
  state = programs.abstract_optimizer(params, _PHASE)
  shape = (config.packing.rows, config.packing.length)
  ints = jax.ShapeDtypeStruct(shape, jnp.int32)
  floats = jax.ShapeDtypeStruct(shape, jnp.float32)
  objective = config.rl.objective
  fields = RLFields(*[floats] * 5, floats if objective.kl_coef > 0 else None)
  model, experts = config.model, None
  if config.rollout.router_replay:
    experts = jax.ShapeDtypeStruct((model.num_moe_layers, *shape, model.num_experts_per_tok), jnp.int16)
  batch = Tokens(*[ints] * 4, experts)
  arguments = (params, None, batch, fields, objective, config.rl.minibatches == 1)
  yield Unit(
    "gradients", programs.rl_gradients.lower(*arguments), {"parameters": params, "batch": (batch, fields)},
    {"optimizer": state},
  )  # fmt: skip
  gradients, _ = programs.rl_gradients.shapes(*arguments)
  yield Unit(
    "update", programs.apply.lower(params, state, gradients.params, _PHASE),
    {"parameters": params, "optimizer": state, "gradients": gradients.params}, {},
  )  # fmt: skip


def engine_on(config: RunConfig, devices: Sequence[Any]) -> RingEngine:
  """The run's engine, laid out on devices that need not be here."""
  parallel = config.rollout.parallel or config.model.parallel
  mesh = make_mesh(parallel.mesh, devices)
  return RingEngine(
    config.model, config.rollout, eos_ids=(0,), vocab_mask_V=np.ones(config.model.vocab_size, bool), seed=0, mesh=mesh
  )


def _prefill(config: RunConfig, devices: Sequence[Any]) -> Unit:
  engine = engine_on(config, devices)
  stored = engine.abstract_stored()
  rows = config.rollout.prefill_batch
  tokens = jax.ShapeDtypeStruct((rows, engine.max_prefill_length), jnp.int32)
  lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
  lowered = engine.programs.prefill.lower(stored, tokens, lengths)
  return Unit("prefill", lowered, {"parameters": stored}, {"kv_cache": engine.abstract_decode_state().cache})


def _decode(config: RunConfig, devices: Sequence[Any]) -> Unit:
  engine = engine_on(config, devices)
  stored = engine.abstract_stored()
  state = engine.abstract_decode_state()
  lowered = engine.programs.decode.lower(stored, state, config.rollout.steps_per_dispatch)
  return Unit("decode", lowered, {"parameters": stored, "kv_cache": state.cache}, {})


def _transfer(config: RunConfig, devices: Sequence[Any]) -> Unit:
  """From the trainer's layout to the engine's, on the same devices: cast or quantised before it travels."""
  engine = engine_on(config, devices)
  params = ring_model.abstract_params(config.model, make_mesh(config.model.parallel.mesh, devices))
  return Unit("transfer", engine.transfer.lower(params), {"parameters": params}, {})
