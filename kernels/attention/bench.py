"""Bench of attention: packed rows, forward and with gradients; decode steps, dense and over pages.

    python -m kernels.attention.bench [--json] [--rounds=N] [--part=packed|decode]

Implementations run in turns within one process, beside `jax.nn.dot_product_attention` with the same mask; temporary
memory is what the compiler reports.  Segments are drawn between a tenth of a row and the whole of it, and cut at its
end.  On a CPU the shapes are small, on an accelerator those of the real models.
"""

import functools
import json
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from kernels.attention import (
  DecodeImplementation,
  DenseCache,
  Implementation,
  PagedCache,
  decode_attention,
  packed_attention,
)
from kernels.timing import interleaved

_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Counted rounds.")
_PARTS = flags.DEFINE_multi_enum("part", ["packed", "decode"], ["packed", "decode"], "What to time; may be repeated.")

# rows, length, heads, key/value heads, head dim
_PACKED_CPU = ((16, 128, 4, 2, 16), (8, 256, 8, 2, 64), (4, 512, 8, 2, 64), (1, 2048, 8, 2, 64), (1, 4096, 8, 2, 64))
_PACKED = ((8, 4096, 16, 4, 128), (1, 32_768, 16, 4, 128), (1, 32_768, 64, 8, 128))
# slots, cache length, heads, key/value heads, head dim
_DECODE_CPU = ((64, 192, 4, 2, 16), (64, 512, 8, 2, 64), (16, 2048, 8, 2, 64))
_DECODE = ((64, 8192, 16, 4, 128), (64, 32_768, 16, 4, 128), (32, 32_768, 64, 8, 128))
_PAGE = 64
_KERNELS = {Implementation.SPLASH: "tpu", Implementation.PALLAS_GPU: "gpu"}  # where they run
_MOST_SCORES = 1 << 28  # bytes of float32 scores up to which all of them are computed at once


def _segments(rows: int, length: int) -> jax.Array:
  rng = np.random.default_rng(0)
  lengths = rng.integers(length // 10, length + 1, (rows, 10))
  ends = np.minimum(np.cumsum(lengths, axis=1), length)
  return jnp.asarray((np.arange(length) >= ends[..., None]).sum(axis=1) + 1, jnp.int32)


def _jax_nn(q, k, v, segments) -> jax.Array:
  mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(q.shape[1], dtype=bool)
  return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def _with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
  def run(q, k, v, segments, dout):
    out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
    return out, pull_back(dout)

  return run


def _compare(
  functions: dict[str, Callable[..., Any]], arrays: tuple[Any, ...], shape: tuple[int, ...]
) -> dict[str, Any]:
  compiled = {name: jax.jit(function).lower(*arrays).compile() for name, function in functions.items()}
  temp = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
  programs = {name: functools.partial(program, *arrays) for name, program in compiled.items()}
  seconds = {name: statistics.median(values) for name, values in interleaved(programs, _ROUNDS.value).items()}
  return {"shape": shape, "seconds": seconds, "temp_bytes": temp}


def _packed(shape: tuple[int, ...], dtype: jnp.dtype, platform: str) -> dict[str, Any]:
  rows, length, heads, kv_heads, head_dim = shape
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, dout = (
    jax.random.normal(key, (rows, length, n, head_dim), dtype)
    for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
  )
  kinds = [kind for kind in Implementation if _KERNELS.get(kind, platform) == platform]
  attends = {kind.value: functools.partial(packed_attention, implementation=kind) for kind in kinds}
  attends["jax.nn"] = _jax_nn
  if rows * heads * length**2 * 4 > _MOST_SCORES:
    del attends["reference"], attends["xla_strips"], attends["jax.nn"]
  functions = {f"{name} forward": lambda q, k, v, s, _, f=f: f(q, k, v, s) for name, f in attends.items()}
  functions |= {f"{name} with gradients": _with_gradients(f) for name, f in attends.items()}
  return _compare(functions, (q, k, v, _segments(rows, length), dout), shape)


def _decode(shape: tuple[int, ...], dtype: jnp.dtype, platform: str) -> dict[str, Any]:
  slots, length, heads, kv_heads, head_dim = shape
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (slots, heads, head_dim), dtype)
  lengths = jnp.asarray(np.random.default_rng(0).integers(1, length + 1, slots), jnp.int32)
  table = jnp.arange(slots * length // _PAGE, dtype=jnp.int32).reshape(slots, -1)
  dense = DenseCache(
    jax.random.normal(keys[1], (1, slots, kv_heads, head_dim, length), dtype),
    jax.random.normal(keys[2], (1, slots, kv_heads, length, head_dim), dtype),
  )
  kv = jnp.stack([dense.k_LxBxKxdxS.transpose(0, 1, 4, 2, 3), dense.v_LxBxKxSxd.swapaxes(2, 3)], axis=4)
  pages = PagedCache(kv.reshape(1, -1, _PAGE, 2 * kv_heads, head_dim))
  arrays = (q, dense, pages, lengths, table)

  def over_pages(kind):
    return lambda q, _, pages, lengths, table: decode_attention(
      q, pages, lengths, layer=0, page_table_BxW=table, implementation=kind
    )

  kinds = [kind for kind in DecodeImplementation if kind is not DecodeImplementation.RAGGED_PAGED or platform == "tpu"]
  functions = {"dense": lambda q, dense, _, lengths, __: decode_attention(q, dense, lengths, layer=0)}
  functions |= {f"pages, {kind.value}": over_pages(kind) for kind in kinds}
  return _compare(functions, arrays, shape)


def _lines(case: dict[str, Any]) -> list[str]:
  sides = "rows, length" if case["part"] == "packed" else "slots, cache length"
  return [
    f"{case['part']}: {sides}, heads, key/value heads, head dim = {case['shape']}",
    *(
      f"  {name:28} {seconds * 1e3:9.2f} ms {case['temp_bytes'][name] / 2**20:9.1f} MiB"
      for name, seconds in case["seconds"].items()
    ),
  ]


def main(argv: list[str]) -> None:
  del argv
  device = jax.devices()[0]
  on_cpu = device.platform == "cpu"
  dtype = jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
  parts = {
    "packed": (_packed, _PACKED_CPU if on_cpu else _PACKED),
    "decode": (_decode, _DECODE_CPU if on_cpu else _DECODE),
  }
  cases = []
  if not _JSON.value:
    print(f"device: {device.device_kind}, {dtype.name}", flush=True)
  for part in _PARTS.value:
    run, shapes = parts[part]
    for shape in shapes:
      cases.append({"part": part, **run(shape, dtype, device.platform)})
      if not _JSON.value:
        print("\n".join(_lines(cases[-1])), flush=True)
  if _JSON.value:
    print(json.dumps({"device": device.device_kind, "dtype": dtype.name, "cases": cases}))


if __name__ == "__main__":
  app.run(main)
