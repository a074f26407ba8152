"""Packing: token sequences of any length into microbatches of one fixed shape.

First-fit decreasing: sequences are taken longest first (ties by their order), each goes into the first row that has
room, which needs at most 11/9 of the fewest possible rows, and one more.  Rows are then cut into microbatches; rows
that are left over at the end hold padding.  The result is a function of the sequences alone.

`pack_groups` keeps the sequences of a group in one microbatch, for a loss that compares them: groups are taken by their
longest sequence, each goes into the first microbatch whose rows have room for all of it.

In a row, segment ids count its sequences from 1 (0 is padding) and positions restart with each.  A position's target is
the next token of its sequence; the last one has none.

Dimension key: R rows of a microbatch, T tokens of a row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.schema import ConfigError


@dataclasses.dataclass(frozen=True)
class PackedBatch:
  """One microbatch."""

  tokens: np.ndarray  # int32 [R, T], 0 where padding
  segment_ids: np.ndarray  # int32 [R, T], 0 where padding
  positions: np.ndarray  # int32 [R, T]
  targets: np.ndarray  # int32 [R, T], 0 where there is none
  target_mask: np.ndarray  # bool [R, T]
  fields: dict[str, np.ndarray]  # float32 [R, T] each, 0 where padding
  where: list[tuple[int, int, int, int]]  # of each sequence here: its index, row, first column, length

  @property
  def fill(self) -> float:
    """Share of positions that are not padding."""
    return float((self.segment_ids > 0).mean())

  def unpack(self, values_RxT: np.ndarray) -> dict[int, np.ndarray]:
    """Per-position values back to sequences, by their index."""
    return {index: values_RxT[row, first : first + length] for index, row, first, length in self.where}


def pack(sequences: Sequence[Mapping[str, Any]], length: int, rows: int) -> list[PackedBatch]:
  """Packs sequences; none of them is split.

  Args:
    sequences: each has "tokens" and any number of per-token fields of the same length; all have the same fields.
    length: T.
    rows: R.

  Returns:
    The microbatches, none for no sequences.

  Raises:
    ConfigError: a sequence is empty, or does not fit in a row.
    ValueError: the fields of a sequence differ in length from its tokens, or in name from the first sequence's.
  """
  for index, sequence in enumerate(sequences):
    _check_fields(index, sequence, sequences[0])
  placed = _place([len(sequence["tokens"]) for sequence in sequences], length)
  return [_fill(sequences, placed[first : first + rows], length, rows) for first in range(0, len(placed), rows)]


def pack_groups(groups: Sequence[Sequence[Mapping[str, Any]]], length: int, rows: int) -> list[PackedBatch]:
  """Packs sequences so that those of a group lie in one microbatch, in whichever of its rows.

  Args and errors as of `pack`, and ConfigError for a group that does not fit in a microbatch.  In `where`, sequences are
  counted through all groups.
  """
  sequences = [sequence for group in groups for sequence in group]
  for index, sequence in enumerate(sequences):
    _check_fields(index, sequence, sequences[0])
  sizes = [len(sequence["tokens"]) for sequence in sequences]
  last = np.cumsum([len(group) for group in groups], dtype=int)
  members = [range(end - len(group), end) for end, group in zip(last.tolist(), groups, strict=True) if len(group)]
  batches: list[list[list[int]]] = []  # which sequences go into each row of each microbatch
  for group in sorted(members, key=lambda group: (-max(sizes[index] for index in group), group.start)):
    if not any(_join(batch, group, sizes, length) for batch in batches):
      batches.append([[] for _ in range(rows)])
      if not _join(batches[-1], group, sizes, length):
        tokens = " + ".join(str(sizes[index]) for index in group)
        raise ConfigError(
          f"packing.length={length}, rows={rows}: {tokens} tokens that must lie in one microbatch do not fit in it"
        )
  return [_fill(sequences, batch, length, rows) for batch in batches]


def unpack(batches: Sequence[PackedBatch], values: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Per-position values [R, T] of each microbatch back to the sequences, in their order."""
  found = [item for batch, values_RxT in zip(batches, values, strict=True) for item in batch.unpack(values_RxT).items()]
  return [own for _, own in sorted(found, key=lambda item: item[0])]


def fill_ratio(batches: Sequence[PackedBatch]) -> float:
  """Share of the positions of all batches that are not padding; 0 without batches."""
  return float(np.mean([batch.fill for batch in batches])) if batches else 0.0


def _check_fields(index: int, sequence: Mapping[str, Any], first: Mapping[str, Any]) -> None:
  if sequence.keys() != first.keys():
    raise ValueError(f"packing: sequence {index} has fields {sorted(sequence)}, the first one {sorted(first)}")
  size = len(sequence["tokens"])
  for name, values in sequence.items():
    if len(values) != size:
      raise ValueError(f"packing: sequence {index} has {size} tokens and {len(values)} values of {name}")


def _place(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Which sequences go into each row."""
  rows: list[list[int]] = []
  room = np.zeros(len(lengths), int)
  for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
    size = lengths[index]
    if not 0 < size <= capacity:
      raise ConfigError(f"packing.length={capacity}: sequence {index} of {size} tokens does not fit in a row")
    row = int(np.argmax(room[: len(rows) + 1] >= size)) if rows else 0
    if row >= len(rows) or room[row] < size:
      row = len(rows)
      rows.append([])
      room[row] = capacity
    rows[row].append(index)
    room[row] -= size
  return rows


def _join(batch: list[list[int]], group: Sequence[int], sizes: Sequence[int], capacity: int) -> bool:
  """Puts a group into the rows of a microbatch, the longest first, if there is room for all of it."""
  room = [capacity - sum(sizes[index] for index in row) for row in batch]
  found = []
  for index in sorted(group, key=lambda index: (-sizes[index], index)):
    row = next((row for row, left in enumerate(room) if 0 < sizes[index] <= left), None)
    if row is None:
      return False
    room[row] -= sizes[index]
    found.append((row, index))
  for row, index in found:
    batch[row].append(index)
  return True


def _fill(sequences: Sequence[Mapping[str, Any]], placed: list[list[int]], length: int, rows: int) -> PackedBatch:
  shape = (rows, length)
  tokens, segments, positions, targets = (np.zeros(shape, np.int32) for _ in range(4))
  fields = {name: np.zeros(shape, np.float32) for name in sequences[0] if name != "tokens"}
  where = []
  for row, members in enumerate(placed):
    first = 0
    for segment, index in enumerate(members, start=1):
      sequence = sequences[index]
      size = len(sequence["tokens"])
      span = slice(first, first + size)
      tokens[row, span] = sequence["tokens"]
      segments[row, span] = segment
      positions[row, span] = np.arange(size)
      targets[row, first : first + size - 1] = sequence["tokens"][1:]
      for name, field in fields.items():
        field[row, span] = sequence[name]
      where.append((index, row, first, size))
      first += size
  target_mask = np.zeros(shape, bool)
  target_mask[:, :-1] = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
  return PackedBatch(tokens, segments, positions, targets, target_mask, fields, where)
