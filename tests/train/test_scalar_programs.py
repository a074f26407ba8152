"""Gradients of the critic and the reward model through packing and microbatches, against one padded row a sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.ring_tiny import get_config
from configs.schema import MeshConfig, OptimizerConfig, PackingConfig, ParallelConfig, PPOConfig, RewardModelConfig
from ring_jax import model as ring_model
from ring_jax.data.preferences import Pair
from ring_jax.records import Rollout
from ring_jax.train.batches import minibatch
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.preference import RewardModelPhase, scores
from ring_jax.train.scalar_batches import pair_batches, value_batches
from ring_jax.train.scalar_programs import ScalarPrograms, pair_metrics, value_metrics
from ring_jax.train.updates import Update
from sharding.mesh import make_mesh

BASE = get_config()
WIDTH, PAIRS = 24, 14
CONFIG = dataclasses.replace(
  BASE,
  model=dataclasses.replace(
    BASE.model, vocab_size=48, hidden_size=16, num_hidden_layers=1, first_k_dense_replace=0, num_experts=4,
    moe_intermediate_size=16,
  ),
  packing=PackingConfig(length=WIDTH, rows=8),
  rollout=dataclasses.replace(BASE.rollout, max_prompt_tokens=8, max_tokens=14),
  reward_model=RewardModelConfig(steps=4, batch_size=PAIRS),
)  # fmt: skip
MODEL = CONFIG.model
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
PPO = PPOConfig(value_clip=0.3, value_coef=0.7)


def random_ids(rng, low, high):
  return rng.integers(0, 45, rng.integers(low, high)).tolist()


@pytest.fixture(scope="module")
def programs():
  return ScalarPrograms(CONFIG, Update(make_optimizer(OPTIMIZER, 10), OPTIMIZER))


@pytest.fixture(scope="module")
def fresh():
  return jax.device_get(ring_model.init_scalar(MODEL, 0))


@pytest.fixture(scope="module")
def params(fresh):
  """Random norms, selection biases and head, some of them below zero."""
  rng = np.random.default_rng(3)

  def shake(path, leaf):
    noise = 0.3 * rng.normal(size=leaf.shape)
    return np.asarray(leaf + (noise if "head" in path[0].key or path[-1].key in ("scale", "bias") else 0), leaf.dtype)

  return jax.tree_util.tree_map_with_path(shake, fresh)


@pytest.fixture(scope="module")
def rollouts():
  """22 answers, one of them a single token, with old values and returns of all sizes."""
  rng = np.random.default_rng(1)
  made = [Rollout(uid, 0, uid, random_ids(rng, 2, 8), random_ids(rng, 1, 14)) for uid in range(21)]
  made.append(Rollout(21, 0, 21, [5, 6], [7]))
  draw = lambda: [rng.normal(size=len(one.tokens)).astype(np.float32) for one in made]  # noqa: E731
  return made, draw(), draw()


@pytest.fixture(scope="module")
def pairs():
  rng = np.random.default_rng(2)
  return [Pair(random_ids(rng, 2, 8), random_ids(rng, 1, 14), random_ids(rng, 1, 14)) for _ in range(PAIRS)]


def padded(sequences):
  tokens = np.zeros((len(sequences), WIDTH), np.int32)
  for row, sequence in enumerate(sequences):
    tokens[row, : len(sequence)] = sequence
  lengths = np.array([len(sequence) for sequence in sequences])
  return tokens, (np.arange(WIDTH) < lengths[:, None]).astype(np.int32), lengths


def padded_values(params, tokens, valid):
  hidden = ring_model.forward(MODEL, params["trunk"], tokens, segment_ids_BxT=valid, mtp=False).hidden_BxTxD
  return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def assert_close(got, expected, tolerance=2e-5):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
    scale = max(float(np.abs(b).max()), 1e-2)  # the bias of a difference has no gradient but rounding
    np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def whole(rollouts):
  made = [dataclasses.replace(rollout, logps=[0.0] * len(rollout.tokens)) for rollout in rollouts]
  return minibatch(np.arange(len(made)), made, CONFIG.packing)


def summed(gradients, params, batches):
  sums = None
  for tokens, fields in batches:
    sums = gradients(params, sums, tokens, fields)
  return sums


def test_value_gradient_is_that_of_single_sequences(programs, params, rollouts):
  made, old, returns = rollouts
  tokens, valid, _ = padded([[*one.prompt, *one.tokens] for one in made])
  spans = [(len(one.prompt) - 1, len(one.prompt) - 1 + len(one.tokens)) for one in made]
  total = sum(len(one.tokens) for one in made)

  def loss_of(params):
    value = padded_values(params, tokens, valid)
    kept = jnp.concatenate([value[row, first:last] for row, (first, last) in enumerate(spans)])
    before, target = np.concatenate(old), np.concatenate(returns)
    near = before + jnp.clip(kept - before, -PPO.value_clip, PPO.value_clip)
    return PPO.value_coef / 2 * jnp.maximum((kept - target) ** 2, (near - target) ** 2).sum() / total, (kept, near)

  (loss, (kept, near)), expected = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  batches = value_batches(whole(made), old, returns, PPO)
  assert len(batches) > 1
  sums = summed(programs.value_gradients, params, batches)
  assert abs(float(sums.loss) - float(loss)) < 1e-6
  assert_close(sums.params, expected)
  # What it says of itself, from the arrays.
  kept, near, target = np.float64(kept), np.float64(near), np.float64(np.concatenate(returns))
  metrics = value_metrics(sums)
  outside = np.abs(kept - np.concatenate(old)) > PPO.value_clip
  clipped = outside & ((near - target) ** 2 > (kept - target) ** 2)
  assert 0.1 < clipped.mean() < 0.9
  assert metrics["clipped"] == pytest.approx(clipped.mean())
  assert metrics["explained_variance"] == pytest.approx(1 - np.var(target - kept) / np.var(target), abs=1e-5)
  assert int(sums.tally.tokens) == total and metrics["loss"] == pytest.approx(float(loss))


def test_at_the_old_values_nothing_is_clipped(programs, params, rollouts):
  """V is V_old exactly: the gradient is that of the plain square, whole and not a half of it."""
  made, _, returns = rollouts
  sequences = [[*one.prompt, *one.tokens] for one in made]
  tokens, valid, lengths = padded(sequences)
  values = jax.jit(padded_values)(params, tokens, valid)
  old = [np.asarray(values[row, len(one.prompt) - 1 : lengths[row] - 1]) for row, one in enumerate(made)]
  wide = dataclasses.replace(PPO, value_clip=1e6)
  got, plain = (
    summed(programs.value_gradients, params, value_batches(whole(made), old, returns, ppo)) for ppo in (PPO, wide)
  )
  assert int(got.tally.clipped) == 0
  assert_close(got.params, plain.params, 1e-6)


def test_pair_gradient_is_that_of_single_sequences(programs, params, pairs):
  sequences = [[*pair.prompt, *pair.chosen] for pair in pairs] + [[*pair.prompt, *pair.rejected] for pair in pairs]
  tokens, valid, lengths = padded(sequences)

  def loss_of(params):
    score = padded_values(params, tokens, valid)[np.arange(2 * PAIRS), lengths - 1]
    margin = score[:PAIRS] - score[PAIRS:]
    return -jnp.mean(jnp.log(jax.nn.sigmoid(margin))), (margin, score)

  (loss, (margin, score)), expected = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  batches = pair_batches(pairs, CONFIG.packing)
  apart = [
    place // WIDTH != other // WIDTH
    for _, fields in batches
    for place, other, weight in zip(*fields, strict=True)
    if weight > 0
  ]
  assert len(batches) > 1 and len(apart) == PAIRS and 0 < sum(apart) < PAIRS  # in one row, and in two
  sums = summed(programs.pair_gradients, params, batches)
  assert abs(float(sums.loss) - float(loss)) < 1e-6
  assert_close(sums.params, expected)
  metrics = pair_metrics(sums)
  assert metrics["accuracy"] == pytest.approx(np.mean(np.asarray(margin) > 0)) and 0 < metrics["accuracy"] < 1
  assert metrics["margin"] == pytest.approx(float(np.mean(margin)), abs=1e-5)
  np.testing.assert_allclose(scores(programs, params, sequences, CONFIG.packing), score, atol=3e-6)


def test_a_mesh_gives_the_same_gradient(programs, params, rollouts, pairs):
  """Eight rows on eight devices, the two answers of a pair on different ones."""
  parallel = ParallelConfig(MeshConfig(data=2, fsdp=4))
  made, old, returns = rollouts
  batches = pair_batches(pairs, CONFIG.packing)[:1], value_batches(whole(made), old, returns, PPO)[:1]
  mesh = make_mesh(parallel.mesh)
  placed = jax.device_put(params, ring_model.scalar_shardings(dataclasses.replace(MODEL, parallel=parallel), mesh))
  spread = ScalarPrograms(CONFIG, Update(optax.adam(1e-2), OPTIMIZER), mesh, parallel)
  for name, some in zip(("pair_gradients", "value_gradients"), batches, strict=True):
    one, other = summed(getattr(programs, name), params, some), summed(getattr(spread, name), placed, some)
    assert abs(float(one.loss) - float(other.loss)) <= 1e-6 * abs(float(one.loss))
    far = jax.tree.map(np.subtract, *jax.device_get((one.params, other.params)))
    assert optax.global_norm(far) <= 1e-6 * optax.global_norm(one.params)
    np.testing.assert_allclose(*map(np.float64, jax.device_get((other.tally, one.tally))), rtol=1e-5, atol=1e-5)
  state = spread.init_optimizer(placed)
  for found, wanted in zip(*map(jax.tree.leaves, (state, spread.abstract_optimizer(placed))), strict=True):
    assert found.shape == wanted.shape and found.sharding.is_equivalent_to(wanted.sharding, found.ndim)


def test_a_step_is_that_of_the_optimizer(programs, params):
  grads = jax.tree.map(np.cos, params)
  optimizer = make_optimizer(OPTIMIZER, 10)

  @jax.jit
  def plain(params, grads):
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state, optax.global_norm(grads)

  placed = jax.device_put(params)
  got = programs.apply(placed, programs.init_optimizer(placed), grads)
  assert_close(got, plain(params, grads), 1e-6)


def test_nothing_to_learn_from(params):
  assert value_batches(whole([]), [], [], PPO) == [] and pair_batches([], CONFIG.packing) == []
  assert scores(None, params, [], CONFIG.packing).shape == (0,)


class Listed:
  """A stream of given pairs."""

  def __init__(self, pairs):
    self._pairs, self.cursor = pairs, 0

  def take(self, count):
    self.cursor += count
    return self._pairs[:count]


def test_the_reward_model_learns_its_pairs(programs, fresh, pairs):
  phase = RewardModelPhase(CONFIG, programs, Listed(pairs))
  params = jax.device_put(fresh)
  state = programs.init_optimizer(params)
  assert phase.accuracy(params, pairs) == 0.0  # a head of zeros: every score is the same
  history = []
  for _ in range(25):
    params, state, metrics, positions = phase.step(params, state)
    history.append(metrics)
  assert history[0]["loss"] == pytest.approx(np.log(2)) and history[0]["accuracy"] == 0.0
  assert history[-1]["loss"] < 0.35 and history[-1]["accuracy"] >= 1 - 1 / PAIRS and history[-1]["margin"] > 0.5
  assert positions == sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
  assert history[-1]["pairs_seen"] == 25 * PAIRS
  assert phase.accuracy(params, pairs) >= 1 - 1 / PAIRS
  assert phase.accuracy(params, []) == 0.0
