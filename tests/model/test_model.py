"""The model: packing, decode against the forward pass, remat, the MTP layer, padding.  Outside oracle: tests/checkpoint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ring_tiny import get_config
from configs.schema import Remat
from ring_jax import model

CONFIG = dataclasses.replace(get_config().model, num_nextn_predict_layers=1, initializer_range=0.15)


@pytest.fixture(scope="module")
def params():
  """Random norms and selection biases, or mistakes in them would not show."""
  rng = np.random.default_rng(0)

  def shake(path, leaf):
    if path[-1].key == "scale":
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    return jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype) if model.is_router_bias(path) else leaf

  return jax.tree_util.tree_map_with_path(shake, model.init_params(CONFIG, 0))


@functools.cache
def forward(config=CONFIG, **options):
  return jax.jit(functools.partial(model.forward, config, **options))


def random_tokens(*shape):
  return np.random.default_rng(1).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def close(a, b, tolerance=2e-6):
  scale = float(jnp.abs(b).max())
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance * max(scale, 1.0))


def test_packed_sequences_do_not_see_each_other_and_padding_changes_nothing(params):
  tokens = random_tokens(1, 16)
  positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0]], np.int32)
  segments = np.array([[1] * 5 + [2] * 7 + [0] * 4], np.int32)
  packed = forward()(params, tokens, positions, segments)
  total = 0
  for start, end in ((0, 5), (5, 12)):
    alone = forward()(params, tokens[:, start:end])
    close(packed.hidden_BxTxD[:, start:end], alone.hidden_BxTxD)
    # The last position of a sequence has no successor: its MTP input is a neighbour's token, and its loss is masked.
    close(packed.mtp_hidden_BxTxD[:, start : end - 1], alone.mtp_hidden_BxTxD[:, :-1])
    total = total + alone.expert_counts_LxE
  np.testing.assert_array_equal(packed.expert_counts_LxE, total)
  assert packed.expert_counts_LxE.sum() == 12 * CONFIG.num_experts_per_tok * CONFIG.num_moe_layers


def test_decode_repeats_the_forward_pass_token_by_token(params):
  B, T = 3, 9
  tokens = random_tokens(B, T)
  expected = forward(return_kv=True)(params, tokens)
  # Slots start at different times, one never does.
  step = jax.jit(functools.partial(model.decode_step, CONFIG))
  cache = model.init_cache(CONFIG, B + 1, 16)
  start = np.array([0, 2, 5, 99])
  for now in range(T + 5):
    at = np.clip(now - start, 0, T - 1)
    active = (now >= start) & (now - start < T)
    column = np.append(tokens[np.arange(B), at[:B]], 0).astype(np.int32)
    hidden, cache = step(params, column, at.astype(np.int32), active, cache)
    for slot in range(B):
      if active[slot]:
        close(hidden[slot], expected.hidden_BxTxD[slot, at[slot]])
  close(cache.k_LxBxKxdxS[:, :B, :, :, :T], expected.kv.k_LxBxKxdxS)
  close(cache.v_LxBxKxSxd[:, :B, :, :T], expected.kv.v_LxBxKxSxd)


@pytest.mark.parametrize("remat", [Remat.DOTS, Remat.FULL, Remat.OFFLOAD])
def test_remat_changes_memory_not_numbers(params, remat):
  tokens = random_tokens(2, 8)

  def gradient(config):
    def loss(p):
      out = model.forward(config, p, tokens)
      return jnp.sum(jnp.sin(out.hidden_BxTxD)) + jnp.sum(jnp.cos(out.mtp_hidden_BxTxD))

    return jax.jit(jax.grad(loss))(params)

  plain, recomputed = gradient(CONFIG), gradient(dataclasses.replace(CONFIG, remat=remat))
  jax.tree.map(lambda a, b: close(a, b, 5e-6), recomputed, plain)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain["moe_layers"]["moe"]["experts"]))
  for bias in (plain["moe_layers"]["moe"]["router"]["bias"], plain["mtp"]["block"]["moe"]["router"]["bias"]):
    assert float(jnp.abs(bias).max()) == 0.0, "no gradient may reach a selection bias"


@pytest.mark.parametrize("dense", [0, 3])
def test_any_number_of_dense_layers(dense):
  config = dataclasses.replace(CONFIG, first_k_dense_replace=dense, num_nextn_predict_layers=0)
  params = model.init_params(config, 0)
  assert ("dense_layers" in params) == (dense > 0) and ("moe_layers" in params) == (dense < 3)
  out = forward(config)(params, random_tokens(1, 4))
  assert out.expert_counts_LxE.shape == (3 - dense, config.num_experts)
  assert out.mtp_hidden_BxTxD is None and out.experts_LxBxTxK is None


def test_bfloat16_stays_near_float32(params):
  tokens = random_tokens(2, 8)
  full = forward()(params, tokens).hidden_BxTxD
  half = forward(dataclasses.replace(CONFIG, dtype="bfloat16"))(params, tokens).hidden_BxTxD
  assert half.dtype == jnp.bfloat16
  assert float(jnp.median(jnp.abs(half.astype(jnp.float32) - full))) < 0.05


def test_init_is_a_function_of_the_seed():
  first, again, other = (model.init_params(CONFIG, seed)["embed"]["embedding"] for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  assert abs(float(first.std()) / CONFIG.initializer_range - 1) < 0.05
