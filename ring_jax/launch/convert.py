"""Converts checkpoints between Orbax and Hugging Face, in little memory whatever the model's size.

    python -m ring_jax.launch.convert --source=runs/tiny --target=exported --to=hf --dtype=bfloat16
    python -m ring_jax.launch.convert --source=Ring-mini-2.0 --target=ring_mini/0 --to=orbax
    python -m ring_jax.launch.convert --source=Ring-1T --to=hf --dtype=bfloat16 --dry_run

The source is a Hugging Face folder (FP8 too), an Orbax step folder, or a workdir (its newest step).  The target must not
exist.  After a kill the same command goes on where it was.  --dry_run needs no weights: config.json, with the index where
there is one, is enough.
"""

import json
import pathlib
from typing import Any

from absl import flags

from configs.schema import ConfigError
from ring_jax.checkpoint import convert
from ring_jax.launch import app

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("source", None, "Hugging Face folder, Orbax step folder or workdir.", required=True)
  flags.DEFINE_string("target", None, "The folder to write; needed unless --dry_run.")
  flags.DEFINE_enum("to", None, list(convert.FORMATS), "What to write.", required=True)
  dtypes = ["float32", "bfloat16"]
  flags.DEFINE_enum("dtype", None, dtypes, "Of the weights (the router stays float32); default: as they are.")
  flags.DEFINE_integer("max_shard_bytes", convert.DEFAULT_SHARD_BYTES, "A safetensors file ends before it is larger.")
  flags.DEFINE_bool("dry_run", False, "Only say what would be written.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")


def _show_plan(plan: dict[str, Any]) -> None:
  for file in plan["files"]:
    print(f"{file['name']}: {file['tensors']:,} tensors, {file['bytes']:,} bytes")
  print(f"{plan['tensors']:,} tensors of {plan['bytes']:,} bytes in {plan['shards']:,} files, nothing written")


def main() -> None:
  options = convert.Options(FLAGS.to, FLAGS.dtype, FLAGS.max_shard_bytes)
  if FLAGS.dry_run:
    plan = convert.plan(FLAGS.source, options)
    print(json.dumps(plan)) if FLAGS.json else _show_plan(plan)
    return
  if not FLAGS.target:
    raise ConfigError("--target is missing: the folder to write")
  done = convert.convert(FLAGS.source, pathlib.Path(FLAGS.target), options)
  if FLAGS.json:
    print(json.dumps(done))
    return
  rate = done["bytes_per_second"] / 1e6
  print(
    f"wrote {done['target']}: {done['tensors']:,} tensors, {done['bytes'] / 1e9:,.3f} GB in {done['shards']:,} files"
    f" ({done['kept_shards']:,} were there), {done['seconds']:,.1f} s, {rate:,.0f} MB/s"
  )


if __name__ == "__main__":
  define_flags()
  app.run(main)
