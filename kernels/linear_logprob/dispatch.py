"""Which implementation runs: the one that is asked for, or the one for the platform that the program is compiled for.

The platform is known when a program is lowered, not when it is traced: one traced program runs on the CPU and is compiled
for a TPU by a process that has none.  So both implementations are traced, and `jax.lax.platform_dependent` picks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from configs.schema import ConfigError, Enum
from kernels.linear_logprob import pallas_tpu, xla_chunked
from kernels.linear_logprob.backend import Combine, Cotangents, Inputs, Scores, zeros


class Implementation(Enum):
  REFERENCE = "reference"  # all logits in memory, differentiated by JAX
  XLA_CHUNKED = "xla_chunked"  # tiles of tokens times vocabulary in plain XLA
  PALLAS_TPU = "pallas_tpu"  # TPU kernels
  PALLAS_INTERPRET = "pallas_interpret"  # the TPU kernels, interpreted on any platform: slow, for tests


_Kept = tuple  # (what the TPU kernels keep, what xla_chunked keeps): the one that does not run is None, or zeros


def score(implementation: Implementation | None, inputs: Inputs) -> Scores:
  inputs = _drawable(inputs)
  if inputs.ids.shape[0] == 0:
    return Scores(*(zeros((0,), _score_dtype(inputs), inputs.hidden) for _ in Scores._fields))
  if (interpret := interpreted(implementation)) is not None:
    return pallas_tpu.score(inputs, interpret=interpret)
  if not by_platform(implementation, inputs.hidden, inputs.weight):
    return xla_chunked.score(inputs)
  # Functions made here, not those of the modules: JAX would take their traces of another context from its cache.
  on_tpu = lambda inputs: pallas_tpu.score(inputs, interpret=False)  # noqa: E731
  elsewhere = lambda inputs: xla_chunked.score(inputs)  # noqa: E731
  return lax.platform_dependent(inputs, tpu=on_tpu, default=elsewhere)


def score_to_train(
  implementation: Implementation | None, inputs: Inputs, combine: Combine | None = None
) -> tuple[Scores, _Kept]:
  if inputs.ids.shape[0] == 0:
    return score(implementation, inputs), (None, None)
  inputs = _drawable(inputs)
  if (interpret := interpreted(implementation)) is not None:
    scores, kept = pallas_tpu.score_to_train(inputs, combine, interpret=interpret)
    return scores, (kept, None)
  xla = functools.partial(xla_chunked.score_to_train, combine=combine)
  if not by_platform(implementation, inputs.hidden, inputs.weight):
    scores, kept = xla(inputs)
    return scores, (None, kept)
  pallas = functools.partial(pallas_tpu.score_to_train, combine=combine, interpret=False)
  # Each branch returns zeros for what the other one keeps.  The compiler drops them, as nothing reads them.
  kept_by_pallas, kept_by_xla = (jax.eval_shape(branch, inputs)[1] for branch in (pallas, xla))

  nothing = lambda kept: jax.tree.map(lambda x: zeros(x.shape, x.dtype, inputs.hidden), kept)  # noqa: E731

  def on_tpu(inputs):
    scores, kept = pallas(inputs)
    return scores, (kept, nothing(kept_by_xla))

  def elsewhere(inputs):
    scores, kept = xla(inputs)
    return scores, (nothing(kept_by_pallas), kept)

  return lax.platform_dependent(inputs, tpu=on_tpu, default=elsewhere)


def gradient(
  implementation: Implementation | None, inputs: Inputs, kept: _Kept, scores: Scores, cotangents: Cotangents, sum_dtype
) -> tuple[jax.Array, jax.Array]:
  """dhidden in sum_dtype and dweight in the weight's dtype."""
  if inputs.ids.shape[0] == 0 or not cotangents.given:
    return jnp.zeros_like(inputs.hidden, sum_dtype), jnp.zeros_like(inputs.weight)
  arguments = (_drawable(inputs), kept, scores, cotangents)

  def pallas(inputs, kept, scores, cotangents, interpret=False):
    return pallas_tpu.gradient(inputs, kept[0], scores, cotangents, sum_dtype, interpret=interpret)

  def xla(inputs, kept, scores, cotangents):
    return xla_chunked.gradient(inputs, kept[1], scores, cotangents, sum_dtype)

  if (interpret := interpreted(implementation)) is not None:
    return pallas(*arguments, interpret=interpret)
  if not by_platform(implementation, inputs.hidden, inputs.weight):
    return xla(*arguments)
  return lax.platform_dependent(*arguments, tpu=pallas, default=xla)


def check(op: str, implementation: Implementation | None, hidden_NxH: jax.Array, weight_HxV: jax.Array) -> None:
  """Raises ConfigError if the TPU kernels are asked for what they do not do."""
  if interpreted(implementation) is not None and not _kernels_take(hidden_NxH, weight_HxV):
    raise ConfigError(
      f"{op}: implementation={implementation} takes bfloat16 and float32, and fewer than {pallas_tpu.MAX_VOCAB} ids:"
      f" not {hidden_NxH.dtype} and {weight_HxV.dtype}{list(weight_HxV.shape)}"
    )


def _drawable(inputs: Inputs) -> Inputs:
  """A masked target is none: id -1."""
  if inputs.mask is None:
    return inputs
  return inputs._replace(ids=jnp.where((inputs.ids >= 0) & inputs.mask[inputs.ids], inputs.ids, -1))


def interpreted(implementation: Implementation | None) -> bool | None:
  """Whether the TPU kernels are to be interpreted; None: they are not what was asked for."""
  return {Implementation.PALLAS_TPU: False, Implementation.PALLAS_INTERPRET: True}.get(implementation)


def by_platform(implementation: Implementation | None, hidden_NxH: jax.Array, weight_HxV: jax.Array) -> bool:
  """Whether the platform decides between the TPU kernels and `xla_chunked`, which is what else None stands for."""
  return implementation is None and _kernels_take(hidden_NxH, weight_HxV) and not _partitioned_by_xla()


def _partitioned_by_xla() -> bool:
  """Whether XLA is to spread the program over a mesh by itself: it cannot do that to a kernel."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(mesh.shape[axis] > 1 for axis in mesh.auto_axes)


def _kernels_take(hidden_NxH: jax.Array, weight_HxV: jax.Array) -> bool:
  supported = pallas_tpu.supports(jnp.result_type(hidden_NxH, weight_HxV))
  return supported and weight_HxV.shape[1] < pallas_tpu.MAX_VOCAB


def _score_dtype(inputs: Inputs):
  return jnp.promote_types(jnp.result_type(inputs.hidden, inputs.weight), jnp.float32)
