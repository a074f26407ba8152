"""FLOPs of a device by formula: 2 x the products that the mathematics asks for, balanced over experts and devices.

    token, one layer    2 D (H + 2 K) d + 2 H d D                 projections
                        4 H d s                                    scores and values against s earlier tokens
                        6 D F (dense) or 6 D f (top_k + shared)    feed-forward, and 2 D E for the router
    token, the head     2 D V

The backward pass is twice the forward pass.  With remat=full a layer is computed once more, except for its feed-forward's
last product and, in an MoE layer, for what only its own output needs; the formula counts the whole layer, as the compiler
may keep less than it could.  The linear log-probability computes its logits twice, forward and backward.

Causal attention over packed rows: a token sees half of its row on average; rows that hold several sequences see less.
"""

from configs.schema import ModelConfig, Remat, RunConfig
from ring_jax.compiled.programs import Kind
from rollout.engine import bucket


def layer(model: ModelConfig, moe: bool, attended: float) -> float:
  """Of one token in one layer, forward."""
  D, H, K, d = model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim
  attention = 2 * D * (H + 2 * K) * d + 2 * H * d * D + 4 * H * d * attended
  if not moe:
    return attention + 6 * D * model.intermediate_size
  experts = model.num_experts_per_tok + model.num_shared_experts
  return attention + 6 * D * model.moe_intermediate_size * experts + 2 * D * model.num_experts


def forward(model: ModelConfig, attended: float) -> float:
  """Of one token in all layers, the head not included."""
  dense = model.first_k_dense_replace * layer(model, False, attended)
  return dense + model.num_moe_layers * layer(model, True, attended)


def head(model: ModelConfig) -> float:
  return 2.0 * model.hidden_size * model.vocab_size


def of(config: RunConfig, kind: Kind, name: str) -> float:
  """Of one device in one run of a program."""
  model, rollout = config.model, config.rollout
  if name == "gradients":
    devices = model.parallel.mesh.num_devices
    passes = 3.0 if model.remat is Remat.NONE else 4.0
    token = passes * forward(model, config.packing.length / 2) + 4 * head(model)
    return config.packing.rows * config.packing.length * token / devices
  devices = (rollout.parallel or model.parallel).mesh.num_devices
  if kind is Kind.PREFILL:
    length = bucket(rollout.max_len)
    return rollout.prefill_batch * length * forward(model, length / 2) / devices
  if kind is Kind.DECODE:
    token = forward(model, rollout.max_len) + head(model)
    return rollout.steps_per_dispatch * rollout.slots * token / devices
  return 0.0  # the optimizer's step and the hand-over multiply nothing
