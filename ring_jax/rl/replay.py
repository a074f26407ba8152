"""Router replay (R3, arXiv 2510.11370): what an engine's router chose, from the engine to the trainer.

    engine    the step that draws token j forwards the position before it: the experts of that position, in every MoE layer
    record    one entry of bytes a token, [L, K] ids, C order; it travels in `Rollout.experts`, like the token's log-prob
    trainer   the entry stands where the model predicts the token (`train.batches`), and `route` takes its ids

So a token's log-prob is recomputed with the very experts that it was drawn with.  Prompts are not recorded: their positions,
but for the last, choose for themselves in both engines.  Nor is what a resumed rollout's prefill chose: a token keeps the
experts of the step that drew it, whatever weights its prefix was computed with later.

Dimension key: N tokens, L MoE layers, K experts a token.
"""

from collections.abc import Sequence

import numpy as np

from configs.schema import ModelConfig

OWN = -1  # the token chooses for itself


def ids_dtype(num_experts: int) -> np.dtype:
  """Of ids as they travel."""
  return np.dtype(np.uint8 if num_experts <= 256 else "<u2")


def encode(experts_NxLxK: np.ndarray) -> list[bytes]:
  """An entry a token; the array is of `ids_dtype`."""
  return [entry.tobytes() for entry in experts_NxLxK]


def decode(entries: Sequence[bytes], model: ModelConfig) -> np.ndarray:
  """int16 [L, N, K], `OWN` where an entry is empty.

  Raises:
    ValueError: an entry of another model.
  """
  L, K = model.num_moe_layers, model.num_experts_per_tok
  dtype = ids_dtype(model.num_experts)
  experts_NxLxK = np.full((len(entries), L, K), OWN, np.int16)
  for own_LxK, entry in zip(experts_NxLxK, entries, strict=True):
    if entry:
      if len(entry) != L * K * dtype.itemsize:
        raise ValueError(f"experts of {len(entry)} bytes: {L} layers of {K} experts have {L * K * dtype.itemsize}")
      own_LxK[:] = np.frombuffer(entry, dtype).reshape(L, K)
  return experts_NxLxK.transpose(1, 0, 2)
