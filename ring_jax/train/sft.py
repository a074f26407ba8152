"""One step of the cold start: imitation of worked answers, mean loss over completion tokens (papers.md 1.1, 1.2)."""

from typing import Any

from configs.schema import RunConfig
from ring_jax.model import Params
from ring_jax.train.batches import sft_batches
from ring_jax.train.programs import Programs
from ring_jax.train.stream import ProblemStream
from sharding.processes import fetch


class SFTPhase:
  def __init__(self, config: RunConfig, programs: Programs, stream: ProblemStream):
    self._config, self._programs, self._stream = config, programs, stream

  def step(self, params: Params, opt_state: Any) -> tuple[Params, Any, dict[str, float], int]:
    """Returns (params, opt_state, metrics, positions trained on); donates what it is given."""
    programs = self._programs
    batches = sft_batches(self._stream.examples(self._config.sft.batch_size), self._config.packing)
    sums = None
    for tokens, weights_RxT in batches:
      sums = programs.sft_gradients(params, sums, tokens, weights_RxT)
    loss, counts_LxE = sums.loss, fetch(sums.counts_LxE)
    params, opt_state, norm = programs.apply(params, opt_state, sums.params, "sft")
    if self._config.sft.router_bias_rate > 0:
      params = programs.balance(params, counts_LxE)
    load = counts_LxE / counts_LxE.mean(axis=-1, keepdims=True).clip(1e-9)
    metrics = {
      "loss": float(loss),
      "grad_norm": float(norm),
      "expert_load_max": float(load.max()) if load.size else 1.0,  # of the mean; 1: perfectly balanced
      "problems_seen": self._stream.cursor,
    }
    return params, opt_state, metrics, int(sum((tokens.segments_RxT > 0).sum() for tokens, _ in batches))
