"""Sampling without logits: its noise, its distribution, and that every implementation draws the same token."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from configs.schema import ConfigError
from kernels.linear_logprob import linear_logprob, tiles, xla_chunked
from kernels.linear_sample import Implementation, linear_sample, noise, token_keys
from sharding.hardware import CHIPS
from tests.kernels import tpu_programs
from tests.kernels.compiled import largest_buffer_elements, temp_bytes

N, H, V = 150, 32, 700
HURRY = {"xla_backend_optimization_level": 0}  # compiling is most of these tests' time
KERNEL = 'custom_call_target="tpu_custom_call"'


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """Several tiles and chunks."""
  monkeypatch.setattr(tiles, "TILES", {chip: tiles.Tile(128, 256) for chip in tiles.TILES})
  monkeypatch.setattr(xla_chunked, "_SINGLE_TILE_ELEMENTS", 0)
  monkeypatch.setattr(xla_chunked, "_VOCAB_CHUNK", 96)
  monkeypatch.setattr(xla_chunked, "_TILE_ELEMENTS", 96 * 64)


def arrays(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 2)
  hidden_NxH = jax.random.normal(keys[0], (N, H), dtype)
  weight_HxV = jax.random.normal(keys[1], (H, V), dtype) / H**0.5
  return hidden_NxH, weight_HxV, token_keys(jnp.full(N, 7), jnp.arange(N) // 10, jnp.arange(N) % 10)


OPTIONS = ({}, {"temperature": jnp.linspace(0.5, 2.0, N), "vocab_mask": jnp.arange(V) % 3 > 0})


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature and mask"])
def test_every_implementation_draws_the_same_token(options):
  """Many tiles, the last one ragged; and its log-probability is the one that training will compute."""
  hidden_NxH, weight_HxV, _ = arrays()
  drawn = {
    kind: jax.jit(functools.partial(linear_sample, implementation=kind, **options), compiler_options=HURRY)(*arrays())
    for kind in (None, *set(Implementation) - {Implementation.PALLAS_TPU})
  }
  want = drawn[Implementation.REFERENCE]
  assert len(np.unique(want.token)) > 100
  for got in drawn.values():
    np.testing.assert_array_equal(got.token, want.token)
    np.testing.assert_allclose(got.logp, want.logp, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(got.lse, want.lse, rtol=2e-6)
  scored = linear_logprob(hidden_NxH, weight_HxV, want.token, **options)
  np.testing.assert_allclose(scored.logp, want.logp, rtol=2e-6, atol=2e-6)
  if "vocab_mask" in options:
    assert np.all(np.asarray(options["vocab_mask"])[np.asarray(want.token)])


def test_bfloat16():
  want = linear_sample(*arrays(jnp.bfloat16), implementation="reference")
  for kind in (Implementation.XLA_CHUNKED, Implementation.PALLAS_INTERPRET):
    got = jax.jit(functools.partial(linear_sample, implementation=kind), compiler_options=HURRY)(*arrays(jnp.bfloat16))
    np.testing.assert_array_equal(got.token, want.token)
    np.testing.assert_allclose(got.logp, want.logp, rtol=2e-6, atol=2e-6)


def test_a_token_depends_on_its_own_row_alone():
  """Another slot, other company, fewer slots: the same tokens, bitwise the same scores."""
  hidden_NxH, weight_HxV, keys_Nx2 = arrays()
  sample = jax.jit(linear_sample)
  first, moved = sample(hidden_NxH, weight_HxV, keys_Nx2), sample(hidden_NxH[::-1], weight_HxV, keys_Nx2[::-1])
  fewer = sample(hidden_NxH[:64], weight_HxV, keys_Nx2[:64])
  for a, b, c in zip(first, moved, fewer, strict=True):
    np.testing.assert_array_equal(a, b[::-1])
    np.testing.assert_array_equal(a[:64], c)


def test_only_the_allowed_id_is_drawn():
  mask_V = jnp.arange(V) == V - 1
  for kind in ("reference", "xla_chunked", "pallas_interpret"):
    draw = functools.partial(linear_sample, vocab_mask=mask_V, implementation=kind)
    got = jax.jit(draw, compiler_options=HURRY)(*arrays())
    assert np.all(got.token == V - 1)
    np.testing.assert_allclose(got.logp, 0, atol=1e-6)


def fits(counts, probabilities):
  """Whether counts are a plausible draw: the fixed seeds make this a yes or no, one in ten thousand would be a no."""
  expected = probabilities * counts.sum()
  assert expected.min() > 5
  return scipy.stats.chisquare(counts, expected).pvalue > 1e-4


def draws(logits_V, seeds, uids, positions, temperature=1.0):
  """Tokens of one distribution under many keys, through the op: the logits are a weight of width 1."""
  keys_Nx2 = token_keys(*(jnp.asarray(np.broadcast_to(x, np.shape(positions))) for x in (seeds, uids, positions)))
  hidden_Nx1 = jnp.ones((keys_Nx2.shape[0], 1))
  sample = jax.jit(lambda h, w, k: linear_sample(h, w, k, temperature=temperature).token)
  return np.asarray(sample(hidden_Nx1, jnp.asarray(logits_V, jnp.float32)[None], keys_Nx2))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_are_the_softmax(temperature):
  """300 ids of probabilities from 1e-3 on, in every lane group of the noise; keys differ in the position alone."""
  logits_V = np.random.default_rng(1).normal(size=300) * 0.6
  tokens = draws(logits_V, 3, 11, np.arange(60_000), temperature)
  p = scipy.special.softmax(logits_V / temperature)
  assert fits(np.bincount(tokens, minlength=300), p)


def test_rare_ids_are_as_rare_as_they_should_be():
  """Of 2^-20 of the mass, which a uniform number of 24 bits near 1 would blur; here 4096 such ids beside one."""
  logits_V = np.full(4097, -20 * np.log(2), np.float32)
  logits_V[0] = 0
  tokens = draws(logits_V, 5, np.arange(8_192), np.arange(8_192))
  share = 4096 * 2.0**-20 / (1 + 4096 * 2.0**-20)
  rare = np.count_nonzero(tokens)
  assert scipy.stats.binomtest(rare, len(tokens), share).pvalue > 1e-4
  assert len(np.unique(tokens[tokens > 0])) > 0.9 * rare


def test_neighbouring_keys_are_independent():
  """Consecutive positions, rollouts and seeds: the pairs of their tokens fit the product of the frequencies."""
  logits_V = np.array([0.0, 0.5, -0.5, 1.0])
  p = scipy.special.softmax(logits_V)
  count = np.arange(20_000)
  for seeds, uids, positions in ((0, 0, count), (0, count, 0), (count, 0, 0)):
    positions = np.broadcast_to(positions, count.shape)
    tokens = draws(logits_V, seeds, uids, positions)
    pairs = np.bincount(tokens[:-1:2] * 4 + tokens[1::2], minlength=16)
    assert fits(pairs, np.outer(p, p).reshape(-1))


def test_hash_is_threefry():
  """Word for word JAX's own, and Random123's published answer for all ones."""
  words = np.random.default_rng(0).integers(0, 2**32, (4, 50), np.uint32)
  got = noise.threefry2x32(*(jnp.asarray(word.view(np.int32)) for word in words))
  for i in range(50):
    want = jax.extend.random.threefry_2x32(jnp.asarray(words[:2, i]), jnp.asarray(words[2:, i]))
    np.testing.assert_array_equal(np.asarray([x[i] for x in got]).view(np.uint32), want)
  ones = noise.threefry2x32(*[jnp.full((), -1, jnp.int32)] * 4)
  assert [int(x) & 0xFFFFFFFF for x in ones] == [0x1CB996FC, 0xBB002BE7]


def test_groups_hash_like_single_ids():
  key = jnp.array([[123], [-456]], jnp.int32)
  for first in (0, 256, 157_184 - 157_184 % 256):
    ids = first + jnp.arange(768, dtype=jnp.int32)
    got = noise.bits_of_groups(key, key + 1, jnp.int32(first), 768)
    np.testing.assert_array_equal(got, noise.bits_of_ids(key, key + 1, ids))
    assert len(np.unique(got)) == got.size


def test_noise_is_exact_where_it_decides():
  """Against float64 from the smallest v to the largest; never infinite, and monotonic."""
  bits = np.unique(np.concatenate([2 ** np.arange(32) - 1, 2 ** np.arange(32), [2**32 - 1]])).astype(np.uint32)
  got = np.asarray(noise.gumbel(jnp.asarray(bits.view(np.int32))))
  v = np.minimum(((bits >> 1).astype(np.float32) + 0.5).astype(np.float64) * 2.0**-31, 1 - 2.0**-24)
  np.testing.assert_allclose(got, -np.log(-np.log1p(-v)), rtol=2e-6, atol=2e-6)
  assert np.isfinite(got).all() and np.all(np.diff(got) <= 0)


def test_no_tokens_and_errors():
  hidden_NxH, weight_HxV, keys_Nx2 = arrays()
  assert linear_sample(hidden_NxH[:0], weight_HxV, keys_Nx2[:0]).token.shape == (0,)
  with pytest.raises(ValueError, match=r"keys uint32\[150, 1\]: expected uint32 \[150, 2\]"):
    linear_sample(hidden_NxH, weight_HxV, keys_Nx2[:, :1])
  with pytest.raises(ValueError, match="linear_sample: temperature=0: must be > 0"):
    linear_sample(hidden_NxH, weight_HxV, keys_Nx2, temperature=0)
  with pytest.raises(ConfigError, match="linear_sample: implementation='x': one of"):
    linear_sample(hidden_NxH, weight_HxV, keys_Nx2, implementation="x")


@pytest.mark.tpu
def test_a_decode_step_holds_no_logits(monkeypatch):
  monkeypatch.undo()
  program = tpu_programs.linear_sample("v5p")
  assert program.as_text().count(KERNEL) == 1
  excluding = ((tpu_programs.H, tpu_programs.V),)
  assert largest_buffer_elements(program.as_text(), excluding) < 256 * tpu_programs.V / 16
  assert temp_bytes(program) <= 4 * 2**20


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("slots, hidden, vocab", [(64, 8192, 157_184), (1024, 2048, 157_184), (8, 64, 320)])
def test_every_chip_compiles(monkeypatch, chip, slots, hidden, vocab):
  monkeypatch.undo()
  assert tpu_programs.linear_sample(chip, slots, hidden, vocab).as_text().count(KERNEL) == 1
