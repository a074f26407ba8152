"""Packing: nothing is lost, nothing overlaps, fields and targets lie where their tokens do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError
from ring_jax.data.packing import fill_ratio, pack, pack_groups, unpack

LENGTH, ROWS = 16, 3


def make(sizes):
  """Tokens that are different everywhere, and a field that says which token it belongs to."""
  starts = np.cumsum([1, *sizes])
  return [
    {"tokens": list(range(start, start + size)), "weights": [0.5 * token for token in range(start, start + size)]}
    for start, size in zip(starts, sizes, strict=False)
  ]


@settings(max_examples=150)
@given(st.lists(st.integers(1, LENGTH), max_size=40))
def test_every_token_has_one_place(sizes):
  sequences = make(sizes)
  batches = pack(sequences, LENGTH, ROWS)
  found = {}
  for batch in batches:
    for array in (batch.tokens, batch.segment_ids, batch.positions, batch.targets, batch.target_mask):
      assert array.shape == (ROWS, LENGTH)
    real = batch.segment_ids > 0
    np.testing.assert_array_equal(batch.tokens > 0, real)
    np.testing.assert_array_equal(batch.fields["weights"], 0.5 * batch.tokens)
    assert batch.fill == real.mean()
    for row in range(ROWS):
      segments = batch.segment_ids[row]
      assert list(dict.fromkeys(segments[segments > 0])) == list(range(1, segments.max() + 1))
    found |= batch.unpack(batch.tokens)
    for index, first, size in ((i, first, size) for i, row, first, size in batch.where):
      assert size == sizes[index] and first + size <= LENGTH
    # Tokens are consecutive numbers within a sequence: the target is the next one, and the last has none.
    np.testing.assert_array_equal(batch.targets[batch.target_mask], batch.tokens[batch.target_mask] + 1)
    assert (batch.targets[~batch.target_mask] == 0).all()
    assert batch.target_mask.sum() == sum(size - 1 for *_, size in batch.where)
    assert (batch.positions[real] == np.concatenate([batch.unpack(batch.positions)[i] for i in _order(batch)])).all()
  assert sorted(found) == list(range(len(sizes)))
  for index, tokens in found.items():
    np.testing.assert_array_equal(tokens, sequences[index]["tokens"])
  # First fit never leaves two rows that are both less than half full.
  rows = [int((row > 0).sum()) for batch in batches for row in batch.segment_ids if (row > 0).any()]
  assert sum(count * 2 <= LENGTH for count in rows) <= 1


def _order(batch):
  return [index for index, row, first, _ in sorted(batch.where, key=lambda place: place[1:3])]


def test_positions_restart_and_the_result_is_a_function_of_the_input():
  batches = [pack(make([3, 2, 2]), 8, 1)[0] for _ in range(2)]
  np.testing.assert_array_equal(batches[0].positions, [[0, 1, 2, 0, 1, 0, 1, 0]])
  np.testing.assert_array_equal(batches[0].segment_ids, [[1, 1, 1, 2, 2, 3, 3, 0]])
  np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
  assert batches[0].where == batches[1].where and fill_ratio(batches) == 7 / 8
  assert pack([], 8, 1) == [] and fill_ratio([]) == 0.0


def test_short_sequences_fill_rows_well():
  sizes = np.random.default_rng(0).integers(8, 40, 512).tolist()
  assert fill_ratio(pack(make(sizes), 128, 1)) > 0.97


def test_errors():
  with pytest.raises(ConfigError, match=r"packing\.length=4: sequence 1 of 5 tokens"):
    pack(make([4, 5]), 4, 1)
  with pytest.raises(ConfigError, match="sequence 0 of 0 tokens"):
    pack([{"tokens": []}], 4, 1)
  with pytest.raises(ValueError, match="sequence 0 has 2 tokens and 1 values of weights"):
    pack([{"tokens": [1, 2], "weights": [1.0]}], 4, 1)
  with pytest.raises(ValueError, match="sequence 1 has fields"):
    pack([{"tokens": [1], "weights": [1.0]}, {"tokens": [1]}], 4, 1)
  with pytest.raises(ConfigError, match=r"packing\.length=4, rows=1: 3 \+ 2 tokens that must lie in one microbatch"):
    pack_groups([make([3, 2])], 4, 1)
  with pytest.raises(ConfigError, match="0 \\+ 1 tokens"):
    pack_groups([[{"tokens": []}, {"tokens": [1]}]], 4, 1)


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(1, 7), max_size=4), max_size=14))
def test_groups_stay_together_and_nothing_is_lost(sizes):
  """Four sequences of at most 7 always fit in 3 rows of 16."""
  sequences = make([size for group in sizes for size in group])
  starts = np.cumsum([0, *map(len, sizes)])
  groups = [sequences[start : start + len(group)] for start, group in zip(starts, sizes, strict=False)]
  batches = pack_groups(groups, LENGTH, ROWS)
  group_of = np.repeat(np.arange(len(sizes)), [len(group) for group in sizes])
  homes = [{int(group_of[index]) for index, *_ in batch.where} for batch in batches]
  assert sorted(group for home in homes for group in home) == sorted(set(group_of.tolist()))
  found = unpack(batches, [batch.tokens for batch in batches])
  assert [tokens.tolist() for tokens in found] == [sequence["tokens"] for sequence in sequences]
  for batch in batches:
    assert batch.tokens.shape == (ROWS, LENGTH)
    assert (batch.segment_ids > 0).sum() == sum(size for *_, size in batch.where)
    np.testing.assert_array_equal(batch.targets[batch.target_mask], batch.tokens[batch.target_mask] + 1)


def test_groups_use_all_rows_of_a_microbatch():
  batches = pack_groups([make([10, 9]), make([6, 6]), make([9, 9]), make([2])], 16, 2)
  assert [sorted(index for index, *_ in batch.where) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6]]
  assert pack_groups([], 16, 2) == [] and unpack([], []) == []
