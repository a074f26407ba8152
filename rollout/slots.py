"""The state of the engine's slots on its devices, and how slots begin.

Dimension key: B slots, W pages of a slot, I slots that begin.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.parallel import ShardingRules
from ring_jax import model as ring_model
from ring_jax.model import KVCache
from rollout.sampling import SamplingParams
from sharding import rules


class DecodeState(NamedTuple):
  """Everything a decode step reads and writes; one entry a slot."""

  cache: KVCache  # of all slots
  page_table_BxW: jax.Array | None  # int32, of a cache in pages: each slot's, numbered from 0 on each device
  token_B: jax.Array  # int32: the last token, not yet in the cache
  position_B: jax.Array  # int32: the position it will take
  remaining_B: jax.Array  # int32: how many tokens the slot may still draw; 0: idle
  generated_B: jax.Array  # int32: how many it has drawn since it was inserted
  uid_B: jax.Array  # uint32
  sampling: SamplingParams


class Sampling(NamedTuple):
  """How one slot draws."""

  temperature: float  # 0: greedy
  top_p: float
  top_k: int
  seed: int


@dataclasses.dataclass(frozen=True)
class Insertion:
  """One slot to fill from row `row` of a prefix."""

  row: int
  slot: int
  uid: int
  max_tokens: int  # it may draw
  sampling: Sampling | None = None  # None: as the engine's config says


@dataclasses.dataclass(frozen=True)
class Extension:
  """One slot whose pages hold the first `start` tokens of its sequence; those after them, but for the last, are to come."""

  slot: int
  start: int
  tokens: Sequence[int]

  def count(self) -> int:
    """How many are to come."""
    return len(self.tokens) - 1 - self.start


@dataclasses.dataclass(frozen=True)
class Joining:
  """One slot to begin with keys and values that are in its pages already."""

  slot: int
  uid: int
  max_tokens: int  # it may draw
  token: int  # the last one
  position: int  # of that
  source: int = 0  # a page of the same device, to be copied
  target: int = -1  # into this one of the slot's own; -1: nothing is copied
  sampling: Sampling | None = None  # None: as the engine's config says


_EACH = ("batch",)
TABLE_AXES = ("batch", None)
SAMPLING_WHOLE = SamplingParams((), (), (), ())


class Columns(NamedTuple):
  """Slots that begin, one a column; one beyond the last slot is dropped."""

  slot_I: jax.Array  # int32, among all
  token_I: jax.Array  # int32: the last one
  position_I: jax.Array  # int32: it will take
  uid_I: jax.Array  # uint32
  limit_I: jax.Array  # int32: tokens it may draw
  sampling_I: SamplingParams


COLUMNS_WHOLE = Columns((), (), (), (), (), SAMPLING_WHOLE)


def columns(begins: Sequence[Insertion | Joining], size: int, slots: int, sampling: Sampling) -> Columns:
  """`size` of them; token and position are the caller's to add.

  Args:
    slots: that there are.
    sampling: of those that have none of their own.
  """
  # Columns without a slot name one beyond the last: the scatter drops them.
  padding = Insertion(row=0, slot=slots, uid=0, max_tokens=0)
  begins = [*begins, *[padding] * (size - len(begins))]
  draws = zip(*(one.sampling or sampling for one in begins), strict=True)
  zeros_I = np.zeros((size,), np.int32)
  return Columns(
    slot_I=np.asarray([one.slot for one in begins], np.int32),
    token_I=zeros_I,
    position_I=zeros_I,
    uid_I=np.asarray([one.uid for one in begins], np.uint32),
    limit_I=np.asarray([one.max_tokens for one in begins], np.int32),
    sampling_I=SamplingParams(*map(np.asarray, draws, (np.float32, np.float32, np.int32, np.uint32))),
  )


def state_axes(state: DecodeState) -> DecodeState:
  """Logical axes: everything is cut by slots."""
  cache = ring_model.cache_axes(state.cache)
  return DecodeState(cache, TABLE_AXES, _EACH, _EACH, _EACH, _EACH, _EACH, SamplingParams(_EACH, _EACH, _EACH, _EACH))


def own(slot_I: jax.Array, slots: int, axes: ShardingRules) -> jax.Array:
  """Where slots are among this device's; `slots`, one beyond the last, for those of other devices."""
  slot_I = slot_I - rules.axis_index(axes.batch) * slots
  return jnp.where((slot_I >= 0) & (slot_I < slots), slot_I, slots)


def begun(state: DecodeState, columns: Columns) -> DecodeState:
  """One device's slots, named by their own numbers; the cache is left as it is."""

  def put(values_B, new_I):
    return values_B.at[columns.slot_I].set(new_I, mode="drop")

  return state._replace(
    token_B=put(state.token_B, columns.token_I),
    position_B=put(state.position_B, columns.position_I),
    remaining_B=put(state.remaining_B, columns.limit_I),
    generated_B=put(state.generated_B, 0),
    uid_B=put(state.uid_B, columns.uid_I),
    sampling=jax.tree.map(put, state.sampling, columns.sampling_I),
  )


def joined(state: DecodeState, columns: Columns, source_I: jax.Array, target_I: jax.Array, axes: ShardingRules):
  """Slots whose keys and values are in their pages already, but for one that is copied from a page to another.

  Args:
    source_I, target_I: pages of the slot's device; a target beyond the last: nothing is copied.
  """

  def local(state: DecodeState, columns: Columns, source_I, target_I) -> DecodeState:
    slots, pages = len(state.token_B), state.cache.pages_LxPxNxCxd.shape[1]
    columns = columns._replace(slot_I=own(columns.slot_I, slots, axes))
    target_I = jnp.where(columns.slot_I < slots, target_I, pages)
    return begun(state._replace(cache=state.cache.copy(source_I, target_I)), columns)

  whole = state_axes(state)
  return rules.manual(local, axes, (whole, COLUMNS_WHOLE, (), ()), whole)(state, columns, source_I, target_I)


def rows_of(state: DecodeState, slot_P: jax.Array, axes: ShardingRules) -> jax.Array:
  """The page tables of slots, each named by its number on the device that has the row."""
  look_up = rules.manual(lambda table_BxW, slot_P: table_BxW[slot_P], axes, (TABLE_AXES, _EACH), TABLE_AXES)
  return look_up(state.page_table_BxW, slot_P)


def first_table(slots: int, parts: int, width: int, pages: int) -> jax.Array:
  """int32 [B, W]: slot b of a device has its pages b W to (b + 1) W, or none where a device has fewer than that."""
  slot_B = jnp.arange(slots, dtype=jnp.int32) % (slots // parts)
  table_BxW = slot_B[:, None] * width + jnp.arange(width, dtype=jnp.int32)
  return table_BxW if pages >= slots // parts * width else jnp.full_like(table_BxW, pages)
