"""What the TPU kernels of this op share: the geometry of a sweep, and pieces of kernel code.

Dimension key: N tokens, P tokens padded to whole blocks or a part of the hidden width, H hidden width, V vocabulary,
R tokens of a block, S tokens of a strip of it, C ids of a tile, L lanes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.linear_logprob.tiles import LANES, Tile, hidden_part


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Blocks of tokens by tiles of the vocabulary."""

  tile: Tile
  hidden: int
  vocab: int
  dtype: jnp.dtype  # of the products' operands
  vmem_limit: int
  interpret: bool

  @property
  def tiles(self) -> int:
    return pl.cdiv(self.vocab, self.tile.ids)

  @property
  def ragged(self) -> bool:
    """Whether the last tile overhangs the vocabulary."""
    return self.vocab % self.tile.ids != 0

  def strip(self, most: int) -> int:
    """Tokens of a strip: a divisor of the block's."""
    return most if self.tile.rows % most == 0 else min(self.tile.rows, LANES)

  def logits(self, hidden_ref, weight_ref, strip) -> jax.Array:
    """float32 [S, C], before temperature and mask."""
    part = hidden_part(self.hidden, self.dtype.itemsize)

    def product(first):
      hidden_SxP = hidden_ref[strip, pl.ds(first, part)].astype(self.dtype)
      return dot(hidden_SxP, weight_ref[pl.ds(first, part), :].astype(self.dtype), (1, 0))

    if part == self.hidden:
      return product(0)
    step = lambda k, x_SxC: x_SxC + product(pl.multiple_of(k * part, part))  # noqa: E731
    zeros_SxC = jnp.zeros((strip.size, self.tile.ids), jnp.float32)
    return lax.fori_loop(0, self.hidden // part, step, zeros_SxC)

  def weight(self, weight_ref, part, ragged_tile) -> jax.Array:
    """A part of a tile of weight; in a ragged tile (its index is given) with zeros for columns beyond the vocabulary."""
    weight_PxC = weight_ref[part, :].astype(self.dtype)
    if ragged_tile is None:
      return weight_PxC
    ids_1xC = lax.broadcasted_iota(jnp.int32, (1, self.tile.ids), 1) + ragged_tile * self.tile.ids
    return jnp.where(ids_1xC < self.vocab, weight_PxC, jnp.zeros_like(weight_PxC))

  def for_each_part(self, body: Callable[[pl.Slice], None]) -> None:
    """Calls body with each part of the hidden width, in a loop if there are several."""
    part = hidden_part(self.hidden, self.dtype.itemsize)
    if part == self.hidden:
      body(pl.ds(0, part))
    else:

      @pl.loop(0, self.hidden // part)
      def _(k):
        body(pl.ds(pl.multiple_of(k * part, part), part))

  def compiler_params(self) -> pltpu.CompilerParams:
    """The outer dimension may be split over cores; the inner one carries sums from tile to tile."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=self.vmem_limit)

  def cost(self, products: int, num_tokens: int, weight_reads: int, results: int) -> pl.CostEstimate:
    """For a sweep that does `products` products a tile and reads the weight `weight_reads` times."""
    bytes_accessed = self.hidden * (weight_reads * self.vocab + (1 + results) * num_tokens) * self.dtype.itemsize
    return pl.CostEstimate(
      flops=2 * products * num_tokens * self.hidden * self.vocab,
      transcendentals=num_tokens * self.vocab,
      bytes_accessed=bytes_accessed,
    )


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Summed in float32; products of float32 numbers in float32 too, where the matrix unit would round to bfloat16."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def per_lane(combine: Callable[[jax.Array, jax.Array], jax.Array], x_SxC: jax.Array) -> jax.Array:
  """Combines the columns that lie on the same lane: [S, C] to [S, L]."""
  result_SxL = x_SxC[:, :LANES]
  for first in range(LANES, x_SxC.shape[1], LANES):
    result_SxL = combine(result_SxL, x_SxC[:, first : first + LANES])
  return result_SxL


def spread(x_SxL: jax.Array, columns: int) -> jax.Array:
  """[S, L] whose lanes are all alike, as [S, columns]."""
  if columns % LANES:
    return jnp.broadcast_to(x_SxL[:, :1], (x_SxL.shape[0], columns))
  return jnp.concatenate([x_SxL] * (columns // LANES), axis=1)


def padded_rows(rows: Sequence[jax.Array], fill: Sequence[float], length: int) -> jax.Array:
  """Up to 8 numbers a token as one float32 array [8, P]: an array [N, 1] would take 128 times its size."""
  padded = [
    jnp.pad(row.astype(jnp.float32), (0, length - row.shape[0]), constant_values=value)
    for row, value in zip(rows, fill, strict=True)
  ]
  return jnp.stack(padded + [jnp.zeros(length, jnp.float32)] * (8 - len(padded)))


def once() -> pl.Buffered:
  """One buffer: for blocks that stay for a whole sweep, where a second one would double the memory for nothing."""
  return pl.Buffered(buffer_count=1)


def out_shape(shape: tuple[int, ...], dtype, operands: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
  """A result that varies over the mesh axes, inside of `shard_map`, over which any operand varies."""
  varying = frozenset().union(*(jax.typeof(operand).manual_axis_type.varying for operand in operands))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))
