"""What the trainer says of token sequences: log-probs, and the experts that every token takes, by layer.

The log-probs come from the trainer's own `forward` and `linear_logprob`.  `forward` counts experts but does not tell
them by token, so `experts` walks the same blocks one after the other; a test holds that it ends in the same hidden states.

Dimension key: B rows, T positions, D hidden, K experts a token.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.schema import ModelConfig
from kernels.linear_logprob import linear_logprob
from kernels.precision import full_products
from parity.vllm.runner import Probe
from ring_jax.model import Params, forward
from ring_jax.model.layers import rotary_tables
from ring_jax.model.router import route
from ring_jax.model.transformer import Block


def logps(
  config: ModelConfig,
  params: Params,
  sequences: Sequence[Sequence[int]],
  temperature: float = 1.0,
  vocab_mask_V: np.ndarray | None = None,
) -> list[np.ndarray]:
  """Log-probs [T - 1] of each sequence's tokens from the second on.

  Args:
    vocab_mask_V: bool; the ids that may be drawn, None: all of them.
  """
  tokens_BxT, segments_BxT = _rows(sequences)
  logp_BxT = np.asarray(_logps(config, params, tokens_BxT, segments_BxT, temperature, vocab_mask_V))
  return [row[: len(ids) - 1] for row, ids in zip(logp_BxT[: len(sequences)], sequences, strict=True)]


def experts(config: ModelConfig, params: Params, sequences: Sequence[Sequence[int]]) -> list[dict[int, np.ndarray]]:
  """Expert ids [T, K] of each sequence's tokens, by layer."""
  tokens_BxT, segments_BxT = _rows(sequences)
  chosen, _ = jax.device_get(walk(config, params, tokens_BxT, segments_BxT))
  return [
    {layer: ids_BxTxK[row, : len(ids)] for layer, ids_BxTxK in chosen.items()} for row, ids in enumerate(sequences)
  ]


def make_probe(config: ModelConfig, params: Params, length: int = 48, seed: int = 0) -> Probe:
  """A random sequence of any ids of the vocabulary; the trainer's own precision judges it."""
  ids = np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()
  return Probe(ids, logps(config, params, [ids])[0])


def _rows(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and segments [B, T], padded to multiples of 8 rows and 32 positions, so that few shapes are compiled."""
  shape = (-(-len(sequences) // 8) * 8, -(-max(map(len, sequences)) // 32) * 32)
  tokens_BxT, segments_BxT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for row, ids in enumerate(sequences):
    tokens_BxT[row, : len(ids)] = ids
    segments_BxT[row, : len(ids)] = 1
  return tokens_BxT, segments_BxT


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logps(
  config: ModelConfig, params: Params, tokens_BxT, segments_BxT, temperature: float, vocab_mask_V
) -> jax.Array:
  hidden_BxTxD = forward(config, params, tokens_BxT, segment_ids_BxT=segments_BxT, mtp=False).hidden_BxTxD
  targets_BxT = jnp.pad(tokens_BxT[:, 1:], ((0, 0), (0, 1)))
  hidden_NxD = hidden_BxTxD.reshape(-1, config.hidden_size)
  scored = linear_logprob(
    hidden_NxD, params["lm_head"]["kernel"], targets_BxT.reshape(-1), temperature=temperature, vocab_mask=vocab_mask_V
  )
  return scored.logp.reshape(tokens_BxT.shape)


def walk(config: ModelConfig, params: Params, tokens_BxT, segments_BxT) -> tuple[dict[int, jax.Array], jax.Array]:
  """(expert ids [B, T, K] by layer, hidden states [B, T, D] after the last layer, before the final norm)."""
  with full_products(config.dtype):
    return _walk(config, params, tokens_BxT, segments_BxT)


@functools.partial(jax.jit, static_argnums=0)
def _walk(config: ModelConfig, params: Params, tokens_BxT, segments_BxT) -> tuple[dict[int, jax.Array], jax.Array]:
  B, T = tokens_BxT.shape
  positions_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
  rotary = rotary_tables(config, positions_BxT)
  x_BxTxD = params["embed"]["embedding"][tokens_BxT].astype(config.dtype)
  chosen: dict[int, jax.Array] = {}
  for layer in range(config.num_hidden_layers):
    block = _block(config, params, layer)
    out_BxTxD, _ = block.attention(block.input_norm(x_BxTxD), rotary, segments_BxT)
    x_BxTxD = x_BxTxD + out_BxTxD
    normed_BxTxD = block.post_norm(x_BxTxD)
    if layer < config.first_k_dense_replace:
      x_BxTxD = x_BxTxD + block.mlp(normed_BxTxD)
      continue
    router = block.moe.router
    ids_NxK = route(normed_BxTxD.reshape(B * T, -1), router.kernel[...], router.bias[...], config).ids_NxK
    chosen[layer] = ids_NxK.reshape(B, T, -1)
    x_BxTxD = x_BxTxD + block.moe(normed_BxTxD, segments_BxT > 0)[0]
  return chosen, x_BxTxD


def _block(config: ModelConfig, params: Params, layer: int) -> Any:
  moe = layer >= config.first_k_dense_replace
  stack = params["moe_layers" if moe else "dense_layers"]
  depth = layer - config.first_k_dense_replace if moe else layer
  graph, state = nnx.split(nnx.eval_shape(lambda: Block(config, moe, nnx.Rngs(params=0))))
  nnx.replace_by_pure_dict(state, jax.tree.map(lambda leaf: leaf[depth], stack))
  return nnx.merge(graph, state)
