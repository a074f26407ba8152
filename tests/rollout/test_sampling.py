"""Sampling: the drawn distribution, its log-probs, the mask, truncation, and independence of slot and batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.parallel import MeshConfig
from rollout.sampling import SamplingParams, _first_above, _invert, sample
from sharding import rules
from sharding.mesh import make_mesh

V, D = 300, 8


def params(B, temperature=1.0, top_p=1.0, top_k=0, seed=0):
  full = lambda value, dtype: jnp.full((B,), value, dtype)  # noqa: E731
  return SamplingParams(
    full(temperature, jnp.float32), full(top_p, jnp.float32), full(top_k, jnp.int32), full(seed, jnp.uint32)
  )


@pytest.fixture(scope="module")
def head():
  rng = np.random.default_rng(0)
  hidden_D = rng.normal(size=(D,)).astype(np.float32)
  head_DxV = rng.normal(size=(D, V)).astype(np.float32)
  mask_V = np.ones(V, bool)
  mask_V[[0, 5, 131, 299]] = False
  return hidden_D, head_DxV, mask_V


def draw(head, B, uids=None, positions=None, **options):
  hidden_D, head_DxV, mask_V = head
  uids = np.arange(B, dtype=np.uint32) if uids is None else np.asarray(uids, np.uint32)
  positions = np.full(B, 3, np.int32) if positions is None else np.asarray(positions, np.int32)
  hidden_BxD = jnp.broadcast_to(hidden_D, (B, len(hidden_D)))
  tokens, logps = jax.jit(sample)(hidden_BxD, head_DxV, mask_V, params(B, **options), uids, positions)
  return np.asarray(tokens), np.asarray(logps)


def exact_logps(head, temperature=1.0):
  hidden_D, head_DxV, mask_V = head
  logits = np.where(mask_V, hidden_D.astype(np.float64) @ head_DxV / temperature, -np.inf)
  return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_distribution_and_logps_are_its_own(head, temperature):
  B = 40_000
  tokens, logps = draw(head, B, temperature=temperature)
  exact = exact_logps(head, temperature)
  np.testing.assert_allclose(logps, exact[tokens], atol=1e-5)
  expected = np.exp(exact) * B
  seen = np.bincount(tokens, minlength=V)
  assert seen[~head[2]].sum() == 0, "a masked id was drawn"
  often = expected > 5
  chi2 = ((seen[often] - expected[often]) ** 2 / expected[often]).sum()
  assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())


def test_top_k_and_top_p_renormalise_what_they_keep(head):
  exact = np.exp(exact_logps(head))
  order = np.argsort(-exact)
  tokens, logps = draw(head, 2000, top_k=3)
  assert set(tokens) <= set(order[:3])
  np.testing.assert_allclose(np.exp(logps), exact[tokens] / exact[order[:3]].sum(), rtol=1e-4)

  kept = order[: int(np.searchsorted(np.cumsum(exact[order]), 0.7)) + 1]
  tokens, logps = draw(head, 2000, top_p=0.7)
  assert set(tokens) == set(kept)
  np.testing.assert_allclose(np.exp(logps), exact[tokens] / exact[kept].sum(), rtol=1e-4)


def test_temperature_0_takes_the_likeliest_and_tells_its_whole_log_prob(head):
  exact = exact_logps(head)
  for cut in ({}, {"top_k": 1}, {"top_p": 0.1}):
    tokens, logps = draw(head, 500, temperature=0.0, **cut)
    assert set(tokens) == {exact.argmax()}
    np.testing.assert_allclose(logps, exact.max(), atol=1e-5)
  # Beside others it changes nothing for them.
  hidden_D, head_DxV, mask_V = head
  mixed = params(400)._replace(temperature_B=jnp.arange(400) % 2 * 1.0)
  arguments = (jnp.broadcast_to(hidden_D, (400, D)), head_DxV, mask_V)
  drawn, logps = jax.jit(sample)(*arguments, mixed, np.arange(400, dtype=np.uint32), np.full(400, 3, np.int32))
  others, other_logps = draw(head, 400)
  np.testing.assert_array_equal(drawn[1::2], others[1::2])
  np.testing.assert_array_equal(logps[1::2], other_logps[1::2])
  assert set(np.asarray(drawn[::2])) == {exact.argmax()}


def test_of_several_likeliest_the_first_is_taken():
  head_1xV = np.zeros((1, V), np.float32)
  head_1xV[0, [131, 40, 299]] = 2.0
  mask_V = np.arange(V) != 40
  tokens, logps = draw((np.ones(1, np.float32), head_1xV, mask_V), 50, temperature=0.0)
  assert set(tokens) == {131}
  np.testing.assert_allclose(logps, 2 - np.log(2 * np.exp(2) + V - 3), atol=1e-5)


def test_a_cut_vocabulary_has_the_same_likeliest_token(head):
  hidden_D, head_DxV, mask_V = head
  tied_DxV = head_DxV.copy()
  tied_DxV[:, 299] = tied_DxV[:, exact_logps(head).argmax()]
  mask_V = np.ones(V, bool)
  hidden_BxD = np.random.default_rng(1).normal(size=(8, D)).astype(np.float32)
  hidden_BxD[0] = hidden_D
  arguments = (hidden_BxD, tied_DxV, mask_V, params(8, temperature=0.0), np.arange(8, dtype=np.uint32), np.arange(8))
  tokens, logps = jax.jit(sample)(*arguments)
  mesh = make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])
  cut_tokens, cut_logps = rules.Program(mesh, sample)(*jax.tree.map(jnp.asarray, arguments))
  np.testing.assert_array_equal(cut_tokens, tokens)
  np.testing.assert_allclose(cut_logps, logps, atol=1e-6)
  assert len(set(np.asarray(tokens))) > 3 and tokens[0] != 299


def test_a_draw_depends_on_uid_and_position_only(head):
  uids = np.array([7, 1, 99, 4], np.uint32)
  positions = np.array([3, 8, 1, 4], np.int32)
  tokens, logps = draw(head, 4, uids, positions)
  order = [2, 0, 3, 1]
  moved_tokens, moved_logps = draw(head, 4, uids[order], positions[order])
  np.testing.assert_array_equal(moved_tokens, tokens[order])
  np.testing.assert_array_equal(moved_logps, logps[order])
  more = [draw(head, 4, uids, positions + shift)[0] for shift in range(1, 30)]
  assert any((other != tokens).any() for other in more), "the position does not reach the key"
  assert (draw(head, 64, seed=1)[0] != draw(head, 64, seed=2)[0]).any()


def test_inversion_never_returns_a_token_without_mass_whatever_the_rounding():
  mass = jnp.asarray([[0.0, 0.25, 0.0, 0.75, 0.0]])
  for target, expected in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1.0, 3), (2.0, 3)):
    assert int(_first_above(mass, jnp.asarray([target]))[0][0]) == expected
  rng = np.random.default_rng(1)
  probs = rng.random((64, 1000)).astype(np.float32) ** 20
  probs[:, rng.random(1000) < 0.9] = 0
  probs /= probs.sum(-1, keepdims=True)
  for uniform in (0.0, 0.5, 1 - 2**-24):
    tokens, here = map(np.asarray, _invert(jnp.asarray(probs), jnp.full((64,), uniform, jnp.float32)))
    assert here.all()
    assert (probs[np.arange(64), tokens] > 0).all()
