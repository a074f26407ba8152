"""What an implementation of sampling takes and gives.

Dimension key: N tokens, H hidden width, V vocabulary.
"""

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
  hidden: jax.Array  # [N, H]
  weight: jax.Array  # [H, V]
  keys: jax.Array  # [N, 2] int32
  temperature: jax.Array | None  # [N]
  mask: jax.Array | None  # [V] bool
  first: jax.Array | int  # the first id of this vocabulary, where it is one shard's


class Draw(NamedTuple):
  """The winner of each token's race among the ids of this vocabulary, [N] each."""

  race: jax.Array  # float32: its logit plus its noise
  token: jax.Array  # int32: its id, counted from that of the first shard
  logit: jax.Array  # float32
  lse: jax.Array  # float32, over this vocabulary
