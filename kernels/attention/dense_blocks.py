"""Decode over a dense cache, a few slots and positions at a time: for processors with caches of their own.

Slots go in groups whose keys of one block of positions fit a core's cache.  A group reads blocks up to the end of its
own longest slot (online.py), the last of them half as long where that is enough.  (All positions of all slots at once are
first copied out of the cache's layer, used or not: twice the traffic, and it grows with the cache and not with what is in it.)

Dimension key: L layers, B slots, b slots of a group, S positions, N positions of a block, H query heads, K key/value
heads, G = H / K, d head dim.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.cache import DenseCache
from kernels.attention.online import OnlineSoftmax
from kernels.bits import widened

_POSITIONS = 128  # even
_GROUP_BYTES = 512 << 10  # of keys


def decode_dense_blocks(q_BxHxd: jax.Array, cache: DenseCache, lengths_B: jax.Array, layer: jax.Array) -> jax.Array:
  """out_BxHxd; see the api."""
  (B, H, d), (K, S) = q_BxHxd.shape, cache.v_LxBxKxSxd.shape[2:4]
  N = min(_POSITIONS, S)
  group = min(B, max(1, _GROUP_BYTES // (K * d * N * cache.k_LxBxKxdxS.dtype.itemsize)))
  q_BxKxGxd = q_BxHxd.reshape(B, K, H // K, d)

  def attend(i: jax.Array, out_BxKxGxd: jax.Array) -> jax.Array:
    first = jnp.minimum(i * group, B - group)  # the last group moves back to stay inside
    q_bxKxGxd, lengths_b = (lax.dynamic_slice_in_dim(x, first, group) for x in (q_BxKxGxd, lengths_B))
    part_bxKxGxd = _group(q_bxKxGxd, cache, lengths_b, first, layer, N)
    return lax.dynamic_update_slice_in_dim(out_BxKxGxd, part_bxKxGxd.astype(out_BxKxGxd.dtype), first, 0)

  out_BxHxd = lax.fori_loop(0, -(-B // group), attend, jnp.zeros_like(q_BxKxGxd)).reshape(B, H, d)
  return jnp.where((lengths_B > 0)[:, None, None], out_BxHxd, 0)


def _group(q_bxKxGxd, cache: DenseCache, lengths_b, first, layer, N: int) -> jax.Array:
  b, K, G, d = q_bxKxGxd.shape
  wide = jnp.promote_types(q_bxKxGxd.dtype, jnp.float32)

  def block(N: int, begin: jax.Array, softmax: OnlineSoftmax) -> OnlineSoftmax:
    place = jnp.minimum(begin, cache.v_LxBxKxSxd.shape[3] - N)  # the last block moves back to stay inside
    k_bxKxdxN = lax.dynamic_slice(cache.k_LxBxKxdxS, (layer, first, 0, 0, place), (1, b, K, d, N))[0]
    v_bxKxNxd = lax.dynamic_slice(cache.v_LxBxKxSxd, (layer, first, 0, place, 0), (1, b, K, N, d))[0]
    if k_bxKxdxN.dtype == jnp.uint16:
      k_bxKxdxN, v_bxKxNxd = widened(k_bxKxdxN), widened(v_bxKxNxd)
    scores_bxKxGxN = jnp.einsum("bkgd,bkdn->bkgn", q_bxKxGxd, k_bxKxdxN, preferred_element_type=wide) * d**-0.5
    position_N = place + jnp.arange(N)
    own_bxN = (position_N >= begin) & (position_N < lengths_b[:, None])
    masked_bxKxGxN = jnp.where(own_bxN[:, None, None], scores_bxKxGxN, jnp.finfo(wide).min)

    def weigh(probs_bxKxGxN: jax.Array) -> jax.Array:
      probs_bxKxGxN = probs_bxKxGxN.astype(v_bxKxNxd.dtype)
      return jnp.einsum("bkgn,bknd->bkgd", probs_bxKxGxN, v_bxKxNxd, preferred_element_type=wide)

    return softmax.add(masked_bxKxGxN, weigh)

  half = -(-N // 2)
  halves = -(-jnp.max(lengths_b) // half)
  softmax = OnlineSoftmax.empty((b, K, G, d), wide)
  softmax = lax.fori_loop(0, halves // 2, lambda w, softmax: block(N, w * N, softmax), softmax)
  softmax = lax.fori_loop(0, halves % 2, lambda _, softmax: block(half, halves // 2 * N, softmax), softmax)
  return softmax.result_Rxd
