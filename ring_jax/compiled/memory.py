"""Memory of a program by formula, a device: what is searched with, where the compiler would take minutes.

    parameters, optimizer, gradients, kv_cache, batch     exact: from the abstract trees, like the compiler's arguments
    temp                                                  an estimate: the most that is alive at one moment

In a training step that is: the inputs of all layers where they are kept; the layers' weights, all cast before the first
runs; and of one layer, forward and backward, its activations in units of one array of tokens times width, and its weights
as they are multiplied, with their gradients.  How many units was read off compiled programs of the presets, and tests hold
the sum of all kinds to within 10% of the compiler's for every one of them (docs/sharding.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from configs.parallel import AXES, ParallelConfig
from configs.schema import Memory, ModelConfig, PackingConfig, Remat, RolloutConfig, RolloutDtype, RunConfig
from ring_jax import model as ring_model
from ring_jax.compiled.programs import Kind
from ring_jax.compiled.report import device_bytes
from ring_jax.model.attention import cache_axes, init_cache
from rollout import engine, weights
from sharding import rules

# What is alive of a layer at once, in arrays of tokens times width.
_TRAINING_ROWS, _PREFILL_ROWS = 20, 12
_NAMES = {Kind.TRAIN_STEP: ("gradients", "update")}


def total(config: RunConfig, kind: Kind) -> int:
  """Bytes of the program of a kind that needs the most."""
  return max(sum(of(config, kind, name).values()) for name in _NAMES.get(kind, (str(kind),)))


def of(config: RunConfig, kind: Kind, name: str) -> dict[str, int]:
  """Bytes by what they are, as in `report.Report`, of one program."""
  if kind is Kind.TRAIN_STEP:
    return _gradients(config) if name == "gradients" else _update(config)
  return _rollout(config.model, config.rollout, kind)


def _mesh(parallel: ParallelConfig) -> AbstractMesh:
  return AbstractMesh(parallel.mesh.sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _gradients(config: RunConfig) -> dict[str, int]:
  parts = trained(config.model, config.packing, config.rl.optimizer.memory, head=True)
  return {
    "parameters": parts["parameters"],
    "batch": parts["batch"],
    "output": parts["parameters"],  # the gradients
    "resident": parts["optimizer"],
    "temp": parts["temp"],
  }


def _update(config: RunConfig) -> dict[str, int]:
  memory = config.rl.optimizer.memory
  parts = trained(config.model, config.packing, memory, head=True)
  params = parts["parameters"]
  return {
    "parameters": params,
    "optimizer": parts["optimizer"],
    "gradients": params,
    "temp": _update_temp(params, config.model, memory),
  }


def _update_temp(params: int, model: ModelConfig, memory: Memory) -> int:
  """State at the host comes layer by layer: two numbers each, before and after, and the next layer's meanwhile."""
  return 0 if memory is Memory.DEVICE else 8 * params // model.num_hidden_layers


@functools.cache
def trained(model: ModelConfig, packing: PackingConfig, memory: Memory, head: bool) -> dict[str, int]:
  """Of a role that is trained: what it holds always, and what gradients need beside and `update` instead of that.

  Args:
    head: whether it is the actor, with lm_head and MTP layer; else the critic, whose head is a vector.
  """
  params = _stored(model, head)
  tokens = packing.rows * packing.length // model.parallel.batch_parts
  return {
    "parameters": params,
    "optimizer": 0 if memory is Memory.HOST else 2 * params,
    "batch": 9 * 4 * tokens,
    "temp": _training_temp(model, tokens),
    "update": _update_temp(params, model, memory),
  }


@functools.cache
def frozen(model: ModelConfig, packing: PackingConfig, head: bool) -> dict[str, int]:
  """Of a role that only judges; its programs are forward passes over packed rows."""
  tokens = packing.rows * packing.length // model.parallel.batch_parts
  cast = _layers_bytes(model) if model.param_dtype != model.dtype else 0
  return {
    "parameters": _stored(model, head),
    "batch": 4 * 4 * tokens,
    "temp": _prefill_temp(model, tokens) + cast,
  }


def _stored(model: ModelConfig, head: bool) -> int:
  params = ring_model.abstract_params(model, _mesh(model.parallel))
  return device_bytes({name: part for name, part in params.items() if head or name not in ("lm_head", "mtp")})


def _training_temp(model: ModelConfig, tokens: int) -> int:
  row = jnp.dtype(model.dtype).itemsize * tokens * model.hidden_size
  # Kept inputs take twice their size in compiled programs, for a reason that their text does not show.
  kept = 2 if model.remat is Remat.OFFLOAD else 2 * model.num_hidden_layers
  cast = _layers_bytes(model) if model.param_dtype != model.dtype else 0
  return (kept + _TRAINING_ROWS) * row + cast + 6 * _gathered(model)


def _layers_bytes(model: ModelConfig) -> int:
  """All layers' weights on a device, as they are multiplied."""
  params = ring_model.abstract_params(model, _mesh(model.parallel))
  stored = sum(device_bytes(params.get(name, {})) for name in ("dense_layers", "moe_layers"))
  return stored * jnp.dtype(model.dtype).itemsize // jnp.dtype(model.param_dtype).itemsize


def _gathered(model: ModelConfig) -> int:
  """One MoE layer's weights as it multiplies by them."""
  attention = 2 * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
  experts = model.num_experts // model.parallel.mesh.expert + model.num_shared_experts
  numbers = model.hidden_size * (attention + 3 * model.moe_intermediate_size * experts) // model.parallel.mesh.tensor
  return jnp.dtype(model.dtype).itemsize * numbers


@functools.cache
def _rollout(trained: ModelConfig, rollout: RolloutConfig, kind: Kind) -> dict[str, int]:
  """Prefill, decode, and the hand-over, which holds both forms of the weights."""
  model = engine.computed_model(trained, rollout)
  mesh = _mesh(model.parallel)
  stored = _packed(model, rollout.dtype)
  if kind is Kind.TRANSFER:
    return {"parameters": _stored(trained, head=True), "output": stored, "temp": 0}
  length = engine.bucket(rollout.max_len)

  def size(*shape: int) -> int:
    cache = jax.eval_shape(lambda: init_cache(model, *shape))
    return device_bytes(jax.tree.map(
      lambda leaf, axes: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rules.named(mesh, model.parallel.rules, axes)),
      cache, cache_axes(cache),
    ))  # fmt: skip

  held = size(rollout.slots, length, min(rollout.page_size, length), rollout.pages)
  if kind is Kind.DECODE:
    return {"parameters": stored, "kv_cache": held, "temp": _decode_temp(model, rollout.slots)}
  rows = rollout.prefill_batch // model.parallel.batch_parts
  prefix = size(rollout.prefill_batch, length)
  return {
    "parameters": stored,
    "resident": held,
    "output": prefix,
    "temp": _prefill_temp(model, rows * length) + prefix,
  }


@functools.cache
def _packed(model: ModelConfig, dtype: RolloutDtype) -> int:
  """The weights as the engine stores them."""
  mesh = _mesh(model.parallel)
  with jax.sharding.use_abstract_mesh(mesh):
    return device_bytes(
      jax.eval_shape(functools.partial(weights.pack, dtype=dtype), ring_model.abstract_params(model, mesh))
    )


def _decode_temp(model: ModelConfig, slots: int) -> int:
  """Logits in float32 and what sampling makes of them; a layer's gathered experts."""
  logits = 4 * slots // model.parallel.batch_parts * model.vocab_size // model.parallel.mesh.tensor
  return 4 * logits + 2 * _gathered(model)


def _prefill_temp(model: ModelConfig, tokens: int) -> int:
  return _PREFILL_ROWS * jnp.dtype(model.dtype).itemsize * tokens * model.hidden_size + 2 * _gathered(model)
