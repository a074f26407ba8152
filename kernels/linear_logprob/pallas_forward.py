"""The sweep over the vocabulary as a TPU kernel (pallas.md section 5, design B).

A block of R tokens stays in vector memory while tiles of C ids of the weight stream by.  For each tile

    x = hidden @ weight_tile / temperature                            float32, on the matrix unit
    m' = max(m, max x),  e = exp(x - m'),  k = exp(m - m')            the running maximum, and what earlier sums shrink by
    s = k s + sum e,  u = k u + sum e x                               then lse = m + log s, mean = u / s
    target = x[target id]                                             found by comparing ids, in the one tile that has it

With `Keep.DIFFERENCE` or `Keep.EXPECTED` the sweep also keeps the expected column of the weight,

    a = k a + e @ weight_tile^T     [R, H],     E_p[W] = a / s

so that the gradient of a log-probability, (W[:, target] - E_p[W]) / temperature, is known when the sweep ends, for
whatever factor it will be multiplied by: attention's identity, with the vocabulary as keys and values.  It is a second
product with a tile that is in vector memory already.

The target's column is picked from the tile by a product with a one-hot vector, over the 128 ids around it: one id at a
time, from a list of the block's targets sorted by id, so that a tile without targets pays nothing.

Sums over ids are kept apart for each of 128 lanes and added up at the end; only the maximum crosses lanes in each tile.
All variants compute the scores by the same operations on the same tiles, so they agree bitwise.

Dimension key: N tokens, P tokens padded to whole blocks, H hidden width, V vocabulary, R tokens of a block, C ids of a
tile, L lanes, B blocks, T tiles.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from configs.schema import Enum
from kernels.linear_logprob.backend import NEVER
from kernels.linear_logprob.pallas_shared import Sweep, dot, once, out_shape, padded_rows, per_lane, spread
from kernels.linear_logprob.tiles import LANES

# Tokens that go through product and softmax together: the next ones' product overlaps with these ones' softmax.
_STRIP = 256


class Keep(Enum):
  """What a sweep returns beside the scores."""

  NOTHING = "nothing"
  DIFFERENCE = "difference"  # W[:, target] - E_p[W]
  EXPECTED = "expected"  # W[:, target] and E_p[W], for a shard that does not know its share of p yet


def forward_call(sweep: Sweep, keep: Keep, hidden_NxH, weight_HxV, ids_N, scale_N, bias_1xV):
  """Runs the sweep.

  Args:
    ids_N: int32; -1: no target.
    scale_N: what logits are multiplied by, or None.
    bias_1xV: float32: 0, or NEVER for ids that cannot be drawn; or None.

  Returns:
    float32 [3, N]: the target's logit (NEVER without one), lse, E_p[x]; and the kept [N, H] arrays, a tuple: of the
    operands' dtype, but E_p[W] in float32.
  """
  tile, hidden = sweep.tile, sweep.hidden
  num_tokens = hidden_NxH.shape[0]
  blocks = pl.cdiv(num_tokens, tile.rows)
  rows = [ids_N.astype(jnp.float32), jnp.ones(num_tokens) if scale_N is None else scale_N]
  rows_8xP = padded_rows(rows, [-1, 1], blocks * tile.rows)

  kept = {Keep.NOTHING: 0, Keep.DIFFERENCE: 1, Keep.EXPECTED: 2}[keep]
  operands, specs = [rows_8xP], [pl.BlockSpec((8, tile.rows), lambda i, j: (0, i))]
  if keep is not Keep.NOTHING:
    operands += _hit_lists(sweep, ids_N, blocks)
    specs += [_scalars(operand.shape[-1]) for operand in operands[1:]]
  operands += [hidden_NxH, weight_HxV]
  specs += [
    pl.BlockSpec((tile.rows, hidden), lambda i, j: (i, 0), pipeline_mode=once()),
    pl.BlockSpec((hidden, tile.ids), lambda i, j: (0, j)),
  ]
  if bias_1xV is not None:
    operands.append(bias_1xV)
    specs.append(pl.BlockSpec((1, tile.ids), lambda i, j: (0, j)))

  block = pl.BlockSpec((tile.rows, hidden), lambda i, j: (i, 0), pipeline_mode=once())
  shapes = [out_shape((8, blocks * tile.rows), jnp.float32, operands)]
  # The expected weight in float32: of a likely token it is nearly the target's column, which is taken from it later.
  shapes += [out_shape((num_tokens, hidden), dtype, operands) for dtype in (sweep.dtype, jnp.float32)[:kept]]
  scratch = [pltpu.VMEM((tile.rows, LANES), dtype) for dtype in [jnp.int32] + [jnp.float32] * 5]
  if keep is Keep.DIFFERENCE:  # Keep.EXPECTED sums in its result
    scratch.append(pltpu.VMEM((tile.rows, hidden), jnp.float32))
  products = 2 if kept else 1
  scores_8xP, *kept_NxH = pl.pallas_call(
    functools.partial(_kernel, _Body(sweep, keep, scale_N is not None, bias_1xV is not None)),
    out_shape=shapes,
    grid=(blocks, sweep.tiles),
    in_specs=specs,
    out_specs=[pl.BlockSpec((8, tile.rows), lambda i, j: (0, i))] + [block] * kept,
    scratch_shapes=scratch,
    compiler_params=sweep.compiler_params(),
    cost_estimate=sweep.cost(products, num_tokens, blocks, results=kept),
    interpret=sweep.interpret,
    name=f"linear_logprob_forward_{keep}",
  )(*operands)
  return scores_8xP[:3, :num_tokens], tuple(kept_NxH)


def _scalars(length: int) -> pl.BlockSpec:
  return pl.BlockSpec((None, 1, length), lambda i, j: (i, 0, 0), memory_space=pltpu.SMEM)


def _hit_lists(sweep: Sweep, ids_N, blocks):
  """Each block's targets sorted by id [B, 1, R], their rows in the block [B, 1, R], and where in that order each tile
  starts [B, 1, T + 1]."""
  tile = sweep.tile
  ids_P = jnp.pad(ids_N, (0, blocks * tile.rows - ids_N.shape[0]), constant_values=-1)
  ids_BxR = jnp.where(ids_P < 0, jnp.iinfo(jnp.int32).max, ids_P).reshape(blocks, tile.rows)
  order_BxR = jnp.argsort(ids_BxR, axis=1).astype(jnp.int32)
  sorted_BxR = jnp.take_along_axis(ids_BxR, order_BxR, axis=1)
  edges_T = jnp.arange(sweep.tiles + 1, dtype=jnp.int32) * tile.ids
  starts_BxT = jnp.sum(sorted_BxR[:, None, :] < edges_T[None, :, None], axis=2, dtype=jnp.int32)
  return [x[:, None, :] for x in (sorted_BxR, order_BxR, starts_BxT)]


@dataclasses.dataclass(frozen=True)
class _Body:
  """What the kernel's code depends on."""

  sweep: Sweep
  keep: Keep
  scaled: bool
  biased: bool


def _kernel(body: _Body, *refs):
  refs = list(refs)
  take = lambda count: [refs.pop(0) for _ in range(count)]  # noqa: E731
  keeps = body.keep is not Keep.NOTHING
  (rows_ref,) = take(1)
  hits = take(3 if keeps else 0)
  hidden_ref, weight_ref = take(2)
  bias_ref = take(1)[0] if body.biased else None
  (scores_ref,) = take(1)
  kept_refs = take({Keep.NOTHING: 0, Keep.DIFFERENCE: 1, Keep.EXPECTED: 2}[body.keep])
  stats_refs = take(6)
  sum_ref = take(1)[0] if body.keep is Keep.DIFFERENCE else kept_refs[1] if keeps else None

  tile_index, last = pl.program_id(1), body.sweep.tiles - 1

  @pl.when(tile_index == 0)
  def _():
    _start(rows_ref, stats_refs)
    if keeps:
      sum_ref[...] = jnp.zeros_like(sum_ref)
      kept_refs[0][...] = jnp.zeros_like(kept_refs[0])

  def sweep_tile(ragged: bool):
    """ragged: the tile overhangs the vocabulary, and what its last columns hold is arbitrary."""
    for first in range(0, body.sweep.tile.rows, body.sweep.strip(_STRIP)):
      strip = pl.ds(first, body.sweep.strip(_STRIP))
      _absorb(body, strip, hidden_ref, weight_ref, bias_ref, stats_refs, sum_ref, tile_index, ragged)

  if body.sweep.ragged:
    pl.when(tile_index < last)(lambda: sweep_tile(ragged=False))
    pl.when(tile_index == last)(lambda: sweep_tile(ragged=True))
  else:
    sweep_tile(ragged=False)
  if keeps:
    _pick_targets(body, hits, weight_ref, kept_refs[0], tile_index)

  @pl.when(tile_index == last)
  def _():
    _finish(body, stats_refs, scores_ref, kept_refs, sum_ref)


def _start(rows_ref, stats_refs):
  target_ref, scale_ref, max_ref, exp_ref, weighted_ref, found_ref = stats_refs
  rows_Rx8 = rows_ref[...].T
  target_ref[...] = jnp.broadcast_to(rows_Rx8[:, 0:1].astype(jnp.int32), target_ref.shape)
  scale_ref[...] = jnp.broadcast_to(rows_Rx8[:, 1:2], scale_ref.shape)
  max_ref[...] = jnp.full_like(max_ref, NEVER)
  exp_ref[...] = jnp.zeros_like(exp_ref)
  weighted_ref[...] = jnp.zeros_like(weighted_ref)
  found_ref[...] = jnp.full_like(found_ref, NEVER)


def _absorb(body, strip, hidden_ref, weight_ref, bias_ref, stats_refs, sum_ref, tile_index, ragged):
  """One tile for one strip of tokens."""
  target_ref, scale_ref, max_ref, exp_ref, weighted_ref, found_ref = stats_refs
  sweep = body.sweep
  x_SxC = sweep.logits(hidden_ref, weight_ref, strip)
  if body.scaled:
    x_SxC = x_SxC * spread(scale_ref[strip, :], sweep.tile.ids)
  if bias_ref is not None:
    x_SxC = x_SxC + bias_ref[...]
  ids_SxC = lax.broadcasted_iota(jnp.int32, x_SxC.shape, 1) + tile_index * sweep.tile.ids
  if ragged:
    x_SxC = jnp.where(ids_SxC < sweep.vocab, x_SxC, NEVER)

  before_SxL = max_ref[strip, :]
  max_SxL = jnp.maximum(before_SxL, jnp.max(x_SxC, axis=1, keepdims=True))
  shrink_SxL = jnp.exp(before_SxL - max_SxL)
  exp_SxC = jnp.exp(x_SxC - spread(max_SxL, sweep.tile.ids))
  hit_SxC = ids_SxC == spread(target_ref[strip, :], sweep.tile.ids)
  max_ref[strip, :] = max_SxL
  exp_ref[strip, :] = exp_ref[strip, :] * shrink_SxL + per_lane(jnp.add, exp_SxC)
  weighted_ref[strip, :] = weighted_ref[strip, :] * shrink_SxL + per_lane(jnp.add, exp_SxC * x_SxC)
  found_ref[strip, :] = jnp.maximum(found_ref[strip, :], per_lane(jnp.maximum, jnp.where(hit_SxC, x_SxC, NEVER)))

  if sum_ref is not None:
    exp_SxC = exp_SxC.astype(sweep.dtype)

    def add(part):
      weight_PxC = sweep.weight(weight_ref, part, tile_index if ragged else None)
      shrink_SxP = spread(shrink_SxL, part.size)
      sum_ref[strip, part] = sum_ref[strip, part] * shrink_SxP + dot(exp_SxC, weight_PxC, (1, 1))

    sweep.for_each_part(add)


def _pick_targets(body, hits, weight_ref, kept_ref, tile_index):
  """Copies the weight's column of each target of this tile into its token's row."""
  sorted_ref, order_ref, starts_ref = hits
  dtype = body.sweep.dtype
  group = 8 * 4 // dtype.itemsize  # rows that a tile of the memory holds: read and written together

  def pick(k, _):
    row, column = order_ref[0, k], sorted_ref[0, k] - tile_index * body.sweep.tile.ids
    lane_group = pl.multiple_of(column & -LANES, LANES)
    one_hot_GxL = lax.broadcasted_iota(jnp.int32, (group, LANES), 1) == column - lane_group
    rows = pl.ds(pl.multiple_of(row & -group, group), group)
    is_row_Gx1 = lax.broadcasted_iota(jnp.int32, (group, 1), 0) == (row & (group - 1))

    def copy(part):
      weight_PxL = weight_ref[part, pl.ds(lane_group, LANES)].astype(dtype)
      if body.sweep.ragged:  # lanes beyond the vocabulary: 0 times what stands there need not be 0
        ids_1xL = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) + (tile_index * body.sweep.tile.ids + lane_group)
        weight_PxL = jnp.where(ids_1xL < body.sweep.vocab, weight_PxL, jnp.zeros_like(weight_PxL))
      column_GxP = dot(one_hot_GxL.astype(dtype), weight_PxL, (1, 1)).astype(dtype)
      kept_ref[rows, part] = jnp.where(is_row_Gx1, column_GxP, kept_ref[rows, part])

    body.sweep.for_each_part(copy)
    return 0

  lax.fori_loop(starts_ref[0, tile_index], starts_ref[0, tile_index + 1], pick, 0)


def _finish(body, stats_refs, scores_ref, kept_refs, sum_ref):
  _, _, max_ref, exp_ref, weighted_ref, found_ref = stats_refs
  total_Rx1 = jnp.sum(exp_ref[...], axis=1, keepdims=True)
  lse_Rx1 = max_ref[:, :1] + jnp.log(total_Rx1)
  mean_Rx1 = jnp.sum(weighted_ref[...], axis=1, keepdims=True) / total_Rx1
  found_Rx1 = jnp.max(found_ref[...], axis=1, keepdims=True)
  lane_RxL = lax.broadcasted_iota(jnp.int32, exp_ref.shape, 1)
  columns_RxL = jnp.where(lane_RxL == 0, found_Rx1, jnp.where(lane_RxL == 1, lse_Rx1, mean_Rx1))
  scores_ref[...] = columns_RxL.T[:8]
  if sum_ref is None:
    return
  share_RxL = jnp.broadcast_to(1 / total_Rx1, exp_ref.shape)

  def keep(part):
    expected_RxP = sum_ref[:, part] * spread(share_RxL, part.size)
    if body.keep is Keep.EXPECTED:
      kept_refs[1][:, part] = expected_RxP
    else:
      difference_RxP = kept_refs[0][:, part].astype(jnp.float32) - expected_RxP
      kept_refs[0][:, part] = difference_RxP.astype(body.sweep.dtype)

  body.sweep.for_each_part(keep)
