"""Where the keys and values of decoding live.

`DenseCache` gives every slot its whole length.  `PagedCache` gives slots pages of a fixed number of positions, as they
need them; which page holds what is said by a page table, that is an argument of every function here and belongs to
whoever hands pages out.  Slots may share pages, such as those of a common prompt, as long as none of them writes there.

Dimension key: L layers, B slots, S positions of a dense slot, P pages, N positions of a page, W pages of one slot's
table, K key/value heads, C = 2K, d head dim, T positions of a prefill, I copies.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.bits import bits, values


class DenseCache(NamedTuple):
  """Keys lie with the position last, which makes decode's q.k a plain matrix product.

  Of a bfloat16 cache, steps on a CPU go over the bits (kernels/bits.py).
  """

  k_LxBxKxdxS: jax.Array  # floating point, or the bits of bfloat16 as uint16
  v_LxBxKxSxd: jax.Array

  def bits(self) -> "DenseCache":
    """A bfloat16 cache as uint16."""
    return DenseCache(*map(bits, self))

  def values(self) -> "DenseCache":
    """The inverse of `bits`."""
    return DenseCache(*map(values, self))

  def write(
    self, layer: jax.Array | int, k_BxKxd: jax.Array, v_BxKxd: jax.Array, positions_B: jax.Array, active_B: jax.Array
  ) -> "DenseCache":
    """One token a slot, at `positions_B`; a slot that is not active writes nothing."""
    rows = jnp.arange(len(positions_B))
    # Beyond the last position a scatter drops what it is given.
    at_B = jnp.where(active_B, positions_B, self.k_LxBxKxdxS.shape[-1])
    if self.k_LxBxKxdxS.dtype == jnp.uint16:
      k_BxKxd, v_BxKxd = (bits(x.astype(jnp.bfloat16)) for x in (k_BxKxd, v_BxKxd))
    return DenseCache(
      self.k_LxBxKxdxS.at[layer, rows, :, :, at_B].set(k_BxKxd, mode="drop"),
      self.v_LxBxKxSxd.at[layer, rows, :, at_B].set(v_BxKxd, mode="drop"),
    )


class PagedCache(NamedTuple):
  """The key of head h is at 2h of C, its value at 2h + 1: the order that ragged paged attention reads.

  A row of a page table, int32 [W], lists the pages of one slot in the order of positions: position t is in page
  row[t // N].  Entries that hold no position yet may be anything; what is written through one that names no page is
  dropped.  The TPU kernel reads the whole table [B, W] from the
  scalar memory, 1 MiB on every chip: pages of N = 256 keep 64 slots of 65,536 positions at 64 KiB.
  """

  pages_LxPxNxCxd: jax.Array

  @classmethod
  def empty(cls, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype) -> "PagedCache":
    return cls(jnp.zeros((layers, pages, page_size, 2 * kv_heads, head_dim), dtype))

  def write(
    self,
    layer: jax.Array | int,
    k_BxKxd: jax.Array,
    v_BxKxd: jax.Array,
    page_table_BxW: jax.Array,
    positions_B: jax.Array,
    active_B: jax.Array,
  ) -> "PagedCache":
    """One token a slot, at `positions_B`; a slot that is not active writes nothing."""
    return self.extend(
      layer, k_BxKxd[:, None], v_BxKxd[:, None], page_table_BxW, positions_B, active_B.astype(jnp.int32)
    )

  def extend(
    self,
    layer: jax.Array | int,
    k_BxTxKxd: jax.Array,
    v_BxTxKxd: jax.Array,
    page_table_BxW: jax.Array,
    starts_B: jax.Array,
    counts_B: jax.Array,
  ) -> "PagedCache":
    """The first `counts_B` of T tokens a row, from position `starts_B` on."""
    num_pages, page_size = self.pages_LxPxNxCxd.shape[1:3]
    step_T = jnp.arange(k_BxTxKxd.shape[1])
    position_BxT = starts_B[:, None] + step_T
    page_BxT = jnp.take_along_axis(page_table_BxW, position_BxT // page_size, axis=1, mode="clip")
    # Beyond the last page a scatter drops what it is given.
    page_BxT = jnp.where(step_T < counts_B[:, None], page_BxT, num_pages)
    token_BxTxCxd = _interleaved(k_BxTxKxd, v_BxTxKxd).astype(self.pages_LxPxNxCxd.dtype)
    return PagedCache(
      self.pages_LxPxNxCxd.at[layer, page_BxT, position_BxT % page_size].set(token_BxTxCxd, mode="drop")
    )

  def insert(
    self, k_LxTxKxd: jax.Array, v_LxTxKxd: jax.Array, pages_W: jax.Array, length: jax.Array | int
  ) -> "PagedCache":
    """The first `length` positions of a prefill into the pages of one slot.  Whole pages are written."""
    num_pages, page_size = self.pages_LxPxNxCxd.shape[1:3]
    kv_LxTxCxd = _interleaved(k_LxTxKxd, v_LxTxKxd).astype(self.pages_LxPxNxCxd.dtype)
    L, T, C, d = kv_LxTxCxd.shape
    filled = -(-T // page_size)
    if filled > len(pages_W):
      raise ValueError(f"insert: {T} positions do not fit into {len(pages_W)} pages of {page_size}")
    padded = jnp.pad(kv_LxTxCxd, ((0, 0), (0, filled * page_size - T), (0, 0), (0, 0)))
    needed_W = jnp.arange(filled) * page_size < length
    page_W = jnp.where(needed_W, pages_W[:filled], num_pages)
    return PagedCache(self.pages_LxPxNxCxd.at[:, page_W].set(padded.reshape(L, filled, page_size, C, d), mode="drop"))

  def copy(self, source_I: jax.Array, target_I: jax.Array) -> "PagedCache":
    """Page `source_I` into page `target_I`, all layers; a target beyond the last page is dropped."""
    copied = self.pages_LxPxNxCxd.at[:, source_I].get(mode="clip")
    return PagedCache(self.pages_LxPxNxCxd.at[:, target_I].set(copied, mode="drop"))


def _interleaved(k_KxD: jax.Array, v_KxD: jax.Array) -> jax.Array:
  """[..., 2K, d] with keys at even and values at odd places."""
  *lead, K, d = k_KxD.shape
  return jnp.stack([k_KxD, v_KxD], axis=-2).reshape(*lead, 2 * K, d)
