"""The architecture: a Ling 2.0 / Ring 2.0 mixture of experts, and how it is computed.

Source of the fields: the model family's `config.json` (reference notes, bailing_moe_v2.md section 1).
"""

import dataclasses
import math

from configs.base import Enum, coerce_enum, require
from configs.parallel import AXES, ParallelConfig


class Remat(Enum):
  """What a layer keeps of its forward pass for the backward pass."""

  NONE = "none"  # keep everything: fastest, most memory
  DOTS = "dots"  # keep the results of weight matmuls, recompute the rest
  FULL = "full"  # keep only the layer's input
  OFFLOAD = "offload"  # keep only the layer's input, in host memory


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN extension of the rotary embedding (`rope_scaling.type = yarn`)."""

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0

  def __post_init__(self):
    require(self.factor >= 1.0, f"model.rope_scaling.factor={self.factor}: must be at least 1")
    require(
      self.original_max_position_embeddings > 0, "model.rope_scaling.original_max_position_embeddings: must be > 0"
    )
    require(
      self.beta_fast > self.beta_slow > 0, "model.rope_scaling: beta_fast must be larger than beta_slow, both > 0"
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Ling 2.0 / Ring 2.0 mixture of experts (`BailingMoeV2ForCausalLM`); names as in its `config.json`."""

  vocab_size: int  # rows of the embedding, padding included
  hidden_size: int
  num_hidden_layers: int  # without MTP layers
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  intermediate_size: int  # of the dense layers
  moe_intermediate_size: int  # of one expert
  num_experts: int
  num_experts_per_tok: int
  num_shared_experts: int = 1
  first_k_dense_replace: int = 1  # leading layers with a dense MLP
  n_group: int = 1  # 0 and 1 both mean: no grouping
  topk_group: int = 1
  routed_scaling_factor: float = 1.0
  norm_topk_prob: bool = True
  rotary_dim: int = 0  # leading dimensions of a head that rotate; 0: half of them
  rope_theta: float = 600_000.0
  rope_scaling: YarnConfig | None = None
  max_position_embeddings: int = 32_768
  rms_norm_eps: float = 1e-6
  num_nextn_predict_layers: int = 0  # 1: with the multi-token-prediction layer
  initializer_range: float = 0.02
  # How it is computed, not what:
  dtype: str = "float32"  # of activations; the router, norms' statistics, softmax and log-probs are float32 always
  param_dtype: str = "float32"  # of the trainer's copy
  remat: Remat = Remat.NONE
  parallel: ParallelConfig = ParallelConfig()

  def __post_init__(self):
    for name in (
      "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
      "intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "max_position_embeddings",
    ):  # fmt: skip
      require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)}: must be at least 1")
    if self.rotary_dim == 0:
      object.__setattr__(self, "rotary_dim", self.head_dim // 2)
    object.__setattr__(self, "n_group", max(self.n_group, 1))
    object.__setattr__(self, "topk_group", max(self.topk_group, 1))
    require(
      self.num_attention_heads % self.num_key_value_heads == 0,
      f"model.num_key_value_heads={self.num_key_value_heads}: must divide num_attention_heads={self.num_attention_heads}",
    )
    require(
      0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
      f"model.rotary_dim={self.rotary_dim}: must be even and at most head_dim={self.head_dim}",
    )
    require(
      self.num_experts % self.n_group == 0,
      f"model.n_group={self.n_group}: must divide num_experts={self.num_experts}",
    )
    require(
      self.n_group == 1 or self.num_experts // self.n_group >= 2,
      f"model.n_group={self.n_group}: a group needs at least 2 experts (it is scored by its best two)",
    )
    require(self.topk_group <= self.n_group, f"model.topk_group={self.topk_group}: at most n_group={self.n_group}")
    reachable = self.num_experts // self.n_group * self.topk_group
    require(
      self.num_experts_per_tok <= reachable,
      f"model.num_experts_per_tok={self.num_experts_per_tok}: only {reachable} experts can be reached"
      f" in {self.topk_group} of {self.n_group} groups",
    )
    require(
      0 <= self.first_k_dense_replace <= self.num_hidden_layers,
      f"model.first_k_dense_replace={self.first_k_dense_replace}: from 0 to num_hidden_layers={self.num_hidden_layers}",
    )
    require(self.num_shared_experts >= 0, "model.num_shared_experts: must be at least 0")
    require(
      self.num_nextn_predict_layers in (0, 1),
      f"model.num_nextn_predict_layers={self.num_nextn_predict_layers}: only depth 0 and 1 exist",
    )
    require(self.rms_norm_eps > 0 and self.rope_theta > 1, "model: rms_norm_eps must be > 0 and rope_theta > 1")
    for name in ("dtype", "param_dtype"):
      value = getattr(self, name)
      require(value in ("float32", "bfloat16", "float64"), f"model.{name}={value!r}: float32, bfloat16 or float64")
    coerce_enum(self, "remat", Remat, "model")
    self._check_parallel()

  def _check_parallel(self) -> None:
    """Every dimension that the rules cut must fall into equal parts."""
    parallel = self.parallel
    sizes = dict(zip(AXES, parallel.mesh.sizes, strict=True))
    for name, axis in (
      ("hidden_size", "embed"), ("hidden_size", "expert_embed"), ("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads"),
      ("intermediate_size", "mlp"), ("moe_intermediate_size", "expert_mlp"), ("num_experts", "experts"),
      ("vocab_size", "vocab"),
    ):  # fmt: skip
      parts = math.prod(sizes[mesh_axis] for mesh_axis in getattr(parallel.rules, axis))
      require(
        getattr(self, name) % parts == 0,
        f"model.{name}={getattr(self, name)}: cannot be cut into {parts} equal parts (parallel.rules.{axis},"
        f" parallel.mesh)",
      )

  @property
  def num_moe_layers(self) -> int:
    return self.num_hidden_layers - self.first_k_dense_replace
