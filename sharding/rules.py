"""From logical axes to shardings, and the two ways in which a program uses them.

    reshard(x, rules, "batch", None, "heads")     x, laid out so: an all-gather, a slice or nothing at all
    manual(f, rules, ins, outs)(x, y)             f sees each device's own part, and says itself what is exchanged

Both follow the mesh that `jax.set_mesh` has set, and do nothing where none is: the same model code runs on one device
without a mesh.  Inside of `manual`, the functions below talk along mesh axes; they too do nothing without a mesh.

Dimension names are those of `configs.parallel.ShardingRules`; None is a dimension that is not cut.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.parallel import ShardingRules

LogicalAxes = tuple[str | None, ...]

# XLA's default on a CPU looks for operations that can run side by side, and so makes a step's copies of weights long before
# they are used; the other order uses them while they are in the processor's cache (measured, docs/speed.md).
_COMPILER_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def spec(rules: ShardingRules, logical: LogicalAxes) -> PartitionSpec:
  """The mesh axes of each dimension."""
  return PartitionSpec(*(getattr(rules, name) or None if name is not None else None for name in logical))


def named(mesh: Mesh, rules: ShardingRules, logical: LogicalAxes) -> NamedSharding:
  return NamedSharding(mesh, spec(rules, logical))


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Programs called inside are laid out on `mesh`; None: on one device, without a mesh."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform(mesh: Mesh | None) -> str:
  """What the devices are: "cpu", "gpu" or "tpu"."""
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


class Program:
  """`jax.jit` of a function that is traced, lowered and run on a mesh; on None: on one device, without one."""

  def __init__(self, mesh: Mesh | None, function: Callable[..., Any], **options: Any):
    self._mesh = mesh
    self._jitted = jax.jit(function, compiler_options=_COMPILER_OPTIONS.get(platform(mesh)), **options)

  def __call__(self, *arguments: Any) -> Any:
    with use_mesh(self._mesh):
      return self._jitted(*arguments)

  def lower(self, *arguments: Any) -> jax.stages.Lowered:
    with use_mesh(self._mesh):
      return self._jitted.lower(*arguments)

  def shapes(self, *arguments: Any) -> Any:
    """What a call would return, as `jax.ShapeDtypeStruct`s that say where each array would lie."""
    with use_mesh(self._mesh):
      out = self._jitted.eval_shape(*arguments)
    return out if self._mesh is None else jax.tree.map(self._placed, out)

  def _placed(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec_ = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self._mesh, spec_))


def _mesh() -> Any:
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def reshard(x: jax.Array, rules: ShardingRules, *logical: str | None) -> jax.Array:
  """x with its dimensions laid out as named; the gradient comes back laid out as x was."""
  return x if _mesh() is None else jax.reshard(x, spec(rules, logical))


def out_sharding(rules: ShardingRules, *logical: str | None) -> PartitionSpec | None:
  """For the `out_sharding` of a product whose contracted dimension is cut on both sides."""
  return None if _mesh() is None else spec(rules, logical)


def manual(function: Callable[..., Any], rules: ShardingRules, ins: Sequence[Any], outs: Any) -> Callable[..., Any]:
  """`function` over each device's parts.

  Args:
    ins: for each argument its logical axes, or a tree of them; () is: whole on every device.
    outs: the same for the results.  What is whole on every device must have been made so (`psum`).
  """
  if _mesh() is None:
    return function
  is_axes = lambda x: isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)  # noqa: E731
  to_spec = lambda axes: spec(rules, axes)  # noqa: E731
  in_specs, out_specs = (jax.tree.map(to_spec, axes, is_leaf=is_axes) for axes in (tuple(ins), outs))
  # Types that say along which axes a value varies are not checked: hand-written VJPs do not know them.
  mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)

  def call(*arguments: Any) -> Any:
    # In an explicit mesh the specs are assertions, so that what lies otherwise is laid out first.
    return mapped(
      *jax.tree.map(lambda axes, x: jax.tree.map(lambda leaf: jax.reshard(leaf, axes), x), in_specs, arguments)
    )

  return call


def axis_size(axes: str | Sequence[str]) -> int:
  """How many devices lie along mesh axes; 1 without a mesh."""
  mesh, size = _mesh(), 1
  for axis in (axes,) if isinstance(axes, str) else axes:
    size *= mesh.shape[axis] if mesh is not None else 1
  return size


def axis_index(axes: str | Sequence[str]) -> jax.Array | int:
  """This device's place along mesh axes, the first of them major; 0 without a mesh."""
  return jax.lax.axis_index(axes) if axis_size(axes) > 1 else 0


def psum(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
  return jax.lax.psum(x, axes) if axis_size(axes) > 1 else x


def pmax(x: jax.Array, axes: str | Sequence[str]) -> jax.Array:
  return jax.lax.pmax(x, axes) if axis_size(axes) > 1 else x


def all_gather(x: jax.Array, axes: str | Sequence[str], dimension: int) -> jax.Array:
  """The parts along mesh axes joined along a dimension; its gradient is a reduce-scatter."""
  return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axis_size(axes) > 1 else x


def all_to_all(x: jax.Array, axes: str | Sequence[str], split: int, join: int) -> jax.Array:
  """Part i of dimension `split` goes to the i-th device along mesh axes, where parts are joined along `join`."""
  return jax.lax.all_to_all(x, axes, split, join, tiled=True) if axis_size(axes) > 1 else x
