"""A rollout worker: decodes for a trainer in another process or on another host (docs/workers.md).

    python -m ring_jax.launch.worker --config=configs/ring_mini.py --host=0.0.0.0 --port=8470
    python -m ring_jax.launch.worker --checkpoint=runs/ring_tiny --config.rollout.slots=64

The config is the trainer's, by --config or from the workdir of its run; single values as there.  Only slots, pages and
layout (rollout.slots, .page_size, .pages, .parallel) may differ: a trainer refuses a worker that would draw other
tokens.  The weights come from the trainer, which finds the worker by --config.rollout.workers or by the file that
--announce and --config.rollout.workers_file name.

Beyond loopback a token is needed: the same in the environment of both, RING_JAX_WORKER_TOKEN, or in --token_file.
"""

import pathlib

from absl import flags

from configs import loading
from configs.schema import ConfigError, RunConfig
from ring_jax.launch import app
from ring_jax.train.rollout_worker import Settings, engine_of, run_worker
from rollout.remote import wire

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", None, "Workdir of the run whose config and tokenizer are used, without --config.")
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all, with a token only.")
  flags.DEFINE_integer("port", 0, "Port to listen on; 0: one that is free.", lower_bound=0, upper_bound=(1 << 16) - 1)
  flags.DEFINE_string("token_file", "", f"File with the shared token; default: {wire.TOKEN_VARIABLE}, if set.")
  flags.DEFINE_string("checkpoint_root", None, "Folder below which a trainer may name checkpoints to load.")
  flags.DEFINE_string("announce", "", "File to add this worker's address to: the trainer's rollout.workers_file.")
  flags.DEFINE_string("advertise", "", "Host by which the trainer reaches this one; default: --host, or its name.")
  flags.DEFINE_integer(
    "chunk_bytes", wire.CHUNK_BYTES, "Of weights in one message, at most.",
    lower_bound=1 << 10, upper_bound=wire.LARGEST_CHUNK_BYTES,
  )  # fmt: skip


def stored_config() -> RunConfig:
  """Where no --config is given."""
  if FLAGS.checkpoint is None:
    raise ConfigError("--config or --checkpoint is missing: the run that this worker decodes for")
  return loading.of_run(pathlib.Path(FLAGS.checkpoint), f"--checkpoint={FLAGS.checkpoint}")


def main(config: RunConfig) -> None:
  names = ("host", "port", "chunk_bytes", "checkpoint_root", "announce", "advertise")
  token = wire.read_token(FLAGS.token_file)
  workdir = None if FLAGS.checkpoint is None else pathlib.Path(FLAGS.checkpoint)
  settings = Settings(token=token, **{name: getattr(FLAGS, name) for name in names})
  run_worker(engine_of(config, workdir), settings)


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True, default_config=stored_config)
