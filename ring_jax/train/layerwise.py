"""The optimizer's step with its state in host memory: a layer at a time, so that the device holds one layer's state.

An optax state is a tree in which the parameter tree occurs again and again, beside counters.  A part of the parameters has
a part of each of these, and the counters; with them the transformation works on the part as on a model of its own.  Only
clipping looks at all parameters at once, and is done before: no part has a larger norm than the whole, so the
transformation finds nothing left to clip.

    embedding, head, norms      at once
    each stack of layers        layer after layer: state to the device, step, state back to the host
"""

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
    updates, state = optimizer.update(clipped, _moved(state, jax.memory.Space.Device), params)
    return optax.apply_updates(params, updates), _moved(state, jax.memory.Space.Host)

  rest = names - set(_STACKS)
  parts = [step(*(_part(tree, names, rest) for tree in (params, opt_state, grads)))]
  for stack in sorted(names & set(_STACKS)):
    parts.append(_layer_by_layer(step, stack, *(_part(tree, names, {stack}) for tree in (params, opt_state, grads))))
  new_params = {name: leaf for part, _ in parts for name, leaf in part.items()}
  return new_params, _joined([state for _, state in parts])


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


def _moved(state: Any, space: jax.memory.Space) -> Any:
  return jax.tree.map(lambda leaf: jax.device_put(leaf, space), state)


def _part(tree: Any, names: frozenset[str], wanted) -> Any:
  """The tree with only `wanted` of every parameter tree in it."""
  if isinstance(tree, dict) and tree.keys() == names:
    return {name: tree[name] for name in wanted}
  if isinstance(tree, tuple):
    children = [_part(child, names, wanted) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
  return tree


def _joined(parts: list[Any]) -> Any:
  """The inverse of `_part`; what is not a parameter tree comes from the first."""
  first = parts[0]
  if isinstance(first, dict):
    return {name: leaf for part in parts for name, leaf in part.items()}
  if isinstance(first, tuple):
    children = [_joined(list(group)) for group in zip(*parts, strict=True)]
    return type(first)(*children) if hasattr(first, "_fields") else tuple(children)
  return first
