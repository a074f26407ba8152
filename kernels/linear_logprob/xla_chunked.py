"""Linear log-probabilities tile by tile, with a hand-written VJP (pallas.md section 5, in plain XLA).

Forward: for each chunk of tokens, one sweep over chunks of the vocabulary keeps a running maximum m and, relative to
it, the sums s = sum exp(x - m) and u = sum x exp(x - m); then lse = m + log s and entropy = lse - u / s.  Only
[N]-sized results are kept for the backward pass.  Where everything is one tile (a toy model), that tile is kept too.

Backward: with cotangents (a, b, c) of (logp, lse, entropy) the gradient of a token's logits is

    dx[j] = a 1[j = target] + p[j] ((b - a) - c (x[j] - lse + entropy)),     p[j] = exp(x[j] - lse)

For each chunk of the vocabulary the tiles of x are computed again, turned into dx and multiplied out:
dhidden += dx @ weight^T, dweight = hidden^T @ dx, both summed in float32.  A chunk of dweight is complete when its
sweep over tokens ends, so it is written once and no second [H, V] array exists.

A token whose three cotangents are all zero (prompt, padding, masked by IcePop) contributes exactly nothing, even if its
hidden state is not finite.  Such tokens are sorted to the end, and chunks that hold nothing else are not computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from kernels.linear_logprob.reference import LinearLogprob

# A tile of float32 logits is 4 MiB: large enough for matmuls at full speed, small enough for a core's share of cache.
_TILE_ELEMENTS = 1 << 20
_VOCAB_CHUNK = 1024
_TOKEN_MULTIPLE = 8
# The toy model's vocabulary fits in one tile; up to this size one tile is quicker than several.
_SINGLE_TILE_ELEMENTS = 1 << 21

# Stands for -inf in sums of logits: its exp is exactly 0, and 0 times it is 0 and not NaN.
_NEVER = -1e30


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


def _logits(hidden_TxH, weight_HxC, temperature_T, mask_C):
  x_TxC = _matmul(hidden_TxH, weight_HxC, (1, 0))
  if temperature_T is not None:
    x_TxC = x_TxC / temperature_T[:, None]
  return x_TxC if mask_C is None else jnp.where(mask_C, x_TxC, _NEVER)


def _sweep(vocab_size, chunk, weight_HxV, mask_V, carry, body):
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


def _start(num_tokens, dtype) -> _Sums:
  zero_T = jnp.zeros(num_tokens, dtype)
  return _Sums(zero_T + _NEVER, zero_T, zero_T, zero_T + _NEVER)


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


def _finish(sums: _Sums) -> LinearLogprob:
  lse_T = sums.max + jnp.log(sums.exp)
  logp_T = jnp.where(sums.target == _NEVER, -jnp.inf, sums.target - lse_T)
  return LinearLogprob(logp_T, lse_T, lse_T - sums.weighted / sums.exp)


def _forward(hidden_NxH, weight_HxV, targets_N, temperature_N, mask_V):
  """The result, and the only tile as (logits, exp, sum of exp) where there is only one, else None."""
  num_tokens, vocab_size = hidden_NxH.shape[0], weight_HxV.shape[1]
  dtype = jnp.promote_types(jnp.result_type(hidden_NxH, weight_HxV), jnp.float32)
  if num_tokens == 0:
    return LinearLogprob(*(jnp.zeros(0, dtype) for _ in range(3))), None
  tokens, ids = tile_shape(num_tokens, vocab_size)
  if (tokens, ids) == (num_tokens, vocab_size):
    x_NxV = _logits(hidden_NxH, weight_HxV, temperature_N, mask_V)
    sums, exp_NxV = _absorb(_start(num_tokens, dtype), x_NxV, 0, targets_N)
    return _finish(sums), (x_NxV, exp_NxV, sums.exp)

  def score(rows):
    hidden_TxH, targets_T, temperature_T = rows

    def tile(first, weight_HxC, mask_C, sums):
      x_TxC = _logits(hidden_TxH, weight_HxC, temperature_T, mask_C)
      return _absorb(sums, x_TxC, first, targets_T)[0]

    return _finish(_sweep(vocab_size, ids, weight_HxV, mask_V, _start(tokens, dtype), tile))

  def chunked(x_N):
    padded = jnp.pad(x_N, [(0, -num_tokens % tokens)] + [(0, 0)] * (x_N.ndim - 1), constant_values=1)
    return padded.reshape(-1, tokens, *x_N.shape[1:])

  scored = lax.map(score, jax.tree.map(chunked, (hidden_NxH, targets_N, temperature_N)))
  return jax.tree.map(lambda x: x.reshape(-1)[:num_tokens], scored), None


def _logits_gradient(x_TxC, probs_TxC, first, mask_C, rows):
  """dx of the module's docstring for one tile, divided by the temperature."""
  dlogp_T, dlse_T, dentropy_T = rows["dlogp"], rows["dlse"], rows["dentropy"]
  spread_T = _minus(dlse_T, dlogp_T)
  dx_TxC = jnp.zeros_like(x_TxC) if spread_T is None else spread_T[:, None]
  if dentropy_T is not None:
    dx_TxC = dx_TxC - dentropy_T[:, None] * (x_TxC - (rows["lse"] - rows["entropy"])[:, None])
  dx_TxC = probs_TxC * dx_TxC
  if dlogp_T is not None:
    hit_TxC = jnp.arange(x_TxC.shape[1]) == (rows["targets"] - first)[:, None]
    dx_TxC = dx_TxC + jnp.where(hit_TxC if mask_C is None else hit_TxC & mask_C, dlogp_T[:, None], 0)
  if rows["temperature"] is not None:
    dx_TxC = dx_TxC / rows["temperature"][:, None]
  return jnp.where(rows["active"][:, None], dx_TxC, 0)


def _minus(a, b):
  if b is None:
    return a
  return -b if a is None else a - b


def _active_first(rows, tokens):
  """Sorts rows with a gradient to the front and pads to whole chunks of tokens with rows that have none.

  Returns the rows, the number of chunks that hold any gradient, and where each original row went.
  """
  active_N = rows["active"]
  num_tokens = active_N.shape[0]
  order_N = jnp.argsort(~active_N, stable=True)
  source_P = jnp.pad(order_N, (0, -num_tokens % tokens), constant_values=num_tokens)
  sorted_rows = jax.tree.map(lambda x: jnp.take(x, source_P, axis=0, mode="fill", fill_value=0), rows)
  return sorted_rows, (jnp.count_nonzero(active_N) + tokens - 1) // tokens, jnp.argsort(order_N)


def _backward_one_tile(weight_HxV, mask_V, rows, tile):
  x_NxV, exp_NxV, sum_N = tile
  dx_NxV = _logits_gradient(x_NxV, exp_NxV * (1 / sum_N)[:, None], 0, mask_V, rows)
  dx_NxV = dx_NxV.astype(jnp.result_type(rows["hidden"], weight_HxV))
  return _matmul(dx_NxV, weight_HxV, (1, 1)), _matmul(rows["hidden"], dx_NxV, (0, 0))


def _backward_tiles(weight_HxV, mask_V, rows):
  num_tokens, vocab_size = rows["hidden"].shape[0], weight_HxV.shape[1]
  tokens, ids = tile_shape(num_tokens, vocab_size)
  rows, chunks, place_N = _active_first(rows, tokens)
  sum_dtype = rows["lse"].dtype
  # bfloat16 arguments: products of bfloat16 numbers, summed in float32, as in any other layer's backward pass.
  dx_dtype = jnp.result_type(rows["hidden"], weight_HxV)

  def vocab_chunk(first, weight_HxC, mask_C, carry):
    dhidden_PxH, dweight_HxV = carry

    def tile(i, carry):
      dhidden_PxH, dweight_HxC = carry
      part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * tokens, tokens), rows)
      x_TxC = _logits(part["hidden"], weight_HxC, part["temperature"], mask_C)
      probs_TxC = jnp.exp(x_TxC - part["lse"][:, None])
      dx_TxC = _logits_gradient(x_TxC, probs_TxC, first, mask_C, part).astype(dx_dtype)
      dhidden_TxH = lax.dynamic_slice_in_dim(dhidden_PxH, i * tokens, tokens) + _matmul(dx_TxC, weight_HxC, (1, 1))
      dhidden_PxH = lax.dynamic_update_slice_in_dim(dhidden_PxH, dhidden_TxH, i * tokens, axis=0)
      return dhidden_PxH, dweight_HxC + _matmul(part["hidden"], dx_TxC, (0, 0))

    zero_HxC = jnp.zeros(weight_HxC.shape, sum_dtype)
    dhidden_PxH, dweight_HxC = lax.fori_loop(0, chunks, tile, (dhidden_PxH, zero_HxC))
    dweight_HxC = dweight_HxC.astype(dweight_HxV.dtype)
    return dhidden_PxH, lax.dynamic_update_slice_in_dim(dweight_HxV, dweight_HxC, first, axis=1)

  start = (jnp.zeros(rows["hidden"].shape, sum_dtype), jnp.zeros_like(weight_HxV))
  dhidden_PxH, dweight_HxV = _sweep(vocab_size, ids, weight_HxV, mask_V, start, vocab_chunk)
  return dhidden_PxH[place_N], dweight_HxV


@jax.custom_vjp
def linear_logprob_chunked(hidden_NxH, weight_HxV, targets_N, temperature_N, vocab_mask_V) -> LinearLogprob:
  return _forward(hidden_NxH, weight_HxV, targets_N, temperature_N, vocab_mask_V)[0]


def _vjp_forward(*primals):
  arguments = jax.tree.map(lambda primal: primal.value, primals)
  result, tile = _forward(*arguments)
  return result, (arguments, result, tile)


def _vjp_backward(residuals, cotangents):
  (hidden_NxH, weight_HxV, targets_N, temperature_N, mask_V), result, tile = residuals
  # A cotangent that is zero by construction costs nothing: with logp alone, the entropy is not needed here.
  dlogp_N, dlse_N, dentropy_N = (None if isinstance(c, SymbolicZero) else c for c in cotangents)
  given = [c for c in (dlogp_N, dlse_N, dentropy_N) if c is not None]
  if hidden_NxH.shape[0] == 0 or not given:
    dhidden_NxH, dweight_HxV = jnp.zeros_like(hidden_NxH), jnp.zeros_like(weight_HxV)
  else:
    active_N = jnp.any(jnp.stack([c != 0 for c in given]), axis=0)
    rows = {
      "active": active_N,
      "hidden": jnp.where(active_N[:, None], hidden_NxH, 0),  # 0 * inf in the product with dx would not be 0
      "targets": targets_N,
      "temperature": temperature_N,
      "lse": result.lse,
      "entropy": None if dentropy_N is None else result.entropy,
      "dlogp": dlogp_N,
      "dlse": dlse_N,
      "dentropy": dentropy_N,
    }
    if tile is None:
      dhidden_NxH, dweight_HxV = _backward_tiles(weight_HxV, mask_V, rows)
    else:
      dhidden_NxH, dweight_HxV = _backward_one_tile(weight_HxV, mask_V, rows, tile)
  gradients = dhidden_NxH.astype(hidden_NxH.dtype), dweight_HxV.astype(weight_HxV.dtype)
  no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (targets_N, mask_V))
  return *gradients, no_gradient[0], jax.tree.map(jnp.zeros_like, temperature_N), no_gradient[1]


linear_logprob_chunked.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
