"""Attention over packed rows: every backend against the definition, in value and gradient, for any way to pack.

`splash` and `pallas_gpu` are interpreted here, the former with small blocks, so that rows have several; that the real TPU
compiler takes it, and what the program then holds, is tested at the end.  On a GPU (`make test-gpu`) `pallas_gpu` is what it
is called.
"""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from configs.schema import ConfigError
from kernels.attention import Implementation, packed_attention, prefill_attention, splash
from kernels.attention.api import SHORT_ROW
from kernels.attention.segments import blocks_needed
from sharding.topology import Topology
from tests.kernels.lowered import for_cuda

FAST = [Implementation.XLA_BLOCKED, Implementation.SPLASH, Implementation.PALLAS_GPU]
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
DEFINITION = 4e-6 if jax.default_backend() == "gpu" else 2e-6  # from float64; a GPU's exp is less exact
T = 300  # several blocks of 64 and of 128, the last not full


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
  if not {"tpu", "tpu_full"} & {mark.name for mark in request.node.iter_markers()}:
    monkeypatch.setattr(splash, "_BLOCK_COST", {128: 1})


def packed(*lengths):
  """Segments 1, 2, ... of these lengths, then padding."""
  row = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return np.pad(row, (0, T - len(row))).astype(np.int32)


# name: two rows of segments
LAYOUTS = {
  "one segment": (packed(T), packed(T)),
  "packed": (packed(100, 28, 172), packed(64, 64, 1, 127)),
  "single tokens": (packed(*[1] * 150), packed(1)),
  "a row of padding": (packed(), packed(5, 250)),
  "padding before and between": (np.roll(packed(30, 40), 150), np.roll(packed(200), 7)),
  "no order": (np.arange(T, dtype=np.int32) % 3 + 1, np.arange(T, dtype=np.int32)[::-1] // 50),
}
HEADS = {"grouped": (4, 2, 16), "one key head": (3, 1, 24)}


def arrays(batch, length, heads, dtype=jnp.float32, seed=0):
  H, K, d = heads
  keys = jax.random.split(jax.random.key(seed), 4)
  sizes = [(batch, length, n, d) for n in (H, K, K, H)]
  # Scores of some size, so that the softmax is neither flat nor a maximum.
  return [jax.random.normal(key, size, jnp.float32).astype(dtype) * 1.5 for key, size in zip(keys, sizes, strict=True)]


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(q, k, v, dout, segments, implementation):
  out, pull_back = jax.vjp(lambda *qkv: packed_attention(*qkv, segments, implementation=implementation), q, k, v)
  return out, *pull_back(dout)


def loop(q, k, v, segments):
  """The definition, token after token, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  for b, t in np.argwhere(segments > 0):
    seen = np.flatnonzero(segments[b, : t + 1] == segments[b, t])
    scores = np.einsum("hd,shd->sh", q[b, t], k[b, seen]) / np.sqrt(q.shape[3])
    weights = np.exp(scores - scores.max(axis=0))
    out[b, t] = np.einsum("sh,shd->hd", weights / weights.sum(axis=0), v[b, seen])
  return out


def close(got, want, tolerance):
  for a, b in zip(got, want, strict=True):
    b = np.asarray(b, np.float32)
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance * max(1, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
def test_reference_is_the_definition(heads, layout):
  q, k, v, _ = arrays(2, T, HEADS[heads])
  segments = np.stack(LAYOUTS[layout])
  got = packed_attention(q, k, v, jnp.asarray(segments), implementation="reference")
  np.testing.assert_allclose(got, loop(q, k, v, segments), atol=DEFINITION)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("implementation", FAST)
def test_backends_match_the_reference(implementation, heads, layout):
  arguments = *arrays(2, T, HEADS[heads]), jnp.asarray(np.stack(LAYOUTS[layout]))
  want = value_and_gradients(*arguments, Implementation.REFERENCE)
  close(value_and_gradients(*arguments, implementation), want, 1e-5)


@hypothesis.settings(max_examples=15)
@hypothesis.given(cuts=st.lists(st.integers(0, T), max_size=6).map(sorted), seed=st.integers(0, 99))
@pytest.mark.parametrize("implementation", FAST)
def test_any_packing_of_one_compiled_program(cuts, seed, implementation):
  """Segments are data: the same program serves all, and leaves the right blocks out."""
  cuts = [0, *cuts]
  segments = np.stack([packed(*np.diff(cuts)), np.random.default_rng(seed).integers(0, 4, T, np.int32)])
  arguments = *arrays(2, T, HEADS["grouped"], seed=seed), jnp.asarray(segments)
  want = value_and_gradients(*arguments, Implementation.REFERENCE)
  close(value_and_gradients(*arguments, implementation), want, 1e-5)


@pytest.mark.parametrize("implementation", Implementation)
def test_bfloat16(implementation):
  """Against float32 on the same, already rounded numbers: a few roundings to 8 bits, not a sum in bfloat16."""
  segments = jnp.asarray(np.stack(LAYOUTS["packed"]))
  arguments = arrays(2, T, HEADS["grouped"], jnp.bfloat16)
  want = value_and_gradients(*(x.astype(jnp.float32) for x in arguments), segments, Implementation.REFERENCE)
  got = value_and_gradients(*arguments, segments, implementation)
  assert all(x.dtype == jnp.bfloat16 for x in got)
  for a, b in zip(got, want, strict=True):
    assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 1e-2 * jnp.linalg.norm(b)


@pytest.mark.parametrize("implementation", Implementation)
def test_padding_is_inert(implementation):
  """What stands in padding, NaN included, reaches nothing; it gives zeros and takes no gradient."""
  for layout in ("padding before and between", "a row of padding"):
    segments = jnp.asarray(np.stack(LAYOUTS[layout]))
    padding = (segments == 0)[:, :, None, None]
    arguments = arrays(2, T, HEADS["grouped"])
    clean = value_and_gradients(*arguments, segments, implementation)
    dirty = value_and_gradients(*(jnp.where(padding, jnp.nan, x) for x in arguments), segments, implementation)
    for a, b in zip(clean, dirty, strict=True):
      np.testing.assert_array_equal(a, b)
      assert not np.any(jnp.where(padding, a, 0))


@pytest.mark.parametrize("implementation", Implementation)
def test_segments_do_not_meet(implementation):
  """A segment's results are the same bits, whatever stands beside it."""
  segments = jnp.asarray(np.stack(LAYOUTS["packed"]))
  arguments = arrays(2, T, HEADS["grouped"])
  others = arrays(2, T, HEADS["grouped"], seed=1)
  mine = (segments == 2)[:, :, None, None]
  a = value_and_gradients(*arguments, segments, implementation)
  b = value_and_gradients(
    *(jnp.where(mine, x, 3 * y) for x, y in zip(arguments, others, strict=True)), segments, implementation
  )
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(jnp.where(mine, x, 0), jnp.where(mine, y, 0))


def test_finite_differences():
  segments = jnp.asarray([[1] * 40 + [2] * 27 + [0] * 3])
  with jax.enable_x64(True):
    q, k, v, _ = arrays(1, 70, (2, 1, 4), jnp.float64)
    attend = functools.partial(packed_attention, segment_ids_BxT=segments, implementation="xla_blocked")
    check_grads(attend, (q, k, v), order=1, modes=["rev"])


def test_scan_and_checkpoint():
  """Stacked layers under scan and remat, as the model runs it."""
  segments = jnp.asarray(np.stack(LAYOUTS["packed"]))
  x = jax.random.normal(jax.random.key(0), (2, T, 2, 8))
  scale = jnp.asarray([0.5, 1.0, 1.5])

  def loss(x, scale, implementation):
    @jax.checkpoint
    def layer(x, scale):
      return x + packed_attention(x * scale, x, x, segments, implementation=implementation), None

    return jnp.mean(jax.lax.scan(layer, x, scale)[0] ** 2)

  gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
  close(gradient(x, scale, None), gradient(x, scale, "reference"), 1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize("length, runs", [(SHORT_ROW, "reference"), (SHORT_ROW + 1, "xla_blocked")])
def test_the_default_on_a_cpu(length, runs):
  segments = jnp.ones((1, length), jnp.int32)
  arguments = *arrays(1, length, HEADS["grouped"]), segments
  for a, b in zip(value_and_gradients(*arguments, None), value_and_gradients(*arguments, runs), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(0, T), (2, 0), (1, 1)])
def test_nothing_and_one_token(shape):
  q, k, v, dout = arrays(*shape, HEADS["grouped"])
  for implementation in [None, *Implementation]:
    out, *gradients = value_and_gradients(q, k, v, dout, jnp.ones(shape, jnp.int32), implementation)
    np.testing.assert_allclose(out, np.repeat(v, 2, axis=2), atol=1e-6)  # a token alone attends to itself
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("query_block, key_block", [(20, 20), (60, 30), (10, 50)])
def test_no_block_with_a_score_is_left_out(layout, query_block, key_block):
  for segments in LAYOUTS[layout]:
    mask = (segments[:, None] == segments) & (segments > 0) & np.tri(T, dtype=bool)
    blocks = mask.reshape(T // query_block, query_block, T // key_block, key_block).any(axis=(1, 3))
    diagonal = np.eye(T, dtype=bool).reshape(T // query_block, query_block, T // key_block, key_block).any(axis=(1, 3))
    needed = np.asarray(blocks_needed(jnp.asarray(segments), query_block, key_block))
    assert np.all(needed >= (blocks | diagonal))
    if np.all(np.diff(segments[segments > 0]) >= 0):
      np.testing.assert_array_equal(needed, blocks | diagonal)


def test_packing_saves_work():
  segments = jnp.asarray(np.repeat(np.arange(1, 9), 4096))  # eight answers of 4096 tokens
  of_row = int(blocks_needed(jnp.ones_like(segments), 512, 512).sum())
  assert int(blocks_needed(segments, 512, 512).sum()) < of_row / 7


def test_splash_prefers_large_blocks(monkeypatch):
  monkeypatch.undo()
  sizes = {length: splash.block_size(length) for length in (129, 300, 1100, 3968, 4096, 32768)}
  assert sizes == {129: 256, 300: 512, 1100: 512, 3968: 1024, 4096: 1024, 32768: 1024}


@pytest.mark.cpu
def test_memory_is_linear():
  def temp(length):
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (4, 2, 2, 4)]
    program = value_and_gradients.lower(*shapes, jax.ShapeDtypeStruct((1, length), jnp.int32), None).compile()
    return program.memory_analysis().temp_size_in_bytes

  assert temp(4096) < 2.1 * temp(2048)
  assert temp(4096) < 4096 * 4096 * 4 / 4, "less than a quarter of one head's scores"


@pytest.mark.parametrize("length", [64, 1000])
def test_lowers_for_cuda(length, monkeypatch):
  shapes = [jax.ShapeDtypeStruct((2, length, heads, 64), jnp.bfloat16) for heads in (8, 2, 2, 8)]
  arguments = *shapes, jax.ShapeDtypeStruct((2, length), jnp.int32)
  plain, with_kernels = for_cuda(value_and_gradients.__wrapped__, *arguments, monkeypatch=monkeypatch)
  assert "dot_general" in plain and "tpu_custom_call" not in plain + with_kernels
  kernels = 0 if length <= SHORT_ROW else 3
  assert with_kernels.count("gpu.triton") == kernels and ("stablehlo.dot_general" in with_kernels) == (kernels == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Programs of the TPU compiler


def compiled(chip, rows, length, heads, dtype=jnp.bfloat16, function=value_and_gradients.__wrapped__):
  H, K, d = heads
  mesh = Mesh(np.array(Topology.parse(CHIPS[chip]).devices()[:1]), ("x",))
  shapes = [((rows, length, n, d), dtype) for n in (H, K, K, H)] + [((rows, length), jnp.int32)]
  arguments = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P())) for shape in shapes]
  return jax.jit(functools.partial(function, implementation=None)).lower(*arguments).compile()


def largest_array(text):
  found = re.findall(r"(?:bf16|f32|pred|s32)\[([\d,]+)\]", text)
  return max(np.prod([int(side) for side in shape.split(",")]) for shape in found)


def check_program(program, rows, length, heads):
  """One kernel for each of three passes, nothing of the size of the scores, memory in proportion to the row."""
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert not re.search(r" (dot|convolution)\(", text), "a product outside of the kernels"
  size = rows * length * heads[0] * heads[2]
  assert largest_array(text) <= size
  # Kernels want heads first: copies of q, out, their cotangents and dq; the forward pass' log-sum-exp, over 128 lanes.
  assert program.memory_analysis().temp_size_in_bytes < 6 * size * 2


@pytest.mark.tpu
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip):
  shape = (1, 512, (16, 4, 128))
  check_program(compiled(chip, *shape), *shape)


@pytest.mark.tpu
def test_compiles_odd_shapes():
  text = compiled("v5e", 2, 200, (4, 2, 16), jnp.float32).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
  "rows, length, heads",
  [(1, 4096, (16, 4, 128)), (1, 32768, (16, 4, 128)), (4, 4096, (32, 4, 128)), (1, 32768, (64, 8, 128))],
)
def test_compiles_real_shapes(rows, length, heads, chip):
  check_program(compiled(chip, rows, length, heads), rows, length, heads)


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("length, heads", [(4096, (4, 2, 128)), (200, (4, 2, 16)), (600, (4, 4, 64))])
def test_compiles_float32(length, heads, chip):
  text = compiled(chip, 1, length, heads, jnp.float32).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.tpu_full
def test_layers_keep_nothing_of_other_backends():
  """Four layers without remat keep what one VJP keeps: q, k, v, result, log-sum-exp; no scores for a backend unused."""
  layers, length, heads = 4, 4096, (16, 4, 128)

  def stacked(q, k, v, dout, segments, implementation):
    def layer(q, _):
      return q + packed_attention(q, k, v, segments, implementation=implementation), None

    out, pull_back = jax.vjp(lambda q: jax.lax.scan(layer, q, None, length=layers)[0], q)
    return out, pull_back(dout)

  program = compiled("v5p", 1, length, heads, function=stacked)
  size = length * heads[0] * heads[2] * 2
  assert program.memory_analysis().temp_size_in_bytes < (2 * layers + 8) * size


@pytest.mark.parametrize(
  "change, message",
  [
    ({"implementation": "fastest"}, "implementation='fastest': one of reference, xla_strips, xla_blocked, splash"),
    ({"implementation": "splash", "dtype": "float16"}, "implementation='splash' with float16"),
    ({"k": (1, 8, 3, 4), "v": (1, 8, 3, 4)}, "H a multiple of K"),
    ({"k": (1, 9, 2, 4)}, r"expected \[B, T, H, d\]"),
    ({"segments": (1, 7)}, "expected integers"),
  ],
)
def test_errors(change, message):
  shapes = {"q": (1, 8, 4, 4), "k": (1, 8, 2, 4), "v": (1, 8, 2, 4)} | change
  q, k, v = (jnp.zeros(shapes[name], change.get("dtype", "float32")) for name in ("q", "k", "v"))
  segments = jnp.ones(change.get("segments", (1, 8)), jnp.int32)
  with pytest.raises(ConfigError if "implementation=" in message else ValueError, match=message):
    packed_attention(q, k, v, segments, implementation=change.get("implementation"))


@pytest.mark.parametrize("length", [SHORT_ROW, SHORT_ROW + 3, 2 * SHORT_ROW])
def test_prefill_is_the_definition(length):
  """Strips that divide the row and strips that do not; prompts shorter than their row."""
  q, k, v, _ = arrays(2, length, HEADS["grouped"])
  segments = (np.arange(length) < np.array([[length], [length // 3]])).astype(np.int32)
  got = jax.jit(prefill_attention)(q, k, v, jnp.asarray(segments))
  np.testing.assert_allclose(got, loop(q, k, v, segments), atol=DEFINITION)
