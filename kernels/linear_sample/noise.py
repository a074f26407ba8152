"""The noise that samples: of each (token, id), by counter, so that every implementation draws the same token.

A token's key is fold_in(fold_in(seed, rollout uid), position) (architecture decision 6), two words.  The noise of id j is
one of the two words of

    threefry2x32(key, (256 ids at a time, 128 lanes of them: (j // 256) * 128 + j % 128, TAG))

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), 20 rounds: the first word for the lower 128 ids of
the 256, the second for the upper ones.  So a tile of whole groups of 256 hashes half as often as it has ids.  TAG keeps
these words apart from what else is drawn with the key.

A word becomes an exponential variable E = -log(1 - v), v in (0, 1), and argmax_j (x_j - log E_j) is a draw from
softmax(x): the Gumbel-max trick, or the winner of a race with rates exp(x_j).  What decides is small E, so v is kept to
32 bits near 0: a float32 between 0 and 1 has only 24 near 1, where `-log(u)` would need them.

int32 throughout, whose sums wrap: the TPU's vector unit has no unsigned conversions.

Dimension key: N tokens, C ids.
"""

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 256
_LANES = 128
TAG = 0x53414D50

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def token_keys(seeds_N: jax.Array, uids_N: jax.Array, positions_N: jax.Array) -> jax.Array:
  """uint32 [N, 2] from integers: the seed of the run, the rollout, and the position that the token will take."""

  def key(seed, uid, position):
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), uid), position))

  return jax.vmap(key)(seeds_N, uids_N, positions_N)


def threefry2x32(key0, key1, count0, count1) -> tuple[jax.Array, jax.Array]:
  """Two words from two keys and two counters, int32 arrays that broadcast together."""
  keys = (key0, key1, key0 ^ key1 ^ _PARITY)
  x0, x1 = count0 + keys[0], count1 + keys[1]
  for i in range(5):
    for rotation in _ROTATIONS[i % 2]:
      x0 = x0 + x1
      x1 = (x1 << rotation) | lax.shift_right_logical(x1, jnp.int32(32 - rotation))
      x1 = x0 ^ x1
    x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + (i + 1)
  return x0, x1


def bits_of_ids(key0, key1, ids) -> jax.Array:
  """Words of any ids; all arrays broadcast together."""
  pair = lax.shift_right_logical(ids, jnp.int32(8)) * _LANES + (ids & (_LANES - 1))
  low, high = threefry2x32(key0, key1, pair, jnp.int32(TAG))
  return jnp.where((ids & _LANES) == 0, low, high)


def bits_of_groups(key0_Nx1, key1_Nx1, first, count: int) -> jax.Array:
  """Words [N, count] of the ids from `first` on, with half the hashes: both are multiples of 256.

  A caller that cannot tell `first` until the program runs vouches for it.
  """
  lane_1xP = lax.broadcasted_iota(jnp.int32, (1, count // 2), 1)  # P = count / 2
  low_NxP, high_NxP = threefry2x32(
    key0_Nx1, key1_Nx1, lane_1xP + lax.shift_right_logical(first, jnp.int32(1)), jnp.int32(TAG)
  )
  halves = [word[:, i : i + _LANES] for i in range(0, count // 2, _LANES) for word in (low_NxP, high_NxP)]
  return jnp.concatenate(halves, axis=1)


def gumbel(bits: jax.Array) -> jax.Array:
  """-log E, float32."""
  half = lax.shift_right_logical(bits, jnp.int32(1)).astype(jnp.float32)
  v = jnp.minimum((half + 0.5) * 2.0**-31, 1 - 2.0**-24)
  series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4))))  # of -log(1 - v), where that would lose digits
  return -jnp.log(jnp.where(v < 2.0**-6, series, -jnp.log(1 - v)))
