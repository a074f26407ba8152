"""The Ling 2.0 / Ring 2.0 transformer (reference notes, bailing_moe_v2.md section 3).

    x = embed(tokens)
    first_k_dense_replace layers:   x += attn(norm x); x += mlp(norm x)
    the other layers:               x += attn(norm x); x += moe(norm x)
    hidden = norm(x);   logits, log-probs and samples are ops over (hidden, lm_head)
    optional MTP layer:             hidden_t and the next token's embedding give the hidden state that predicts t + 2

Layers of one kind are stacked on a leading axis and scanned, so that an 80-layer model compiles like a 2-layer one.
Flax NNX holds the structure; the world outside sees a nested dict of arrays (architecture decision 2).

Dimension key: B rows or slots, T positions, W pages of a slot, D hidden, L layers, E experts, K experts a token, V
vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from configs.schema import ModelConfig, Remat
from kernels.attention import DenseCache, PagedCache
from ring_jax.model.attention import Attention, KVCache
from ring_jax.model.layers import MLP, RMSNorm, normal, rotary_tables, weight
from ring_jax.model.moe import MoE
from sharding import rules

_INPUT = "layer_input"
_REMAT_POLICY = {
  Remat.DOTS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  Remat.FULL: None,
  Remat.OFFLOAD: jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


class ForwardOutput(NamedTuple):
  hidden_BxTxD: jax.Array  # after the final norm
  mtp_hidden_BxTxD: jax.Array | None  # after the MTP layer's final norm; the lm_head applies to it too
  expert_counts_LxE: jax.Array  # int32: tokens each expert of each MoE layer got (the MTP layer not included)
  kv: DenseCache | None  # keys and values of the tokens given, where asked for; S = T
  experts_LxBxTxK: jax.Array | None  # int32: of each token in each MoE layer, where asked for


class Block(nnx.Module):
  """One layer, dense or MoE (section 3.2)."""

  def __init__(self, config: ModelConfig, moe: bool, rngs: nnx.Rngs):
    self.input_norm = RMSNorm(config, config.hidden_size)
    self.attention = Attention(config, rngs)
    self.post_norm = RMSNorm(config, config.hidden_size)
    if moe:
      self.moe = MoE(config, rngs)
    else:
      self.mlp = MLP(config, config.intermediate_size, rngs)

  def _feed_forward(self, x_BxTxD, valid_BxT, given_BxTxK=None, *, index=None, record=False):
    with jax.named_scope("feed_forward"):
      if hasattr(self, "moe"):
        x_norm_BxTxD = self.post_norm(x_BxTxD)
        out_BxTxD, routed = self.moe(x_norm_BxTxD, valid_BxT, given_BxTxK, index=index, record=record)
      else:
        out_BxTxD, routed = self.mlp(self.post_norm(x_BxTxD)), None
      return x_BxTxD + out_BxTxD, routed

  def __call__(self, x_BxTxD, rotary, segment_ids_BxT, given_BxTxK=None, *, index=None, prefill=False, record=False):
    """`index`: see `decode`; None where the layer holds its own experts."""
    with jax.named_scope("attention"):
      out_BxTxD, kv = self.attention(self.input_norm(x_BxTxD), rotary, segment_ids_BxT, prefill)
    x_BxTxD, routed = self._feed_forward(
      x_BxTxD + out_BxTxD, segment_ids_BxT > 0, given_BxTxK, index=index, record=record
    )
    return x_BxTxD, routed, kv

  def decode(self, x_Bx1xD, rotary, positions_B, active_B, cache, layer, index, page_table_BxW, *, record):
    """`layer` of all, whose cache it is; `index` of its kind, whose experts it has."""
    with jax.named_scope("attention"):
      out_Bx1xD, cache = self.attention.decode(
        self.input_norm(x_Bx1xD), rotary, positions_B, active_B, cache, layer, page_table_BxW
      )
    x_Bx1xD, routed = self._feed_forward(x_Bx1xD + out_Bx1xD, active_B[:, None], index=index, record=record)
    return x_Bx1xD, cache, routed

  def extend(self, x_BxTxD, rotary, starts_B, counts_B, cache, layer, index, page_table_BxW):
    with jax.named_scope("attention"):
      out_BxTxD, cache = self.attention.extend(
        self.input_norm(x_BxTxD), rotary, starts_B, counts_B, cache, layer, page_table_BxW
      )
    valid_BxT = jnp.arange(x_BxTxD.shape[1]) < counts_B[:, None]
    x_BxTxD, _ = self._feed_forward(x_BxTxD + out_BxTxD, valid_BxT, index=index)
    return x_BxTxD, cache


class Embedding(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.embedding = normal(config, rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"))

  def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
    axes = self.config.parallel.rules
    look_up = rules.manual(self._look_up, axes, (("vocab", "embed"), ("batch", None)), ("batch", None, None))
    return look_up(self.embedding[...], tokens_BxT)

  def _look_up(self, embedding_VxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """The table stays where it is: each device finds its columns and ids for its neighbours' tokens too, and what is
    found travels.  Its gradient is summed where it lies, in the table's dtype.
    """
    axes = self.config.parallel.rules
    tokens_BxT = rules.all_gather(tokens_BxT, axes.embed, 0)
    if rules.axis_size(axes.vocab) == 1:
      found_BxTxD = embedding_VxD[tokens_BxT]
    else:
      row_BxT = tokens_BxT - rules.axis_index(axes.vocab) * embedding_VxD.shape[0]
      mine_BxT = (row_BxT >= 0) & (row_BxT < embedding_VxD.shape[0])
      found_BxTxD = jnp.where(mine_BxT[..., None], embedding_VxD[jnp.where(mine_BxT, row_BxT, 0)], 0)
    found_BxTxD = rules.all_to_all(found_BxTxD.astype(self.config.dtype), axes.embed, 0, 2)
    return rules.psum(found_BxTxD, axes.vocab)


class Projection(nnx.Module):
  """A bare weight [in, out]."""

  def __init__(self, config: ModelConfig, shape: tuple[int, int], axes: rules.LogicalAxes, rngs: nnx.Rngs):
    self.kernel = normal(config, rngs, shape, axes)


class MTPLayer(nnx.Module):
  """Multi-token prediction, depth 1 (section 3.9): embedding first, then hidden; same mask, same positions."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D = config.hidden_size
    self.enorm, self.hnorm = RMSNorm(config, D), RMSNorm(config, D)
    self.config = config
    self.eh_proj = Projection(config, (2 * D, D), ("embed", None), rngs)
    self.block = Block(config, moe=True, rngs=rngs)
    self.final_norm = RMSNorm(config, D)

  def __call__(self, embedded_BxTxD, hidden_BxTxD, rotary, segment_ids_BxT):
    both_BxTx2D = jnp.concatenate([self.enorm(embedded_BxTxD), self.hnorm(hidden_BxTxD)], axis=-1)
    x_BxTxD = both_BxTx2D @ weight(self.config, self.eh_proj.kernel, both_BxTx2D.dtype)
    x_BxTxD, _, _ = self.block(x_BxTxD, rotary, segment_ids_BxT)
    return self.final_norm(x_BxTxD)


class RingModel(nnx.Module):
  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    self.embed = Embedding(config, rngs)
    if config.first_k_dense_replace:
      self.dense_layers = _stack(config, False, config.first_k_dense_replace, rngs)
    if config.num_moe_layers:
      self.moe_layers = _stack(config, True, config.num_moe_layers, rngs)
    self.final_norm = RMSNorm(config, config.hidden_size)
    self.lm_head = Projection(config, (config.hidden_size, config.vocab_size), ("embed", "vocab"), rngs)
    if config.num_nextn_predict_layers:
      self.mtp = MTPLayer(config, rngs)

  def _stacks(self) -> list[Block]:
    return [getattr(self, name) for name in ("dense_layers", "moe_layers") if hasattr(self, name)]

  def __call__(
    self,
    tokens_BxT,
    positions_BxT,
    segment_ids_BxT,
    experts_LxBxTxK,
    *,
    return_kv: bool,
    return_experts: bool,
    mtp: bool,
  ) -> ForwardOutput:
    tokens_BxT, positions_BxT, segment_ids_BxT = (
      rules.reshard(x_BxT, self.config.parallel.rules, "batch", None)
      for x_BxT in (tokens_BxT, positions_BxT, segment_ids_BxT)
    )
    rotary = rotary_tables(self.config, positions_BxT)
    x_BxTxD = self.embed(tokens_BxT)
    if experts_LxBxTxK is not None:
      experts_LxBxTxK = rules.reshard(experts_LxBxTxK, self.config.parallel.rules, None, "batch", None, None)
    counts, caches, chosen = [jnp.zeros((0, self.config.num_experts), jnp.int32)], [], None
    for stack in self._stacks():
      graph, experts, cut = _split(stack, cut_experts=not return_kv)  # with keys and values no gradient is asked for

      def layer(x, cut, graph=graph, experts=experts):
        (params, index), given = cut
        x = checkpoint_name(x, _INPUT)
        x, routed, kv = nnx.merge(graph, experts, params)(
          x, rotary, segment_ids_BxT, given, index=index, prefill=return_kv, record=return_experts
        )
        return x, (routed, kv if return_kv else None)

      if self.config.remat is not Remat.NONE:
        layer = jax.checkpoint(layer, policy=_REMAT_POLICY[self.config.remat])
      given = experts_LxBxTxK if hasattr(stack, "moe") else None
      x_BxTxD, (routed, kv) = jax.lax.scan(layer, x_BxTxD, (cut, given))
      if routed is not None:
        counts.append(routed.counts_E)
        chosen = routed.ids_BxTxK
      if return_kv:
        caches.append(DenseCache(*kv))
    hidden_BxTxD = self.final_norm(x_BxTxD)
    mtp_hidden = None
    if mtp and self.config.num_nextn_predict_layers:
      following_BxT = jnp.pad(tokens_BxT[:, 1:], ((0, 0), (0, 1)))  # the last position is filled with id 0
      mtp_hidden = self.mtp(self.embed(following_BxT), hidden_BxTxD, rotary, segment_ids_BxT)
    kv = DenseCache(*(jnp.concatenate(part) for part in zip(*caches, strict=True))) if return_kv else None
    return ForwardOutput(hidden_BxTxD, mtp_hidden, jnp.concatenate(counts), kv, chosen)

  def decode(self, tokens_B, positions_B, active_B, cache: KVCache, page_table_BxW, *, return_experts: bool):
    tokens_B, positions_B, active_B = (
      rules.reshard(x_B, self.config.parallel.rules, "batch") for x_B in (tokens_B, positions_B, active_B)
    )
    rotary = rotary_tables(self.config, positions_B[:, None])
    carry = (self.embed(tokens_B[:, None]), cache)
    first, chosen = 0, None
    for stack in self._stacks():
      graph, experts, cut = _split(stack)

      def layer(carry, cut, graph=graph, experts=experts, first=first):
        params, index = cut
        *carry, routed = nnx.merge(graph, experts, params).decode(
          carry[0], rotary, positions_B, active_B, carry[1], first + index, index, page_table_BxW, record=return_experts
        )
        return tuple(carry), routed.ids_BxTxK if return_experts and routed else None

      # The cache is carried, not scanned over: as a carry it is updated in place.
      carry, ids_LxBx1xK = jax.lax.scan(layer, carry, cut)
      chosen = chosen if ids_LxBx1xK is None else ids_LxBx1xK[:, :, 0]
      first += len(cut[1])
    x_Bx1xD, cache = carry
    hidden_BxD = self.final_norm(x_Bx1xD)[:, 0]
    return (hidden_BxD, cache, chosen) if return_experts else (hidden_BxD, cache)

  def extend(self, tokens_BxT, starts_B, counts_B, cache: PagedCache, page_table_BxW) -> PagedCache:
    """The last layer's output is of no use; layers are scanned, and so it is computed."""
    tokens_BxT, page_table_BxW = (
      rules.reshard(x, self.config.parallel.rules, "batch", None) for x in (tokens_BxT, page_table_BxW)
    )
    starts_B, counts_B = (rules.reshard(x_B, self.config.parallel.rules, "batch") for x_B in (starts_B, counts_B))
    rotary = rotary_tables(self.config, starts_B[:, None] + jnp.arange(tokens_BxT.shape[1]))
    carry, first = (self.embed(tokens_BxT), cache), 0
    for stack in self._stacks():
      graph, experts, cut = _split(stack)

      def layer(carry, cut, graph=graph, experts=experts, first=first):
        params, index = cut
        block = nnx.merge(graph, experts, params)
        return block.extend(carry[0], rotary, starts_B, counts_B, carry[1], first + index, index, page_table_BxW), None

      carry, _ = jax.lax.scan(layer, carry, cut)
      first += len(cut[1])
    return carry[1]


def _stack(config: ModelConfig, moe: bool, depth: int, rngs: nnx.Rngs) -> Block:
  @nnx.split_rngs(splits=depth)
  @nnx.vmap(in_axes=(0,), out_axes=0)
  def make(rngs):
    return Block(config, moe, rngs)

  return make(rngs)


def _split(stack: Block, *, cut_experts: bool = False):
  """(structure, the experts of all layers, (the other parameters, the number of each layer)): a scan goes over the last.

  The scan would copy a layer's experts, of which a decode step needs few and a prefill each once.  Where gradients are
  asked for they must come layer by layer: with `cut_experts` they are among the others, and layers have no number.
  """
  graph, experts, rest = nnx.split(stack, lambda path, _: not cut_experts and "experts" in path, ...)
  return graph, experts, (rest, None if cut_experts else jnp.arange(len(jax.tree.leaves(rest)[0])))
