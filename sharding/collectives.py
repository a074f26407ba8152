"""Collectives that JAX lacks on some platform."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(
  rows_SxD: jax.Array,
  slots: int,
  sent_PxP: jax.Array,
  kept_PxP: jax.Array,
  count_PxP: jax.Array,
  me: jax.Array,
  axis: str,
) -> jax.Array:
  """Device p's rows sent[p, q] .. + count[p, q] go to device q, to its rows kept[p, q] ..; the rest is zero.

  `jax.lax.ragged_all_to_all` on TPU.  XLA has none for the CPU (jax issue 34755): there all rows are gathered and each
  device picks its own, which moves more and gives the same, so that what is built on it can be run and checked.

  Args:
    rows_SxD: this device's rows.
    slots: rows of the result.
    sent_PxP, kept_PxP, count_PxP: int32, from and to; the same on all devices.
    me: this device's index along `axis`.
  """

  def ragged(rows_SxD, sent_PxP, kept_PxP, count_PxP, me):
    empty = jnp.zeros((slots, rows_SxD.shape[1]), rows_SxD.dtype)
    return jax.lax.ragged_all_to_all(
      rows_SxD, empty, sent_PxP[me], count_PxP[me], kept_PxP[me], count_PxP[:, me], axis_name=axis
    )

  def gathered(rows_SxD, sent_PxP, kept_PxP, count_PxP, me):
    all_PxSxD = jax.lax.all_gather(rows_SxD, axis)
    slot_S = jnp.arange(slots)
    begin_Px1, end_Px1 = kept_PxP[:, me, None], (kept_PxP + count_PxP)[:, me, None]
    mine_PxS = (slot_S >= begin_Px1) & (slot_S < end_Px1)
    source_S = jnp.argmax(mine_PxS, axis=0)
    row_S = sent_PxP[source_S, me] + slot_S - kept_PxP[source_S, me]
    return jnp.where(mine_PxS.any(axis=0)[:, None], all_PxSxD[source_S, jnp.clip(row_S, 0, rows_SxD.shape[0] - 1)], 0)

  return jax.lax.platform_dependent(rows_SxD, sent_PxP, kept_PxP, count_PxP, me, tpu=ragged, default=gathered)
