"""AdamW, and where its state waits (papers.md 1.2)."""

import dataclasses

from configs.base import Enum, coerce_enum, require


class Schedule(Enum):
  CONSTANT = "constant"
  COSINE = "cosine"


class Memory(Enum):
  DEVICE = "device"
  HOST = "host"  # pinned host memory


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with warm-up (papers.md 1.2)."""

  learning_rate: float
  schedule: Schedule = Schedule.CONSTANT
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  grad_clip: float = 1.0  # global norm
  memory: Memory = Memory.DEVICE  # where its state waits between steps

  def __post_init__(self):
    coerce_enum(self, "schedule", Schedule, "optimizer")
    coerce_enum(self, "memory", Memory, "optimizer")
    require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: must be > 0")
    require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: must be at least 0")
    require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "optimizer: b1 and b2 must be from 0 to below 1")
    require(self.weight_decay >= 0 and self.grad_clip > 0, "optimizer: weight_decay >= 0 and grad_clip > 0")
