"""Fingerprints: the same for the same bits, wherever they lie; another for any change."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import to_dict
from ring_jax.checkpoint import hf
from ring_jax.checkpoint.store import RunStore
from ring_jax.launch.digest import digest
from tests.checkpoint import hf_folder
from tests.configs import small_run


def run_digest(folder) -> dict:
  command = [sys.executable, "-m", "ring_jax.launch.digest", f"--checkpoint={folder}", "--json"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0 and done.stderr == "", done.stderr
  return json.loads(done.stdout)


def test_a_digest_is_what_it_says():
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  found = digest({"a": {"b": jnp.asarray(array)}})
  expected = hashlib.sha256(b"float32 [2, 3] " + array.tobytes()).hexdigest()
  assert found["tensors"] == {"a.b": expected}
  assert found["sha256"] == hashlib.sha256(f"a.b {expected}\n".encode()).hexdigest()


@pytest.mark.parametrize(
  "other",
  [
    {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4).at[3].set(-0.0)},
    {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)},
    {"a": jnp.zeros((2, 3), jnp.int32), "b": jnp.zeros(4)},
    {"a": jnp.zeros((2, 3)), "c": jnp.zeros(4)},
    {"a": jnp.zeros((2, 3))},
  ],
)
def test_any_change_changes_it(other):
  base = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
  assert digest(dict(reversed(base.items()))) == digest(base)
  assert digest(other)["sha256"] != digest(base)["sha256"]


def test_command_gives_the_same_for_every_kind_of_folder(tmp_path):
  fields = hf_folder.fields(num_hidden_layers=2, dtype="bfloat16")
  hf_folder.write(tmp_path / "hf", fields, hf_folder.random_tensors(fields))
  config, params = hf.load(tmp_path / "hf")
  run = to_dict(dataclasses.replace(small_run.get_config(), model=config))
  with RunStore(tmp_path / "run" / "checkpoints", keep=2) as store:
    for step in (1, 2):
      store.save(step, params, {"n": jnp.zeros(())}, {}, run)
      params = jax.tree.map(lambda leaf: leaf + 1, params)
  first = run_digest(tmp_path / "hf")
  assert first["step"] is None and list(first["tensors"]) == sorted(first["tensors"])
  assert len(first["tensors"]) == len(jax.tree.leaves(params)) and "moe_layers.moe.router.bias" in first["tensors"]
  assert run_digest(tmp_path / "run" / "checkpoints" / "1") == first | {"step": 1}
  newest = run_digest(tmp_path / "run")
  assert newest["step"] == 2 and newest["sha256"] != first["sha256"]
