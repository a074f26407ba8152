"""Bench of the grouped matmul: the MLP of an MoE layer, forward and backward, on the default device.

    python -m kernels.grouped_matmul.bench [--json]

Compared, in turns within one process: the MLP with `blocked` and, on a TPU, `megablox`, on a GPU `pallas_gpu`; the same
MLP as an einsum of all tokens with all experts; a chain of matmuls, whose rate stands for what the machine can do.  Each
program does its work twice within one call, as a training step does layer after layer, so that the pages of its buffers
are not fresh every time.  Routing, sorting and combining are the model's and are not in it.

On a CPU the shapes are small by default and the dtype is float32, on an accelerator both are those of Ring-mini.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from kernels.grouped_matmul.api import grouped_matmul
from kernels.grouped_matmul.blocked import padded_rows
from kernels.timing import interleaved, plain_matmul, ratio, show

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_SIZES = {  # on a CPU, on an accelerator
  "tokens": (4096, 4096, "Tokens in the batch."),
  "experts": (32, 256, "Routed experts."),
  "top_k": (4, 8, "Experts a token goes to."),
  "hidden": (512, 2048, "Width of the model."),
  "ffn": (256, 512, "Width of one expert."),
}
_FLAGS = {
  name: flags.DEFINE_integer(name, None, f"{what}  Default {on_cpu} on a CPU, else {elsewhere}.", lower_bound=1)
  for name, (on_cpu, elsewhere, what) in _SIZES.items()
}
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default float32 on a CPU, else bfloat16.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Counted rounds.")

_REPEATS = 2
_KERNELS = {"tpu": ("megablox",), "gpu": ("pallas_gpu",)}  # by platform


def _swiglu(h: jax.Array) -> jax.Array:
  gate, up = jnp.split(h, 2, axis=-1)
  return jax.nn.silu(gate) * up


def _grouped_mlp(x_MxD, w_in_ExDxF, w_out_ExFxD, group_sizes_E: jax.Array, implementation: str) -> jax.Array:
  product = functools.partial(grouped_matmul, group_sizes_E=group_sizes_E, implementation=implementation)
  return product(_swiglu(product(x_MxD, w_in_ExDxF)), w_out_ExFxD)


def _dense_mlp(x_TxD: jax.Array, w_in_ExDxF: jax.Array, w_out_ExFxD: jax.Array, gate_TxE: jax.Array):
  h_ExTxF = _swiglu(jnp.einsum("td,edf->etf", x_TxD, w_in_ExDxF))
  return jnp.einsum("etd,te->td", jnp.einsum("etf,efd->etd", h_ExTxF, w_out_ExFxD), gate_TxE)


def _repeated(mlp: Callable[..., jax.Array]) -> Callable[..., Any]:
  """Forward and backward of mlp, several times in one program, each time from the last one's results."""

  def step(carry, _):
    x, w_in, w_out = carry
    y, pull_back = jax.vjp(mlp, x, w_in, w_out)
    dx, dw_in, dw_out = pull_back(y)
    return (x + 1e-6 * dx, w_in - 1e-6 * dw_in, w_out - 1e-6 * dw_out), None

  return jax.jit(lambda *arrays: jax.lax.scan(step, arrays, None, length=_REPEATS)[0])


def measure() -> dict[str, Any]:
  """Runs the bench; times in seconds for one forward and backward pass, rates in FLOP/s of ideal work."""
  on_cpu = jax.default_backend() == "cpu"
  sizes = {name: _FLAGS[name].value or _SIZES[name][0 if on_cpu else 1] for name in _SIZES}
  tokens, experts, top_k, hidden, ffn = sizes.values()
  dtype = jnp.dtype(_DTYPE.value or ("float32" if on_cpu else "bfloat16"))
  rng = np.random.default_rng(0)
  chosen_TxK = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
  sizes_E = np.bincount(chosen_TxK.reshape(-1), minlength=experts).astype(np.int32)
  rows = tokens * top_k
  gate_TxE = np.zeros((tokens, experts), np.float32)
  np.put_along_axis(gate_TxE, chosen_TxK, 1.0 / top_k, axis=1)
  normal = lambda *shape, std=1.0: jnp.asarray(rng.standard_normal(shape, np.float32) * std, dtype)  # noqa: E731
  w_in, w_out = normal(experts, hidden, 2 * ffn, std=hidden**-0.5), normal(experts, ffn, hidden, std=ffn**-0.5)

  matmul, matmul_flops = plain_matmul(2048 if on_cpu else 8192, dtype=dtype)
  kinds = ["blocked", *_KERNELS.get(jax.devices()[0].platform, ())]
  mlps = {
    kind: _repeated(functools.partial(_grouped_mlp, group_sizes_E=jnp.asarray(sizes_E), implementation=kind))
    for kind in kinds
  }
  dense = _repeated(functools.partial(_dense_mlp, gate_TxE=jnp.asarray(gate_TxE, dtype)))
  x_MxD, x_TxD = normal(rows, hidden), normal(tokens, hidden)
  programs = {"matmul": matmul, "dense": lambda: dense(x_TxD, w_in, w_out)}
  programs |= {kind: functools.partial(mlp, x_MxD, w_in, w_out) for kind, mlp in mlps.items()}
  seconds = interleaved(programs, _ROUNDS.value)
  ideal_flops = 3 * 2 * rows * (hidden * 2 * ffn + ffn * hidden)  # forward once, backward twice
  result = {
    "device": jax.devices()[0].device_kind,
    "dtype": dtype.name,
    "shape": sizes,
    "dense_seconds": statistics.median(seconds["dense"]) / _REPEATS,
    "matmul_flops_per_second": matmul_flops / statistics.median(seconds["matmul"]),
    "padded_over_ideal_rows": padded_rows(sizes_E, rows) / rows,  # of blocked
  }
  for kind in kinds:
    result |= {
      f"{kind}_seconds": statistics.median(seconds[kind]) / _REPEATS,
      f"{kind}_flops_per_second": _REPEATS * ideal_flops / statistics.median(seconds[kind]),
      f"{kind}_speedup_over_dense": ratio(seconds, "dense", kind),
      f"{kind}_fraction_of_matmul_rate": _REPEATS * ideal_flops / matmul_flops * ratio(seconds, "matmul", kind),
    }
  return result


def main(argv: list[str]) -> None:
  del argv
  show(measure(), _JSON.value)


if __name__ == "__main__":
  app.run(main)
