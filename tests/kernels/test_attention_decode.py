"""Decode attention: dense and paged caches hold the same, and every implementation reads it alike.

The TPU kernel runs in Pallas' TPU simulator, copies and semaphores included, races looked for.
"""

import copy
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as shipped
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import ConfigError
from kernels.attention import (
  DenseCache,
  PagedCache,
  decode_attention,
  dense_blocks,
  extend_attention,
  packed_attention,
)
from kernels.attention.ragged_paged import fits
from sharding.topology import Topology

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
LAYERS, SLOTS, PAGE, WIDTH = 2, 6, 8, 5
LENGTH = PAGE * WIDTH
LENGTHS = [1, PAGE, LENGTH, 0, PAGE + 1, 23]  # one token, a page's end, full, idle, one beyond a page, any


attend = jax.jit(decode_attention)


class Filled:
  """Two caches of the same random keys and values; the pages in no order, unused ones full of other numbers."""

  def __init__(self, heads, dtype=jnp.float32, seed=0):
    _, K, d = heads
    keys = jax.random.split(jax.random.key(seed), 4)
    self.k, self.v = (jax.random.normal(key, (LAYERS, SLOTS, LENGTH, K, d), dtype) for key in keys[:2])
    self.q = jax.random.normal(keys[2], (SLOTS, *heads[::2]), dtype)
    self.lengths = jnp.asarray(LENGTHS, jnp.int32)
    pages = np.random.default_rng(seed).permutation(SLOTS * WIDTH + 3)[: SLOTS * WIDTH]
    self.table = jnp.asarray(pages.reshape(SLOTS, WIDTH), jnp.int32)
    self.dense = DenseCache(self.k.transpose(0, 1, 3, 4, 2), self.v.transpose(0, 1, 3, 2, 4))
    other = jax.random.normal(keys[3], (LAYERS, SLOTS * WIDTH + 3, PAGE, 2 * K, d), dtype)
    self.paged = PagedCache(other)
    insert = jax.jit(PagedCache.insert)
    for slot, length in enumerate(LENGTHS):
      self.paged = insert(self.paged, self.k[:, slot], self.v[:, slot], self.table[slot], length)


@functools.lru_cache
def filled_with(heads, dtype=jnp.float32):
  return Filled(heads, dtype)


def loop(filled, layer):
  """The definition, slot after slot, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (filled.q, filled.k[layer], filled.v[layer]))
  out = np.zeros(q.shape)
  groups = q.shape[1] // k.shape[2]
  for slot, length in enumerate(filled.lengths.tolist()):
    for h in range(q.shape[1]) if length else ():
      scores = k[slot, :length, h // groups] @ q[slot, h] / np.sqrt(q.shape[2])
      weights = np.exp(scores - scores.max())
      out[slot, h] = weights @ v[slot, :length, h // groups] / weights.sum()
  return out


@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 8), (2, 2, 128)])
def test_dense_and_pages_match_the_definition(heads):
  filled = filled_with(heads)
  for layer in range(LAYERS):
    want = loop(filled, layer)
    dense = attend(filled.q, filled.dense, filled.lengths, layer=layer)
    paged = attend(filled.q, filled.paged, filled.lengths, layer=layer, page_table_BxW=filled.table)
    np.testing.assert_allclose(dense, want, atol=2e-6)
    np.testing.assert_allclose(paged, want, atol=2e-6)


def test_bfloat16():
  filled = filled_with((4, 2, 16), jnp.bfloat16)
  for cache, table in ((filled.dense, None), (filled.paged, filled.table)):
    out = attend(filled.q, cache, filled.lengths, layer=1, page_table_BxW=table)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), loop(filled, 1), atol=2e-2)


def test_tokens_written_one_by_one_are_those_inserted():
  """Prefill some, write the rest, across page borders; a silent slot's pages stay as they are."""
  filled = filled_with((4, 2, 16))
  written, write = PagedCache(filled.paged.pages_LxPxNxCxd + 1), jax.jit(PagedCache.write)
  starts = np.minimum(LENGTHS, [0, 3, PAGE, 0, PAGE, 20])
  for slot, start in enumerate(starts):
    written = written.insert(filled.k[:, slot], filled.v[:, slot], filled.table[slot], start)
  untouched = written
  for step in range(LENGTH):
    position = jnp.asarray(starts + step, jnp.int32)
    active = position < filled.lengths
    at = jnp.minimum(position, LENGTH - 1)
    for layer in range(LAYERS):
      token = [x[layer, jnp.arange(SLOTS), at] for x in (filled.k, filled.v)]
      written = write(written, layer, *token, filled.table, position, active)
  for layer in range(LAYERS):
    out = attend(filled.q, written, filled.lengths, layer=layer, page_table_BxW=filled.table)
    np.testing.assert_allclose(out, loop(filled, layer), atol=2e-6)
  others = np.setdiff1d(np.arange(SLOTS * WIDTH + 3), np.asarray(filled.table))
  for pages in (others, np.asarray(filled.table[3])):  # of no slot, and of the idle one
    np.testing.assert_array_equal(written.pages_LxPxNxCxd[:, pages], untouched.pages_LxPxNxCxd[:, pages])


def test_slots_may_share_pages():
  """Two slots with the same first page: a prompt that is stored once."""
  filled = copy.copy(filled_with((4, 2, 16)))
  table = filled.table.at[5, 0].set(filled.table[4, 0])
  shared = attend(filled.q, filled.paged, filled.lengths, layer=0, page_table_BxW=table)
  filled.k = filled.k.at[:, 5, :PAGE].set(filled.k[:, 4, :PAGE])
  filled.v = filled.v.at[:, 5, :PAGE].set(filled.v[:, 4, :PAGE])
  np.testing.assert_allclose(shared, loop(filled, 0), atol=2e-6)


def test_a_prompt_that_fills_no_page_needs_no_more_pages():
  filled = filled_with((4, 2, 16))
  k, v = filled.k[:, 5, : PAGE + 3], filled.v[:, 5, : PAGE + 3]
  cache = PagedCache(jnp.zeros_like(filled.paged.pages_LxPxNxCxd)).insert(k, v, jnp.asarray([7, 9]), PAGE + 3)
  assert sorted(np.unique(np.nonzero(cache.pages_LxPxNxCxd)[1])) == [7, 9]
  np.testing.assert_array_equal(cache.pages_LxPxNxCxd[:, 9, :3, 0::2], k[:, PAGE:])
  np.testing.assert_array_equal(cache.pages_LxPxNxCxd[:, 9, :3, 1::2], v[:, PAGE:])
  with pytest.raises(ValueError, match="do not fit into 1 pages of 8"):
    cache.insert(k, v, jnp.asarray([7]), PAGE + 3)


def extended(filled, starts, counts, layer):
  """Queries of T new positions, keys and values written first; what they give, and the definition."""
  K, d = filled.k.shape[3:]
  T = max(counts)
  q = jax.random.normal(jax.random.key(11), (SLOTS, T, filled.q.shape[1], d))
  at = np.minimum(np.asarray(starts)[:, None] + np.arange(T), LENGTH - 1)
  new = [x[layer, np.arange(SLOTS)[:, None], at] for x in (filled.k, filled.v)]
  cache = PagedCache(jnp.full_like(filled.paged.pages_LxPxNxCxd, 3.0))
  for slot, start in enumerate(starts):
    cache = cache.insert(filled.k[:, slot], filled.v[:, slot], filled.table[slot], start)
  cache = cache.extend(layer, *new, filled.table, jnp.asarray(starts), jnp.asarray(counts))
  want = np.zeros(q.shape)
  for slot, count in enumerate(counts):
    for t in range(count):
      k, v = (np.asarray(x[layer, slot, : starts[slot] + t + 1], np.float64) for x in (filled.k, filled.v))
      for h in range(q.shape[2]):
        scores = k[:, h * K // q.shape[2]] @ np.asarray(q[slot, t, h], np.float64) / np.sqrt(d)
        weights = np.exp(scores - scores.max())
        want[slot, t, h] = weights @ v[:, h * K // q.shape[2]] / weights.sum()
  return q, cache, want, np.arange(T) < np.asarray(counts)[:, None]


# From nothing; a page's end; to the very end of the cache; nothing at all; across pages; one token.
STARTS, COUNTS = [0, PAGE, LENGTH - 5, 0, 3, 22], [11, 2, 5, 0, 2 * PAGE, 1]


@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 8)])
def test_new_positions_see_the_past_and_themselves(heads):
  filled = filled_with(heads)
  q, cache, want, valid = extended(filled, STARTS, COUNTS, 1)
  out = jax.jit(extend_attention)(q, cache, jnp.asarray(STARTS), layer=1, page_table_BxW=filled.table)
  assert np.isfinite(out).all()
  np.testing.assert_allclose(np.asarray(out)[valid], want[valid], atol=2e-6)
  # A row without new positions wrote nothing, nor did anybody into pages of no slot.
  others = np.setdiff1d(np.arange(SLOTS * WIDTH + 3), np.delete(np.asarray(filled.table), 3, axis=0))
  assert (np.asarray(cache.pages_LxPxNxCxd)[:, others] == 3.0).all()


def test_one_new_position_is_a_decode_step():
  filled = filled_with((4, 2, 16))
  starts = jnp.maximum(filled.lengths, 1) - 1
  out = extend_attention(filled.q[:, None], filled.paged, starts, layer=1, page_table_BxW=filled.table)[:, 0]
  decoded = attend(filled.q, filled.paged, filled.lengths, layer=1, page_table_BxW=filled.table)
  np.testing.assert_allclose(out[filled.lengths > 0], decoded[filled.lengths > 0], atol=1e-6)


def test_pages_are_copied_whole_and_a_target_beyond_the_last_is_dropped():
  pages = filled_with((4, 2, 16)).paged
  count = pages.pages_LxPxNxCxd.shape[1]
  copied = pages.copy(jnp.asarray([4, 2, 0]), jnp.asarray([7, count, 9])).pages_LxPxNxCxd
  want = np.asarray(pages.pages_LxPxNxCxd).copy()
  want[:, [7, 9]] = want[:, [4, 0]]
  np.testing.assert_array_equal(copied, want)


def test_the_last_token_of_a_packed_row_is_a_decode_step():
  """Training and sampling compute the same attention (architecture decision 4)."""
  filled = filled_with((4, 2, 16))
  length = filled.lengths[5]
  q = jax.random.normal(jax.random.key(7), (1, length, 4, 16)).at[0, -1].set(filled.q[5])
  segments = jnp.ones((1, length), jnp.int32)
  packed = packed_attention(q, filled.k[0, 5:6, :length], filled.v[0, 5:6, :length], segments)
  decoded = attend(filled.q, filled.dense, filled.lengths, layer=0)
  np.testing.assert_allclose(packed[0, -1], decoded[5], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The TPU kernel


@pytest.fixture
def simulated(monkeypatch):
  """The shipped kernel in Pallas' TPU simulator.

  The simulator of JAX 0.10.2 lacks two operations that the kernel uses; they are put in other words here: reading a
  reshaped reference (read all, reshape the value) and a masked store (read, select, store).
  """

  class Reshaped:
    def __init__(self, ref, shape):
      self.ref, self.shape, self.dtype = ref, shape, ref.dtype

    def __getitem__(self, index):
      return self.ref[...].reshape(self.shape)[index]

  class Buffer:
    def __init__(self, ref):
      self.ref = ref

    def reshape(self, *shape):
      return Reshaped(self.ref, shape)

  def store(ref, value, mask):
    ref[...] = jnp.where(mask, value, ref[...])

  wait = shipped.MultiPageAsyncCopyDescriptor.wait
  monkeypatch.setattr(shipped.MultiPageAsyncCopyDescriptor, "wait", lambda self: Buffer(wait(self)))
  monkeypatch.setattr(pltpu, "store", store)


@pytest.mark.parametrize("heads, block", [((4, 2, 128), 1024), ((4, 1, 128), PAGE)])
def test_kernel_in_the_simulator(heads, block, simulated, monkeypatch, capfd):
  """One block of pages a slot, and one page a block, so that copies follow each other."""
  monkeypatch.setattr("kernels.attention.ragged_paged._BLOCK_POSITIONS", block)
  filled = filled_with(heads)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    simulate = jax.jit(functools.partial(decode_attention, layer=1, implementation="ragged_paged"))
    out = simulate(filled.q, filled.paged, filled.lengths, page_table_BxW=filled.table)
  np.testing.assert_allclose(out, loop(filled, 1), atol=5e-6)
  assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_kernel_with_many_queries_in_the_simulator(simulated, monkeypatch, capfd):
  monkeypatch.setattr("kernels.attention.ragged_paged._BLOCK_POSITIONS", PAGE)
  filled = filled_with((4, 2, 128))
  q, cache, want, valid = extended(filled, STARTS, COUNTS, 1)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    simulate = jax.jit(functools.partial(extend_attention, layer=1, implementation="ragged_paged"))
    out = simulate(q, cache, jnp.asarray(STARTS), page_table_BxW=filled.table)
  np.testing.assert_allclose(np.asarray(out)[valid], want[valid], atol=5e-6)
  assert "RACE DETECTED" not in "".join(capfd.readouterr())


MODELS = {"ring_mini": (16, 4, 128), "ring_flash": (32, 4, 128), "ring_1t": (64, 8, 128)}


def compiled_step(chip, heads, slots, page, context, dtype=jnp.bfloat16):
  """Layers of a decode step: write the new token, attend; the cache is donated."""
  H, K, d = heads
  layers, pages = 4, 2 * context // page  # few enough pages for float32 on the smallest chip

  def step(q, pages, table, lengths, k, v):
    def layer(cache, index):
      cache = cache.write(index, k, v, table, lengths - 1, lengths > 0)
      return cache, decode_attention(q, cache, lengths, layer=index, page_table_BxW=table)

    return jax.lax.scan(layer, PagedCache(pages), jnp.arange(layers))

  mesh = Mesh(np.array(Topology.parse(CHIPS[chip]).devices()[:1]), ("x",))
  shapes = [
    ((slots, H, d), dtype),
    ((layers, pages, page, 2 * K, d), dtype),
    ((slots, context // page), jnp.int32),
    ((slots,), jnp.int32),
    ((slots, K, d), dtype),
    ((slots, K, d), dtype),
  ]
  arguments = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P())) for shape in shapes]
  # The kernel asks for the chip where it is lowered.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(step, donate_argnums=1).lower(*arguments)
  return lowered.compile(), np.prod(shapes[1][0]) * jnp.dtype(dtype).itemsize


def check_step(program, cache_bytes):
  """The kernel, and the cache neither copied nor cut: it is updated in place and read where it lies."""
  text, memory = program.as_text(), program.memory_analysis()
  assert text.count('custom_call_target="tpu_custom_call"') == 1
  assert not re.search(r" (dot|convolution)\(", text), "a product outside of the kernel"
  assert memory.alias_size_in_bytes >= cache_bytes
  assert memory.temp_size_in_bytes < min(8 << 20, cache_bytes / 100)


@pytest.mark.tpu
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip):
  check_step(*compiled_step(chip, MODELS["ring_mini"], slots=64, page=256, context=65536))


@pytest.mark.tpu
def test_many_new_positions_compile():
  """A prefill that goes on from pages: the kernel, and no copy of the cache."""
  H, K, d = MODELS["ring_mini"]
  layers, pages, page, rows, tokens, width = 4, 256, 256, 8, 512, 128

  def step(q, cache, table, starts, counts, k, v):
    def layer(cache, index):
      cache = cache.extend(index, k, v, table, starts, counts)
      return cache, extend_attention(q, cache, starts, layer=index, page_table_BxW=table)

    return jax.lax.scan(layer, cache, jnp.arange(layers))

  mesh = Mesh(np.array(Topology.parse(CHIPS["v5e"]).devices()[:1]), ("x",))
  of = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))  # noqa: E731
  numbers, new = of((rows,), jnp.int32), of((rows, tokens, K, d))
  cache = PagedCache(of((layers, pages, page, 2 * K, d)))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(step, donate_argnums=1).lower(
      of((rows, tokens, H, d)), cache, of((rows, width), jnp.int32), numbers, numbers, new, new
    )
  program, cache_bytes = lowered.compile(), 2 * np.prod(cache.pages_LxPxNxCxd.shape)
  text, memory = program.as_text(), program.memory_analysis()
  assert text.count('custom_call_target="tpu_custom_call"') == 1
  assert memory.alias_size_in_bytes >= cache_bytes and memory.temp_size_in_bytes < cache_bytes / 4


@pytest.mark.tpu
def test_compiles_without_the_kernel():
  """Heads that the kernel does not take: XLA reads the pages, on a TPU too."""
  program, _ = compiled_step("v5e", (4, 2, 16), slots=8, page=16, context=512)
  assert "tpu_custom_call" not in program.as_text()


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
  "slots, page, dtype", [(64, 256, jnp.bfloat16), (256, 128, jnp.bfloat16), (16, 256, jnp.float32)]
)
def test_compiles_real_models(slots, page, dtype, model, chip):
  check_step(*compiled_step(chip, MODELS[model], slots, page, 65536, dtype))


@pytest.mark.parametrize(
  "heads, head_dim, dtype, takes",
  [
    (4, 128, jnp.bfloat16, True),
    (8, 128, jnp.bfloat16, True),
    (2, 16, jnp.bfloat16, False),
    (4, 128, jnp.float16, False),
  ],
)
def test_which_heads_the_kernel_takes(heads, head_dim, dtype, takes):
  q = jax.ShapeDtypeStruct((2, 2 * heads, head_dim), dtype)
  assert fits(q, jax.ShapeDtypeStruct((1, 4, 8, 2 * heads, head_dim), dtype)) == takes


def test_errors():
  filled = filled_with((4, 2, 16))
  with pytest.raises(ConfigError, match="implementation='flash': one of xla, ragged_paged"):
    decode_attention(filled.q, filled.dense, filled.lengths, layer=0, implementation="flash")
  with pytest.raises(ConfigError, match="reads pages, this cache is dense"):
    decode_attention(filled.q, filled.dense, filled.lengths, layer=0, implementation="ragged_paged")
  with pytest.raises(ConfigError, match="does not take q"):
    decode_attention(
      filled.q, filled.paged, filled.lengths, layer=0, page_table_BxW=filled.table, implementation="ragged_paged"
    )
  with pytest.raises(ValueError, match="needs a page table"):
    decode_attention(filled.q, filled.paged, filled.lengths, layer=0)
  with pytest.raises(ValueError, match="no page table"):
    decode_attention(filled.q, filled.dense, filled.lengths, layer=0, page_table_BxW=filled.table)
  with pytest.raises(ValueError, match="multiple of 2"):
    decode_attention(filled.q[:, :3], filled.dense, filled.lengths, layer=0)


@pytest.mark.cpu
@pytest.mark.parametrize("positions", [16, 12, 128])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 1, 8)])
def test_dense_blocks_of_slots_and_positions(heads, positions, monkeypatch):
  """Groups of 4 of 6 slots, blocks of some of 40 positions: the last of both move back, and count nothing twice."""
  filled = copy.copy(filled_with(heads))
  monkeypatch.setattr(dense_blocks, "_POSITIONS", positions)
  monkeypatch.setattr(dense_blocks, "_GROUP_BYTES", 4 * min(positions, LENGTH) * heads[1] * heads[2] * 4)
  for most in (LENGTH, 23, PAGE, 1, 0):  # whole blocks and a half, halves alone, nothing
    filled.lengths = jnp.minimum(jnp.asarray(LENGTHS, jnp.int32), most)
    got = jax.jit(dense_blocks.decode_dense_blocks)(filled.q, filled.dense, filled.lengths, jnp.int32(1))
    np.testing.assert_allclose(got, loop(filled, 1), atol=2e-6)


def test_a_bfloat16_cache_by_its_bits():
  """What is written is the same to the bit, what is read but for the rounding of the softmax."""
  filled = filled_with((4, 2, 16), jnp.bfloat16)
  new = jax.random.normal(jax.random.key(5), (2, SLOTS, 2, 16), jnp.bfloat16)
  positions, active = filled.lengths % LENGTH, jnp.arange(SLOTS) != 2
  written = jax.jit(DenseCache.write)(filled.dense, 1, *new, positions, active)
  by_bits = jax.jit(DenseCache.write)(filled.dense.bits(), 1, *new, positions, active)
  for one, other in zip(written, by_bits.values(), strict=True):
    np.testing.assert_array_equal(one, other)
  assert (written.v_LxBxKxSxd != filled.dense.v_LxBxKxSxd).any()
  lengths = jnp.where(filled.lengths > 0, positions + 1, 0)
  got = attend(filled.q, by_bits, lengths, layer=1)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    *(x.astype(jnp.float32) for x in (got, attend(filled.q, written, lengths, layer=1))), atol=0.02
  )
