"""Speed and memory of conversion, against `cp` on the same bytes.

    python -m ring_jax.checkpoint.bench --gigabytes=4 --folder=/tmp --json

Writes a made-up model of that size (bfloat16, many experts) into a temporary folder, copies it with `cp`, and converts it
to Orbax and back, each followed by a sync of what was written; conversion syncs by itself.  Every conversion is a process
of its own, whose peak of resident memory is reported beside the largest tensor.  The folder needs four times the size.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from configs.schema import ModelConfig
from ring_jax.checkpoint import bits, names, shards, targets
from ring_jax.checkpoint.hf_source import Index
from ring_jax.model import abstract_params

_SHARD_BYTES = 1 << 30


class _Noise:
  """A source of random finite weights."""

  def __init__(self, config: ModelConfig):
    self.config = config
    self.leaves = names.leaves_of(abstract_params(config))
    self.folder = pathlib.Path()
    random = np.random.default_rng(0).integers(0, 2**16, 1 << 24, dtype=np.uint16)
    self._words = random & np.uint16(
      0xBFFF
    )  # one exponent bit cleared: finite as bfloat16, and the high half of float32
    self._at = 0

  def fill(self, path: names.Path, index: Index, out: np.ndarray) -> None:
    count = out.size * out.itemsize // 2
    self._at = (self._at + 2 * 7919) % (self._words.size - count)
    bits.copy(out, self._words[self._at : self._at + count].view(out.dtype).reshape(out.shape))

  def check_finite(self, path: names.Path, index: Index, values: np.ndarray) -> None:
    raise AssertionError(f"{path}: the noise is not finite")


def model_of(size: int, experts: int = 64) -> ModelConfig:
  """A mixture of experts of about `size` bytes; nine tenths are experts."""
  hidden, width, vocabulary = (1024, 512, 16_384) if size > 1 << 29 else (512, 256, 4096)
  layer = 2 * (3 * hidden * width * (experts + 1) + 4 * hidden * hidden)
  return ModelConfig(
    vocab_size=vocabulary,
    hidden_size=hidden,
    num_hidden_layers=1 + max(1, round((size - 4 * hidden * vocabulary) / layer)),
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=hidden // 8,
    rotary_dim=hidden // 16,
    intermediate_size=2 * hidden,
    moe_intermediate_size=width,
    num_experts=experts,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    dtype="bfloat16",
    param_dtype="bfloat16",
  )


def write_model(folder: pathlib.Path, config: ModelConfig, max_shard_bytes: int = _SHARD_BYTES) -> targets.HFTarget:
  """A Hugging Face folder of noise."""
  source, scratch = _Noise(config), shards.Scratch()
  planned = targets.HFTarget(config, source.leaves, max_shard_bytes)
  folder.mkdir(parents=True)
  for file in planned.files:
    with open(folder / file.name, "wb") as stream:
      for piece in file.pieces(source, scratch.array):
        stream.write(piece.values.reshape(-1).view(np.uint8))
  planned.finish(folder, {})
  return planned


# A process's peak begins with what its parent had when it was started, which may be more than all it needs itself (a
# test runner that holds JAX): so a small process starts it, and prints its peak in bytes.
_MEASURED = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_convert(*arguments: str) -> tuple[dict[str, Any], int]:
  """Runs the command; returns its report and its peak of resident memory in bytes."""
  command = [sys.executable, "-m", "ring_jax.launch.convert", *arguments, "--json"]
  done = subprocess.run(
    [sys.executable, "-c", _MEASURED, *command],
    stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}")
  report, peak = done.stdout.splitlines()
  return json.loads(report), int(peak)


def _sync(folder: pathlib.Path) -> None:
  for path in folder.rglob("*"):
    shards.sync_path(path)


def _copy(folder: pathlib.Path) -> float:
  """Seconds of `cp` and sync."""
  begun = time.monotonic()
  subprocess.run(["cp", "-r", folder / "hf", folder / "copy"], check=True)
  _sync(folder / "copy")
  seconds = time.monotonic() - begun
  subprocess.run(["rm", "-r", folder / "copy"], check=True)
  return seconds


def measure(size: int, place: str | None = None) -> dict[str, Any]:
  """Seconds are of the whole: hashing, checks, and the disk; bytes per second for `cp` and both directions."""
  with tempfile.TemporaryDirectory(dir=place) as name:
    folder = pathlib.Path(name)
    planned = write_model(folder / "hf", model_of(size))
    _sync(folder / "hf")
    largest = max(np.prod(shape) for shape in planned.shapes.values()) * jnp.dtype(jnp.bfloat16).itemsize
    report: dict[str, Any] = {"bytes": planned.bytes, "tensors": planned.tensors, "largest_tensor": int(largest)}
    before = _copy(folder)
    for source, target, to in (("hf", "0", "orbax"), ("0", "again", "hf")):
      done, peak = run_convert(f"--source={folder / source}", f"--target={folder / target}", f"--to={to}")
      after = _copy(folder)
      cp = planned.bytes * 2 / (before + after)  # a disk's speed changes: what it was around the conversion
      report[f"to_{to}"] = planned.bytes / done["seconds"]
      report[f"to_{to}_cp"] = cp
      report[f"to_{to}_of_cp"] = report[f"to_{to}"] / cp
      report[f"to_{to}_peak_memory"] = peak
      before = after
    return report


def main(_: list[str]) -> None:
  report = measure(round(flags.FLAGS.gigabytes * 1e9), flags.FLAGS.folder)
  if flags.FLAGS.json:
    print(json.dumps(report))
    return
  for name, value in report.items():
    print(f"{name:<24} {value:,.2f}" if name.endswith("of_cp") else f"{name:<24} {value / 1e6:,.3f} M")


if __name__ == "__main__":
  flags.DEFINE_float("gigabytes", 4.0, "Size of the model.", lower_bound=0.05)
  flags.DEFINE_string("folder", None, "Where to write; default: the system's folder for temporary files.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")
  app.run(main)
