"""How arrays lie on devices: the sizes of the mesh axes, and which of them each logical axis of an array is cut over.

    data     replicas of the parameters; each sees other tokens
    fsdp     parameters and optimizer state are cut over it and gathered layer by layer; each sees other tokens
    expert   experts are cut over it, and tokens travel to them; all else is cut over it as over fsdp; each sees other
             tokens
    tensor   heads, feed-forward width and vocabulary are cut over it; all see the same tokens

There is no axis for the sequence: a row of 32k tokens with rematerialisation fits on the chips that the presets name,
and rows, not parts of rows, are what a batch has plenty of.

Source: architecture decision 3; the exchange forms are jax_practice.md section 6.
"""

import dataclasses
import math

from configs.base import Enum, coerce_enum, require

AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; their product is the number of devices."""

  data: int = 1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1

  def __post_init__(self):
    for name in AXES:
      require(getattr(self, name) > 0, f"mesh.{name}={getattr(self, name)}: must be at least 1")

  @property
  def sizes(self) -> tuple[int, ...]:
    """In the order of AXES."""
    return tuple(getattr(self, name) for name in AXES)

  @property
  def num_devices(self) -> int:
    return math.prod(self.sizes)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axes of each logical axis of an array, major first; () is: not cut."""

  batch: tuple[str, ...] = ("data", "fsdp", "expert")  # rows of tokens, slots: no device repeats another's tokens
  embed: tuple[str, ...] = ("fsdp", "expert")  # the hidden width of weights; gathered before use
  expert_embed: tuple[str, ...] = ("fsdp",)  # the same of the experts' weights, which are not replicated over expert
  heads: tuple[str, ...] = ("tensor",)
  kv_heads: tuple[str, ...] = ("tensor",)  # like heads, or grouped-query attention would need other devices' keys
  mlp: tuple[str, ...] = ("tensor",)  # feed-forward width, dense layers and shared expert
  experts: tuple[str, ...] = ("expert",)
  expert_mlp: tuple[str, ...] = ("tensor",)
  vocab: tuple[str, ...] = ("tensor",)  # of the output matrix and the embedding
  layers: tuple[str, ...] = ()  # stacked layers are scanned: each device needs every layer

  def __post_init__(self):
    for field in dataclasses.fields(self):
      axes = tuple(getattr(self, field.name))
      object.__setattr__(self, field.name, axes)
      for axis in axes:
        require(axis in AXES, f"rules.{field.name}: mesh axis {axis!r}: one of {', '.join(AXES)}")
      require(len(set(axes)) == len(axes), f"rules.{field.name}: names a mesh axis twice")
    require(self.heads == self.kv_heads, "rules.kv_heads: must be cut like rules.heads")
    require(not self.layers, "rules.layers: stacked layers cannot be cut")
    # The programs are written for these; other choices would need other collectives.
    for name, choices in (
      ("embed", (("fsdp", "expert"), ("fsdp",), ())), ("expert_embed", (("fsdp",), ())), ("experts", (("expert",), ())),
      ("heads", (("tensor",), ())), ("mlp", (("tensor",), ())), ("expert_mlp", (("tensor",), ())),
      ("vocab", (("tensor",), ())),
    ):  # fmt: skip
      allowed = " or ".join(str(list(choice)) for choice in choices)
      require(getattr(self, name) in choices, f"rules.{name}: {allowed}")
    require("tensor" not in self.batch, "rules.batch: devices along tensor share their tokens")


class ExpertParallel(Enum):
  """How tokens meet the experts of other devices along the mesh axis `expert`."""

  LOCAL = "local"  # they do not: every device holds all experts
  RING = "ring"  # all-gather tokens, compute for the own experts, reduce-scatter the results
  ALL_TO_ALL = "all_to_all"  # send each row to its expert, in padded blocks; runs on every platform
  RAGGED_ALL_TO_ALL = "ragged_all_to_all"  # the same without padding; TPU


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """Mesh, rules and exchange of one program; the default is one device."""

  mesh: MeshConfig = MeshConfig()
  rules: ShardingRules = ShardingRules()
  expert_parallel: ExpertParallel = ExpertParallel.LOCAL
  expert_buffer: float = 1.25  # rows of an exchange buffer, in units of a balanced load; more rows take more rounds
  moe_chunk: int = 0  # tokens of a device that an MoE layer takes at a time, one chunk after the other; 0: all

  def __post_init__(self):
    coerce_enum(self, "expert_parallel", ExpertParallel, "parallel")
    require(self.expert_buffer > 0, f"parallel.expert_buffer={self.expert_buffer}: must be > 0")
    require(self.moe_chunk >= 0, f"parallel.moe_chunk={self.moe_chunk}: must be at least 0")
    require(
      self.expert_parallel is not ExpertParallel.LOCAL or self.mesh.expert == 1,
      f"parallel.mesh.expert={self.mesh.expert} needs parallel.expert_parallel=ring, all_to_all or ragged_all_to_all",
    )

  @property
  def batch_parts(self) -> int:
    """How many devices hold different rows of a batch."""
    return math.prod(getattr(self.mesh, axis) for axis in self.rules.batch)
