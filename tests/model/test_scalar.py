"""The scalar model: its tree, its values and gradients on one device and on meshes, and the optimizer on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.ring_tiny import get_config
from configs.schema import MeshConfig, OptimizerConfig, ParallelConfig
from ring_jax import model as ring_model
from ring_jax.train import layerwise
from ring_jax.train.optimizer import make_optimizer
from sharding import rules
from sharding.mesh import make_mesh

MODEL = dataclasses.replace(
  get_config().model, vocab_size=48, hidden_size=32, num_hidden_layers=3, num_nextn_predict_layers=1, num_experts=4,
  moe_intermediate_size=16, intermediate_size=32,
)  # fmt: skip
ROWS, LENGTH = 8, 15
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 48, (ROWS, LENGTH)).astype(np.int32)


def shaken(params):
  """Random norms, selection biases and head, some of them below zero."""
  rng = np.random.default_rng(3)

  def shake(path, leaf):
    noise = 0.3 * rng.normal(size=leaf.shape)
    return np.asarray(leaf + (noise if "head" in path[0].key or path[-1].key in ("scale", "bias") else 0), leaf.dtype)

  return jax.tree_util.tree_map_with_path(shake, jax.device_get(params))


@pytest.fixture(scope="module")
def fresh():
  return ring_model.init_scalar(MODEL, 1)


@pytest.fixture(scope="module")
def params(fresh):
  return shaken(fresh)


@pytest.fixture(scope="module")
def batch():
  """Two sequences a row, some padding, one row of padding alone; and what each value weighs."""
  segments = np.where(np.arange(LENGTH) < 6, 1, 2) * np.ones((ROWS, 1), np.int32)
  segments[1, 12:], segments[4] = 0, 0
  positions = np.where(segments == 2, np.arange(LENGTH) - 6, np.arange(LENGTH))
  weights = np.where(segments > 0, np.random.default_rng(5).normal(size=segments.shape), 0.0)
  return TOKENS, positions.astype(np.int32), segments.astype(np.int32), weights.astype(np.float32)


def differentiated(config, mesh=None):
  """(values, gradients) of a weighted sum of tanh of the values."""

  def loss_of(params, tokens, positions, segments, weights):
    values_RxT = ring_model.scalar_values(config, params, tokens, positions, segments)
    flat = lambda x: rules.reshard(jnp.asarray(x), config.parallel.rules, "batch", None).reshape(-1)  # noqa: E731
    return jnp.sum(flat(weights) * jnp.tanh(flat(values_RxT))), values_RxT

  return rules.Program(mesh, jax.grad(loss_of, has_aux=True))


@pytest.fixture(scope="module")
def alone(params, batch):
  return differentiated(MODEL)(params, *batch)


def distance(got, want):
  """Relative, in the norm of a whole tree."""
  pairs = list(zip(*map(jax.tree.leaves, (got, want)), strict=True))
  norm = lambda leaves: np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))  # noqa: E731
  return norm(np.float64(a) - np.float64(b) for a, b in pairs) / norm(b for _, b in pairs)


def test_tree_is_the_actor_s_trunk_and_a_zero_head(fresh):
  actor = ring_model.init_params(dataclasses.replace(MODEL, num_nextn_predict_layers=0), 1)
  actor["mtp"] = {"final_norm": {"scale": jnp.ones(32)}}
  made = ring_model.scalar_from_actor(actor)
  trunk = {name: part for name, part in actor.items() if name not in ("lm_head", "mtp")}
  jax.tree.map(np.testing.assert_array_equal, made, fresh)
  jax.tree.map(np.testing.assert_array_equal, made["trunk"], trunk)
  assert {"lm_head", "mtp"} <= actor.keys()
  assert not np.any(made["head"]["kernel"]) and not np.any(made["head"]["bias"])
  shape = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
  assert jax.tree.map(shape, ring_model.abstract_scalar(MODEL)) == jax.tree.map(shape, made)
  # The actor survives the donation of what was made of it.
  jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)(made)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(actor))


def test_the_head_is_float32_on_a_bfloat16_trunk():
  half = dataclasses.replace(MODEL, param_dtype="bfloat16", dtype="bfloat16")
  made = jax.eval_shape(ring_model.scalar_from_actor, ring_model.abstract_params(half))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(made["head"])} == {"float32"}
  same = lambda one, other: one.dtype == other.dtype and one.shape == other.shape  # noqa: E731
  assert all(jax.tree.leaves(jax.tree.map(same, made, ring_model.abstract_scalar(half))))
  values = jax.eval_shape(lambda *x: ring_model.scalar_values(half, *x), made, TOKENS)
  assert values.dtype == jnp.float32 and values.shape == TOKENS.shape


def test_values_are_those_of_each_sequence_alone(params, batch):
  tokens, positions, segments, _ = batch
  values = np.asarray(jax.jit(lambda *x: ring_model.scalar_values(MODEL, *x))(params, tokens, positions, segments))
  assert np.isfinite(values).all()
  # Each sequence in a row of its own, with what is not its own as padding.
  hidden_of = jax.jit(lambda *x: ring_model.forward(MODEL, *x, mtp=False).hidden_BxTxD)
  for row, first, last in ((0, 0, 6), (0, 6, 15), (1, 6, 12)):
    alone = np.zeros_like(tokens)
    alone[0, : last - first] = tokens[row, first:last]
    valid = (np.arange(LENGTH) < last - first).astype(np.int32) * (np.arange(ROWS) == 0)[:, None].astype(np.int32)
    hidden = hidden_of(params["trunk"], alone, np.arange(LENGTH, dtype=np.int32) * np.ones_like(valid), valid)
    expected = np.float64(hidden) @ np.float64(params["head"]["kernel"]) + np.float64(params["head"]["bias"])
    np.testing.assert_allclose(values[row, first:last], expected[0, : last - first], atol=3e-6)


# Another one is in test_scalar_programs.py.
PARALLEL = ParallelConfig(MeshConfig(data=2, expert=2, tensor=2), expert_parallel="all_to_all")


def test_values_and_gradients_on_a_mesh_are_those_of_one_device(params, batch, alone):
  config = dataclasses.replace(MODEL, parallel=PARALLEL)
  mesh = make_mesh(PARALLEL.mesh)
  placed = jax.device_put(params, ring_model.scalar_shardings(config, mesh))
  grads, values = differentiated(config, mesh)(placed, *batch)
  expected_grads, expected = alone
  assert distance(values, expected) <= 1e-6
  assert distance(grads, expected_grads) <= 1e-6
  assert distance(grads["head"], expected_grads["head"]) <= 2e-6
  assert float(jnp.abs(grads["head"]["bias"])) > 1e-3
  for leaf, parameter in zip(jax.tree.leaves(grads), jax.tree.leaves(placed), strict=True):
    assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim)


def test_parameters_are_made_where_the_shardings_say(fresh):
  config = dataclasses.replace(MODEL, num_nextn_predict_layers=0, parallel=PARALLEL)
  mesh = make_mesh(PARALLEL.mesh)
  actor = jax.device_put(fresh["trunk"] | {"lm_head": {"kernel": np.ones((32, 48), np.float32)}},
                         ring_model.param_shardings(config, mesh))  # fmt: skip
  made, abstract = ring_model.scalar_from_actor(actor), ring_model.abstract_scalar(config, mesh)
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (made, fresh)))
  for leaf, shape in zip(*map(jax.tree.leaves, (made, abstract)), strict=True):
    assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
  traced = jax.eval_shape(lambda: ring_model.init_scalar(config, 1, mesh))
  assert jax.tree.structure(traced) == jax.tree.structure(abstract)


def test_weight_decay_takes_matrices_and_the_head_kernel_only(params):
  optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
  updates, _ = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p))(params)
  updates = jax.device_get(updates)
  biases = []
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    still = path[-1].key in ("scale", "bias")
    assert (not np.any(update)) == still, jax.tree_util.keystr(path)
    biases += [path] if ring_model.is_router_bias(path) else []
  assert [path[0].key for path in biases] == ["trunk"]
  assert np.all(updates["head"]["kernel"])


def test_layer_by_layer_update_is_that_of_the_whole_tree(params):
  config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, grad_clip=0.7)
  optimizer = make_optimizer(config, 10)
  rng = np.random.default_rng(1)
  draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731

  def at_once(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def by_layers(params, state, grads):
    return layerwise.update(optimizer, params, state, grads, optax.global_norm(grads), config.grad_clip)

  one = other = (params, jax.jit(optimizer.init)(params))
  for _ in range(2):
    grads = jax.tree.map(draw, params)
    one, other = jax.jit(at_once)(*one, grads), jax.jit(by_layers)(*other, grads)
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for ours, theirs in zip(*map(jax.tree.leaves, (other, one)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_only_one_layer_s_state_visits_the_device(params):
  """The transformation sees each stack a layer at a time, also below `trunk`."""
  seen = []

  def update(grads, state, params):
    seen.append({path[1].key: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(grads)})
    return grads, state

  optimizer = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
  jax.eval_shape(lambda p: layerwise.update(optimizer, p, optimizer.init(p), p, optax.global_norm(p), 1.0), params)
  assert [set(part) for part in seen] == [{"embed", "final_norm", "kernel", "bias"}, {"dense_layers"}, {"moe_layers"}]
  wq = params["trunk"]["moe_layers"]["attention"]["wq"]
  assert wq.shape[0] == 2 and wq.shape not in seen[2].values()
