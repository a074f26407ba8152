"""The optimizer's step with its state in host memory: a layer at a time, so that the device holds one layer's state.

An optax state is a tree in which the parameter tree occurs again and again, beside counters.  A part of the parameters has
a part of each of these, and the counters; with them the transformation works on the part as on a model of its own.  Only
clipping looks at all parameters at once, and is done before: no part has a larger norm than the whole, so the
transformation finds nothing left to clip.

    embedding, head, norms      at once
    each stack of layers        layer after layer: state to the device, step, state back to the host

A stack lies at the top of an actor's tree, and below `trunk` in that of a scalar model.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ring_jax.model import Params

_STACKS = ("dense_layers", "moe_layers")


def update(
  optimizer: optax.GradientTransformation, params: Params, opt_state: Any, grads: Params, norm: jax.Array, clip: float
) -> tuple[Params, Any]:
  """(params, opt_state) after a step; the state lies in host memory before and after.

  Args:
    norm: of all gradients.
    clip: the norm that they are clipped to, as in the optimizer.
  """
  names = frozenset(params)

  def step(params, state, grads):
    clipped = jax.tree.map(lambda leaf: jnp.where(norm < clip, leaf, leaf / norm * clip), grads)
    updates, state = optimizer.update(clipped, jax.device_put(state, jax.memory.Space.Device), params)
    return optax.apply_updates(params, updates), jax.device_put(state, jax.memory.Space.Host)

  trees = (params, opt_state, grads)
  parts = [step(*(_part(tree, names, None) for tree in trees))]
  for stack in _STACKS:
    if any(jax.tree_util.DictKey(stack) in path for path, _ in jax.tree.leaves_with_path(params)):
      parts.append(_layer_by_layer(step, stack, *(_part(tree, names, stack) for tree in trees)))
  return _joined(parts)


def _layer_by_layer(step, stack: str, params: Params, state: Any, grads: Params) -> tuple[Params, Any]:
  """The step over a stack; parameters are changed in place."""
  leaves, tree = jax.tree.flatten_with_path(state)
  stacked = [jax.tree_util.DictKey(stack) in path for path, _ in leaves]
  counters = [leaf for (_, leaf), inside in zip(leaves, stacked, strict=True) if not inside]

  def layer(params, scanned):
    index, slices, grads = scanned
    sources = {True: iter(slices), False: iter(counters)}
    state = jax.tree.unflatten(tree, [next(sources[inside]) for inside in stacked])
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params)
    one, state = step(one, state, grads)
    put = lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0)  # noqa: E731
    return jax.tree.map(put, params, one), jax.tree.leaves(state)

  depth = jax.tree.leaves(params)[0].shape[0]
  slices = [leaf for (_, leaf), inside in zip(leaves, stacked, strict=True) if inside]
  params, new = jax.lax.scan(layer, params, (jnp.arange(depth), slices, grads))
  # Counters come out once a layer, all alike; those of the rest are taken.
  return params, jax.tree.unflatten(tree, new)


def _part(tree: Any, names: frozenset[str], stack: str | None) -> Any:
  """The tree with only a stack of every parameter tree in it; None: with all that is in no stack."""
  is_params = lambda node: isinstance(node, dict) and node.keys() == names  # noqa: E731
  return jax.tree.map(lambda node: _cut(node, stack) if is_params(node) else node, tree, is_leaf=is_params)


def _cut(params: Params, stack: str | None) -> Params:
  kept = {}
  for name, below in params.items():
    if name in _STACKS:
      wanted = name == stack
    elif isinstance(below, dict):
      below = _cut(below, stack)
      wanted = bool(below)
    else:
      wanted = stack is None
    if wanted:
      kept[name] = below
  return kept


def _joined(parts: list[Any]) -> Any:
  """The inverse of `_part`; what is not a parameter tree comes from the first."""
  is_params = lambda node: isinstance(node, dict)  # noqa: E731
  join = lambda *nodes: _union(nodes) if is_params(nodes[0]) else nodes[0]  # noqa: E731
  return jax.tree.map(join, *parts, is_leaf=is_params)


def _union(parts: Sequence[Params]) -> Params:
  """Nested dicts, none of whose leaves is in two of them, as one."""
  names = {name for part in parts for name in part}
  found = {name: [part[name] for part in parts if name in part] for name in names}
  return {name: _union(below) if isinstance(below[0], dict) else below[0] for name, below in found.items()}
