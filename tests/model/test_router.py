"""The router against a plain numpy reading of bailing_moe_v2.md 3.6, where mistakes hide: groups, negative scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ring_tiny import get_config
from ring_jax.model.router import route, updated_bias

CONFIG = dataclasses.replace(
  get_config().model, num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
)
N, D = 64, 24


def by_hand(x, kernel, bias, config):
  ids, weights = [], []
  for row in x.astype(np.float64):
    scores = 1 / (1 + np.exp(-(row @ kernel.astype(np.float64))))
    choice = scores + bias
    size = config.num_experts // config.n_group
    groups = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(config.n_group)]
    kept = np.argsort(groups)[-config.topk_group :] if config.n_group > 1 else [0]
    allowed = [e for e in range(config.num_experts) if e // size in kept]
    best = sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    picked = scores[best]
    total = picked.sum() if config.norm_topk_prob and len(best) > 1 else 1.0
    ids.append(best)
    weights.append(picked / total * config.routed_scaling_factor)
  return np.array(ids), np.array(weights)


@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["bias", "negative"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("normalised", [True, False])
def test_ids_and_weights(groups, shift, normalised):
  config = dataclasses.replace(CONFIG, n_group=groups[0], topk_group=groups[1], norm_topk_prob=normalised)
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(D, 16)).astype(np.float32) / 4
  bias = (rng.normal(size=16) * 0.3 + shift).astype(np.float32)
  routing = route(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias), config)
  ids, weights = by_hand(x, kernel, bias, config)
  np.testing.assert_array_equal(routing.ids_NxK, ids)
  np.testing.assert_allclose(routing.weights_NxK, weights, rtol=2e-6)
  if normalised:
    np.testing.assert_allclose(routing.weights_NxK.sum(-1), config.routed_scaling_factor, rtol=1e-6)


def test_given_experts_are_weighed_by_the_tokens_own_scores():
  rng = np.random.default_rng(2)
  x, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (D, 16), (16,)))
  plain = route(x, kernel, bias, CONFIG)
  given = np.stack([rng.permutation(16)[:4] for _ in range(N)]).astype(np.int16)
  given[::3] = -1
  routing = route(x, kernel, bias, CONFIG, jnp.asarray(given))
  scores = 1 / (1 + np.exp(-(np.float64(x) @ np.float64(kernel))))
  ids = np.where(given >= 0, given, plain.ids_NxK)
  picked = np.take_along_axis(scores, ids, axis=1)
  np.testing.assert_array_equal(routing.ids_NxK, ids)
  np.testing.assert_allclose(routing.weights_NxK, picked / picked.sum(axis=1, keepdims=True) * 2.5, rtol=3e-6)
  for own in (plain.ids_NxK, jnp.full((N, 4), -1)):
    again = route(x, kernel, bias, CONFIG, own)
    np.testing.assert_array_equal(again.weights_NxK, plain.weights_NxK)
  # The gradient of scores at given ids, which no step of the router can make jump.
  target = jnp.asarray(rng.normal(size=(N, 4)), jnp.float32)
  loss = lambda kernel: jnp.sum(route(x, kernel, bias, CONFIG, jnp.maximum(given, ids)).weights_NxK * target)  # noqa: E731
  direction = jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)
  numeric = (loss(kernel + 1e-2 * direction) - loss(kernel - 1e-2 * direction)) / 2e-2
  assert float(numeric) == pytest.approx(float(jnp.vdot(jax.grad(loss)(kernel), direction)), rel=1e-3)


def test_gradient_reaches_scores_only():
  rng = np.random.default_rng(1)
  x, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (D, 16), (16,)))
  target = jnp.asarray(rng.normal(size=(N, 4)), jnp.float32)
  loss = lambda kernel, bias: jnp.sum(route(x, kernel, bias, CONFIG).weights_NxK * target)  # noqa: E731
  by_kernel, by_bias = jax.grad(loss, argnums=(0, 1))(kernel, bias)
  assert float(jnp.abs(by_bias).max()) == 0.0
  direction = jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)
  step = 1e-3
  numeric = (loss(kernel + step * direction, bias) - loss(kernel - step * direction, bias)) / (2 * step)
  assert abs(float(numeric) - float(jnp.vdot(by_kernel, direction))) < 2e-2 * abs(float(numeric))


def test_bias_moves_against_the_load_and_keeps_its_mean():
  counts = jnp.asarray([[10, 0, 5, 5], [1, 1, 1, 97]])
  moved = updated_bias(jnp.zeros((2, 4)), counts, 1e-3)
  np.testing.assert_allclose(moved.mean(-1), 0.0, atol=1e-9)
  assert moved[0, 1] > moved[0, 2] > moved[0, 0] and moved[1, 3] == moved[1].min()
