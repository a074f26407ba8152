"""What an op becomes on an NVIDIA GPU, on a machine without one: StableHLO, not compiled."""

import functools
from collections.abc import Callable

import jax

from kernels import choice


def for_cuda(function: Callable, *arguments: jax.ShapeDtypeStruct, monkeypatch) -> tuple[str, str]:
  """`function(*arguments, implementation=None)`: in plain XLA, which can be exported; and where JAX's plugin is installed."""
  monkeypatch.setattr(choice, "compiles_for_gpus", lambda: False)
  plain = jax.export.export(jax.jit(functools.partial(function, implementation=None)), platforms=["cuda"])(*arguments)
  monkeypatch.setattr(choice, "compiles_for_gpus", lambda: True)
  # A function of its own: what was traced is kept by the function.
  with_kernels = jax.jit(functools.partial(function, implementation=None)).trace(*arguments)
  return plain.mlir_module(), with_kernels.lower(lowering_platforms=("cuda",)).as_text()
