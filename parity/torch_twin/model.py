"""Ling 2.0 / Ring 2.0 in PyTorch, written from the notes (bailing_moe_v2.md sections 2 and 3) and not from `ring_jax.model`.

It exists to disagree: with the JAX model it shares the configuration class and nothing else.  It is the published model's
own layout (module and tensor names of the Hugging Face checkpoint, one fused query/key/value matrix, one module an
expert, a loop over experts), so that a mistake in the layout of either side cannot hide in both.

    model = RingTwin(config)                     weights of config.param_dtype, activations of config.dtype
    out = model(tokens, positions, segments)     rows of packed sequences -> hidden states
    model.logits(out.hidden_BxTxD)               float32
    ScalarTwin(config)(tokens, segments)         float32 [B, T]: values of a critic, scores of a reward model

`collect`, a dict, receives what the layers compute, by (layer, name); see `NAMES`.  The MTP layer's number is
num_hidden_layers.  Router, norm statistics, softmax and rotation are float32 whatever the dtype (float64 in float64).

Dimension key: B rows, T positions, N = B * T tokens, D hidden, H query heads, K kv heads, d head dim, R rotary dims,
E experts, k experts a token, V vocabulary.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from configs.schema import ModelConfig

Collected = dict[tuple[int | None, str], torch.Tensor]

# What `collect` receives, in the order of computation; "router_*" of MoE layers only, layer None for the last two.
NAMES = ("attention", "router_ids", "router_weights", "feed_forward", "block", "hidden", "mtp_hidden")


class TwinOutput(NamedTuple):
  hidden_BxTxD: torch.Tensor  # after the final norm
  mtp_hidden_BxTxD: torch.Tensor | None  # after the MTP layer's final norm


def torch_dtype(name: str) -> torch.dtype:
  return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


def device_of(model: nn.Module) -> torch.device:
  return next(model.parameters()).device


def _wide(x: torch.Tensor) -> torch.Tensor:
  return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
  """A weight [out, in] without bias, cast to the activations' dtype where it is used."""

  def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
    super().__init__(inputs, outputs, bias=False, dtype=dtype)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
  """w * cast(x / sqrt(mean x^2 + eps)): section 3.1."""

  def __init__(self, size: int, config: ModelConfig):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(size, dtype=torch_dtype(config.param_dtype)))
    self.eps = config.rms_norm_eps

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    wide = _wide(x)
    variance = (wide * wide).mean(-1, keepdim=True)
    return self.weight.to(x.dtype) * (wide / torch.sqrt(variance + self.eps)).to(x.dtype)


class Rotation(NamedTuple):
  """cos and sin [B, T, 1, R], float32: of each rotated dimension, both halves alike."""

  cos: torch.Tensor
  sin: torch.Tensor


def rotation(config: ModelConfig, positions_BxT: torch.Tensor) -> Rotation:
  """Section 3.4: frequencies over the rotary dimensions alone, not over the head."""
  exponents = torch.arange(0, config.rotary_dim, 2, device=positions_BxT.device).float() / config.rotary_dim
  frequencies, factor = 1.0 / config.rope_theta**exponents, 1.0
  if config.rope_scaling is not None:
    frequencies, factor = _yarn(config, frequencies)
  angles = torch.cat([positions_BxT.float()[..., None] * frequencies] * 2, dim=-1)[:, :, None, :]
  return Rotation(angles.cos() * factor, angles.sin() * factor)


def _yarn(config: ModelConfig, frequencies: torch.Tensor) -> tuple[torch.Tensor, float]:
  """YaRN: a dimension that turns more than beta_fast times in the original context keeps its frequency, one that turns
  less than beta_slow times has it divided by the factor, with a linear ramp over the dimensions between."""
  yarn, R = config.rope_scaling, config.rotary_dim

  def dimension(turns: float) -> float:
    wavelength = yarn.original_max_position_embeddings / turns
    return R / 2 * math.log(wavelength / (2 * math.pi), config.rope_theta)

  first = max(math.floor(dimension(yarn.beta_fast)), 0)
  last = min(math.ceil(dimension(yarn.beta_slow)), R - 1)
  if first == last:
    last += 0.001
  ramp = torch.arange(R // 2, dtype=torch.float32, device=frequencies.device)
  stretched = ((ramp - first) / (last - first)).clamp(0, 1)
  return torch.lerp(frequencies, frequencies / yarn.factor, stretched), 0.1 * math.log(yarn.factor) + 1


def rotate(x_BxTxHxd: torch.Tensor, by: Rotation) -> torch.Tensor:
  """Rotates the first R dimensions of every head; the others pass through."""
  R = by.cos.shape[-1]
  turning, passing = x_BxTxHxd[..., :R], x_BxTxHxd[..., R:]
  wide = _wide(turning)
  a, b = wide.chunk(2, dim=-1)
  turned = wide * by.cos + torch.cat((-b, a), dim=-1) * by.sin
  return torch.cat((turned.to(x_BxTxHxd.dtype), passing), dim=-1)


def visible(segments_BxT: torch.Tensor) -> torch.Tensor:
  """bool [B, T, T]: row t sees column s if s is not later and of the same sequence (sequences lie together)."""
  same = segments_BxT[:, :, None] == segments_BxT[:, None, :]
  return same & torch.ones_like(same[0]).tril()


class Attention(nn.Module):
  """Section 3.3; the rows of the fused matrix are all Q heads, then all K heads, then all V heads (2.1)."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    dtype, d = torch_dtype(config.param_dtype), config.head_dim
    self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
    self.query_key_value = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * d, dtype)
    self.dense = Linear(self.heads * d, config.hidden_size, dtype)
    self.query_layernorm = RMSNorm(d, config)
    self.key_layernorm = RMSNorm(d, config)

  def position(self, q_BxTxHxd, k_BxTxKxd, by: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of every head, then rotation."""
    return rotate(self.query_layernorm(q_BxTxHxd), by), rotate(self.key_layernorm(k_BxTxKxd), by)

  def forward(self, x_BxTxD: torch.Tensor, by: Rotation, visible_BxTxT: torch.Tensor) -> torch.Tensor:
    B, T, _ = x_BxTxD.shape
    heads = self.query_key_value(x_BxTxD).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim)
    q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
    q, k = self.position(q, k, by)
    share = self.heads // self.kv_heads
    k, v = (part.repeat_interleave(share, dim=2).transpose(1, 2) for part in (k, v))
    scores_BxHxTxT = _wide(q.transpose(1, 2)) @ _wide(k).mT / math.sqrt(self.head_dim)
    hidden = ~visible_BxTxT[:, None]
    probs = scores_BxHxTxT.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype)
    return self.dense((probs @ v).transpose(1, 2).reshape(B, T, -1))


class GatedMLP(nn.Module):
  """down(silu(gate x) * up x): dense layers, every expert, the shared expert (3.5)."""

  def __init__(self, config: ModelConfig, width: int):
    super().__init__()
    dtype = torch_dtype(config.param_dtype)
    self.gate_proj = Linear(config.hidden_size, width, dtype)
    self.up_proj = Linear(config.hidden_size, width, dtype)
    self.down_proj = Linear(width, config.hidden_size, dtype)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
  """Section 3.6: the bias chooses, the score weighs."""

  OUTSIDE = -math.inf  # the score of experts outside of the chosen groups

  def __init__(self, config: ModelConfig):
    super().__init__()
    self.config = config
    self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
    self.register_buffer("expert_bias", torch.zeros(config.num_experts))

  def choose(self, scores_NxE: torch.Tensor) -> torch.Tensor:
    """The ids [N, k] of the experts with the best biased scores within the best groups."""
    biased = (scores_NxE + self.expert_bias.to(scores_NxE.dtype)).detach()
    groups, kept = self.config.n_group, self.config.topk_group
    if groups > 1:
      by_group = biased.unflatten(-1, (groups, -1))
      worth_NxG = by_group.sort(-1, descending=True).values[..., :2].sum(-1)
      best_NxP = worth_NxG.topk(kept, dim=-1).indices
      outside_NxG = torch.ones_like(worth_NxG, dtype=torch.bool).scatter(-1, best_NxP, False)
      biased = by_group.masked_fill(outside_NxG[..., None], self.OUTSIDE).flatten(-2)
    return biased.topk(self.config.num_experts_per_tok, dim=-1).indices

  def weigh(self, scores_NxE: torch.Tensor, ids_Nxk: torch.Tensor) -> torch.Tensor:
    weights = scores_NxE.gather(-1, ids_Nxk)
    if self.config.norm_topk_prob and self.config.num_experts_per_tok > 1:
      weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * self.config.routed_scaling_factor

  def forward(self, x_NxD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _wide(x_NxD)
    scores_NxE = torch.sigmoid(F.linear(wide, self.weight.to(wide.dtype)))
    ids_Nxk = self.choose(scores_NxE)
    return ids_Nxk, self.weigh(scores_NxE, ids_Nxk)


class SparseMLP(nn.Module):
  """Routed experts, none of them with a capacity, and the shared expert, which is not scaled (3.7)."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    self.gate = Router(config)
    self.experts = nn.ModuleList(GatedMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
    shared = config.moe_intermediate_size * config.num_shared_experts
    self.shared_experts = GatedMLP(config, shared) if shared else None

  def combine(self, routed_NxD: torch.Tensor, x_NxD: torch.Tensor) -> torch.Tensor:
    return routed_NxD if self.shared_experts is None else routed_NxD + self.shared_experts(x_NxD)

  def forward(self, x_BxTxD: torch.Tensor, real_BxT: torch.Tensor, note) -> torch.Tensor:
    x_NxD = x_BxTxD.flatten(0, 1)
    ids_Nxk, weights_Nxk = self.gate(x_NxD)
    note("router_ids", ids_Nxk.unflatten(0, x_BxTxD.shape[:2]))
    note("router_weights", weights_Nxk.unflatten(0, x_BxTxD.shape[:2]))
    routed = torch.zeros_like(x_NxD, dtype=weights_Nxk.dtype)
    # Every expert runs, also on no token: under FSDP all ranks must have gradients of the same parameters.
    for number, expert in enumerate(self.experts):
      token, rank = torch.nonzero((ids_Nxk == number) & real_BxT.flatten()[:, None], as_tuple=True)
      routed = routed.index_add(0, token, expert(x_NxD[token]).to(routed.dtype) * weights_Nxk[token, rank, None])
    return self.combine(routed.to(x_NxD.dtype), x_NxD).view_as(x_BxTxD)


class Layer(nn.Module):
  """Section 3.2.  The MTP layer is one of these with four more tensors (2, 3.9)."""

  def __init__(self, config: ModelConfig, number: int):
    super().__init__()
    self.number, self.sparse = number, number >= config.first_k_dense_replace
    self.input_layernorm = RMSNorm(config.hidden_size, config)
    self.attention = Attention(config)
    self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
    self.mlp = SparseMLP(config) if self.sparse else GatedMLP(config, config.intermediate_size)
    if number >= config.num_hidden_layers:
      self.enorm = RMSNorm(config.hidden_size, config)
      self.hnorm = RMSNorm(config.hidden_size, config)
      self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, torch_dtype(config.param_dtype))
      self.final_layernorm = RMSNorm(config.hidden_size, config)

  def feed_forward(self, x_BxTxD: torch.Tensor, real_BxT: torch.Tensor, note) -> torch.Tensor:
    normed = self.post_attention_layernorm(x_BxTxD)
    return self.mlp(normed, real_BxT, note) if self.sparse else self.mlp(normed)

  def forward(self, x_BxTxD, by: Rotation, visible_BxTxT, real_BxT, collect: Collected | None = None) -> torch.Tensor:
    def note(name: str, value: torch.Tensor) -> None:
      if collect is not None:
        collect[self.number, name] = value

    attended = self.attention(self.input_layernorm(x_BxTxD), by, visible_BxTxT)
    note("attention", attended)
    x_BxTxD = x_BxTxD + attended
    fed = self.feed_forward(x_BxTxD, real_BxT, note)
    note("feed_forward", fed)
    note("block", x_BxTxD + fed)
    return x_BxTxD + fed


class Backbone(nn.Module):
  """What the checkpoint calls `model`; its layers include the MTP layer, last."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    dtype = torch_dtype(config.param_dtype)
    self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
    count = config.num_hidden_layers + config.num_nextn_predict_layers
    self.layers = nn.ModuleList(Layer(config, number) for number in range(count))
    self.norm = RMSNorm(config.hidden_size, config)


class Trunk(nn.Module):
  """Everything below the head."""

  def __init__(self, config: ModelConfig):
    super().__init__()
    self.config = config
    self.model = Backbone(config)

  def embed(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
    return self.model.word_embeddings(tokens_BxT).to(torch_dtype(self.config.dtype))

  def forward(
    self,
    tokens_BxT: torch.Tensor,
    positions_BxT: torch.Tensor | None = None,
    segments_BxT: torch.Tensor | None = None,
    collect: Collected | None = None,
    *,
    mtp: bool = True,
  ) -> TwinOutput:
    """Hidden states of rows of packed sequences.

    Args:
      tokens_BxT: ids.
      positions_BxT: within each sequence; default: along the row.
      segments_BxT: from 1, which sequence of its row a token is of; 0: padding.  Default: one sequence a row.
      collect: receives intermediate tensors.
      mtp: whether to run the MTP layer where there is one.
    """
    tokens_BxT = tokens_BxT.long()
    if positions_BxT is None:
      positions_BxT = torch.arange(tokens_BxT.shape[1], device=tokens_BxT.device).expand_as(tokens_BxT)
    if segments_BxT is None:
      segments_BxT = torch.ones_like(tokens_BxT)
    context: tuple[Any, ...] = (rotation(self.config, positions_BxT), visible(segments_BxT), segments_BxT > 0, collect)
    depth = self.config.num_hidden_layers
    x_BxTxD = self.embed(tokens_BxT)
    for layer in self.model.layers[:depth]:
      x_BxTxD = layer(x_BxTxD, *context)
    out = TwinOutput(self.model.norm(x_BxTxD), None)
    if mtp and self.config.num_nextn_predict_layers:
      out = out._replace(mtp_hidden_BxTxD=self._mtp(tokens_BxT, out.hidden_BxTxD, context))
    if collect is not None:
      collect |= {(None, name): value for name, value in zip(NAMES[-2:], out, strict=True) if value is not None}
    return out

  def _mtp(self, tokens_BxT, hidden_BxTxD, context) -> torch.Tensor:
    """Section 3.9: the next token's embedding first, then the hidden state after the final norm."""
    layer = self.model.layers[-1]
    following = tokens_BxT.roll(-1, dims=1)
    following[:, -1] = 0
    both = torch.cat((layer.enorm(self.embed(following)), layer.hnorm(hidden_BxTxD)), dim=-1)
    return layer.final_layernorm(layer(layer.eh_proj(both), *context))


class RingTwin(Trunk):
  """`BailingMoeV2ForCausalLM`; tensors as in its checkpoint."""

  def __init__(self, config: ModelConfig):
    super().__init__(config)
    self.lm_head = Linear(config.hidden_size, config.vocab_size, torch_dtype(config.param_dtype))

  def logits(self, hidden: torch.Tensor) -> torch.Tensor:
    return _wide(self.lm_head(hidden))


class ScalarHead(nn.Module):
  """float32: hidden . weight + bias.  The bias has one dimension, since FSDP2 cuts no scalars."""

  def __init__(self, size: int):
    super().__init__()
    self.weight = nn.Parameter(torch.zeros(size))
    self.bias = nn.Parameter(torch.zeros(1))

  def forward(self, hidden: torch.Tensor) -> torch.Tensor:
    wide = _wide(hidden)
    return wide @ self.weight.to(wide.dtype) + self.bias.to(wide.dtype)


class ScalarTwin(Trunk):
  """A critic or a reward model: the trunk without MTP layer, and a number a token."""

  def __init__(self, config: ModelConfig):
    super().__init__(dataclasses.replace(config, num_nextn_predict_layers=0))
    self.head = ScalarHead(config.hidden_size)

  def forward(self, tokens_BxT: torch.Tensor, segments_BxT: torch.Tensor | None = None) -> torch.Tensor:
    """[B, T]"""
    return self.head(super().forward(tokens_BxT, segments_BxT=segments_BxT).hidden_BxTxD)
