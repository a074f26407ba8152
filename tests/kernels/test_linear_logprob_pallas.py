"""The linear log-probability's TPU kernels, interpreted on the CPU: against NumPy float64, bitwise among each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from configs.schema import ConfigError
from kernels.linear_logprob import Implementation, LinearLogprob, backend, dispatch, linear_logprob, tiles
from kernels.linear_logprob.backend import active_first
from tests.kernels.test_linear_logprob import definition

INTERPRET = Implementation.PALLAS_INTERPRET
H = 48


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """128 tokens by 128 ids, so that little arrays have several blocks and tiles."""
  monkeypatch.setattr(tiles, "TILES", {chip: tiles.Tile(128, 128) for chip in tiles.TILES})


def arrays(tokens, vocab, dtype=jnp.float32, scale=1.0, hidden=H):
  keys = jax.random.split(jax.random.key(1), 6)
  hidden_NxH = jax.random.normal(keys[0], (tokens, hidden), dtype) * scale
  weight_HxV = jax.random.normal(keys[1], (hidden, vocab), dtype) / hidden**0.5
  targets_N = jax.random.randint(keys[2], (tokens,), 0, vocab)
  targets_N = targets_N.at[0].set(0).at[1].set(vocab - 1).at[2].set(vocab - 1).at[-1].set(min(127, vocab - 1))
  return hidden_NxH, weight_HxV, targets_N, LinearLogprob(*(jax.random.normal(key, (tokens,)) for key in keys[3:]))


def program(used=(0, 1, 2), quick=True, **options):
  """(hidden, weight, targets, cotangents) -> values and gradients, compiled once.

  Only the results in `used` have a cotangent: the others' are zero by construction.  quick: the CPU's compiler is to
  hurry, which is most of these tests' time.
  """

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0} if quick else None)
  def run(hidden_NxH, weight_HxV, targets_N, cotangents):
    def loss(hidden_NxH, weight_HxV):
      scored = linear_logprob(hidden_NxH, weight_HxV, targets_N, implementation=INTERPRET, **options)
      return sum(jnp.sum(scored[i] * cotangents[i]) for i in used), scored

    (_, scored), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden_NxH, weight_HxV)
    return *scored, *gradients

  return run


def values_and_gradients(hidden_NxH, weight_HxV, targets_N, cotangents, used=(0, 1, 2), **options):
  return program(used, **options)(hidden_NxH, weight_HxV, targets_N, cotangents)


def wanted(hidden_NxH, weight_HxV, targets_N, cotangents, used=(0, 1, 2), **options):
  cotangents = [c if i in used else jnp.zeros_like(c) for i, c in enumerate(cotangents)]
  as_float = lambda x: x.astype(jnp.float32)  # noqa: E731
  return definition(as_float(hidden_NxH), as_float(weight_HxV), targets_N, cotangents, **options)


def error(a, b):
  a = np.asarray(a, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
  "tokens, vocab, used, options",
  [
    (200, 300, (0,), {}),
    (200, 300, (0, 1, 2), {"temperature": jnp.linspace(0.5, 2.0, 200), "vocab_mask": jnp.arange(300) % 5 != 2}),
    (21, 77, (0,), {"temperature": 0.7}),
    pytest.param(256, 256, (1,), {"vocab_mask": jnp.arange(256) > 140}, marks=pytest.mark.tpu_full),
    (130, 300, (0,), {"vocab_mask": jnp.arange(300) >= 270}),
    pytest.param(128, 384, (2,), {}, marks=pytest.mark.tpu_full),
  ],
)
def test_matches_definition(tokens, vocab, used, options):
  """Arrays that fill their blocks and tiles and arrays that do not; each gradient alone and all together."""
  hidden_NxH, weight_HxV, targets_N, cotangents = arrays(tokens, vocab)
  if "vocab_mask" in options:
    drawable = np.flatnonzero(options["vocab_mask"])
    targets_N = jnp.asarray(drawable)[targets_N % len(drawable)]
  case = (hidden_NxH, weight_HxV, targets_N, cotangents, used)
  got, want = values_and_gradients(*case, **options), wanted(*case, **options)
  assert max(map(error, got, want)) < 1e-5


def test_tiles_of_the_table(monkeypatch):
  """V = 1000 with the tiles of a chip, 512 ids: padding of the second one must not enter the sum."""
  monkeypatch.undo()
  case = arrays(37, 1000)
  assert max(map(error, values_and_gradients(*case), wanted(*case))) < 1e-5


@pytest.mark.tpu_full
def test_an_eighth_of_the_real_vocabulary(monkeypatch):
  monkeypatch.undo()
  case = (*arrays(600, 157_184 // 8, hidden=256), (0,))
  assert max(map(error, values_and_gradients(*case), wanted(*case))) < 1e-5


@pytest.mark.parametrize("used", [(0,), pytest.param((0, 1, 2), marks=pytest.mark.tpu_full)])
def test_bfloat16(used):
  """float32 logits; gradients within the rounding of bfloat16 logit gradients and results."""
  case = (*arrays(200, 300, jnp.bfloat16), used)
  got, want = values_and_gradients(*case), wanted(*case)
  assert [x.dtype for x in got] == [jnp.float32] * 3 + [jnp.bfloat16] * 2
  assert max(map(error, got[:3], want[:3])) < 1e-5
  assert max(map(error, got[3:], want[3:])) < 5e-3


def test_likely_tokens():
  """The difference of two nearly equal columns: targets of probability 0.9 to 0.9999, as most tokens have in RL."""
  hidden_NxH, weight_HxV, _, cotangents = arrays(200, 300, jnp.bfloat16, scale=3.0)
  targets_N = jnp.argmax(hidden_NxH @ weight_HxV, axis=1)
  boost_NxH = weight_HxV[:, targets_N].T.astype(jnp.float32) * 8
  hidden_NxH = (hidden_NxH.astype(jnp.float32) + boost_NxH).astype(jnp.bfloat16)
  case = (hidden_NxH, weight_HxV, targets_N, cotangents, (0,))
  got, want = values_and_gradients(*case), wanted(*case)
  assert 0.99 < np.median(np.exp(want[0])) < 0.9999
  assert max(map(error, got[3:], want[3:])) < 5e-3
  # As one shard of the vocabulary: what is kept is put together when all shards are known.
  inputs = backend.Inputs(hidden_NxH, weight_HxV, targets_N, None, None)
  _, kept = jax.jit(lambda inputs: dispatch.score_to_train(INTERPRET, inputs, lambda scores: scores))(inputs)
  dhidden_NxH = cotangents.logp[:, None] * kept[0].astype(jnp.float32)
  assert error(dhidden_NxH, want[3]) < 5e-3


def test_large_logits():
  """Logits to +-60 and beyond: nothing overflows, and tiny probabilities keep their gradients."""
  case = arrays(200, 300, scale=16.0)
  logits = np.asarray(case[0] @ case[1])
  assert logits.max() > 60 and logits.min() < -60
  got = values_and_gradients(*case)
  assert all(np.isfinite(x).all() for x in got) and max(map(error, got, wanted(*case))) < 1e-5


def test_hidden_in_parts(monkeypatch):
  """A hidden width beyond one unrolled product goes in a loop."""
  monkeypatch.setattr(tiles, "_HIDDEN_PART", 128)
  case = arrays(130, 200, hidden=384)
  assert max(map(error, values_and_gradients(*case), wanted(*case))) < 1e-5


def test_masked_and_unknown_ids():
  hidden_NxH, weight_HxV, targets_N, cotangents = arrays(140, 300)
  targets_N = targets_N.at[3].set(5).at[4].set(300).at[5].set(-1).at[6].set(jnp.iinfo(jnp.int32).max)
  mask_V = jnp.arange(300) != 5
  logp_N, *others = values_and_gradients(hidden_NxH, weight_HxV, targets_N, cotangents, (0,), vocab_mask=mask_V)
  assert np.all(np.asarray(logp_N)[3:7] == -np.inf) and np.isfinite(np.delete(np.asarray(logp_N), range(3, 7))).all()
  assert all(np.isfinite(x).all() for x in others)
  assert not np.any(others[-1][:, 5])


@pytest.mark.parametrize("used", [(0,), pytest.param((0, 1, 2), marks=pytest.mark.tpu_full)])
def test_rows_without_cotangent_are_inert(used):
  """A token without gradient contributes exactly nothing, even one whose hidden state is NaN."""
  hidden_NxH, weight_HxV, targets_N, cotangents = arrays(300, 200)
  active_N = jnp.arange(300) % 3 == 0
  cotangents = LinearLogprob(*(jnp.where(active_N, c, 0) for c in cotangents))
  run = program(used)
  clean = run(hidden_NxH, weight_HxV, targets_N, cotangents)
  dirty_NxH = jnp.where(active_N[:, None], hidden_NxH, jnp.nan)
  dirty = run(dirty_NxH, weight_HxV, targets_N, cotangents)
  for a, b in zip(clean[3:], dirty[3:], strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.any(clean[3][~np.asarray(active_N)])
  none = run(dirty_NxH, weight_HxV, targets_N, LinearLogprob(*[jnp.zeros(300)] * 3))
  assert not np.any(none[3]) and not np.any(none[4])


def test_blocks_without_gradient_are_not_counted():
  """What the kernels are told to compute: blocks of tokens with a gradient, and no others."""
  active_N = jnp.arange(1000) % 4 == 1
  source_P, blocks, place_N = active_first(active_N, 128)
  assert blocks == 2 and source_P.shape == (1024,)
  np.testing.assert_array_equal(source_P[:250], np.flatnonzero(active_N))
  assert np.all(np.asarray(source_P[250:]) == 1000)
  np.testing.assert_array_equal(np.asarray(place_N)[np.asarray(active_N)], np.arange(250))
  assert active_first(jnp.zeros(1000, bool), 128)[1] == 0 and active_first(jnp.ones(1024, bool), 128)[1] == 8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scoring_equals_training_bitwise(dtype):
  """The sweep that scores and the one that also keeps the expected weight: the first minibatch's ratio is exactly 1."""
  hidden_NxH, weight_HxV, targets_N, cotangents = arrays(200, 300, dtype)
  options = {"implementation": INTERPRET, "temperature": 0.8, "vocab_mask": jnp.arange(300) % 9 != 4}
  scored = jax.jit(functools.partial(linear_logprob, **options))(hidden_NxH, weight_HxV, targets_N)
  del options["implementation"]
  trained = values_and_gradients(hidden_NxH, weight_HxV, targets_N, cotangents, (0,), quick=False, **options)
  for a, b in zip(scored, trained[:3], strict=True):
    np.testing.assert_array_equal(a, b)


def test_rows_do_not_depend_on_their_neighbours():
  hidden_NxH, weight_HxV, targets_N, _ = arrays(200, 300)
  score = jax.jit(lambda h, t: linear_logprob(h, weight_HxV, t, implementation=INTERPRET))
  moved = score(hidden_NxH[::-1], targets_N[::-1])
  for a, b in zip(score(hidden_NxH, targets_N), moved, strict=True):
    np.testing.assert_array_equal(a, b[::-1])


def test_finite_differences():
  hidden_NxH, weight_HxV, targets_N, cotangents = arrays(9, 40)
  *_, dhidden_NxH, dweight_HxV = values_and_gradients(hidden_NxH, weight_HxV, targets_N, cotangents)

  def value(h, w):
    values = definition(h, w, targets_N, cotangents)[:3]
    return sum(float(np.dot(x, np.asarray(c, np.float64))) for x, c in zip(values, cotangents, strict=True))

  rng = np.random.default_rng(0)
  h, w = np.asarray(hidden_NxH, np.float64), np.asarray(weight_HxV, np.float64)
  for _ in range(3):
    dh, dw = rng.normal(size=h.shape), rng.normal(size=w.shape)
    slope = (value(h + 1e-5 * dh, w + 1e-5 * dw) - value(h - 1e-5 * dh, w - 1e-5 * dw)) / 2e-5
    np.testing.assert_allclose(np.sum(dhidden_NxH * dh) + np.sum(dweight_HxV * dw), slope, rtol=1e-5)


@pytest.mark.tpu_full
def test_in_the_simulated_tpu(capfd):
  """With the TPU's memories, where what was not written is NaN, its copies, and its detector of races between them."""
  hidden_NxH, weight_HxV, targets_N, cotangents = arrays(200, 300)
  for which in (0, 2):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
      loss = lambda h, w: jnp.sum(  # noqa: E731
        linear_logprob(h, w, targets_N, implementation=Implementation.PALLAS_TPU)[which] * cotangents[which]  # noqa: B023
      )
      gradients = jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(hidden_NxH, weight_HxV))
    assert max(map(error, gradients, wanted(hidden_NxH, weight_HxV, targets_N, cotangents, (which,))[3:])) < 1e-5
  printed = capfd.readouterr()
  assert "RACE" not in printed.out + printed.err


def test_no_tokens():
  got = values_and_gradients(
    jnp.zeros((0, H)), jnp.ones((H, 50)), jnp.zeros(0, jnp.int32), LinearLogprob(*[jnp.zeros(0)] * 3)
  )
  assert [x.shape for x in got] == [(0,)] * 3 + [(0, H), (H, 50)] and not np.any(got[4])


def test_one_program_for_every_platform():
  """Traced once, without an implementation being named: kernels for the TPU, none of them elsewhere."""
  loss = lambda h, w, t: jnp.sum(linear_logprob(h, w, t).logp)  # noqa: E731
  grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
  for platforms, kernels in ((["tpu"], 2), (["cpu"], 0), (["cuda"], 0)):
    shapes = [jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), jax.ShapeDtypeStruct((128, 1000), jnp.bfloat16)]
    exported = jax.export.export(grad, platforms=platforms)(*shapes, jax.ShapeDtypeStruct((256,), jnp.int32))
    assert exported.mlir_module().count("custom_call @tpu_custom_call") == kernels, platforms


def test_double_precision_is_left_to_xla():
  with jax.enable_x64(True):
    hidden_NxH, weight_HxV, targets_N = jnp.ones((4, 8), jnp.float64), jnp.ones((8, 9), jnp.float64), jnp.zeros(4, int)
    assert linear_logprob(hidden_NxH, weight_HxV, targets_N).logp.dtype == jnp.float64
    with pytest.raises(ConfigError, match="implementation=pallas_interpret takes bfloat16 and float32"):
      linear_logprob(hidden_NxH, weight_HxV, targets_N, implementation=INTERPRET)


@pytest.mark.parametrize("chip", [None, *tiles.CHIPS])
@pytest.mark.parametrize("kernel", ["forward", "dhidden", "dweight"])
def test_tiles_fit(chip, kernel):
  """At every width of the real models there is a tile; it takes no more memory than the chip has."""
  chip = tiles.CHIPS.get(chip)
  for hidden in (64, 2048, 4096, 8192):
    for itemsize in (2, 4):
      tile = tiles.tile_for(kernel, chip, hidden, itemsize)
      assert tile.rows % 128 == 0 and tile.ids % 128 == 0
      assert tiles.vmem_bytes(kernel, tile, hidden, itemsize) <= tiles.vmem_budget(chip)
  with pytest.raises(ValueError, match="needs more vector memory"):
    tiles.tile_for(kernel, chip, 1 << 20, 4)
