"""Whether the engine decodes with the weights that the trainer has: the log-probs of a fixed prompt, computed by both.

    trainer's side    its parameters as the engine would store them, on the trainer's mesh
    engine's side     what the engine stores, on the engine's mesh

Both sides run the engine's arithmetic on the same values, and differ by the order of sums alone.  A tensor that is stale,
misplaced or of another step changes nearly every number.

Dimension key: B rows, T positions, N = B * T.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.schema import ModelConfig, RolloutDtype
from kernels.linear_logprob import linear_logprob
from ring_jax.model import Params, forward
from rollout import weights
from rollout.engine import RingEngine
from sharding import rules
from sharding.transfer import Probe, check

_LENGTH = 16
_SEED = 7
# bfloat16 activations round at every layer, and then may choose other experts.
_EXACT, _ROUNDED = (1e-3, 0.0), (0.1, 0.25)


class EngineProbe:
  """Args:
  model, mesh: the trainer's.
  engine: whose weights are looked at; it has a mesh.
  """

  def __init__(self, model: ModelConfig, mesh: Mesh, engine: RingEngine):
    self._mesh = mesh
    self._pack = functools.partial(weights.pack, dtype=engine.config.dtype)
    trained = dataclasses.replace(engine.model, parallel=model.parallel)
    rows = math.lcm(trained.parallel.batch_parts, engine.model.parallel.batch_parts)
    # Ids that any vocabulary has, each row another.
    self._tokens_BxT = np.random.default_rng(_SEED).integers(0, model.vocab_size, (rows, _LENGTH)).astype(np.int32)
    exact = engine.config.dtype is not RolloutDtype.BFLOAT16 and engine.model.dtype != "bfloat16"
    sent = rules.Program(mesh, lambda params: self._logps(trained, self._pack(params)))
    arrived = rules.Program(engine.mesh, functools.partial(self._logps, engine.model))
    self._probe = Probe(sent, arrived, *(_EXACT if exact else _ROUNDED))

  def __call__(self, params: Params, stored: dict[str, Any], version: int) -> None:
    """Raises TransferError, which names the tensors: the engine's weights are not the trainer's."""
    check.probe(self._probe, params, stored, version, rules.Program(self._mesh, self._pack))

  def _logps(self, model: ModelConfig, stored: dict[str, Any]) -> jax.Array:
    """float32 [N]: of each next token of the rows."""
    params, axes = weights.unpack(stored, model.dtype), model.parallel.rules
    hidden_BxTxD = forward(model, params, self._tokens_BxT, mtp=False).hidden_BxTxD
    kernel_DxV = rules.reshard(params["lm_head"]["kernel"].astype(hidden_BxTxD.dtype), axes, None, "vocab")
    targets_BxT = rules.reshard(jnp.asarray(np.roll(self._tokens_BxT, -1, axis=1)), axes, "batch", None)
    hidden_NxD = hidden_BxTxD.reshape(-1, hidden_BxTxD.shape[-1])
    return linear_logprob(hidden_NxD, kernel_DxV, targets_BxT.reshape(-1)).logp
