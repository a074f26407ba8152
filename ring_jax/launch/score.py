"""Scores token ids with a checkpoint: logits, log-probs, and the MTP layer's logits where there is one.

    python -m ring_jax.launch.score --checkpoint=Ring-mini-2.0 --tokens=ids.npy --out=out.npz --dtype=float32

ids.npy holds integers [B, T], one sequence a row.  out.npz gets, all float32,

    logits  [B, T, V]     of the token after each position
    logp    [B, T-1]      log-probabilities of ids[:, 1:]
    mtp     [B, T, V]     of the token after the next, only where the model has an MTP layer
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs.schema import ConfigError, ModelConfig
from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.launch import app
from ring_jax.model import Params, forward

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", None, "Hugging Face folder, Orbax step folder or workdir.", required=True)
  flags.DEFINE_string("tokens", None, "A .npy file of integer token ids [B, T].", required=True)
  flags.DEFINE_string("out", None, "The .npz file to write.", required=True)
  dtypes = ["float32", "bfloat16"]
  flags.DEFINE_enum("dtype", None, dtypes, "Of weights and activations; default: the checkpoint's own.")


def read_tokens(path: str) -> np.ndarray:
  """Token ids [B, T], int64; ConfigError names what is wrong with the file."""
  try:
    tokens_BxT = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ConfigError(f"--tokens={path}: is not a .npy file of numbers ({error})") from None
  if not isinstance(tokens_BxT, np.ndarray) or tokens_BxT.dtype.kind not in "iu":
    kind = getattr(tokens_BxT, "dtype", "an .npz archive")
    raise ConfigError(f"--tokens={path}: holds {kind}, must be an array of integers")
  if tokens_BxT.ndim != 2 or 0 in tokens_BxT.shape:
    raise ConfigError(f"--tokens={path}: has shape {list(tokens_BxT.shape)}, must be [B, T] with at least one token")
  return tokens_BxT.astype(np.int64)


def check_range(tokens_BxT: np.ndarray, vocab_size: int) -> None:
  for value in (tokens_BxT.min(), tokens_BxT.max()):
    if not 0 <= value < vocab_size:
      raise ConfigError(f"--tokens: holds id {value}, must be from 0 to {vocab_size - 1} (the vocabulary)")


@functools.partial(jax.jit, static_argnums=0)
def _score_row(config: ModelConfig, params: Params, tokens_1xT: jax.Array) -> dict[str, jax.Array]:
  output = forward(config, params, tokens_1xT)
  kernel_DxV = params["lm_head"]["kernel"]

  def logits_of(hidden_1xTxD: jax.Array) -> jax.Array:
    return (hidden_1xTxD @ kernel_DxV.astype(hidden_1xTxD.dtype)).astype(jnp.float32)

  logits_1xTxV = logits_of(output.hidden_BxTxD)
  logp_1xTxV = jax.nn.log_softmax(logits_1xTxV[:, :-1])
  scores = {
    "logits": logits_1xTxV,
    "logp": jnp.take_along_axis(logp_1xTxV, tokens_1xT[:, 1:, None], axis=-1)[..., 0],
  }
  if output.mtp_hidden_BxTxD is not None:
    scores["mtp"] = logits_of(output.mtp_hidden_BxTxD)
  return scores


def score(config: ModelConfig, params: Params, tokens_BxT: np.ndarray) -> dict[str, np.ndarray]:
  """Logits, log-probs and MTP logits (module docstring), with matmuls in full precision.

  One row at a time, so that the device holds [T, V] logits and not [B, T, V].
  """
  with jax.default_matmul_precision("highest"):
    rows = [jax.device_get(_score_row(config, params, row_T[None])) for row_T in tokens_BxT.astype(np.int32)]
  return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def main() -> None:
  tokens_BxT = read_tokens(FLAGS.tokens)
  opened = open_checkpoint(FLAGS.checkpoint, dtype=FLAGS.dtype)
  check_range(tokens_BxT, opened.config.vocab_size)
  scores = score(opened.config, opened.params, tokens_BxT)
  out = pathlib.Path(FLAGS.out)
  unfinished = out.with_name(f".{out.name}.tmp-{os.getpid()}")
  with open(unfinished, "wb") as file:
    np.savez(file, **scores)
  unfinished.replace(out)
  print(f"wrote {out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in scores.items()))


if __name__ == "__main__":
  define_flags()
  app.run(main)
