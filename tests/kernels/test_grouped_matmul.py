"""The grouped matmul: every backend against a loop, in value and gradient, wherever rows and groups can lie.

`megablox` and `pallas_gpu` are interpreted here; that the real TPU compiler takes the former, and what the program then holds,
is tested below.  On a GPU (`make test-gpu`) the latter is what it is called.
"""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from configs.schema import ConfigError
from kernels.grouped_matmul import Implementation, gated_experts, grouped_matmul, megablox
from kernels.grouped_matmul.blocked import block_sizes, padded_rows
from sharding.topology import Topology
from tests.kernels.lowered import for_cuda

# name: rows, group sizes.  Blocks are (256, 64) from 128 rows a group on, else one of 4 to 32.
LAYOUTS = {
  "even": (512, [256, 256]),
  "ragged": (700, [301, 0, 399]),
  "rows beyond the last group": (600, [290, 1, 200]),
  "all rows beyond": (40, [0, 0, 0]),
  "one group has all": (600, [0, 600, 0]),
  "smaller than a block": (3, [1, 2]),
  "tail at the very end": (513, [1, 512]),
  "decode": (64, [8, 0, 0, 21, 1, 0, 33, 0]),
  "no rows": (0, [0, 0]),
}
K, N = 24, 40
FAST = [Implementation.BLOCKED, Implementation.MEGABLOX, Implementation.PALLAS_GPU]
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def arrays(rows, sizes, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  lhs = jax.random.normal(keys[0], (rows, K), dtype)
  rhs = jax.random.normal(keys[1], (len(sizes), K, N), dtype)
  dout = jax.random.normal(keys[2], (rows, N), dtype)
  return lhs, rhs, jnp.asarray(sizes, jnp.int32), dout


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(lhs, rhs, sizes, dout, implementation):
  out, pull_back = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, implementation=implementation), lhs, rhs)
  return out, *pull_back(dout)


def loop(lhs, rhs, sizes, dout):
  """The definition once more, in NumPy float64."""
  lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs, rhs, dout))
  out, dlhs, drhs = np.zeros(dout.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
  start = 0
  for e, size in enumerate(np.asarray(sizes)):
    rows = slice(start, start + size)
    out[rows], dlhs[rows], drhs[e] = lhs[rows] @ rhs[e], dout[rows] @ rhs[e].T, lhs[rows].T @ dout[rows]
    start += size
  return out, dlhs, drhs


@pytest.mark.parametrize("implementation", list(Implementation))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_loop(layout, implementation):
  arguments = arrays(*LAYOUTS[layout])
  for got, want in zip(value_and_gradients(*arguments, implementation), loop(*arguments), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("inner, outer", [(300, 128), (1, 257)])
def test_megablox_cuts_any_sides(inner, outer, monkeypatch):
  """Sides that are no multiple of a tile, whole and (with little memory) cut, the inner one included."""
  keys = jax.random.split(jax.random.key(0), 3)
  lhs, rhs = jax.random.normal(keys[0], (90, inner)), jax.random.normal(keys[1], (2, inner, outer))
  sizes, dout = jnp.asarray([70, 13], jnp.int32), jax.random.normal(keys[2], (90, outer))
  for budget in (megablox._VMEM_BYTES, 0):
    monkeypatch.setattr(megablox, "_VMEM_BYTES", budget)
    monkeypatch.setattr(megablox, "_WIDEST", 256)
    tiles = megablox.gmm_tiles(90, 2, inner, outer, jnp.float32)
    assert (tiles[1] < inner) == (budget == 0 and inner == 300)
    got = jax.jit(lambda *a: value_and_gradients.__wrapped__(*a, Implementation.MEGABLOX))(lhs, rhs, sizes, dout)
    for a, b in zip(got, loop(lhs, rhs, sizes, dout), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("implementation", FAST)
@hypothesis.settings(max_examples=25)
@hypothesis.given(
  cuts=st.lists(st.integers(0, 300), min_size=3, max_size=3).map(sorted),
  tail=st.integers(0, 300),
)
def test_any_sizes_of_one_compiled_program(cuts, tail, implementation):
  """Group sizes are data: the same program serves all, empty and full groups included."""
  sizes = [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], min(tail, 300 - cuts[2])]
  arguments = arrays(300, sizes)
  for got, want in zip(value_and_gradients(*arguments, implementation), loop(*arguments), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("implementation", FAST)
def test_bfloat16_sums_in_float32(implementation):
  arguments = arrays(700, [301, 0, 399], jnp.bfloat16)
  for got, want in zip(value_and_gradients(*arguments, implementation), loop(*arguments), strict=True):
    assert got.dtype == jnp.bfloat16
    # one rounding of the exact result to 8 bits; a bfloat16 sum over 400 rows would be off by far more
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("implementation", FAST)
def test_rows_outside_groups_are_inert(implementation):
  """What stands beyond the groups, infinities and NaN included, reaches neither the result nor a gradient."""
  lhs, rhs, sizes, dout = arrays(40, [9, 0, 11])
  clean = value_and_gradients(lhs, rhs, sizes, dout, implementation)
  dirty = value_and_gradients(
    lhs.at[20:].set(jnp.nan), rhs.at[1].set(jnp.inf), sizes, dout.at[20:].set(jnp.inf), implementation
  )
  assert not np.any(clean[0][20:]) and not np.any(clean[1][20:]) and not np.any(clean[2][1])
  for a, b in zip(clean, dirty, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", FAST)
def test_groups_do_not_meet(implementation):
  """Two groups share a row tile; what stands in one of them, NaN included, does not reach the other."""
  lhs, rhs, sizes, dout = arrays(40, [9, 31])
  clean = value_and_gradients(lhs, rhs, sizes, dout, implementation)
  dirty = value_and_gradients(lhs.at[9:].set(jnp.nan), rhs, sizes, dout.at[9:].set(jnp.inf), implementation)
  for a, b, own in zip(clean, dirty, (np.s_[:9], np.s_[:9], np.s_[0]), strict=True):
    np.testing.assert_array_equal(a[own], b[own])


def test_scan_checkpoint_and_layers():
  """Stacked layers under scan and remat, as the model runs it."""
  sizes = jnp.asarray([5, 0, 8, 3], jnp.int32)
  x = jax.random.normal(jax.random.key(0), (20, K))
  w = jax.random.normal(jax.random.key(1), (3, 4, K, K)) / K**0.5

  def loss(x, w, implementation):
    @jax.checkpoint
    def layer(x, w):
      return x + jnp.tanh(grouped_matmul(x, w, sizes, implementation=implementation)), None

    return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)

  gradients = {kind: jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, w, kind) for kind in Implementation}
  for kind in FAST:
    for a, b in zip(gradients[kind], gradients[Implementation.REFERENCE], strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_finite_differences():
  with jax.enable_x64(True):
    lhs, rhs, sizes, _ = arrays(11, [4, 0, 5], jnp.float64)
    check_grads(lambda a, b: grouped_matmul(a, b, sizes), (lhs, rhs), order=1, modes=["rev"])


@pytest.mark.cpu
def test_no_memory_or_work_of_all_experts():
  """No buffer of rows times experts, and few rows computed in vain."""
  rows, experts = 4096, 32
  lhs = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
  rhs = jax.ShapeDtypeStruct((experts, 128, 64), jnp.float32)
  sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
  grad = jax.grad(lambda a, b, s: jnp.sum(grouped_matmul(a, b, s) ** 2), argnums=(0, 1))
  temp = jax.jit(grad).lower(lhs, rhs, sizes).compile().memory_analysis().temp_size_in_bytes
  assert temp < 4 * rows * 64 * 4, "more than a few arrays of the size of the result"
  sizes = np.bincount(np.random.default_rng(0).integers(0, experts, 4 * rows), minlength=experts)
  assert padded_rows(sizes, 4 * rows) < 1.1 * 4 * rows


def test_block_sizes_follow_the_rows_of_a_group():
  assert block_sizes(16384, 32) == (256, 64)
  assert block_sizes(200, 1) == (64,)
  assert block_sizes(64, 8) == (8,)
  assert block_sizes(64, 256) == (4,)
  assert block_sizes(2, 256) == (2,)


@pytest.mark.cpu
def test_the_default_runs_blocked_on_a_cpu():
  arguments = arrays(40, [9, 0, 11])
  for a, b in zip(
    value_and_gradients(*arguments, None), value_and_gradients(*arguments, Implementation.BLOCKED), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_lowers_for_cuda(monkeypatch):
  shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.ndim > 1 else x.dtype) for x in arrays(700, [301, 0, 399])]
  plain, with_kernels = for_cuda(value_and_gradients.__wrapped__, *shapes, monkeypatch=monkeypatch)
  assert "dot_general" in plain and "tpu_custom_call" not in plain + with_kernels
  assert with_kernels.count("gpu.triton") == 3 and "stablehlo.dot_general" not in with_kernels


# ---------------------------------------------------------------------------------------------------------------------
# megablox: the work it does, and the programs that the TPU compiler makes of it


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_work_counts_the_kernels_steps(layout):
  """Against the list of steps that megablox itself makes."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

  rows, sizes = LAYOUTS[layout]
  if not sum(sizes):
    return
  tile = megablox.gmm_tiles(rows, len(sizes), K, N, jnp.float32)[0]
  _, steps = make_group_metadata(
    group_sizes=jnp.asarray(sizes, jnp.int32),
    m=-(-rows // tile) * tile,
    tm=tile,
    start_group=jnp.int32(0),
    num_nonzero_groups=len(sizes),
    visit_empty_groups=False,
  )
  work = megablox.padded_work(np.asarray(sizes), rows, K, N, jnp.float32)
  assert work.forward == int(steps) * tile / sum(sizes)


# Experts' matrices of the real models: gate and up, and down.  A device holds 32 experts and the rows of 8192 tokens
# that chose 8 of them.
EXPERTS = {"ring_mini": (2048, 512), "ring_flash": (4096, 1024), "ring_1t": (8192, 2048)}
ROWS, LOCAL_EXPERTS = 8192 * 8, 32


@pytest.mark.parametrize("model", EXPERTS)
def test_work_of_real_layers_is_within_a_tenth_of_ideal(model):
  hidden, ffn = EXPERTS[model]
  rng = np.random.default_rng(0)
  even = np.full(LOCAL_EXPERTS, ROWS // LOCAL_EXPERTS)
  uneven = rng.multinomial(ROWS, rng.dirichlet(np.full(LOCAL_EXPERTS, 4.0)))
  for sizes in (even, uneven):
    for inner, outer in ((hidden, 2 * ffn), (ffn, hidden)):
      work = megablox.padded_work(sizes, ROWS, inner, outer, jnp.bfloat16)
      assert 1 <= work.forward < 1.1 and 1 <= work.backward < 1.1, (inner, outer, work)


def compiled(chip, rows, experts, inner, outer, dtype=jnp.bfloat16):
  """The default implementation, value and gradients, by the TPU compiler."""
  mesh = Mesh(np.array(Topology.parse(CHIPS[chip]).devices()[:1]), ("x",))
  shapes = ((rows, inner), dtype), ((experts, inner, outer), dtype), ((experts,), jnp.int32), ((rows, outer), dtype)
  arguments = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P())) for shape in shapes]
  return value_and_gradients.lower(*arguments, implementation=None).compile()


def check_program(program, rows, experts, inner, outer):
  """One kernel for each of three products, the work of no more groups than one, no large buffer."""
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert not re.search(r" (dot|convolution)\(", text), "a product outside of the kernels"
  # Each kernel tells the compiler its FLOPs, those of the ideal; a dense product would show as E times as many.
  assert 1 <= program.cost_analysis()["flops"] / (3 * 2 * rows * inner * outer) < 1.1
  arrays_in_program = re.findall(r"(?:bf16|f32|pred|s32)\[([\d,]+)\]", text)
  largest = max(np.prod([int(side) for side in shape.split(",")]) for shape in arrays_in_program)
  assert largest <= max(rows * inner, rows * outer, experts * inner * outer)
  assert program.memory_analysis().temp_size_in_bytes < 8 << 20


@pytest.mark.tpu
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_chip(chip):
  """The experts of ring_mini, with a quarter of the rows."""
  shape = (ROWS // 4, LOCAL_EXPERTS, 2048, 1024)
  check_program(compiled(chip, *shape), *shape)


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", megablox.DTYPES)
def test_compiles_with_odd_sides(dtype):
  """Rows that fill no tile, sides of 64 and 320: what the smallest memory, that of v5e, takes."""
  text = compiled("v5e", 700, 3, 64, 320, dtype).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.tpu
def test_compiles_under_shard_map():
  """Experts over four chips, each with its own rows; nothing is sent."""
  mesh = Mesh(np.array(Topology.parse("v5e:2x2").devices()), ("expert",), axis_types=(AxisType.Explicit,))
  rows = NamedSharding(mesh, P("expert"))
  shapes = (
    ((4 * 512, 256), jnp.bfloat16),
    ((8, 256, 128), jnp.bfloat16),
    ((8,), jnp.int32),
    ((4 * 512, 128), jnp.bfloat16),
  )
  local = functools.partial(value_and_gradients, implementation=None)
  program = jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
  text = jax.jit(program).lower(*(jax.ShapeDtypeStruct(*shape, sharding=rows) for shape in shapes)).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", EXPERTS)
def test_compiles_real_layers(model, chip):
  hidden, ffn = EXPERTS[model]
  for inner, outer in ((hidden, 2 * ffn), (ffn, hidden)):
    shape = (ROWS, LOCAL_EXPERTS, inner, outer)
    check_program(compiled(chip, *shape), *shape)


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
  "rows, experts, inner, outer, dtype",
  [
    (4096, 8, 8192, 4096, jnp.float32),  # float32 leaves no room for the whole inner side
    (8, 256, 2048, 1024, jnp.bfloat16),  # decode: one token
    (512, 32, 2048, 1024, jnp.bfloat16),  # decode: 64 slots
    (1024, 2, 1100, 1100, jnp.bfloat16),
    (64, 8, 24, 40, jnp.bfloat16),
    (700, 3, 64, 320, jnp.float32),
  ],
)
def test_compiles_other_shapes(rows, experts, inner, outer, dtype, chip):
  text = compiled(chip, rows, experts, inner, outer, dtype).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(
  "change, message",
  [
    ({"implementation": "fastest"}, "implementation='fastest': one of reference, blocked, megablox"),
    ({"lhs_MxK": jnp.zeros((4, 7))}, r"expected \[M, K\] and \[E, K, N\]"),
    ({"group_sizes_E": jnp.zeros(3, jnp.int32)}, "expected 2 integers"),
    ({"group_sizes_E": jnp.zeros(2)}, "expected 2 integers"),
    ({"lhs_MxK": jnp.zeros((4, 5), jnp.bfloat16)}, "expected one floating dtype for both"),
    (
      {
        "lhs_MxK": jnp.zeros((4, 5), "float16"),
        "rhs_ExKxN": jnp.zeros((2, 5, 6), "float16"),
        "implementation": "megablox",
      },
      "implementation='megablox' with float16",
    ),
  ],
)
def test_errors(change, message):
  arguments = {
    "lhs_MxK": jnp.zeros((4, 5)),
    "rhs_ExKxN": jnp.zeros((2, 5, 6)),
    "group_sizes_E": jnp.zeros(2, jnp.int32),
    "implementation": None,
  } | change
  with pytest.raises(ConfigError if "implementation=" in message else ValueError, match=message):
    grouped_matmul(**arguments)


@pytest.mark.parametrize("layout", ["ragged", "rows beyond the last group", "all rows beyond", "decode", "no rows"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gated_experts_are_the_chosen_layer_s(layout, dtype):
  """Against the definition on the same, already rounded numbers; rows of no expert are zero."""
  rows, sizes = LAYOUTS[layout]
  layers, F = 3, 20
  keys = jax.random.split(jax.random.key(1), 3)
  x = jax.random.normal(keys[0], (rows, K), dtype)
  gate_up = jax.random.normal(keys[1], (layers, len(sizes), K, 2, F), dtype)
  down = jax.random.normal(keys[2], (layers, len(sizes), F, K), dtype)
  got = jax.jit(gated_experts)(x, gate_up, down, jnp.asarray(sizes, jnp.int32), 2)
  assert got.dtype == dtype and got.shape == x.shape
  want, start = np.zeros(x.shape), 0
  for e, size in enumerate(sizes):
    mine = slice(start, start + size)
    hidden = np.asarray(x[mine], np.float64) @ np.asarray(gate_up[2, e], np.float64).reshape(K, 2 * F)
    gate, up = np.split(hidden, 2, axis=1)
    want[mine] = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down[2, e], np.float64)
    start += size
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  assert np.linalg.norm(np.asarray(got, np.float64) - want) <= tolerance * np.linalg.norm(want)
  assert not np.asarray(got[start:], np.float32).any()
