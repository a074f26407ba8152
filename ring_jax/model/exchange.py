"""How rows of tokens meet their experts: on one device, or along the mesh axis `expert` (ExpertParallel).

    local                 sort the (token, expert) pairs by expert
    ring                  all-gather the tokens, take the pairs of the own experts, reduce-scatter the sums
    all_to_all            C rows for every device, sent to the experts and back
    ragged_all_to_all     as many rows as there are, sent to the experts and back

All are dropless and exact.  An exchange has buffers of a fixed number of rows, a little more than a balanced load needs
(`expert_buffer`).  If some device gets more, the rest goes in further rounds, which are skipped where nobody has one; so
memory is bounded whatever the router does.

What stands in a buffer is told by two index arrays that are each other's inverse: `pair_S`, the pair in every slot of
the buffer, and `slot_M`, the slot of every pair; one beyond the last is: none.  With both at hand every gather has a
gather as its backward pass: XLA's own would be a scatter-add, which is slow and sums in no fixed order.

The results of a token's experts are summed in float32, in the fixed order of the top-k (ring: of the devices first).

Dimension key: N tokens, K experts a token, M = N * K pairs, S slots of a buffer, D hidden, E experts, e own experts,
P devices along `expert`, C slots for each of them, R rounds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.parallel import AXES, ExpertParallel, ParallelConfig
from sharding import rules
from sharding.collectives import ragged_all_to_all

AXIS = "expert"
# rows [S, D] sorted by own expert, sizes [e] -> rows [S, D]; rows beyond the sizes are not computed
Apply = Callable[[jax.Array, jax.Array], jax.Array]


class Pairs(NamedTuple):
  """Which experts every token goes to."""

  x_NxD: jax.Array
  ids_NxK: jax.Array  # int32, of the expert; E: none
  weights_NxK: jax.Array  # float32


def exchange(pairs: Pairs, num_experts: int, apply: Apply, config: ParallelConfig) -> jax.Array:
  """The weighted sum over each token's experts, float32 [N, D].

  Args:
    pairs: this device's tokens.
    num_experts: E, of all devices.
    apply: this device's experts.
  """
  match config.expert_parallel:
    case ExpertParallel.RING if rules.axis_size(AXIS) > 1:
      return _ring(pairs, num_experts, apply, config.expert_buffer)
    case ExpertParallel.ALL_TO_ALL if rules.axis_size(AXIS) > 1:
      return _all_to_all(pairs, num_experts, apply, config.expert_buffer)
    case ExpertParallel.RAGGED_ALL_TO_ALL if rules.axis_size(AXIS) > 1:
      return _ragged(pairs, num_experts, apply, config.expert_buffer)
    case _:
      return _local(pairs, num_experts, apply)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs in order of their expert, and windows of that order


class Sorted(NamedTuple):
  """The pairs by expert; pairs without one (padding, other devices' experts) stand behind all others."""

  order_M: jax.Array  # the pair at each place
  place_M: jax.Array  # the place of each pair
  begin_E: jax.Array  # the first place of each expert
  end_E: jax.Array


def _sort(ids_NxK: jax.Array, num_experts: int) -> Sorted:
  """By counting, as a token's experts are all different; one sort, for the inverse.

  (A sort costs the TPU compiler several seconds.)
  """
  taken_NxKxE = ids_NxK[..., None] == jnp.arange(num_experts)
  counts_NxE = taken_NxKxE.sum(axis=1, dtype=jnp.int32)
  before_NxE = jnp.cumsum(counts_NxE, axis=0) - counts_NxE  # rows of earlier tokens
  sizes_E = counts_NxE.sum(axis=0)
  end_E = jnp.cumsum(sizes_E)
  begin_E = end_E - sizes_E
  place_M = jnp.where(taken_NxKxE, (begin_E + before_NxE)[:, None], 0).sum(axis=-1).reshape(-1)
  none_M = (ids_NxK == num_experts).astype(jnp.int32).reshape(-1)
  place_M = jnp.where(none_M > 0, end_E[-1] + jnp.cumsum(none_M) - 1, place_M)
  _, order_M = jax.lax.sort((place_M, jnp.arange(place_M.size, dtype=jnp.int32)), num_keys=1, is_stable=False)
  return Sorted(order_M, place_M, begin_E, end_E)


def _sizes_within(pairs: Sorted, first: jax.Array, count: int) -> jax.Array:
  """How many of `count` places from `first` on each expert has."""
  clip = lambda place: jnp.clip(place - first, 0, count)  # noqa: E731
  return clip(pairs.end_E) - clip(pairs.begin_E)


def _fill(source: jax.Array, index: jax.Array) -> jax.Array:
  """source[index], and zeros where the index lies beyond the last."""
  return jnp.take(source, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def gather_rows(x_NxD: jax.Array, pair_S: jax.Array, slot_NxK: jax.Array) -> jax.Array:
  """The buffer [S, D]: in each slot the token of its pair."""
  return _fill(x_NxD, pair_S // slot_NxK.shape[1])


def _gather_rows_backward(slot_NxK, grad_SxD):
  dx_NxD = sum(_fill(grad_SxD, slot_N).astype(jnp.float32) for slot_N in slot_NxK.T)
  return dx_NxD.astype(grad_SxD.dtype), None, None


gather_rows.defvjp(lambda x, pair, slot: (gather_rows(x, pair, slot), slot), _gather_rows_backward)


@jax.custom_vjp
def combine_rows(rows_SxD: jax.Array, weights_NxK: jax.Array, pair_S: jax.Array, slot_NxK: jax.Array) -> jax.Array:
  """float32 [N, D]: for each token the weighted sum of its pairs' rows; pairs without a slot count as 0."""
  return sum(
    weight_N[:, None] * _fill(rows_SxD, slot_N).astype(weights_NxK.dtype)
    for weight_N, slot_N in zip(weights_NxK.T, slot_NxK.T, strict=True)
  )


def _combine_rows_backward(residuals, grad_NxD):
  rows_SxD, weights_NxK, pair_S, slot_NxK = residuals
  weight_S = _fill(weights_NxK.reshape(-1), pair_S)
  # The result was rounded to the rows' dtype, so its gradient is of that dtype too, and is fetched in it.
  token_SxD = _fill(grad_NxD.astype(rows_SxD.dtype), pair_S // slot_NxK.shape[1])
  drows_SxD = token_SxD * weight_S[:, None]
  dweights = [jnp.sum(_fill(rows_SxD, slot_N).astype(grad_NxD.dtype) * grad_NxD, axis=-1) for slot_N in slot_NxK.T]
  return drows_SxD.astype(rows_SxD.dtype), jnp.stack(dweights, axis=-1), None, None


combine_rows.defvjp(lambda *arguments: (combine_rows(*arguments), arguments), _combine_rows_backward)


@jax.custom_vjp
def permute(rows_SxD: jax.Array, from_S: jax.Array, to_S: jax.Array) -> jax.Array:
  """rows[from], zeros for none; `to` is the inverse of `from`."""
  return _fill(rows_SxD, from_S)


permute.defvjp(lambda rows, from_, to: (_fill(rows, from_), to), lambda to, grad: (_fill(grad, to), None, None))


def _rounds(first: Callable[[], jax.Array], body: Callable[[jax.Array], jax.Array], needed: jax.Array, most: int):
  """first() + body(1) + ... + body(needed - 1); `needed` is the same on all devices and at most `most`.

  The first round is the usual case and is kept for the backward pass as usual; further ones are computed again there.
  """
  out = first()
  if most <= 1:
    return out

  # The checkpoint stands around the condition: inside of it, what a round reads would be kept once for each of them.
  @jax.checkpoint
  def step(out, round_):
    return jax.lax.cond(round_ < needed, lambda out: out + body(round_), lambda out: out, out), None

  return jax.lax.scan(step, out, jnp.arange(1, most))[0]


def _capacity(rows: int, factor: float, most: int) -> int:
  """Slots for what would be `rows` rows at a balanced load, a multiple of 8."""
  return min(-(-int(np.ceil(rows * factor)) // 8) * 8, most)


# ---------------------------------------------------------------------------------------------------------------------
# The four forms


def _local(pairs: Pairs, num_experts: int, apply: Apply) -> jax.Array:
  by_expert = _sort(pairs.ids_NxK, num_experts)
  slot_NxK = by_expert.place_M.reshape(pairs.ids_NxK.shape)
  rows_MxD = apply(gather_rows(pairs.x_NxD, by_expert.order_M, slot_NxK), by_expert.end_E - by_expert.begin_E)
  return combine_rows(rows_MxD, pairs.weights_NxK, by_expert.order_M, slot_NxK)


def _ring(pairs: Pairs, num_experts: int, apply: Apply, factor: float) -> jax.Array:
  devices = rules.axis_size(AXIS)
  own = num_experts // devices
  everyone = Pairs(*(rules.all_gather(part, AXIS, 0) for part in pairs))
  ids_NxK = everyone.ids_NxK - rules.axis_index(AXIS) * own
  ids_NxK = jnp.where((ids_NxK >= 0) & (ids_NxK < own), ids_NxK, own)
  by_expert = _sort(ids_NxK, own)
  slots = _capacity(pairs.ids_NxK.size, factor, ids_NxK.size)

  def round_(r):
    first = r * slots
    place_S = first + jnp.arange(slots)
    pair_S = jnp.where(place_S < by_expert.end_E[-1], _fill(by_expert.order_M, place_S), ids_NxK.size)
    slot_M = by_expert.place_M - first
    slot_M = jnp.where((slot_M >= 0) & (slot_M < slots) & (ids_NxK.reshape(-1) < own), slot_M, slots)
    slot_NxK = slot_M.reshape(ids_NxK.shape)
    rows_SxD = apply(gather_rows(everyone.x_NxD, pair_S, slot_NxK), _sizes_within(by_expert, first, slots))
    return combine_rows(rows_SxD, everyone.weights_NxK, pair_S, slot_NxK)

  needed = rules.pmax(-(-by_expert.end_E[-1] // slots), AXES)
  out_NxD = _rounds(lambda: round_(0), round_, needed, -(-ids_NxK.size // slots))
  return jax.lax.psum_scatter(out_NxD, AXIS, scatter_dimension=0, tiled=True)


def _all_to_all(pairs: Pairs, num_experts: int, apply: Apply, factor: float) -> jax.Array:
  devices = rules.axis_size(AXIS)
  own = num_experts // devices
  N, K = pairs.ids_NxK.shape
  by_expert = _sort(pairs.ids_NxK, num_experts)
  begin_P, end_P = by_expert.begin_E[::own], by_expert.end_E[own - 1 :: own]
  most = N * min(K, own)  # rows that one device can have for another
  slots = _capacity(-(-N * K // devices), factor, most)
  device_M = pairs.ids_NxK.reshape(-1) // own  # P for none
  begin_M = _fill(begin_P, device_M)

  def round_(r):
    place_PxC = begin_P[:, None] + r * slots + jnp.arange(slots)
    pair_S = jnp.where(place_PxC < end_P[:, None], _fill(by_expert.order_M, place_PxC), N * K).reshape(-1)
    offset_M = by_expert.place_M - begin_M - r * slots
    inside_M = (offset_M >= 0) & (offset_M < slots) & (device_M < devices)
    slot_NxK = jnp.where(inside_M, device_M * slots + offset_M, devices * slots).reshape(N, K)

    first_E = jnp.repeat(begin_P + r * slots, own)
    sizes_Pxe = _sizes_within(by_expert, first_E, slots).reshape(devices, own)
    rows_SxD = swap(gather_rows(pairs.x_NxD, pair_S, slot_NxK).reshape(devices, slots, -1))
    from_S, to_S, sizes_e = _by_own_expert(swap(sizes_Pxe), jnp.arange(devices) * slots, devices * slots)
    done_SxD = permute(apply(permute(rows_SxD.reshape(devices * slots, -1), from_S, to_S), sizes_e), to_S, from_S)
    back_SxD = swap(done_SxD.reshape(devices, slots, -1)).reshape(devices * slots, -1)
    return combine_rows(back_SxD, pairs.weights_NxK, pair_S, slot_NxK)

  swap = lambda parts: jax.lax.all_to_all(parts, AXIS, 0, 0)  # noqa: E731
  needed = rules.pmax(-(-jnp.max(end_P - begin_P) // slots), AXES)
  return _rounds(lambda: round_(0), round_, needed, -(-most // slots))


def _by_own_expert(sizes_Pxe: jax.Array, begin_P: jax.Array, slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rows came in blocks, one from each device, each sorted by expert: where each goes so that all are.

  Args:
    sizes_Pxe: rows of each block and expert.
    begin_P: the first slot of each block.

  Returns: (the slot that stands at each place, the place of each slot, rows of each expert); `slots`: none.
  """
  sizes_e = sizes_Pxe.sum(axis=0)
  slot_Pxe = begin_P[:, None] + jnp.cumsum(sizes_Pxe, axis=1) - sizes_Pxe
  place_Pxe = jnp.cumsum(sizes_e) - sizes_e + jnp.cumsum(sizes_Pxe, axis=0) - sizes_Pxe

  def moved(from_Pxe, to_Pxe):
    offset_SxB = jnp.arange(slots)[:, None] - from_Pxe.reshape(-1)
    inside_SxB = (offset_SxB >= 0) & (offset_SxB < sizes_Pxe.reshape(-1))
    there_S = jnp.where(inside_SxB, to_Pxe.reshape(-1) + offset_SxB, 0).sum(axis=-1)
    return jnp.where(inside_SxB.any(axis=-1), there_S, slots)

  return moved(place_Pxe, slot_Pxe), moved(slot_Pxe, place_Pxe), sizes_e


def _ragged(pairs: Pairs, num_experts: int, apply: Apply, factor: float) -> jax.Array:
  devices = rules.axis_size(AXIS)
  own = num_experts // devices
  N, K = pairs.ids_NxK.shape
  by_expert = _sort(pairs.ids_NxK, num_experts)
  sizes_E = by_expert.end_E - by_expert.begin_E
  everyones_PxE = rules.all_gather(sizes_E[None], AXIS, 0)
  me = rules.axis_index(AXIS)
  rows_PxP = everyones_PxE.reshape(devices, devices, own).sum(axis=-1)  # from, to
  slots = _capacity(N * K, factor, devices * N * min(K, own))
  fits = rules.pmax(rows_PxP.sum(axis=0).max(), AXES) <= slots

  def ragged():
    # Where the block from p to q begins: in p's own order, and in q's buffer.
    sent_PxP = jnp.cumsum(rows_PxP, axis=1) - rows_PxP
    kept_PxP = jnp.cumsum(rows_PxP, axis=0) - rows_PxP
    slot_NxK = jnp.where(pairs.ids_NxK < num_experts, by_expert.place_M.reshape(N, K), N * K)
    place_M = jnp.arange(N * K)
    pair_M = jnp.where(place_M < by_expert.end_E[-1], by_expert.order_M, N * K)
    rows_MxD = gather_rows(pairs.x_NxD, pair_M, slot_NxK)
    there = ragged_all_to_all(rows_MxD, slots, sent_PxP, kept_PxP, rows_PxP, me, AXIS)
    sizes_Pxe = jax.lax.dynamic_slice_in_dim(everyones_PxE, me * own, own, axis=1)
    from_S, to_S, sizes_e = _by_own_expert(sizes_Pxe, kept_PxP[:, me], slots)
    done_SxD = permute(apply(permute(there, from_S, to_S), sizes_e), to_S, from_S)
    back_MxD = ragged_all_to_all(done_SxD, N * K, kept_PxP.T, sent_PxP.T, rows_PxP.T, me, AXIS)
    return combine_rows(back_MxD, pairs.weights_NxK, pair_M, slot_NxK)

  return jax.lax.cond(fits, ragged, lambda: _all_to_all(pairs, num_experts, apply, factor))
