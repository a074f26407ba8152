"""The backward pass as TPU kernels: logit gradients are computed again, tile by tile, and multiplied out.

    x = hidden @ weight_tile / temperature,  p = exp(x - lse)
    dx = p ((b - a) - c (x - mean)) + a 1[id = target],     divided by the temperature          (backend.py)
    dweight_tile = sum over blocks of tokens: hidden^T @ dx       one tile of the vocabulary after the other
    dhidden = sum over tiles: dx @ weight_tile^T                  only where the forward sweep does not give it

dx is rounded to the operands' dtype for the second product; sums are float32, and a result is written once.

Tokens come with those first that have a gradient; blocks beyond them are neither read nor computed.  Their number is
known before the kernel starts (a prefetched scalar), so that nothing is fetched for them either.

Dimension key: P tokens padded to whole blocks, H hidden width, V vocabulary, R tokens of a block, S tokens of a strip,
C ids of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_logprob.pallas_shared import Sweep, dot, once, out_shape

_STRIP = 256


class Rows(NamedTuple):
  """Float32 numbers of each token, stacked to [8, P] in this order; zeros for tokens without gradient."""

  target: jax.Array
  lse: jax.Array
  hit: jax.Array  # a / temperature
  share: jax.Array  # (b - a) / temperature
  scale: jax.Array  # 1 / temperature
  spread: jax.Array | None  # c / temperature; None: no gradient of the entropy
  mean: jax.Array | None


def dweight_call(sweep: Sweep, with_entropy: bool, blocks, rows_8xP, hidden_PxH, weight_HxV, bias_1xV, dtype):
  """dweight [H, V] of the given dtype.  blocks: int32 [1], how many blocks have a gradient."""
  tile, hidden = sweep.tile, sweep.hidden
  kernel = functools.partial(_dweight_kernel, sweep, with_entropy, bias_1xV is not None)
  specs = [
    pl.BlockSpec((8, tile.rows), lambda j, i, blocks: (0, _at_most(i, blocks))),
    pl.BlockSpec((tile.rows, hidden), lambda j, i, blocks: (_at_most(i, blocks), 0)),
    pl.BlockSpec((hidden, tile.ids), lambda j, i, blocks: (0, j)),
    pl.BlockSpec((1, tile.ids), lambda j, i, blocks: (0, j)),
  ]
  operands = [blocks, rows_8xP, hidden_PxH, weight_HxV] + ([] if bias_1xV is None else [bias_1xV])
  grid_spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(sweep.tiles, hidden_PxH.shape[0] // tile.rows),
    in_specs=specs[: len(operands) - 1],
    out_specs=pl.BlockSpec((hidden, tile.ids), lambda j, i, blocks: (0, j)),
    scratch_shapes=[pltpu.VMEM((hidden, tile.ids), jnp.float32), pltpu.VMEM((tile.rows, tile.ids), sweep.dtype)],
  )
  return pl.pallas_call(
    kernel,
    out_shape=out_shape(weight_HxV.shape, dtype, operands),
    grid_spec=grid_spec,
    compiler_params=sweep.compiler_params(),
    cost_estimate=sweep.cost(2, hidden_PxH.shape[0], 2, results=0),
    interpret=sweep.interpret,
    name="linear_logprob_dweight",
  )(*operands)


def dhidden_call(sweep: Sweep, with_entropy: bool, blocks, rows_8xP, hidden_PxH, weight_HxV, bias_1xV, dtype):
  """dhidden [P, H] of the given dtype; arguments as of `dweight_call`."""
  tile, hidden = sweep.tile, sweep.hidden
  kernel = functools.partial(_dhidden_kernel, sweep, with_entropy, bias_1xV is not None)
  specs = [
    pl.BlockSpec((8, tile.rows), lambda i, j, blocks: (0, _at_most(i, blocks))),
    pl.BlockSpec((tile.rows, hidden), lambda i, j, blocks: (_at_most(i, blocks), 0), pipeline_mode=once()),
    pl.BlockSpec((hidden, tile.ids), lambda i, j, blocks: (0, jnp.where(i < blocks[0], j, 0))),
    pl.BlockSpec((1, tile.ids), lambda i, j, blocks: (0, j)),
  ]
  operands = [blocks, rows_8xP, hidden_PxH, weight_HxV] + ([] if bias_1xV is None else [bias_1xV])
  grid_spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=1,
    grid=(hidden_PxH.shape[0] // tile.rows, sweep.tiles),
    in_specs=specs[: len(operands) - 1],
    out_specs=pl.BlockSpec((tile.rows, hidden), lambda i, j, blocks: (i, 0), pipeline_mode=once()),
    scratch_shapes=[pltpu.VMEM((tile.rows, hidden), jnp.float32)],
  )
  return pl.pallas_call(
    kernel,
    out_shape=out_shape(hidden_PxH.shape, dtype, operands),
    grid_spec=grid_spec,
    compiler_params=sweep.compiler_params(),
    cost_estimate=sweep.cost(2, hidden_PxH.shape[0], hidden_PxH.shape[0] // tile.rows, results=1),
    interpret=sweep.interpret,
    name="linear_logprob_dhidden",
  )(*operands)


def _at_most(i, blocks):
  """Index of the block to have in memory: beyond the last one with a gradient, none is fetched."""
  return jnp.minimum(i, jnp.maximum(blocks[0] - 1, 0))


def _dweight_kernel(
  sweep: Sweep, with_entropy: bool, biased: bool, blocks_ref, rows_ref, hidden_ref, weight_ref, *refs
):
  bias_ref, dweight_ref, sum_ref, dx_ref = refs if biased else (None, *refs)
  tile_index, block = pl.program_id(0), pl.program_id(1)

  @pl.when(block == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(block < blocks_ref[0])
  def _():
    rows_Rx8 = rows_ref[...].T
    size = sweep.strip(_STRIP)
    for first in range(0, sweep.tile.rows, size):
      rows = Rows(*(rows_Rx8[first : first + size, k : k + 1] for k in range(7)))
      strip = pl.ds(first, size)
      dx_ref[strip, :] = _logit_gradients(
        sweep, with_entropy, rows, strip, hidden_ref, weight_ref, bias_ref, tile_index, ragged=False
      )

    def add(part):
      sum_ref[part, :] += dot(hidden_ref[:, part].astype(sweep.dtype), dx_ref[...], (0, 0))

    sweep.for_each_part(add)

  @pl.when(block == pl.num_programs(1) - 1)
  def _():
    def write(part):
      dweight_ref[part, :] = sum_ref[part, :].astype(dweight_ref.dtype)

    sweep.for_each_part(write)


def _dhidden_kernel(
  sweep: Sweep, with_entropy: bool, biased: bool, blocks_ref, rows_ref, hidden_ref, weight_ref, *refs
):
  bias_ref, dhidden_ref, sum_ref = refs if biased else (None, *refs)
  block, tile_index = pl.program_id(0), pl.program_id(1)
  last = sweep.tiles - 1

  @pl.when(tile_index == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def sweep_tile(ragged: bool):
    rows_Rx8 = rows_ref[...].T
    size = sweep.strip(_STRIP)
    for first in range(0, sweep.tile.rows, size):
      rows = Rows(*(rows_Rx8[first : first + size, k : k + 1] for k in range(7)))
      strip = pl.ds(first, size)
      dx_SxC = _logit_gradients(sweep, with_entropy, rows, strip, hidden_ref, weight_ref, bias_ref, tile_index, ragged)

      def add(part, strip=strip, dx_SxC=dx_SxC):
        weight_PxC = sweep.weight(weight_ref, part, tile_index if ragged else None)
        sum_ref[strip, part] += dot(dx_SxC, weight_PxC, (1, 1))

      sweep.for_each_part(add)

  active = block < blocks_ref[0]
  if sweep.ragged:
    pl.when(active & (tile_index < last))(lambda: sweep_tile(ragged=False))
    pl.when(active & (tile_index == last))(lambda: sweep_tile(ragged=True))
  else:
    pl.when(active)(lambda: sweep_tile(ragged=False))

  @pl.when(tile_index == last)
  def _():
    def write(part):
      dhidden_ref[:, part] = sum_ref[:, part].astype(dhidden_ref.dtype)

    sweep.for_each_part(write)


def _logit_gradients(sweep, with_entropy, rows, strip, hidden_ref, weight_ref, bias_ref, tile_index, ragged):
  """dx of one tile for one strip of tokens, in the operands' dtype; 0 in columns beyond the vocabulary."""
  x_SxC = sweep.logits(hidden_ref, weight_ref, strip) * rows.scale
  if bias_ref is not None:
    x_SxC = x_SxC + bias_ref[...]
  dx_SxC = jnp.exp(x_SxC - rows.lse)
  if with_entropy:
    dx_SxC = dx_SxC * (rows.share - rows.spread * (x_SxC - rows.mean))
  else:
    dx_SxC = dx_SxC * rows.share
  ids_SxC = lax.broadcasted_iota(jnp.int32, x_SxC.shape, 1) + tile_index * sweep.tile.ids
  dx_SxC = dx_SxC + jnp.where(ids_SxC == rows.target.astype(jnp.int32), rows.hit, 0.0)
  if ragged:
    dx_SxC = jnp.where(ids_SxC < sweep.vocab, dx_SxC, 0.0)
  return dx_SxC.astype(sweep.dtype)
