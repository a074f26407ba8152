"""Decode attention over pages on a TPU: the ragged paged attention kernel that JAX ships.

The kernel takes sequences of any number of queries each; in decoding each has one.  It copies the pages of a slot from
the chip's main memory itself, a block of pages at a time, the next one while it works on this one, and touches no page
beyond a slot's length: a step costs what the slots hold, not what they might.

Sources: jax.experimental.pallas.ops.tpu.ragged_paged_attention; reference notes, pallas.md sections 3 and 4.
Dimension key: L layers, B slots, P pages, N positions of a page, W pages of one slot's table, H query heads, K
key/value heads, C = 2K, d head dim.
"""

import jax
import jax.numpy as jnp

# Positions that one block of pages holds: enough for copies of a few hundred KiB, little enough for every chip.
_BLOCK_POSITIONS = 1024
_BLOCK_BYTES = 4 << 20
# Queries of one block; the kernel multiplies the whole block with each of its slots' keys, so few.
_QUERIES = 8
_VMEM_BYTES = 32 << 20


def fits(q_BxHxd: jax.Array, pages_LxPxNxCxd: jax.Array) -> bool:
  """Whether the kernel takes these heads: head dims of whole lanes, and key/value heads that fill their tiles."""
  heads, head_dim = pages_LxPxNxCxd.shape[3:]
  packing = 4 // pages_LxPxNxCxd.dtype.itemsize
  tiles, rest = divmod(heads, max(packing, 1))
  return (
    q_BxHxd.dtype == pages_LxPxNxCxd.dtype
    and q_BxHxd.dtype in (jnp.bfloat16, jnp.float32)
    and head_dim % 128 == 0
    and rest == 0
    and (tiles in (1, 2, 4) or tiles % 8 == 0)
  )


def decode_ragged_paged(
  q_BxHxd: jax.Array,
  pages_LxPxNxCxd: jax.Array,
  page_table_BxW: jax.Array,
  lengths_B: jax.Array,
  layer: jax.Array,
) -> jax.Array:
  """out_BxHxd; see the api."""
  # Imported late: a process that runs on a CPU needs no kernel before it traces one.
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

  L, P, N, C, d = pages_LxPxNxCxd.shape
  B, W = page_table_BxW.shape
  page_bytes = N * C * d * pages_LxPxNxCxd.dtype.itemsize
  out_BxHxd = ragged_paged_attention(
    q_BxHxd,
    # A layer cut out of the cache would be a copy of it, step after step; its pages are told by their numbers instead.
    pages_LxPxNxCxd.reshape(L * P, N, C, d),
    # The kernel fetches the first block of every sequence and waits for it only where there is something to attend to.
    jnp.maximum(lengths_B, 1),
    layer * P + jnp.clip(page_table_BxW, 0, P - 1),
    jnp.arange(B + 1, dtype=jnp.int32),
    jnp.full((1,), B, jnp.int32),
    sm_scale=d**-0.5,
    # Both told, or the kernel asks for the chip that it is traced on, which may be none.
    num_kv_pages_per_block=max(1, min(W, _BLOCK_POSITIONS // N, _BLOCK_BYTES // page_bytes)),
    num_queries_per_block=min(B, _QUERIES),
    vmem_limit_bytes=_VMEM_BYTES,
  )
  return jnp.where((lengths_B > 0)[:, None, None], out_BxHxd, 0)
