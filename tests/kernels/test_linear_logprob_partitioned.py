"""The linear log-probability over a mesh, on CPU devices; the cases are in partitioned_cases.py."""

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from kernels.linear_logprob import Partition, linear_logprob, padded_vocab
from tests.devices import run_on_devices


def test_on_eight_devices():
  printed = run_on_devices(8, "tests.kernels.partitioned_cases:quick").split()
  assert printed == [
    "one_tile", "over_meshes", "ragged_vocabulary", "explicit_mesh", "inside_shard_map", "sampling", "policy",
  ]  # fmt: skip


@pytest.mark.tpu_full
def test_every_case_on_eight_devices():
  printed = run_on_devices(8, "tests.kernels.partitioned_cases:full").split()
  assert len(printed) == 8


def test_padded_vocab():
  assert padded_vocab(157_184, 1) == padded_vocab(157_184, 4) == 157_184  # 4 x 128 x 307
  assert padded_vocab(157_184, 8) == 157_696  # 8 x 128 x 154
  assert padded_vocab(1, 2) == 256


def test_errors():
  mesh = AbstractMesh((2, 2), ("rows", "vocab"), (AxisType.Auto,) * 2)
  with pytest.raises(ValueError, match=r"21 tokens over \('rows',\): a multiple of 2"):
    partition = Partition(mesh, ("rows",), ("vocab",))
    linear_logprob(jnp.ones((21, 4)), jnp.ones((4, 8)), jnp.zeros(21, int), partition=partition)
  for rows, vocab in ((("tokens",), ("vocab",)), (("rows",), ("rows",)), ("rows", ("vocab",))):
    with pytest.raises(ValueError, match=r"different axes of \('rows', 'vocab'\)"):
      Partition(mesh, rows, vocab)
