"""The op over a mesh: tokens over some axes, the vocabulary over others.

Each shard sweeps its own vocabulary for its own tokens.  What is told between shards of the vocabulary is a maximum and
three sums a token,

    lse = log sum_shards exp(lse_s),  target = the one shard's that has it,  mean = sum_shards exp(lse_s - lse) mean_s

and in the backward pass the sum of dhidden, [N, H] in float32.  dweight is summed over the shards of the tokens.
Neither the weight nor any logits move.

Dimension key: N tokens, H hidden width, V vocabulary, S shards of it; arrays inside of `shard_map` are one shard's.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.linear_logprob import dispatch
from kernels.linear_logprob.backend import NEVER, Cotangents, Inputs, Scores
from kernels.linear_logprob.dispatch import Implementation
from kernels.linear_logprob.tiles import LANES


@dataclasses.dataclass(frozen=True)
class Partition:
  """Raises ValueError for axes that the mesh has not, or that are named twice."""

  mesh: Mesh | AbstractMesh
  rows: tuple[str, ...]  # axes that tokens are spread over
  vocab: tuple[str, ...]  # axes that the vocabulary is spread over

  def __post_init__(self):
    axes = (*self.rows, *self.vocab)
    if len(set(axes)) < len(axes) or not set(axes) <= set(self.mesh.axis_names):
      raise ValueError(f"Partition: rows={self.rows}, vocab={self.vocab}: different axes of {self.mesh.axis_names}")

  @property
  def vocab_shards(self) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.vocab)

  def inputs(self, inputs: Inputs) -> Inputs:
    """The specs of the inputs."""
    temperature = None if inputs.temperature is None else P(self.rows)
    mask = None if inputs.mask is None else P(self.vocab)
    return Inputs(P(self.rows, None), P(None, self.vocab), P(self.rows), temperature, mask)

  def scores(self) -> Scores:
    return Scores(*[P(self.rows)] * 3)


def padded_vocab(vocab: int, shards: int) -> int:
  """The vocabulary that a weight should have in memory: equal shards, each of whole groups of lanes.

  XLA stores a matrix whose columns are no multiple of 128 by columns, so that the TPU kernels would need a copy of it.
  The ids that are added must be masked (`vocab_mask`).
  """
  return -(-vocab // (shards * LANES)) * shards * LANES


def of_arguments(hidden_NxH: jax.Array, weight_HxV: jax.Array) -> Partition | None:
  """How arguments are spread over a mesh with explicit axes; None where there is no such mesh."""
  mesh = jax.typeof(hidden_NxH).sharding.mesh
  if mesh.empty or not mesh.explicit_axes:
    return None
  if not isinstance(hidden_NxH, jax.core.Tracer):
    mesh = hidden_NxH.sharding.mesh  # outside of jit the program needs its devices
  axes = lambda x, dimension: _axes(jax.typeof(x).sharding.spec[dimension])  # noqa: E731
  return Partition(mesh, axes(hidden_NxH, 0), axes(weight_HxV, 1))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def check_tokens(partition: Partition, num_tokens: int, op: str) -> None:
  """Raises ValueError if the tokens do not divide by their shards."""
  shards = math.prod(partition.mesh.shape[axis] for axis in partition.rows)
  if num_tokens % shards:
    raise ValueError(f"{op}: {num_tokens} tokens over {partition.rows}: a multiple of {shards}")


def divisible(partition: Partition, weight_HxV: jax.Array, mask_V: jax.Array | None):
  """(weight, mask) with a vocabulary that divides by its shards; ids that are added to it are masked."""
  vocab = weight_HxV.shape[1]
  if vocab % partition.vocab_shards == 0:
    return weight_HxV, mask_V
  padding = padded_vocab(vocab, partition.vocab_shards) - vocab
  mask_V = jnp.ones(vocab, bool) if mask_V is None else mask_V
  return jnp.pad(weight_HxV, ((0, 0), (0, padding))), jnp.pad(mask_V, (0, padding))


def spread(partition: Partition, arrays, specs):
  """Arrays over the mesh's explicit axes by their specs; over other axes `shard_map` spreads them."""
  if not partition.mesh.explicit_axes:
    return arrays

  def move(x, spec):
    sharding = NamedSharding(partition.mesh, spec)
    # Outside of jit, an array that is made on the way here is on one device, which `reshard` does not take.
    return jax.reshard(x, sharding) if isinstance(x, jax.core.Tracer) else jax.device_put(x, sharding)

  return jax.tree.map(move, arrays, specs)


def place(partition: Partition, inputs: Inputs) -> Inputs:
  """The inputs as the shards take them."""
  check_tokens(partition, inputs.ids.shape[0], "linear_logprob")
  weight_HxV, mask_V = divisible(partition, inputs.weight, inputs.mask)
  inputs = inputs._replace(weight=weight_HxV, mask=mask_V)
  return spread(partition, inputs, partition.inputs(inputs))


def score(implementation: Implementation | None, partition: Partition, inputs: Inputs) -> Scores:
  def shard(inputs):
    return _combine(partition, dispatch.score(implementation, _local(partition, inputs)))

  return over(partition, shard, (partition.inputs(inputs),), partition.scores())(inputs)


def score_to_train(implementation: Implementation | None, partition: Partition, inputs: Inputs):
  def shard(inputs):
    combine = functools.partial(_combine, partition)
    scores, kept = dispatch.score_to_train(implementation, _local(partition, inputs), combine)
    return scores, jax.tree.map(lambda x: x[:, None], kept)

  kept_spec = P(partition.rows, partition.vocab)
  return over(partition, shard, (partition.inputs(inputs),), (partition.scores(), kept_spec))(inputs)


def gradient(
  implementation: Implementation | None, partition: Partition, inputs: Inputs, kept, scores: Scores,
  cotangents: Cotangents,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  sum_dtype = scores.lse.dtype

  def shard(inputs, kept, scores, cotangents):
    kept = jax.tree.map(lambda x: x[:, 0], kept)
    inputs = _local(partition, inputs)
    dhidden_NxH, dweight_HxV = dispatch.gradient(implementation, inputs, kept, scores, cotangents, sum_dtype)
    if partition.vocab:
      dhidden_NxH = lax.psum(dhidden_NxH, partition.vocab)
    if partition.rows:
      dweight_HxV = lax.psum(dweight_HxV, partition.rows)
    return dhidden_NxH.astype(inputs.hidden.dtype), dweight_HxV

  kept_spec, row_spec = P(partition.rows, partition.vocab), P(partition.rows)
  specs = (partition.inputs(inputs), kept_spec, row_spec, row_spec)
  results = (P(partition.rows, None), P(None, partition.vocab))
  return over(partition, shard, specs, results)(inputs, kept, scores, cotangents)


def over(partition: Partition, shard, in_specs, out_specs):
  """`shard` on each shard."""
  return jax.shard_map(shard, mesh=partition.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local(partition: Partition, inputs: Inputs) -> Inputs:
  """Ids counted from the first of this shard's vocabulary; -1: another shard's."""
  if not partition.vocab:
    return inputs
  size = inputs.weight.shape[1]
  ids_N = inputs.ids - lax.axis_index(partition.vocab) * size
  return inputs._replace(ids=jnp.where((ids_N >= 0) & (ids_N < size), ids_N, -1))


def _combine(partition: Partition, local: Scores) -> Scores:
  if not partition.vocab:
    return local
  largest_N = lax.pmax(local.lse, partition.vocab)
  share_N = jnp.exp(local.lse - largest_N)
  has_target_N = local.target != NEVER
  summands_4xN = jnp.stack([share_N, share_N * local.mean, jnp.where(has_target_N, local.target, 0), has_target_N])
  share_N, mean_N, target_N, found_N = lax.psum(summands_4xN, partition.vocab)
  return Scores(jnp.where(found_N > 0, target_N, NEVER), largest_N + jnp.log(share_N), mean_N / share_N)
