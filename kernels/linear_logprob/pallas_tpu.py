"""The linear log-probability as TPU kernels: forward sweep (pallas_forward.py), backward sweeps (pallas_backward.py).

Scoring takes the plain sweep.  Training takes the sweep that also keeps, of each token, D = W[:, target] - E_p[W]: then
dhidden = dlogp * D / temperature for whatever dlogp turns out to be, and the backward pass sweeps once, for dweight.  A
gradient through lse or entropy, which D does not hold, costs a sweep for dhidden.

Dimension key: N tokens, P tokens padded to whole blocks, H hidden width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.linear_logprob.backend import NEVER, Combine, Cotangents, Inputs, Scores, active_first, take_rows
from kernels.linear_logprob.pallas_backward import Rows, dhidden_call, dweight_call
from kernels.linear_logprob.pallas_forward import Keep, forward_call
from kernels.linear_logprob.pallas_shared import Sweep, padded_rows
from kernels.linear_logprob.tiles import LANES, Kernel, Tile, context_chip, tile_for, vmem_budget

# Ids travel to the kernels as float32, which holds whole numbers up to this.
MAX_VOCAB = 1 << 24


def supports(dtype: jnp.dtype) -> bool:
  """Whether the kernels take operands of this dtype, the result dtype of hidden and weight."""
  return dtype in (jnp.bfloat16, jnp.float32)


def score(inputs: Inputs, *, interpret: bool) -> Scores:
  return Scores(*_forward(inputs, Keep.NOTHING, interpret)[0])


def score_to_train(inputs: Inputs, combine: Combine | None, *, interpret: bool) -> tuple[Scores, jax.Array]:
  """What is kept is D [N, H], in the operands' dtype."""
  if combine is None:
    scores_3xN, (difference_NxH,) = _forward(inputs, Keep.DIFFERENCE, interpret)
    return Scores(*scores_3xN), difference_NxH
  scores_3xN, (target_NxH, expected_NxH) = _forward(inputs, Keep.EXPECTED, interpret)
  local = Scores(*scores_3xN)
  scores = combine(local)
  share_N = jnp.exp(local.lse - scores.lse)  # of the probability that lies in this shard's vocabulary
  difference_NxH = target_NxH.astype(jnp.float32) - share_N[:, None] * expected_NxH
  return scores, difference_NxH.astype(target_NxH.dtype)


def gradient(
  inputs: Inputs, difference_NxH: jax.Array, scores: Scores, cotangents: Cotangents, sum_dtype, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
  active_N = cotangents.active()
  inverse_N = 1.0 if inputs.temperature is None else 1 / inputs.temperature
  with_entropy = cotangents.entropy is not None
  only_logp = cotangents.lse is None and not with_entropy
  hidden_NxH = inputs.hidden
  if only_logp:
    factor_N = jnp.where(active_N, cotangents.logp * inverse_N, 0)
    dhidden_NxH = jnp.where(active_N[:, None], factor_N[:, None] * difference_NxH.astype(jnp.float32), 0)
    dhidden_NxH = dhidden_NxH.astype(sum_dtype)
    # The sweep's copy of hidden comes after: D's memory is free by then.
    dhidden_NxH, hidden_NxH = lax.optimization_barrier((dhidden_NxH, hidden_NxH))

  sweep = sweep_for("dweight", inputs.hidden, inputs.weight, interpret)
  rows = sweep.tile.rows
  source_P, blocks, place_N = active_first(active_N, rows)
  zero = lambda cotangent: 0.0 if cotangent is None else cotangent  # noqa: E731
  dlogp_N, dlse_N = zero(cotangents.logp), zero(cotangents.lse)
  spread_N = cotangents.entropy * inverse_N if with_entropy else None
  numbers = Rows(
    inputs.ids, scores.lse, dlogp_N * inverse_N, (dlse_N - dlogp_N) * inverse_N, inverse_N, spread_N,
    scores.mean if with_entropy else None,
  )  # fmt: skip
  sorted_rows = [
    take_rows(jnp.broadcast_to(number, active_N.shape).astype(jnp.float32), source_P)
    for number in numbers
    if number is not None
  ]
  rows_8xP = padded_rows(sorted_rows, [0] * len(sorted_rows), source_P.shape[0])
  hidden_PxH = take_rows(hidden_NxH, source_P)
  weight_HxV, bias_1xV = weight_and_bias(inputs.weight, inputs.mask)
  arguments = (with_entropy, blocks[None], rows_8xP, hidden_PxH, weight_HxV, bias_1xV)
  dweight_HxV = dweight_call(sweep, *arguments, inputs.weight.dtype)[:, : inputs.weight.shape[1]]
  if not only_logp:
    sweep = sweep_for("dhidden", inputs.hidden, inputs.weight, interpret, rows)
    dhidden_NxH = dhidden_call(sweep, *arguments, sum_dtype)[place_N]
    dhidden_NxH = jnp.where(active_N[:, None], dhidden_NxH, 0)
  return dhidden_NxH, dweight_HxV


def _forward(inputs: Inputs, keep: Keep, interpret: bool):
  num_tokens = inputs.hidden.shape[0]
  sweep = sweep_for("forward", inputs.hidden, inputs.weight, interpret)
  padding = max(sweep.tile.rows - num_tokens, 0)  # a block is not larger than the array
  hidden_NxH = jnp.pad(inputs.hidden, ((0, padding), (0, 0)))
  ids_N = jnp.pad(inputs.ids, (0, padding), constant_values=-1)
  scale_N = None
  if inputs.temperature is not None:
    scale_N = jnp.pad(1 / inputs.temperature, (0, padding), constant_values=1)
  weight_HxV, bias_1xV = weight_and_bias(inputs.weight, inputs.mask)
  scores_3xN, kept = forward_call(sweep, keep, hidden_NxH, weight_HxV, ids_N, scale_N, bias_1xV)
  return scores_3xN[:, :num_tokens], tuple(kept_NxH[:num_tokens] for kept_NxH in kept)


def sweep_for(
  kernel: Kernel, hidden_NxH: jax.Array, weight_HxV: jax.Array, interpret: bool, rows: int | None = None
) -> Sweep:
  """The tile of the chip, cut to the arrays; rows: what another sweep has padded the tokens for."""
  num_tokens, hidden = hidden_NxH.shape
  vocab = weight_HxV.shape[1]
  chip = context_chip()
  tile = tile_for(kernel, chip, hidden, max(hidden_NxH.dtype.itemsize, weight_HxV.dtype.itemsize))
  up = lambda size: -(-size // LANES) * LANES  # noqa: E731
  tile = Tile(rows or min(tile.rows, up(num_tokens)), min(tile.ids, up(vocab)))
  return Sweep(tile, hidden, vocab, jnp.result_type(hidden_NxH, weight_HxV), vmem_budget(chip), interpret)


def weight_and_bias(weight_HxV: jax.Array, mask_V: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
  """The weight, of at least one whole group of lanes, and 0 or NEVER to be added to each id's logits."""
  vocab = weight_HxV.shape[1]
  padding = -vocab % LANES if vocab < 4 * LANES else 0
  weight_HxV = jnp.pad(weight_HxV, ((0, 0), (0, padding)))
  if mask_V is None:
    return weight_HxV, None
  bias_V = jnp.where(mask_V, 0.0, NEVER).astype(jnp.float32)
  return weight_HxV, jnp.pad(bias_V, (0, padding))[None]
