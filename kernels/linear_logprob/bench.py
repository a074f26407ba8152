"""Bench of the linear log-probability on the default device: scoring, and value and gradient of a loss of logp.

    python -m kernels.linear_logprob.bench [--json]
    python -m kernels.linear_logprob.bench --tokens=4096,32768 --hidden=2048,4096,8192 --dtype=bfloat16

Programs are timed in turns within one process.  Beside the op as it is dispatched here (`default`):

    reference       all logits in memory (the unfused loss)
    token_chunked   512 tokens at a time with all their logits, computed again in the backward pass (`jax.checkpoint`):
                    what is written where no fused op is at hand
    xla_chunked, pallas_tpu     this op's implementations, the latter on a TPU
    tokamax         its cross-entropy, where it is installed: only the sum over tokens, so the loss is that

Each line: milliseconds; temporary memory, and the peak with arguments and results, as the compiler reports them; and the
share of the rate of a chain of plain matmuls in the same turns, counting the FLOPs that no way can do without (one
product with the weight to score, three to train).  A program that does not fit is reported as such.

On a CPU the shapes are small by default, and there are two more cases: the toy model's, and a batch of which three quarters
of the tokens have no gradient.  On an accelerator they are those of the real models.
"""

import json
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from kernels.linear_logprob.api import linear_logprob
from kernels.linear_logprob.dispatch import Implementation
from kernels.timing import interleaved, plain_matmul, ratio

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_TOKENS = flags.DEFINE_list("tokens", None, "Tokens; default 1024 on a CPU, else 4096,32768.")
_HIDDEN = flags.DEFINE_list("hidden", None, "Widths of the hidden states; default 256 on a CPU, else 2048,4096,8192.")
_VOCAB = flags.DEFINE_integer("vocab", 157_184, "The real vocabulary: that of Ling 2.0.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16"], "Of operands; default float32 on a CPU, else bfloat16."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Counted rounds.")

_CHUNK = 512  # tokens, of token_chunked
_CPU_CASES = {  # tokens, hidden, vocabulary; calls a round, as one may be too short to time; share with a gradient
  "toy": ((4096, 64, 320), 8, 1.0),
  "mostly_masked": ((4096, 256, 16_384), 1, 0.25),
}


def _of_op(implementation: Implementation | None) -> Callable[..., jax.Array]:
  return lambda hidden_NxH, weight_HxV, targets_N: (
    linear_logprob(hidden_NxH, weight_HxV, targets_N, implementation=implementation).logp
  )


def _token_chunked(hidden_NxH, weight_HxV, targets_N):
  @jax.checkpoint
  def chunk(rows):
    logits_TxV = jnp.dot(rows[0], weight_HxV, preferred_element_type=jnp.float32)
    target_T = jnp.take_along_axis(logits_TxV, rows[1][:, None], axis=1)[:, 0]
    return target_T - jax.nn.logsumexp(logits_TxV, axis=1)

  def chunked(x):
    padded = jnp.pad(x, [(0, -num_tokens % _CHUNK)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, _CHUNK, *x.shape[1:])

  num_tokens = targets_N.shape[0]
  return jax.lax.map(chunk, (chunked(hidden_NxH), chunked(targets_N))).reshape(-1)[:num_tokens]


def _tokamax():
  """The sum of its losses over tokens, negative; None where it is not installed."""
  try:
    import tokamax
  except ImportError:
    return None
  return lambda hidden_NxH, weight_HxV, targets_N: (
    -tokamax.linear_softmax_cross_entropy_loss(hidden_NxH, targets_N, weight_HxV, reduction="sum")
  )


def _ways() -> dict[str, Callable[..., jax.Array]]:
  """Hidden, weight, targets to log-probabilities, or to their sum."""
  ways = {"default": _of_op(None), "reference": _of_op(Implementation.REFERENCE), "token_chunked": _token_chunked}
  ways["xla_chunked"] = _of_op(Implementation.XLA_CHUNKED)
  if jax.default_backend() == "tpu":
    ways["pallas_tpu"] = _of_op(Implementation.PALLAS_TPU)
  if (tokamax := _tokamax()) is not None:
    ways["tokamax"] = tokamax
  return ways


def _train(way: Callable[..., jax.Array]) -> Callable[..., Any]:
  def loss(hidden_NxH, weight_HxV, targets_N, advantages_N):
    logp = way(hidden_NxH, weight_HxV, targets_N)
    return -jnp.sum(advantages_N * logp) if logp.ndim else -logp

  return jax.value_and_grad(loss, argnums=(0, 1))


def _score(way: Callable[..., jax.Array]) -> Callable[..., Any]:
  return lambda hidden_NxH, weight_HxV, targets_N, advantages_N: way(hidden_NxH, weight_HxV, targets_N)


def _compiled(program: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> jax.stages.Compiled | None:
  """None if it does not fit; it is run once, as some only fail then."""
  try:
    compiled = jax.jit(program).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return None
  return compiled


def _measure(programs: dict[str, Callable], arrays, calls: int, products: int) -> dict[str, Any]:
  """Milliseconds, memory and rate of each program; `products` with the weight are needed."""
  compiled = {name: _compiled(program, arrays) for name, program in programs.items()}
  fitting = {name: program for name, program in compiled.items() if program is not None}
  matmul, matmul_flops = plain_matmul(dtype=arrays[0].dtype)

  def calling(program):
    return lambda: [program(*arrays) for _ in range(calls)]

  runs = {name: calling(program) for name, program in fitting.items()} | {"matmul": matmul}
  seconds = interleaved(runs, _ROUNDS.value if calls == 1 else 4 * _ROUNDS.value + 1)
  needed = 2.0 * products * arrays[0].shape[0] * arrays[1].size
  results = {}
  for name, program in compiled.items():
    if program is None:
      results[name] = None
      continue
    memory = program.memory_analysis()
    temp, outside = memory.temp_size_in_bytes, memory.argument_size_in_bytes + memory.output_size_in_bytes
    share = needed * calls / matmul_flops / ratio(seconds, name, "matmul")
    results[name] = {
      "seconds": statistics.median(seconds[name]) / calls, "temp_bytes": temp, "peak_bytes": temp + outside,
      "share_of_matmul": share,
    }  # fmt: skip
    if compiled["reference"] is not None:
      results[name]["time_over_reference"] = ratio(seconds, name, "reference")
  return results


def _case(shape: tuple[int, int, int], dtype, calls: int = 1, active_share: float = 1.0) -> dict[str, Any]:
  tokens, hidden, vocab = shape
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = (
    jax.random.normal(keys[0], (tokens, hidden), dtype),
    jax.random.normal(keys[1], (hidden, vocab), dtype) * hidden**-0.5,
    jax.random.randint(keys[2], (tokens,), 0, vocab),
    jax.random.normal(keys[3], (tokens,)) * (jnp.arange(tokens) < active_share * tokens),
  )
  ways = _ways()
  return {
    "shape": {"tokens": tokens, "hidden": hidden, "vocab": vocab, "active_share": active_share},
    "score": _measure({name: _score(way) for name, way in ways.items()}, arrays, calls, products=1),
    "train": _measure({name: _train(way) for name, way in ways.items()}, arrays, calls, products=3),
  }


def _shapes(on_cpu: bool) -> dict[str, tuple]:
  """Arguments of `_case`, but the dtype, by name."""
  shapes: dict[str, tuple] = {}
  for hidden in map(int, _HIDDEN.value or ([256] if on_cpu else [2048, 4096, 8192])):
    for tokens in map(int, _TOKENS.value or ([1024] if on_cpu else [4096, 32_768])):
      shapes[f"{tokens}x{hidden}x{_VOCAB.value}"] = ((tokens, hidden, _VOCAB.value),)
  return shapes | (_CPU_CASES if on_cpu and not _HIDDEN.value and not _TOKENS.value else {})


def _lines(name: str, case: dict[str, Any]) -> list[str]:
  lines = []
  for what in ("score", "train"):
    lines.append(f"{name}, {what}        ms   temp MiB   peak MiB   of matmul   time / reference")
    for way, measured in case[what].items():
      if measured is None:
        lines.append(f"  {way:14} does not fit")
        continue
      memory = [measured[kind] / 2**20 for kind in ("temp_bytes", "peak_bytes")]
      line = f"  {way:14} {measured['seconds'] * 1e3:10.2f} {memory[0]:10.1f} {memory[1]:10.1f}"
      over = measured.get("time_over_reference", float("nan"))
      lines.append(f"{line} {measured['share_of_matmul']:11.2f} {over:18.3f}")
  return lines


def main(argv: list[str]) -> None:
  del argv
  device, on_cpu = jax.devices()[0].device_kind, jax.default_backend() == "cpu"
  dtype = jnp.dtype(_DTYPE.value or ("float32" if on_cpu else "bfloat16"))
  if not _JSON.value:
    print(f"device: {device}, {dtype.name}", flush=True)
  cases = {}
  for name, (shape, *rest) in _shapes(on_cpu).items():
    cases[name] = _case(shape, dtype, *rest)
    if not _JSON.value:
      print("\n".join(_lines(name, cases[name])), flush=True)
  if _JSON.value:
    print(json.dumps({"device": device, "dtype": dtype.name, "cases": cases}))


if __name__ == "__main__":
  app.run(main)
