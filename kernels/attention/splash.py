"""Attention over packed rows on a TPU: the splash attention kernels that JAX ships.

Scores never leave the chip's vector memory, and blocks of the attention matrix that hold nothing are left out.  Splash
itself knows of empty blocks from a mask that is fixed when the program is traced, such as the causal one.  Which blocks
two segments share is data, so the tables that steer its grid are made here, on the device, for every row: `block_mask`
says which blocks run, `data_next` which block is fetched next.  A row then costs what its segments cost, as with
`xla_blocked`, and all rows of a batch share one program; they go one after the other, as the grid's steps do anyway.

The kernel does not scale the scores; the queries are scaled instead, and with bfloat16 that is one rounding more than
`reference` has.

Sources: jax.experimental.pallas.ops.tpu.splash_attention; reference notes, pallas.md sections 4 and 8.
Dimension key: B rows, T positions, H query heads, K key/value heads, d head dim, I query blocks, J key blocks.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.segments import blocks_needed

# Bundles (issued instructions) of the three compiled kernels per 1000 pairs of a query and a key, v5p; the other chips
# rank blocks alike (docs/kernels.md).
_BLOCK_COST = {1024: 20.5, 512: 26.8, 256: 55.8, 128: 141.6}
_COMPUTE_BLOCK = 512  # keys of one product within a block: more would not fit beside it in registers and memory


def forward(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT, *, interpret: bool = False):
  """(out_BxTxHxd, lse_BxHxT float32); see the api.  interpret: evaluate the kernel's body with XLA, on any machine."""

  def row(arrays):
    q_HxTxd, k_KxTxd, v_KxTxd, ids_T = arrays
    kernel, segments = _kernel(ids_T, block, save_residuals=True, interpret=interpret)
    out_HxTxd, (lse_HxT,) = kernel(q_HxTxd, k_KxTxd, v_KxTxd, segments)
    return out_HxTxd, lse_HxT

  T = q_BxTxHxd.shape[1]
  block = block_size(T)
  q_k_v = (_heads_first(x, block) for x in (_scaled(q_BxTxHxd), k_BxTxKxd, v_BxTxKxd))
  out_BxHxTxd, lse_BxHxT = lax.map(row, (*q_k_v, _padded(segment_ids_BxT, block)))
  return out_BxHxTxd[:, :, :T].swapaxes(1, 2), lse_BxHxT[..., :T]


def backward(
  q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT, out_BxTxHxd, lse_BxHxT, dout_BxTxHxd, *, interpret: bool = False
):
  """(dq_BxTxHxd, dk_BxTxKxd, dv_BxTxKxd) for the cotangent of out."""
  # Splash offers its backward pass only through its own VJP.  Ours has to be one with that of the other backends,
  # whose residuals it shares, so it is called by its private name.
  from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import _splash_attention_bwd

  def row(arrays):
    q_HxTxd, k_KxTxd, v_KxTxd, ids_T, out_HxTxd, lse_HxT, dout_HxTxd = arrays
    kernel, segments = _kernel(ids_T, block, save_residuals=False, interpret=interpret)
    residuals = (
      q_HxTxd,
      k_KxTxd,
      v_KxTxd,
      segments,
      None,
      out_HxTxd,
      lse_HxT,
      kernel.dq_mask_info,
      kernel.dkv_mask_info,
    )
    grads = _splash_attention_bwd(**kernel.kwargs, res=residuals, do=dout_HxTxd)
    return grads[3:6]

  T = q_BxTxHxd.shape[1]
  block = block_size(T)
  q_k_v = (_heads_first(x, block) for x in (_scaled(q_BxTxHxd), k_BxTxKxd, v_BxTxKxd))
  out_BxHxTxd, dout_BxHxTxd = (_heads_first(x, block) for x in (out_BxTxHxd, dout_BxTxHxd))
  lse_BxHxT = _padded(lse_BxHxT, block)
  grads = lax.map(row, (*q_k_v, _padded(segment_ids_BxT, block), out_BxHxTxd, lse_BxHxT, dout_BxHxTxd))
  dq_BxTxHxd, dk_BxTxKxd, dv_BxTxKxd = (x[:, :, :T].swapaxes(1, 2) for x in grads)
  return _scaled(dq_BxTxHxd), dk_BxTxKxd, dv_BxTxKxd


def _scaled(x_BxTxHxd: jax.Array) -> jax.Array:
  return (x_BxTxHxd.astype(jnp.float32) * x_BxTxHxd.shape[-1] ** -0.5).astype(x_BxTxHxd.dtype)


def block_size(num_positions: int) -> int:
  """The block with which a row of one segment costs least; large ones are cheap to compute, small ones waste less."""

  def cost(block: int) -> float:
    blocks = -(-num_positions // block)
    return blocks * (blocks + 1) * block**2 * _BLOCK_COST[block]

  return min(_BLOCK_COST, key=cost)


def _heads_first(x_BxTxHxd: jax.Array, block: int) -> jax.Array:
  """[B, H, T, d], with T padded to whole blocks."""
  return _padded(x_BxTxHxd.transpose(0, 2, 3, 1), block).swapaxes(2, 3)


def _padded(x: jax.Array, block: int) -> jax.Array:
  """The last side padded to whole blocks, with zeros: for segments that is padding too."""
  return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % block),))


def _causal(query: jax.Array, key: jax.Array) -> jax.Array:
  return query >= key


def _kernel(segment_ids_T: jax.Array, block: int, *, save_residuals: bool, interpret: bool):
  """Splash attention of one row, and its segments in splash's form."""
  # Imported late: a process that runs on a CPU needs no kernel before it traces one.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

  needed_IxJ = blocks_needed(segment_ids_T, block, block)
  position_T = jnp.arange(len(segment_ids_T), dtype=jnp.int32)

  def info(next_IxJ: jax.Array) -> MaskInfo:
    return MaskInfo(
      data_next=next_IxJ[None],
      mask_next=None,
      block_mask=needed_IxJ[None].astype(jnp.int32),
      partial_mask_blocks=None,
      q_sequence=position_T,
    )

  along_keys, along_queries = info(_next(needed_IxJ, axis=1)), info(_next(needed_IxJ, axis=0))
  sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv"), block)
  sizes |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), min(block, _COMPUTE_BLOCK))
  kernel = splash.SplashAttentionKernel(
    along_keys,
    along_keys,
    along_queries,
    block_sizes=splash.BlockSizes(**sizes),
    is_mqa=False,
    save_residuals=save_residuals,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    mask_function=_causal,
    interpret=interpret,
  )
  return kernel, splash.SegmentIds(segment_ids_T, segment_ids_T)


def _next(needed_IxJ: jax.Array, axis: int) -> jax.Array:
  """int32 [I, J]: the first needed block at or after each along the axis; after the last one, that one.

  A block that runs is its own, and between two that run the next one is fetched early.
  """
  count = needed_IxJ.shape[axis]
  place_IxJ = lax.broadcasted_iota(jnp.int32, needed_IxJ.shape, axis)
  coming_IxJ = lax.cummin(jnp.where(needed_IxJ, place_IxJ, count), axis=axis, reverse=True)
  last = jnp.max(jnp.where(needed_IxJ, place_IxJ, 0), axis=axis, keepdims=True)
  return jnp.minimum(coming_IxJ, last)
