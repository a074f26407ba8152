"""The grouped matmul: `blocked` against `reference`, in value and gradient, wherever rows and groups can lie."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from configs.schema import ConfigError
from kernels.grouped_matmul import Implementation, grouped_matmul
from kernels.grouped_matmul.blocked import block_sizes, padded_rows

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


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  cuts=st.lists(st.integers(0, 300), min_size=3, max_size=3).map(sorted),
  tail=st.integers(0, 300),
)
def test_any_sizes_of_one_compiled_program(cuts, tail):
  """Group sizes are data: the same program serves all, empty and full groups included."""
  sizes = [cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1], min(tail, 300 - cuts[2])]
  arguments = arrays(300, sizes)
  for got, want in zip(value_and_gradients(*arguments, Implementation.BLOCKED), loop(*arguments), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-4)


def test_bfloat16_sums_in_float32():
  arguments = arrays(700, [301, 0, 399], jnp.bfloat16)
  for got, want in zip(value_and_gradients(*arguments, Implementation.BLOCKED), loop(*arguments), strict=True):
    assert got.dtype == jnp.bfloat16
    # one rounding of the exact result to 8 bits; a bfloat16 sum over 400 rows would be off by far more
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-3)


def test_rows_outside_groups_are_inert():
  """What stands beyond the groups, infinities and NaN included, reaches neither the result nor a gradient."""
  lhs, rhs, sizes, dout = arrays(40, [9, 0, 11])
  clean = value_and_gradients(lhs, rhs, sizes, dout, Implementation.BLOCKED)
  dirty = value_and_gradients(
    lhs.at[20:].set(jnp.nan), rhs.at[1].set(jnp.inf), sizes, dout.at[20:].set(jnp.inf), Implementation.BLOCKED
  )
  assert not np.any(clean[0][20:]) and not np.any(clean[1][20:]) and not np.any(clean[2][1])
  for a, b in zip(clean, dirty, strict=True):
    np.testing.assert_array_equal(a, b)


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
  for a, b in zip(*gradients.values(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_finite_differences():
  with jax.enable_x64(True):
    lhs, rhs, sizes, _ = arrays(11, [4, 0, 5], jnp.float64)
    check_grads(lambda a, b: grouped_matmul(a, b, sizes), (lhs, rhs), order=1, modes=["rev"])


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


@pytest.mark.parametrize(
  "change, message",
  [
    ({"implementation": "fastest"}, "implementation='fastest': one of reference, blocked"),
    ({"lhs_MxK": jnp.zeros((4, 7))}, r"expected \[M, K\] and \[E, K, N\]"),
    ({"group_sizes_E": jnp.zeros(3, jnp.int32)}, "expected 2 integers"),
    ({"group_sizes_E": jnp.zeros(2)}, "expected 2 integers"),
    ({"lhs_MxK": jnp.zeros((4, 5), jnp.bfloat16)}, "expected one floating dtype for both"),
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
