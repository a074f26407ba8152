"""Sampling as a TPU kernel: the plain sweep of the linear log-probability, with a race beside the sums.

Each of 128 lanes keeps the leader among its own ids (race, id, logit); lanes are compared when the sweep ends.  Of equal
races the smallest id wins: ids grow along a lane, where only a strictly better one takes over, and the comparison of the
lanes takes the smallest.

Dimension key: N tokens, P tokens padded to whole blocks, H hidden width, V vocabulary, R tokens of a block, S tokens of
a strip, C ids of a tile, L lanes.
"""

import functools
from typing import Any, NamedTuple

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


class _State(NamedTuple):
  """Scratch [R, L]: what a block of tokens knows after some tiles; keys and scale are the same on all lanes."""

  key0: Any  # int32
  key1: Any
  scale: Any  # float32, as all below: 1 / temperature
  max: Any  # of the logits
  exp: Any  # sum of exp(logit - max)
  race: Any  # of the leader
  token: Any
  logit: Any


def _kernel(sweep: Sweep, scaled: bool, biased: bool, grouped: bool, first_ref, rows_ref, keys_ref, *refs):
  hidden_ref, weight_ref, *refs = refs
  bias_ref, drawn_ref, *state = refs if biased else (None, *refs)
  state = _State(*state)
  tile_index, last = pl.program_id(1), sweep.tiles - 1
  pl.when(tile_index == 0)(lambda: _start(state, rows_ref, keys_ref))

  def sweep_tile(ragged):
    here = tile_index * sweep.tile.ids
    size = sweep.strip(_STRIP)
    for begin in range(0, sweep.tile.rows, size):
      strip = pl.ds(begin, size)
      x_SxC = sweep.logits(hidden_ref, weight_ref, strip)
      if scaled:
        x_SxC = x_SxC * spread(state.scale[strip, :], sweep.tile.ids)
      if bias_ref is not None:
        x_SxC = x_SxC + bias_ref[...]
      if ragged:
        x_SxC = jnp.where(lax.broadcasted_iota(jnp.int32, x_SxC.shape, 1) + here < sweep.vocab, x_SxC, NEVER)
      _absorb(state, strip, x_SxC, first_ref[0] + here, grouped)

  if sweep.ragged:
    pl.when(tile_index < last)(lambda: sweep_tile(ragged=False))
    pl.when(tile_index == last)(lambda: sweep_tile(ragged=True))
  else:
    sweep_tile(ragged=False)
  pl.when(tile_index == last)(lambda: _finish(state, drawn_ref))


def _start(state: _State, rows_ref, keys_ref):
  keys_Rx8, scale_Rx8 = keys_ref[...].T, rows_ref[...].T
  state.key0[...] = jnp.broadcast_to(keys_Rx8[:, 0:1], state.key0.shape)
  state.key1[...] = jnp.broadcast_to(keys_Rx8[:, 1:2], state.key1.shape)
  state.scale[...] = jnp.broadcast_to(scale_Rx8[:, 0:1], state.scale.shape)
  state.max[...] = jnp.full_like(state.max, NEVER)
  state.race[...] = jnp.full_like(state.race, -jnp.inf)
  for ref in (state.exp, state.token, state.logit):
    ref[...] = jnp.zeros_like(ref)


def _absorb(state: _State, strip, x_SxC, first, grouped: bool):
  """One tile, whose first id is `first`, for one strip of tokens."""
  ids = x_SxC.shape[1]
  before_SxL = state.max[strip, :]
  max_SxL = jnp.maximum(before_SxL, jnp.max(x_SxC, axis=1, keepdims=True))
  exp_SxC = jnp.exp(x_SxC - spread(max_SxL, ids))
  state.max[strip, :] = max_SxL
  state.exp[strip, :] = state.exp[strip, :] * jnp.exp(before_SxL - max_SxL) + per_lane(jnp.add, exp_SxC)

  ids_SxC = first + lax.broadcasted_iota(jnp.int32, x_SxC.shape, 1)
  hashes = ids // 2 if grouped else ids
  keys = [spread(ref[strip, :], hashes) for ref in (state.key0, state.key1)]
  bits_SxC = bits_of_groups(*keys, first, ids) if grouped else bits_of_ids(*keys, ids_SxC)
  race_SxC = x_SxC + gumbel(bits_SxC)
  leader = state.race[strip, :], state.token[strip, :], state.logit[strip, :]
  for begin in range(0, ids, LANES):
    lanes = slice(begin, begin + LANES)
    ahead_SxL = race_SxC[:, lanes] > leader[0]
    challenger = race_SxC[:, lanes], ids_SxC[:, lanes].astype(jnp.float32), x_SxC[:, lanes]
    leader = [jnp.where(ahead_SxL, new, old) for new, old in zip(challenger, leader, strict=True)]
  state.race[strip, :], state.token[strip, :], state.logit[strip, :] = leader


def _finish(state: _State, drawn_ref):
  race_RxL, token_RxL = state.race[...], state.token[...]
  race_Rx1 = jnp.max(race_RxL, axis=1, keepdims=True)
  token_Rx1 = jnp.min(jnp.where(race_RxL == race_Rx1, token_RxL, jnp.inf), axis=1, keepdims=True)
  wins_RxL = (race_RxL == race_Rx1) & (token_RxL == token_Rx1)
  logit_Rx1 = jnp.max(jnp.where(wins_RxL, state.logit[...], NEVER), axis=1, keepdims=True)
  lse_Rx1 = state.max[:, :1] + jnp.log(jnp.sum(state.exp[...], axis=1, keepdims=True))
  lane_RxL = lax.broadcasted_iota(jnp.int32, race_RxL.shape, 1)
  columns_RxL = jnp.broadcast_to(lse_Rx1, race_RxL.shape)
  for lane, column_Rx1 in enumerate((race_Rx1, token_Rx1, logit_Rx1)):
    columns_RxL = jnp.where(lane_RxL == lane, column_Rx1, columns_RxL)
  drawn_ref[...] = columns_RxL.T[:8]
