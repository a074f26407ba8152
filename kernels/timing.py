"""Timing for the benches: programs run in turns, so that a busy neighbour slows all of them alike."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def interleaved(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of every round of every program.  One round runs each program once; a first round is not counted."""
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for round_ in range(rounds + 1):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program())
      if round_ > 0:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def ratio(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
  """Median over rounds of one program's time in units of another's in the same round."""
  return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def show(result: Mapping[str, Any], as_json: bool) -> None:
  """Prints numbers by name."""
  if as_json:
    print(json.dumps(result))
    return
  for name, value in result.items():
    print(f"{name:31} {value:.4g}" if isinstance(value, float) else f"{name:31} {value}")


def plain_matmul(size: int = 2048, repeats: int = 4, dtype=jnp.float32) -> tuple[Callable[[], Any], float]:
  """A chain of square matmuls, the rate that others are compared with; returns it and its FLOPs."""
  a_DxD = (jax.random.normal(jax.random.key(0), (size, size), jnp.float32) / size**0.5).astype(dtype)
  chain = jax.jit(lambda a: jax.lax.fori_loop(0, repeats, lambda _, c: c @ a, a))
  return lambda: chain(a_DxD), 2.0 * size**3 * repeats
