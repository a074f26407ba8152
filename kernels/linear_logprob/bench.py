"""Bench of the linear log-probability: value and gradient of a loss of logp, with the entropy as a metric beside it.

    python -m kernels.linear_logprob.bench [--json]

`xla_chunked` against `reference` (the unfused loss), in turns within one process: time, and temporary memory as the
compiler reports it.  At the real vocabulary, at the toy model's, and, for scale, on a batch of which three quarters of
the tokens have no gradient.
"""

import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from kernels.linear_logprob.api import Implementation, linear_logprob
from kernels.timing import interleaved, ratio

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens, at the real vocabulary.")
_HIDDEN = flags.DEFINE_integer("hidden", 256, "Width of the hidden states, at the real vocabulary.")
_VOCAB = flags.DEFINE_integer("vocab", 157_184, "The real vocabulary: that of Ling 2.0.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Counted rounds.")

_TOY = (4096, 64, 320)  # tokens, hidden, vocabulary
_TOY_CALLS = 8  # per round: one is too short to time


def _compiled(implementation: Implementation, arrays: tuple[jax.Array, ...]) -> jax.stages.Compiled:
  def loss(hidden_NxH, weight_HxV, targets_N, advantages_N):
    scored = linear_logprob(hidden_NxH, weight_HxV, targets_N, implementation=implementation)
    return -jnp.sum(advantages_N * scored.logp), scored.entropy

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(*arrays).compile()


def _compare(shape: tuple[int, int, int], rounds: int, calls: int = 1, active_share: float = 1.0) -> dict[str, Any]:
  tokens, hidden, vocab = shape
  keys = jax.random.split(jax.random.key(0), 4)
  active_N = jnp.arange(tokens) < active_share * tokens
  arrays = (
    jax.random.normal(keys[0], (tokens, hidden)),
    jax.random.normal(keys[1], (hidden, vocab)) / hidden**0.5,
    jax.random.randint(keys[2], (tokens,), 0, vocab),
    jax.random.normal(keys[3], (tokens,)) * active_N,
  )
  programs = {kind.value: _compiled(kind, arrays) for kind in (Implementation.REFERENCE, Implementation.XLA_CHUNKED)}
  temp = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}

  def calling(program):
    return lambda: [program(*arrays) for _ in range(calls)]

  seconds = interleaved({name: calling(program) for name, program in programs.items()}, rounds)
  return {
    "shape": {"tokens": tokens, "hidden": hidden, "vocab": vocab, "active_share": active_share},
    "seconds": {name: statistics.median(values) / calls for name, values in seconds.items()},
    "temp_bytes": temp,
    "time_over_reference": ratio(seconds, "xla_chunked", "reference"),
    "memory_over_reference": temp["xla_chunked"] / temp["reference"],
  }


def measure() -> dict[str, Any]:
  real = (_TOKENS.value, _HIDDEN.value, _VOCAB.value)
  return {
    "device": jax.devices()[0].device_kind,
    "real": _compare(real, _ROUNDS.value),
    "toy": _compare(_TOY, 4 * _ROUNDS.value + 1, _TOY_CALLS),
    "mostly_masked": _compare((4096, 256, 16_384), _ROUNDS.value, active_share=0.25),
  }


def main(argv: list[str]) -> None:
  del argv
  result = measure()
  if _JSON.value:
    print(json.dumps(result))
    return
  for name, case in result.items():
    if name == "device":
      print(f"device: {case}")
      continue
    print(f"{name}: {case['shape']}")
    for kind in case["seconds"]:
      print(f"  {kind:12} {case['seconds'][kind] * 1e3:9.2f} ms {case['temp_bytes'][kind] / 2**20:9.1f} MiB")
    print(f"  ratio        {case['time_over_reference']:9.3f}    {case['memory_over_reference']:9.4f}")


if __name__ == "__main__":
  app.run(main)
