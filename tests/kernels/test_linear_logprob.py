"""The linear log-probability: `xla_chunked` against `reference`, against NumPy, and what it promises about memory."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from configs.schema import ConfigError
from kernels.linear_logprob import Implementation, linear_logprob, xla_chunked

H = 16
CHUNKED = Implementation.XLA_CHUNKED
ON_CPU = (Implementation.REFERENCE, CHUNKED)  # the kernels: test_linear_logprob_pallas.py


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request, monkeypatch):
  """Both ways through the op at test sizes: tiles of 8 tokens and 32 ids, or everything in one."""
  if request.param == "many tiles":
    small_tiles(monkeypatch)
  return request.param


def small_tiles(monkeypatch):
  monkeypatch.setattr(xla_chunked, "_SINGLE_TILE_ELEMENTS", 0)
  monkeypatch.setattr(xla_chunked, "_VOCAB_CHUNK", 32)
  monkeypatch.setattr(xla_chunked, "_TILE_ELEMENTS", 8 * 32)


def arrays(tokens, vocab, seed=0, dtype=jnp.float32, scale=1.0):
  keys = jax.random.split(jax.random.key(seed), 6)
  hidden = jax.random.normal(keys[0], (tokens, H), dtype) * scale
  weight = jax.random.normal(keys[1], (H, vocab), dtype) / H**0.5
  targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
  if tokens > 1:
    targets = targets.at[0].set(0).at[1].set(vocab - 1)
  cotangents = tuple(jax.random.normal(k, (tokens,), jnp.float32) for k in keys[3:])
  return hidden, weight, targets, cotangents


def value_and_gradients(hidden, weight, targets, cotangents, implementation=CHUNKED, **options):
  @jax.jit
  def run(hidden, weight, targets, cotangents):
    score = functools.partial(linear_logprob, targets_N=targets, implementation=implementation, **options)
    scored, pull_back = jax.vjp(lambda h, w: score(h, w), hidden, weight)
    return scored, pull_back(type(scored)(*cotangents))

  scored, gradients = run(hidden, weight, targets, cotangents)
  return *scored, *gradients


def definition(hidden, weight, targets, cotangents, temperature=1.0, vocab_mask=None):
  """Values and gradients in NumPy float64, from the formulas."""
  hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
  temperature = np.broadcast_to(np.asarray(temperature, np.float64), len(hidden))[:, None]
  mask = np.ones(weight.shape[1], bool) if vocab_mask is None else np.asarray(vocab_mask)
  x = np.where(mask, hidden @ weight / temperature, -np.inf)
  top = x.max(axis=1, keepdims=True)
  lse = top + np.log(np.exp(x - top).sum(axis=1, keepdims=True))
  log_p = x - lse
  p = np.exp(log_p)
  log_p = np.where(mask, log_p, 0)
  entropy = -(p * log_p).sum(axis=1, keepdims=True)
  hit = (np.arange(weight.shape[1]) == np.asarray(targets)[:, None]) & mask
  a, b, c = (np.asarray(cotangent, np.float64)[:, None] for cotangent in cotangents)
  dx = (a * (hit - p) + b * p - c * p * (log_p + entropy)) / temperature
  logp = np.take_along_axis(x, np.asarray(targets)[:, None], axis=1) - lse
  return logp[:, 0], lse[:, 0], entropy[:, 0], dx @ weight.T, hidden.T @ dx


def assert_close(got, want, rtol=2e-5, atol=2e-5):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


MASK = np.random.default_rng(0).random(77) < 0.6
MASK[[0, 76]] = True


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"temperature": 0.7},
    {"temperature": jnp.linspace(0.5, 2.0, 21), "vocab_mask": jnp.asarray(MASK)},
    {"vocab_mask": jnp.arange(77) >= 40},  # the first chunk of the vocabulary is masked as a whole
  ],
)
def test_matches_definition(options, implementation, tiling):
  """21 tokens and 77 ids: neither is a multiple of its tile.  Targets include the first id and the last."""
  hidden, weight, targets, cotangents = arrays(21, 77)
  if "vocab_mask" in options:
    drawable = np.flatnonzero(options["vocab_mask"])
    targets = jnp.asarray(drawable)[targets % len(drawable)]
  got = value_and_gradients(hidden, weight, targets, cotangents, implementation, **options)
  assert_close(got, definition(hidden, weight, targets, cotangents, **options))


@pytest.mark.parametrize("which", range(3))
def test_each_cotangent_alone(which, tiling):
  """Only one of logp, lse, entropy is used: the others' cotangents are zero by construction."""
  hidden, weight, targets, cotangents = arrays(21, 77)
  used = tuple(c if i == which else jnp.zeros_like(c) for i, c in enumerate(cotangents))
  loss = lambda h, w: jnp.sum(linear_logprob(h, w, targets)[which] * cotangents[which])  # noqa: E731
  assert_close(jax.jit(jax.grad(loss, (0, 1)))(hidden, weight), definition(hidden, weight, targets, used)[3:])


@hypothesis.settings(max_examples=6)
@hypothesis.given(tokens=st.integers(0, 40), vocab=st.integers(1, 100))
def test_any_shape(tokens, vocab):
  hidden, weight, targets, cotangents = arrays(tokens, vocab)
  with pytest.MonkeyPatch.context() as monkeypatch:
    small_tiles(monkeypatch)
    got = value_and_gradients(hidden, weight, targets, cotangents)
  assert [x.shape for x in got] == [(tokens,)] * 3 + [(tokens, H), (H, vocab)]
  if tokens:
    assert_close(got, definition(hidden, weight, targets, cotangents))


def test_large_logits(tiling):
  """Logits to +-60 and beyond: nothing overflows, and tiny probabilities keep their gradients."""
  hidden, weight, targets, cotangents = arrays(21, 77, scale=25.0)
  logits = np.asarray(hidden) @ np.asarray(weight)
  assert logits.max() > 60 and logits.min() < -60
  got = value_and_gradients(hidden, weight, targets, cotangents)
  want = definition(hidden, weight, targets, cotangents)
  assert all(np.isfinite(x).all() for x in got)
  assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_masked_and_unknown_ids(tiling):
  hidden, weight, targets, cotangents = arrays(21, 77)
  mask = jnp.arange(77) != 5
  targets = targets.at[3].set(5).at[4].set(77).at[5].set(-1)
  for implementation in ON_CPU:
    logp, lse, entropy, dhidden, dweight = value_and_gradients(
      hidden, weight, targets, cotangents, implementation, vocab_mask=mask
    )
    assert np.all(np.asarray(logp)[3:6] == -np.inf)
    assert np.isfinite(np.delete(np.asarray(logp), [3, 4, 5])).all()
    assert all(np.isfinite(x).all() for x in (lse, entropy, dhidden, dweight))
    assert not np.any(dweight[:, 5])


def test_rows_without_cotangent_are_inert(tiling):
  """A token without gradient contributes exactly nothing, even one whose hidden state is NaN."""
  hidden, weight, targets, cotangents = arrays(40, 77)
  active = jnp.arange(40) % 3 == 0
  cotangents = tuple(jnp.where(active, c, 0) for c in cotangents)
  clean = value_and_gradients(hidden, weight, targets, cotangents)
  dirty = value_and_gradients(jnp.where(active[:, None], hidden, jnp.nan), weight, targets, cotangents)
  for a, b in zip(clean[3:], dirty[3:], strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.any(clean[3][~np.asarray(active)])
  none = value_and_gradients(hidden, weight, targets, tuple(jnp.zeros_like(c) for c in cotangents))
  assert not np.any(none[3]) and not np.any(none[4])


def test_rows_do_not_depend_on_their_neighbours(tiling):
  """The same token in other company, and the same program again: bitwise the same scores."""
  hidden, weight, targets, _ = arrays(40, 77)
  score = jax.jit(lambda h, t: linear_logprob(h, weight, t))
  first, again = score(hidden, targets), score(hidden, targets)
  others = score(hidden.at[20:].multiply(3.0), targets.at[20:].set(1))
  moved = score(hidden[::-1], targets[::-1])
  for a, b, c, d in zip(first, again, others, moved, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[:20], c[:20])
    np.testing.assert_array_equal(a, d[::-1])


def test_scoring_equals_training_bitwise(tiling):
  """log-probs at theta_old and those inside value_and_grad: the PPO ratio of the first minibatch is exactly 1."""
  hidden, weight, targets, cotangents = arrays(40, 77)
  scored = jax.jit(lambda h, w: linear_logprob(h, w, targets))(hidden, weight)
  np.testing.assert_array_equal(scored.logp, value_and_gradients(hidden, weight, targets, cotangents)[0])


def test_bfloat16(tiling):
  """bfloat16 arguments: float32 logits; gradients within the rounding of bfloat16 logit gradients and results."""
  hidden, weight, targets, cotangents = arrays(40, 77, dtype=jnp.bfloat16)
  got = value_and_gradients(hidden, weight, targets, cotangents)
  want = definition(hidden.astype(jnp.float32), weight.astype(jnp.float32), targets, cotangents)
  assert [x.dtype for x in got] == [jnp.float32] * 3 + [jnp.bfloat16] * 2
  assert_close(got[:3], want[:3])
  for a, b in zip(got[3:], want[3:], strict=True):
    assert np.linalg.norm(a.astype(jnp.float32) - b) < 5e-3 * np.linalg.norm(b)


def test_finite_differences(tiling):
  with jax.enable_x64(True):
    hidden, weight, targets, _ = arrays(9, 40, dtype=jnp.float64)
    check_grads(lambda h, w: linear_logprob(h, w, targets, temperature=1.3), (hidden, weight), order=1, modes=["rev"])


def test_scan_and_checkpoint(tiling):
  hidden, weight, targets, _ = arrays(32, 77)

  def loss(hidden, weight, implementation):
    @jax.checkpoint
    def part(total, rows):
      scored = linear_logprob(rows[0], weight, rows[1], implementation=implementation)
      return total + jnp.sum(scored.logp - 0.1 * scored.entropy), None

    return jax.lax.scan(part, 0.0, (hidden.reshape(2, 16, H), targets.reshape(2, 16)))[0]

  gradients = [jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(hidden, weight, kind) for kind in ON_CPU]
  assert_close(*gradients)


@pytest.fixture(scope="module")
def compiled():
  """value_and_grad at 512 tokens and 50,001 ids for both implementations: compiled, never run."""
  tokens, vocab = 512, 50_001

  def loss(hidden, weight, targets, implementation):
    scored = linear_logprob(hidden, weight, targets, implementation=implementation)
    return jnp.sum(scored.logp), scored.entropy

  shapes = (
    jax.ShapeDtypeStruct((tokens, 64), jnp.float32),
    jax.ShapeDtypeStruct((64, vocab), jnp.float32),
    jax.ShapeDtypeStruct((tokens,), jnp.int32),
  )
  grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=3)
  return tokens * vocab, {kind: grad.lower(*shapes, kind).compile() for kind in ON_CPU}


@pytest.mark.cpu
def test_memory_is_a_tenth(compiled):
  _, programs = compiled
  temp = {kind: program.memory_analysis().temp_size_in_bytes for kind, program in programs.items()}
  assert temp[CHUNKED] <= temp[Implementation.REFERENCE] / 10


@pytest.mark.cpu
def test_no_array_of_tokens_times_vocabulary(compiled):
  elements, programs = compiled

  def largest(program, excluding=()):
    shapes = re.findall(r"[a-z]+\d*\[([\d,]+)\]", program.as_text())
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in set(shapes) - set(excluding))

  assert largest(programs[Implementation.REFERENCE]) >= elements  # the search finds what it is meant to find
  assert largest(programs[CHUNKED], excluding=["64,50001"]) < elements / 16


def test_tiles_cover_and_stay_small():
  for tokens, vocab in ((1, 157_184), (1000, 157_184), (16_384, 320), (8192, 157_184), (4096, 320)):
    tile_tokens, tile_ids = xla_chunked.tile_shape(tokens, vocab)
    assert 0 < tile_tokens <= tokens and 0 < tile_ids <= vocab
    assert tile_tokens * tile_ids <= 1 << 21
    assert -tokens % tile_tokens <= tokens / 16, "padding"
  assert xla_chunked.tile_shape(4096, 320) == (4096, 320)


@pytest.mark.parametrize(
  "change, error, message",
  [
    ({"implementation": "x"}, ConfigError, "implementation='x': one of reference, xla_chunked, pallas_tpu"),
    ({"weight_HxV": jnp.zeros((5, 6))}, ValueError, r"expected \[N, H\] and \[H, V\]"),
    ({"targets_N": jnp.zeros(3)}, ValueError, r"expected integers \[3\]"),
    ({"temperature": 0.0}, ValueError, "temperature=0.0: must be > 0"),
    ({"temperature": jnp.ones(2)}, ValueError, r"a number or one a token \[3\]"),
    ({"vocab_mask": jnp.ones(5, bool)}, ValueError, r"expected bool \[6\]"),
  ],
)
def test_errors(change, error, message):
  arguments = {
    "hidden_NxH": jnp.zeros((3, 4)),
    "weight_HxV": jnp.zeros((4, 6)),
    "targets_N": jnp.zeros(3, jnp.int32),
  } | change
  with pytest.raises(error, match=message):
    linear_logprob(**arguments)
