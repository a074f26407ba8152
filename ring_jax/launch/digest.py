"""Fingerprints of a checkpoint's parameters: equal fingerprints mean bitwise equal parameters.

    python -m ring_jax.launch.digest --checkpoint=runs/tiny
    python -m ring_jax.launch.digest --checkpoint=runs/tiny/checkpoints/40 --json

The checkpoint is a Hugging Face folder, an Orbax step folder, or a workdir (its newest step).  A tensor's fingerprint
is the SHA-256 of its dtype, shape and bytes, so the same model in another dtype has another one.  With --json one
object is printed: {"step", "sha256" (of all tensors), "tensors": {name: sha256}}.
"""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from absl import flags

from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.launch import app

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", None, "Hugging Face folder, Orbax step folder or workdir.", required=True)
  flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")


def digest(params: Any) -> dict[str, Any]:
  """{"sha256", "tensors"}; the names are the dotted paths in the parameter tree, sorted."""
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  tensors = {name: _of_array(leaves[name]) for name in sorted(leaves)}
  whole = hashlib.sha256("".join(f"{name} {value}\n" for name, value in tensors.items()).encode())
  return {"sha256": whole.hexdigest(), "tensors": tensors}


def _of_array(array: np.ndarray) -> str:
  found = hashlib.sha256(f"{array.dtype.name} {list(array.shape)} ".encode())
  found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return found.hexdigest()


def main() -> None:
  opened = open_checkpoint(FLAGS.checkpoint)
  result = {"step": opened.step} | digest(opened.params)
  if FLAGS.json:
    print(json.dumps(result))
    return
  for name, value in result["tensors"].items():
    print(value, name)
  print(result["sha256"], "all" if opened.step is None else f"all, step {opened.step}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
