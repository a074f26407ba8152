"""Packing: nothing is lost, nothing overlaps, fields and targets lie where their tokens do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ConfigError
from ring_jax.data.packing import fill_ratio, pack

LENGTH, ROWS = 16, 3


def make(sizes):
  """Tokens that are different everywhere, and a field that says which token it belongs to."""
  starts = np.cumsum([1, *sizes])
  return [
    {"tokens": list(range(start, start + size)), "weights": [0.5 * token for token in range(start, start + size)]}
    for start, size in zip(starts, sizes, strict=False)
  ]


@settings(max_examples=150, deadline=None)
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
