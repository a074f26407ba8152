"""Attention of new tokens over pages on a TPU: the ragged paged attention kernel that JAX ships.

The kernel takes sequences of any number of queries each; in decoding each has one.  The last query of a sequence is at its
last position.  It copies the pages of a slot from
the chip's main memory itself, a block of pages at a time, the next one while it works on this one, and touches no page
beyond a slot's length: a step costs what the slots hold, not what they might.

Sources: jax.experimental.pallas.ops.tpu.ragged_paged_attention; reference notes, pallas.md sections 3 and 4.
Dimension key: Q = B T queries, L layers, B slots or rows, T queries of each, P pages, N positions of a page, W pages of one slot's table, H
query heads, K key/value heads, C = 2K, d head dim.
"""

import jax
import jax.numpy as jnp

# Positions that one block of pages holds: enough for copies of a few hundred KiB, little enough for every chip.
_BLOCK_POSITIONS = 1024
_BLOCK_BYTES = 4 << 20
# Queries of one block; the kernel multiplies the whole block with each of its slots' keys, so few where each has one.
_QUERIES, _QUERIES_OF_MANY = 8, 32
_VMEM_BYTES = 32 << 20


def fits(q_BxTxHxd: jax.Array, pages_LxPxNxCxd: jax.Array) -> bool:
  """Whether the kernel takes these heads: head dims of whole lanes, and key/value heads that fill their tiles."""
  heads, head_dim = pages_LxPxNxCxd.shape[3:]
  packing = 4 // pages_LxPxNxCxd.dtype.itemsize
  tiles, rest = divmod(heads, max(packing, 1))
  return (
    q_BxTxHxd.dtype == pages_LxPxNxCxd.dtype
    and q_BxTxHxd.dtype in (jnp.bfloat16, jnp.float32)
    and head_dim % 128 == 0
    and rest == 0
    and (tiles in (1, 2, 4) or tiles % 8 == 0)
  )


def attend_ragged_paged(
  q_BxTxHxd: jax.Array,
  pages_LxPxNxCxd: jax.Array,
  page_table_BxW: jax.Array,
  starts_B: jax.Array,
  layer: jax.Array,
) -> jax.Array:
  """out_BxTxHxd; see the api.  What an idle slot gives, which starts at -1, means nothing."""
  # Imported late: a process that runs on a CPU needs no kernel before it traces one.
  from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

  L, P, N, C, d = pages_LxPxNxCxd.shape
  (B, T), W = q_BxTxHxd.shape[:2], page_table_BxW.shape[1]
  page_bytes = N * C * d * pages_LxPxNxCxd.dtype.itemsize
  if T > 1:  # padding queries may reach beyond the table
    page_table_BxW = jnp.pad(page_table_BxW, ((0, 0), (0, -(-T // N))))
  out_QxHxd = ragged_paged_attention(
    q_BxTxHxd.reshape(B * T, *q_BxTxHxd.shape[2:]),
    # A layer cut out of the cache would be a copy of it, step after step; its pages are told by their numbers instead.
    pages_LxPxNxCxd.reshape(L * P, N, C, d),
    # The kernel fetches the first block of every sequence and waits for it only where there is something to attend to.
    jnp.maximum(starts_B, 0) + T,
    layer * P + jnp.clip(page_table_BxW, 0, P - 1),
    jnp.arange(B + 1, dtype=jnp.int32) * T,
    jnp.full((1,), B, jnp.int32),
    sm_scale=d**-0.5,
    # Both told, or the kernel asks for the chip that it is traced on, which may be none.
    num_kv_pages_per_block=max(1, min(W, _BLOCK_POSITIONS // N, _BLOCK_BYTES // page_bytes)),
    num_queries_per_block=min(B * T, _QUERIES if T == 1 else _QUERIES_OF_MANY),
    vmem_limit_bytes=_VMEM_BYTES,
  )
  return out_QxHxd.reshape(q_BxTxHxd.shape)
