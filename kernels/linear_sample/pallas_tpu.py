"""Sampling as a TPU kernel: the plain sweep of the linear log-probability, with a race beside the sums.

Each of 128 lanes keeps the leader among its own ids (race, id, logit); lanes are compared when the sweep ends.  Of equal
races the smallest id wins: ids grow along a lane, where only a strictly better one takes over, and the comparison of the
lanes takes the smallest.

Dimension key: N tokens, P tokens padded to whole blocks, H hidden width, V vocabulary, R tokens of a block, S tokens of
a strip, C ids of a tile, L lanes.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_logprob.backend import NEVER
from kernels.linear_logprob.pallas_shared import Sweep, once, out_shape, padded_rows, per_lane, spread
from kernels.linear_logprob.pallas_tpu import sweep_for, weight_and_bias
from kernels.linear_logprob.tiles import LANES
from kernels.linear_sample.backend import Draw, Inputs
from kernels.linear_sample.noise import GROUP, bits_of_groups, bits_of_ids, gumbel

_STRIP = 256


def draw(inputs: Inputs, *, interpret: bool) -> Draw:
  num_tokens, hidden = inputs.hidden.shape
  sweep = sweep_for("forward", inputs.hidden, inputs.weight, interpret)
  tile = sweep.tile
  blocks = pl.cdiv(num_tokens, tile.rows)
  padded = blocks * tile.rows
  # A block is not larger than the array: where there is one alone, it is filled up.
  hidden_NxH = jnp.pad(inputs.hidden, ((0, max(tile.rows - num_tokens, 0)), (0, 0)))
  scale_N = jnp.ones(num_tokens) if inputs.temperature is None else 1 / inputs.temperature
  keys_8xP = jnp.pad(inputs.keys.T, ((0, 6), (0, padded - num_tokens)))
  first_1 = jnp.asarray(inputs.first, jnp.int32).reshape(1)
  weight_HxV, bias_1xV = weight_and_bias(inputs.weight, inputs.mask)

  operands = [first_1, padded_rows([scale_N], [1], padded), keys_8xP, hidden_NxH, weight_HxV]
  specs = [
    pl.BlockSpec(memory_space=pltpu.SMEM),
    pl.BlockSpec((8, tile.rows), lambda i, j: (0, i)),
    pl.BlockSpec((8, tile.rows), lambda i, j: (0, i)),
    pl.BlockSpec((tile.rows, hidden), lambda i, j: (i, 0), pipeline_mode=once()),
    pl.BlockSpec((hidden, tile.ids), lambda i, j: (0, j)),
  ]
  if bias_1xV is not None:
    operands.append(bias_1xV)
    specs.append(pl.BlockSpec((1, tile.ids), lambda i, j: (0, j)))
  # Where the first id is known to be a whole group's, half the hashes do.
  grouped = isinstance(inputs.first, int) and inputs.first % GROUP == 0 and tile.ids % GROUP == 0
  drawn_8xP = pl.pallas_call(
    functools.partial(_kernel, sweep, inputs.temperature is not None, bias_1xV is not None, grouped),
    out_shape=out_shape((8, padded), jnp.float32, operands),
    grid=(blocks, sweep.tiles),
    in_specs=specs,
    out_specs=pl.BlockSpec((8, tile.rows), lambda i, j: (0, i)),
    scratch_shapes=[pltpu.VMEM((tile.rows, LANES), dtype) for dtype in [jnp.int32] * 2 + [jnp.float32] * 6],
    compiler_params=sweep.compiler_params(),
    cost_estimate=sweep.cost(1, num_tokens, blocks, results=0),
    interpret=sweep.interpret,
    name="linear_sample",
  )(*operands)
  race_N, token_N, logit_N, lse_N = drawn_8xP[:4, :num_tokens]
  return Draw(race_N, token_N.astype(jnp.int32), logit_N, lse_N)


def _kernel(sweep: Sweep, scaled: bool, biased: bool, grouped: bool, first_ref, rows_ref, keys_ref, *refs):
  hidden_ref, weight_ref, *refs = refs
  bias_ref, drawn_ref, *state = refs if biased else (None, *refs)
  key0_ref, key1_ref, scale_ref, max_ref, exp_ref, race_ref, token_ref, logit_ref = state
  tile_index, last = pl.program_id(1), sweep.tiles - 1
  first = first_ref[0]

  @pl.when(tile_index == 0)
  def _():
    keys_Rx8, scale_Rx8 = keys_ref[...].T, rows_ref[...].T
    key0_ref[...] = jnp.broadcast_to(keys_Rx8[:, 0:1], key0_ref.shape)
    key1_ref[...] = jnp.broadcast_to(keys_Rx8[:, 1:2], key1_ref.shape)
    scale_ref[...] = jnp.broadcast_to(scale_Rx8[:, 0:1], scale_ref.shape)
    max_ref[...] = jnp.full_like(max_ref, NEVER)
    race_ref[...] = jnp.full_like(race_ref, -jnp.inf)
    for ref in (exp_ref, token_ref, logit_ref):
      ref[...] = jnp.zeros_like(ref)

  def absorb(strip, ragged):
    x_SxC = sweep.logits(hidden_ref, weight_ref, strip)
    if scaled:
      x_SxC = x_SxC * spread(scale_ref[strip, :], sweep.tile.ids)
    if bias_ref is not None:
      x_SxC = x_SxC + bias_ref[...]
    here = tile_index * sweep.tile.ids
    ids_SxC = lax.broadcasted_iota(jnp.int32, x_SxC.shape, 1) + here
    if ragged:
      x_SxC = jnp.where(ids_SxC < sweep.vocab, x_SxC, NEVER)
    before_SxL = max_ref[strip, :]
    max_SxL = jnp.maximum(before_SxL, jnp.max(x_SxC, axis=1, keepdims=True))
    exp_SxC = jnp.exp(x_SxC - spread(max_SxL, sweep.tile.ids))
    max_ref[strip, :] = max_SxL
    exp_ref[strip, :] = exp_ref[strip, :] * jnp.exp(before_SxL - max_SxL) + per_lane(jnp.add, exp_SxC)
    if grouped:
      bits_SxC = bits_of_groups(
        spread(key0_ref[strip, :], sweep.tile.ids // 2), spread(key1_ref[strip, :], sweep.tile.ids // 2),
        first + here, sweep.tile.ids,
      )  # fmt: skip
    else:
      keys = [spread(ref[strip, :], sweep.tile.ids) for ref in (key0_ref, key1_ref)]
      bits_SxC = bits_of_ids(*keys, first + ids_SxC)
    race_SxC = x_SxC + gumbel(bits_SxC)
    leader = race_ref[strip, :], token_ref[strip, :], logit_ref[strip, :]
    for begin in range(0, sweep.tile.ids, LANES):
      lanes = slice(begin, begin + LANES)
      ahead_SxL = race_SxC[:, lanes] > leader[0]
      challenger = race_SxC[:, lanes], (first + ids_SxC[:, lanes]).astype(jnp.float32), x_SxC[:, lanes]
      leader = [jnp.where(ahead_SxL, new, old) for new, old in zip(challenger, leader, strict=True)]
    race_ref[strip, :], token_ref[strip, :], logit_ref[strip, :] = leader

  def sweep_tile(ragged):
    size = sweep.strip(_STRIP)
    for begin in range(0, sweep.tile.rows, size):
      absorb(pl.ds(begin, size), ragged)

  if sweep.ragged:
    pl.when(tile_index < last)(lambda: sweep_tile(ragged=False))
    pl.when(tile_index == last)(lambda: sweep_tile(ragged=True))
  else:
    sweep_tile(ragged=False)

  @pl.when(tile_index == last)
  def _():
    race_Rx1 = jnp.max(race_ref[...], axis=1, keepdims=True)
    leads_RxL = race_ref[...] == race_Rx1
    token_Rx1 = jnp.min(jnp.where(leads_RxL, token_ref[...], jnp.inf), axis=1, keepdims=True)
    logit_Rx1 = jnp.max(
      jnp.where(leads_RxL & (token_ref[...] == token_Rx1), logit_ref[...], NEVER), axis=1, keepdims=True
    )
    lse_Rx1 = max_ref[:, :1] + jnp.log(jnp.sum(exp_ref[...], axis=1, keepdims=True))
    lane_RxL = lax.broadcasted_iota(jnp.int32, race_ref.shape, 1)
    columns_RxL = jnp.broadcast_to(lse_Rx1, race_ref.shape)
    for lane, column_Rx1 in enumerate((race_Rx1, token_Rx1, logit_Rx1)):
      columns_RxL = jnp.where(lane_RxL == lane, column_Rx1, columns_RxL)
    drawn_ref[...] = columns_RxL.T[:8]
