"""Linear log-probabilities tile by tile, in plain XLA (pallas.md section 5).

Forward: for each chunk of tokens, one sweep over chunks of the vocabulary keeps a running maximum m and, relative to
it, the sums s = sum exp(x - m) and u = sum x exp(x - m); then lse = m + log s and mean = u / s.  Only [N]-sized results
are kept for the backward pass.  Where everything is one tile (a toy model), that tile is kept too.

Backward: for each chunk of the vocabulary the tiles of x are computed again, turned into the logits' gradient dx
(backend.py) and multiplied out: dhidden += dx @ weight^T, dweight = hidden^T @ dx, both summed in float32.  A chunk of
dweight is complete when its sweep over tokens ends, so it is written once and no second [H, V] array exists.

Tokens without gradient are sorted to the end, and chunks that hold nothing else are not computed.

Dimension key: N tokens, P tokens padded to whole chunks, H hidden width, V vocabulary, T tokens of a chunk, C ids of a
chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear_logprob.backend import (
  NEVER,
  Combine,
  Cotangents,
  Inputs,
  Scores,
  active_first,
  take_rows,
  zeros,
)

# A tile of float32 logits is 4 MiB: large enough for matmuls at full speed, small enough for a core's share of cache.
_TILE_ELEMENTS = 1 << 20
_VOCAB_CHUNK = 1024
_TOKEN_MULTIPLE = 8
# The toy model's vocabulary fits in one tile; up to this size one tile is quicker than several.
_SINGLE_TILE_ELEMENTS = 1 << 21


def tile_shape(num_tokens: int, vocab_size: int) -> tuple[int, int]:
  """(tokens, ids) of a tile of logits; tokens are padded to a multiple of the first."""
  if num_tokens * vocab_size <= _SINGLE_TILE_ELEMENTS:
    return num_tokens, vocab_size
  ids = min(vocab_size, _VOCAB_CHUNK)
  chunks = -(-num_tokens * ids // _TILE_ELEMENTS)
  tokens = -(-num_tokens // chunks)  # chunks of nearly equal size, so that little is padded
  return min(-(-tokens // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE, num_tokens), ids


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Summed in float32, and with products of float32 numbers in float32 also where the hardware has a faster way."""
  a, b = (x.astype(jnp.result_type(a, b)) for x in (a, b))
  dtype = jnp.promote_types(a.dtype, jnp.float32)
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def tile_logits(hidden_TxH, weight_HxC, temperature_T, mask_C):
  """After temperature and mask: NEVER for an id that cannot be drawn."""
  x_TxC = _matmul(hidden_TxH, weight_HxC, (1, 0))
  if temperature_T is not None:
    x_TxC = x_TxC / temperature_T[:, None]
  return x_TxC if mask_C is None else jnp.where(mask_C, x_TxC, NEVER)


def sweep_vocabulary(vocab_size, chunk, weight_HxV, mask_V, carry, body):
  """Calls body(first id, weight_HxC, mask_C, carry) for each chunk of the vocabulary, the last one possibly shorter."""

  def step(first, size, carry):
    weight_HxC = lax.dynamic_slice_in_dim(weight_HxV, first, size, axis=1)
    mask_C = None if mask_V is None else lax.dynamic_slice_in_dim(mask_V, first, size)
    return body(first, weight_HxC, mask_C, carry)

  whole = vocab_size // chunk
  carry = lax.fori_loop(0, whole, lambda i, c: step(i * chunk, chunk, c), carry)
  rest = vocab_size - whole * chunk
  return step(whole * chunk, rest, carry) if rest else carry


class _Sums(NamedTuple):
  """What the forward sweep knows of a chunk of tokens after some ids; [T] each."""

  max: jax.Array
  exp: jax.Array  # sum of exp(x - max)
  weighted: jax.Array  # sum of x exp(x - max)
  target: jax.Array  # the target's logit, once its id was met


def _start(num_tokens, dtype, like) -> _Sums:
  zero_T = zeros((num_tokens,), dtype, like)
  return _Sums(zero_T + NEVER, zero_T, zero_T, zero_T + NEVER)


def _absorb(sums: _Sums, x_TxC, first, targets_T) -> tuple[_Sums, jax.Array]:
  """The sums with one more tile, whose first id is `first`; and exp(x - max) of the tile."""
  max_T = jnp.maximum(sums.max, jnp.max(x_TxC, axis=1))
  exp_TxC = jnp.exp(x_TxC - max_T[:, None])
  shrink_T = jnp.exp(sums.max - max_T)
  column_T = targets_T - first
  column_in_tile_T = jnp.clip(column_T, 0, x_TxC.shape[1] - 1)
  found_T = jnp.take_along_axis(x_TxC, column_in_tile_T[:, None], axis=1)[:, 0]
  grown = _Sums(
    max_T,
    sums.exp * shrink_T + jnp.sum(exp_TxC, axis=1),
    sums.weighted * shrink_T + jnp.sum(exp_TxC * x_TxC, axis=1),
    jnp.where(column_T == column_in_tile_T, found_T, sums.target),
  )
  return grown, exp_TxC


def _finish(sums: _Sums) -> Scores:
  return Scores(sums.target, sums.max + jnp.log(sums.exp), sums.weighted / sums.exp)


class Tile(NamedTuple):
  """The only tile, where there is only one."""

  logits: jax.Array  # [N, V]
  exp: jax.Array  # [N, V]: exp(logits - max)
  scale: jax.Array  # [N]: the probability is exp * scale


def score(inputs: Inputs) -> Scores:
  return score_to_train(inputs, None)[0]


def score_to_train(inputs: Inputs, combine: Combine | None) -> tuple[Scores, Tile | None]:
  num_tokens, vocab_size = inputs.hidden.shape[0], inputs.weight.shape[1]
  dtype = jnp.promote_types(jnp.result_type(inputs.hidden, inputs.weight), jnp.float32)
  combine = combine or (lambda scores: scores)
  tokens, ids = tile_shape(num_tokens, vocab_size)
  if (tokens, ids) == (num_tokens, vocab_size):
    x_NxV = tile_logits(inputs.hidden, inputs.weight, inputs.temperature, inputs.mask)
    sums, exp_NxV = _absorb(_start(num_tokens, dtype, inputs.hidden), x_NxV, 0, inputs.ids)
    local = _finish(sums)
    scores = combine(local)
    return scores, Tile(x_NxV, exp_NxV, jnp.exp(local.lse - scores.lse) / sums.exp)

  def score_chunk(rows):
    hidden_TxH, ids_T, temperature_T = rows

    def tile(first, weight_HxC, mask_C, sums):
      x_TxC = tile_logits(hidden_TxH, weight_HxC, temperature_T, mask_C)
      return _absorb(sums, x_TxC, first, ids_T)[0]

    return _finish(
      sweep_vocabulary(vocab_size, ids, inputs.weight, inputs.mask, _start(tokens, dtype, inputs.hidden), tile)
    )

  def chunked(x_N):
    padded = jnp.pad(x_N, [(0, -num_tokens % tokens)] + [(0, 0)] * (x_N.ndim - 1), constant_values=1)
    return padded.reshape(-1, tokens, *x_N.shape[1:])

  scores = lax.map(score_chunk, jax.tree.map(chunked, (inputs.hidden, inputs.ids, inputs.temperature)))
  return combine(jax.tree.map(lambda x: x.reshape(-1)[:num_tokens], scores)), None


def _logits_gradient(x_TxC, probs_TxC, first, rows):
  """dx of backend.py for one tile, divided by the temperature."""
  dlogp_T, dlse_T, dentropy_T = rows["cotangents"]
  spread_T = _minus(dlse_T, dlogp_T)
  dx_TxC = jnp.zeros_like(x_TxC) if spread_T is None else spread_T[:, None]
  if dentropy_T is not None:
    dx_TxC = dx_TxC - dentropy_T[:, None] * (x_TxC - rows["mean"][:, None])
  dx_TxC = probs_TxC * dx_TxC
  if dlogp_T is not None:
    hit_TxC = jnp.arange(x_TxC.shape[1]) == (rows["ids"] - first)[:, None]
    dx_TxC = dx_TxC + jnp.where(hit_TxC, dlogp_T[:, None], 0)
  if rows["temperature"] is not None:
    dx_TxC = dx_TxC / rows["temperature"][:, None]
  return jnp.where(rows["active"][:, None], dx_TxC, 0)


def _minus(a, b):
  if b is None:
    return a
  return -b if a is None else a - b


def gradient(
  inputs: Inputs, tile: Tile | None, scores: Scores, cotangents: Cotangents, sum_dtype
) -> tuple[jax.Array, jax.Array]:
  active_N = cotangents.active()
  rows = {
    "active": active_N,
    "hidden": jnp.where(active_N[:, None], inputs.hidden, 0),  # 0 * inf in the product with dx would not be 0
    "ids": inputs.ids,
    "temperature": inputs.temperature,
    "lse": scores.lse,
    "mean": None if cotangents.entropy is None else scores.mean,
    "cotangents": cotangents,
  }
  backward = _backward_tiles if tile is None else _backward_one_tile
  dhidden_NxH, dweight_HxV = backward(inputs.weight, inputs.mask, rows, tile)
  return dhidden_NxH.astype(sum_dtype), dweight_HxV.astype(inputs.weight.dtype)


def _backward_one_tile(weight_HxV, mask_V, rows, tile):
  del mask_V  # is in the tile
  dx_NxV = _logits_gradient(tile.logits, tile.exp * tile.scale[:, None], 0, rows)
  dx_NxV = dx_NxV.astype(jnp.result_type(rows["hidden"], weight_HxV))
  return _matmul(dx_NxV, weight_HxV, (1, 1)), _matmul(rows["hidden"], dx_NxV, (0, 0))


def _backward_tiles(weight_HxV, mask_V, rows, tile):
  del tile  # there are several
  num_tokens, vocab_size = rows["hidden"].shape[0], weight_HxV.shape[1]
  tokens, ids = tile_shape(num_tokens, vocab_size)
  source_P, chunks, place_N = active_first(rows["active"], tokens)
  rows = jax.tree.map(lambda x: take_rows(x, source_P), rows)
  sum_dtype = rows["lse"].dtype
  # bfloat16 arguments: products of bfloat16 numbers, summed in float32, as in any other layer's backward pass.
  dx_dtype = jnp.result_type(rows["hidden"], weight_HxV)

  def vocab_chunk(first, weight_HxC, mask_C, carry):
    dhidden_PxH, dweight_HxV = carry

    def add_tile(i, carry):
      dhidden_PxH, dweight_HxC = carry
      part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * tokens, tokens), rows)
      x_TxC = tile_logits(part["hidden"], weight_HxC, part["temperature"], mask_C)
      probs_TxC = jnp.exp(x_TxC - part["lse"][:, None])
      dx_TxC = _logits_gradient(x_TxC, probs_TxC, first, part).astype(dx_dtype)
      dhidden_TxH = lax.dynamic_slice_in_dim(dhidden_PxH, i * tokens, tokens) + _matmul(dx_TxC, weight_HxC, (1, 1))
      dhidden_PxH = lax.dynamic_update_slice_in_dim(dhidden_PxH, dhidden_TxH, i * tokens, axis=0)
      return dhidden_PxH, dweight_HxC + _matmul(part["hidden"], dx_TxC, (0, 0))

    zero_HxC = jnp.zeros_like(weight_HxC, sum_dtype)
    dhidden_PxH, dweight_HxC = lax.fori_loop(0, chunks, add_tile, (dhidden_PxH, zero_HxC))
    dweight_HxC = dweight_HxC.astype(dweight_HxV.dtype)
    return dhidden_PxH, lax.dynamic_update_slice_in_dim(dweight_HxV, dweight_HxC, first, axis=1)

  start = (jnp.zeros_like(rows["hidden"], sum_dtype), jnp.zeros_like(weight_HxV))
  dhidden_PxH, dweight_HxV = sweep_vocabulary(vocab_size, ids, weight_HxV, mask_V, start, vocab_chunk)
  return dhidden_PxH[place_N], dweight_HxV
