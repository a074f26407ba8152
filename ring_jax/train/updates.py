"""What the training programs of every model share: gradients summed over microbatches, and the optimizer's step on the sum.

The optimizer's state waits where its config says: on the device, or in host memory, from where it visits the device a
layer at a time (`layerwise`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.schema import Memory, OptimizerConfig
from ring_jax.model import Params
from ring_jax.train import layerwise


def gradients(loss_of: Callable[[Params], tuple[jax.Array, Any]], params: Params) -> tuple[jax.Array, Any, Params]:
  """(loss, what `loss_of` returns beside it, gradients in float32)."""
  (loss, out), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
  return loss, out, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)


def added(sums: Any | None, found: Any) -> Any:
  """The sums of one more microbatch; None: it is the first, and no memory is spent on zeros."""
  return found if sums is None else jax.tree.map(jnp.add, sums, found)


class Update:
  """The optimizer of one phase, as functions to be jitted.

  Args:
    transformation: of `make_optimizer`.
    config: where its state waits, and the norm that gradients are clipped to.
  """

  def __init__(self, transformation: optax.GradientTransformation, config: OptimizerConfig):
    self._transformation, self._config = transformation, config

  def init(self, params: Params) -> Any:
    state = self._transformation.init(params)
    return jax.device_put(state, jax.memory.Space.Host) if self._at_host else state

  def placed(self, state: Any) -> Any:
    """The state's shapes and shardings, as of `rules.Program.shapes` of `init`, with the memory in which it waits."""
    if not self._at_host:
      return state

    def at_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
      return leaf.update(sharding=sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(at_host, state)

  def apply(self, params: Params, opt_state: Any, grads: Params) -> tuple[Params, Any, jax.Array]:
    """The optimizer's step; returns (params, opt_state, gradient norm before clipping)."""
    norm = optax.global_norm(grads)
    if self._at_host:
      clip = self._config.grad_clip
      params, opt_state = layerwise.update(self._transformation, params, opt_state, grads, norm, clip)
    else:
      updates, opt_state = self._transformation.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
    return params, opt_state, norm

  @property
  def _at_host(self) -> bool:
    return self._config.memory is Memory.HOST
