"""What the TPU compiler says of a program, on a machine without a TPU: memory, buffers, collectives, bundles.

    program = compile_for("v5p", f, abstract((4096, 2048), jnp.bfloat16), ...)      for one device
    program = compile_for("v5p:2x2x1", f, ...)                                      arguments that carry shardings
    temp_bytes(program), largest_buffer_elements(program.as_text()), collectives(program.as_text())

`bundles` counts the instruction words (VLIW bundles) of each kernel that a function compiles.  A kernel's loops
are counted once and waits are not, so it is a measure of the code and not a time: good for ranking tiles and for noticing
that a kernel has become worse.

Source: reference notes, pallas.md section 3.
"""

import collections
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.topology import Topology

ROOT = pathlib.Path(__file__).parents[2]
SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def devices_of(name: str) -> np.ndarray:
  """Abstract devices: all of a topology (v5p:2x2x1), or one of a chip (v5p)."""
  return np.array(Topology.parse(name).devices() if ":" in name else Topology.parse(SMALLEST[name]).devices()[:1])


def compile_for(chip: str, fn, *abstract_args: Any, donate_argnums=()) -> jax.stages.Compiled:
  """Compiles fn for one device of a chip; every array is whole on it."""
  mesh = Mesh(devices_of(chip), ("device",))
  whole = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), abstract_args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), warnings.catch_warnings():
    # The cache of compiled programs can store what is for no present device, but not read it.
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    return jax.jit(fn, donate_argnums=donate_argnums).lower(*arguments).compile()


def temp_bytes(program: jax.stages.Compiled) -> int:
  """Bytes a device holds beside arguments and results."""
  return program.memory_analysis().temp_size_in_bytes


def largest_buffer_elements(hlo_text: str, excluding: tuple[tuple[int, ...], ...] = ()) -> int:
  """Elements of the largest array that occurs in a program's text, other than arrays of the given shapes.

  s8 is left out: as that the compiler writes the bytes of any array while it moves them.
  """
  shapes = {
    tuple(map(int, shape.split(","))) for shape in re.findall(r"\b(?!s8\b)[a-z]+\d+[a-z0-9]*\[([\d,]+)\]", hlo_text)
  }
  return max((math.prod(shape) for shape in shapes - set(excluding)), default=0)


def collectives(hlo_text: str) -> collections.Counter:
  """How many collective operations of each kind a program has; an asynchronous pair counts once."""
  found = re.findall(rf"= \S.*? ({'|'.join(_COLLECTIVES)})(?:-start)?\(", hlo_text)
  return collections.Counter(found)


def bundles(target: str, *arguments: str) -> dict[str, dict[str, float]]:
  """Static counts of each kernel that a function compiles, by name: of Pallas kernels and of XLA's fusions.

  Args:
    target: "module:function"; it runs in a process of its own, as the compiler reads the flags that make it write its
      listings only once.
    arguments: what the function is called with.

  Returns:
    per kernel: `bundles`, and `spills`, the share of them that stores a register to memory for want of registers.
  """
  module, function = target.split(":")
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {
      "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
      "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from the cache is not compiled
      "JAX_PLATFORMS": "cpu",
    }
    code = f"import sys, {module} as m; m.{function}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
      raise RuntimeError(f"{target}: {done.stderr[-2000:]}")
    return _read_listings(pathlib.Path(folder))


def _read_listings(folder: pathlib.Path) -> dict[str, dict[str, float]]:
  counts = {}
  for path in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
    name = re.match(r"\d+-(.+?)(?:\.\d+)*-\d+-final", path.name)[1]
    _, units, _, _, *rows = path.read_text().splitlines()
    spill = [unit.strip() for unit in units.split(",")].index("VSTORE:SPILL")
    spills = sum(int(row.split()[spill]) for row in rows)
    counts[name] = {"bundles": len(rows), "spills": round(spills / len(rows), 4)}
  return counts
