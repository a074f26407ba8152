"""The configuration of a run: one tree of frozen dataclasses, valid once it exists.

Every class checks its own fields on construction and `RunConfig` checks what several of them say together, so that no
other file has to.  A mistake raises `ConfigError` with one line that names the field, the value and what would be right.
Nothing here imports JAX: a config can be read, printed and compared on any machine.

Source of the RL fields: Ring-1T sections 2.3 and 2.4 (papers.md 1.2, 1.4, 1.5).  The model's are in `configs.model`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from configs.base import ConfigError, Enum, coerce_enum, require, to_dict
from configs.model import ModelConfig, Remat, YarnConfig
from configs.parallel import ExpertParallel, MeshConfig, ParallelConfig, ShardingRules

__all__ = [
  "Advantage",
  "Aggregate",
  "AnswerFormat",
  "BudgetCounts",
  "Calibration",
  "ChatTemplate",
  "CheckpointConfig",
  "ConfigError",
  "Denominator",
  "Enum",
  "EvalConfig",
  "ExpertParallel",
  "IcePopConfig",
  "KVPolicy",
  "Memory",
  "MeshConfig",
  "ModelConfig",
  "OnPurge",
  "OptimizerConfig",
  "PackingConfig",
  "ParallelConfig",
  "RLConfig",
  "Remat",
  "RetentionCounts",
  "RolloutConfig",
  "RolloutDtype",
  "RunConfig",
  "SFTConfig",
  "Schedule",
  "ShardingRules",
  "TaskConfig",
  "TaskSource",
  "TokenWeight",
  "TokenizerConfig",
  "Unit",
  "YarnConfig",
  "require",
  "to_dict",
]

# ---------------------------------------------------------------------------------------------------------------------
# Objective


class Aggregate(Enum):
  """How per-token losses become one number (papers.md 1.4, Part 3)."""

  SEQUENCE_MEAN = "sequence_mean"  # mean over sequences of 1/|y| sum_t: equation 1 of Ring-1T
  TOKEN_MEAN = "token_mean"  # sum over tokens / number of tokens
  TOKEN_BUDGET = "token_budget"  # sum over tokens / Phi: C3PO, equation 2 of Ring-lite


class TokenWeight(Enum):
  """What a token inside the calibration band is multiplied by."""

  RATIO = "ratio"  # k itself: M(k) of equation 2
  ONE = "one"  # a 0/1 mask


class Calibration(Enum):
  """Which policy is compared with the one that sampled."""

  OLD = "old_over_infer"  # pi_train(theta_old) / pi_infer: equation 1
  THETA = "theta_over_infer"  # pi_train(theta) / pi_infer, detached: two policies, no recomputation


class Denominator(Enum):
  ALL = "all"  # masked tokens still count: equation 1
  KEPT = "kept"  # only tokens inside the band count


@dataclasses.dataclass(frozen=True)
class IcePopConfig:
  """The IcePop objective, Ring-1T equations 1 and 2."""

  alpha: float = 0.5
  beta: float = 5.0
  clip_low: float = 0.2
  clip_high: float = 0.2
  aggregate: Aggregate = Aggregate.SEQUENCE_MEAN
  weight: TokenWeight = TokenWeight.RATIO
  calibration: Calibration = Calibration.OLD
  denominator: Denominator = Denominator.ALL
  kl_coef: float = 0.0  # of D_KL(pi_theta || pi_ref), k3 estimate, outside the mask as in equation 1
  token_budget: int = 0  # Phi, for aggregate=token_budget

  def __post_init__(self):
    for name, kind in _ENUMS_OF_ICEPOP.items():
      coerce_enum(self, name, kind, "objective")
    require(
      0.0 <= self.alpha <= self.beta and math.isfinite(self.alpha),
      f"objective.alpha={self.alpha}, beta={self.beta}: need 0 <= alpha <= beta",
    )
    require(0.0 <= self.clip_low <= 1.0, f"objective.clip_low={self.clip_low}: from 0 to 1")
    require(self.clip_high >= 0.0, f"objective.clip_high={self.clip_high}: must be at least 0")
    require(self.kl_coef >= 0.0, f"objective.kl_coef={self.kl_coef}: must be at least 0")
    require(
      self.aggregate is not Aggregate.TOKEN_BUDGET or self.token_budget > 0,
      "objective.aggregate=token_budget needs objective.token_budget (Phi) > 0",
    )
    require(
      self.denominator is Denominator.ALL or self.aggregate is not Aggregate.TOKEN_BUDGET,
      "objective.denominator=kept contradicts aggregate=token_budget, whose denominator is Phi",
    )
    require(
      self.denominator is Denominator.ALL or self.calibration is Calibration.OLD,
      "objective.denominator=kept needs calibration=old_over_infer: what is kept must be known before the gradient",
    )


_ENUMS_OF_ICEPOP = {
  "aggregate": Aggregate,
  "weight": TokenWeight,
  "calibration": Calibration,
  "denominator": Denominator,
}


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


class RolloutDtype(Enum):
  """The dtype the engine's weights are stored in; quantised ones have a scale per output channel."""

  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"
  FP8 = "fp8"  # e4m3
  INT8 = "int8"
  INT4 = "int4"


class KVPolicy(Enum):
  """What happens to the keys and values of an unfinished rollout when new weights arrive."""

  RECOMPUTE = "recompute"  # prompt and partial answer are prefilled again under the new weights
  KEEP = "keep"  # the slot goes on with what it has


class Unit(Enum):
  """What is handed to the trainer as one thing (papers.md 1.5 leaves it open)."""

  GROUP = "group"  # a prompt's G rollouts, once all of them ended
  ROLLOUT = "rollout"  # each rollout by itself: Algorithm 1 to the letter


class BudgetCounts(Enum):
  COMPLETED = "completed"  # full length of rollouts that ended: Algorithm 1
  GENERATED = "generated"  # every token as it is sampled: the prose of section 2.3.3


class RetentionCounts(Enum):
  """What makes a rollout older; the two differ only for what waits for its first slot."""

  ITERATIONS = "iterations"  # every iteration that it survived: "increased by 1 for every unfinished rollout"
  PARTITIONS = "partitions"  # every iteration end that cut it: "the number of partitions it has undergone"


class OnPurge(Enum):
  """What becomes of a rollout whose retention exceeds the limit."""

  DROP = "drop"  # forgotten, as in Algorithm 1 (it is counted, and its length logged)
  REQUEUE = "requeue"  # started again from its prompt
  TRAIN = "train"  # ends where it is, with finish reason "purged", and is scored and trained on


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """Engine and C3PO++ scheduler (Ring-1T Algorithm 1)."""

  token_budget: int  # Phi: an iteration ends when this many tokens are counted
  slots: int  # sequences decoded at once
  pool: int = 0  # Omega_infer, rollouts in flight (slots + waiting); 0: as many as slots, and at least one group
  retention: int = 2  # sigma: how many iterations a rollout may survive unfinished
  group_size: int = 8  # G
  unit: Unit = Unit.GROUP
  budget_counts: BudgetCounts = BudgetCounts.COMPLETED
  retention_counts: RetentionCounts = RetentionCounts.ITERATIONS
  on_purge: OnPurge = OnPurge.DROP
  kv_policy: KVPolicy = KVPolicy.RECOMPUTE
  dtype: RolloutDtype = RolloutDtype.FLOAT32
  max_prompt_tokens: int = 1024
  max_tokens: int = 1024  # of the answer
  steps_per_dispatch: int = 8  # decode steps between two looks of the host
  prefill_batch: int = 8  # prompts prefilled by one dispatch
  page_size: int = 0  # positions of a page of keys and values; 0: each slot's in one piece, which is quicker on a CPU
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0  # 0: off
  parallel: ParallelConfig | None = None  # of the engine; None: as the trainer's (model.parallel)

  def __post_init__(self):
    for name, kind in (
      ("unit", Unit), ("budget_counts", BudgetCounts), ("retention_counts", RetentionCounts), ("on_purge", OnPurge),
      ("kv_policy", KVPolicy), ("dtype", RolloutDtype),
    ):  # fmt: skip
      coerce_enum(self, name, kind, "rollout")
    if self.pool == 0:
      object.__setattr__(self, "pool", max(self.slots, self.group_size))
    for name in (
      "token_budget", "slots", "group_size", "max_prompt_tokens", "max_tokens", "steps_per_dispatch", "prefill_batch",
    ):  # fmt: skip
      require(getattr(self, name) > 0, f"rollout.{name}={getattr(self, name)}: must be at least 1")
    require(self.retention >= 0, f"rollout.retention={self.retention}: must be at least 0")
    require(self.pool >= self.slots, f"rollout.pool={self.pool}: smaller than rollout.slots={self.slots}")
    require(
      self.pool >= self.group_size,
      f"rollout.pool={self.pool}: a group of {self.group_size} rollouts would never fit (rollout.group_size)",
    )
    require(
      self.page_size >= 0 and self.page_size & (self.page_size - 1) == 0,
      f"rollout.page_size={self.page_size}: a power of two, or 0",
    )
    require(self.temperature > 0, f"rollout.temperature={self.temperature}: must be > 0")
    require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p}: from above 0 to 1")
    require(self.top_k >= 0, f"rollout.top_k={self.top_k}: must be at least 0 (0: off)")

  @property
  def max_len(self) -> int:
    """Positions that one slot's cache must hold."""
    return self.max_prompt_tokens + self.max_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and tokenizer


class ChatTemplate(Enum):
  BASE = "base"  # <role>HUMAN</role>question<role>ASSISTANT</role>
  CHAT = "chat"  # the SFT template of Ling 2.0, with its system block and <|role_end|>


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Where token ids come from."""

  path: str = ""  # a tokenizer.json, or a folder that holds one; empty: build one from the run's own text
  merges: int = 0  # how many BPE merges a built tokenizer learns (beyond those of the template's own words)
  template: ChatTemplate = ChatTemplate.BASE
  thinking: bool = False  # whether the generation prompt opens <think>

  def __post_init__(self):
    coerce_enum(self, "template", ChatTemplate, "tokenizer")
    require(self.merges >= 0, f"tokenizer.merges={self.merges}: must be at least 0")


@dataclasses.dataclass(frozen=True)
class TaskSource:
  """One Reasoning Gym task in a mixture."""

  name: str  # any name that Reasoning Gym knows
  weight: float = 1.0
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of that task's own config
  prompt: str = "{question}"  # Python format over question, answer and the entry's metadata
  completion: str = "{answer}"  # what SFT imitates; the same fields, and {trace} where the task has one

  def __post_init__(self):
    require(bool(self.name), "task.mixture: a source needs a name")
    require(self.weight > 0, f"task.mixture: weight={self.weight} of {self.name}: must be > 0")


class AnswerFormat(Enum):
  """How the answer is found in what the model wrote."""

  ALL = "all"  # the whole completion (after </think> where thinking is on)
  BOXED = "boxed"  # the last \\boxed{...}, compared by MathVerify
  HASH = "hash"  # what follows the only '#'


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """Problems, and how answers to them are scored."""

  mixture: tuple[TaskSource, ...]
  train_size: int = 20_000  # problems per source, before those seen in the held-out set are removed
  held_out_size: int = 512  # problems, all sources together
  answer: AnswerFormat = AnswerFormat.ALL
  exact: bool = True  # only a full score is a 1; off: partial credit of the task's scorer
  deadline: float = 2.0  # seconds for one answer's score
  workers: int = 1  # scoring processes
  exclude_profanity: bool = True  # leave out problems whose text holds words that should not be shown

  def __post_init__(self):
    coerce_enum(self, "answer", AnswerFormat, "task")
    object.__setattr__(self, "mixture", tuple(self.mixture))
    require(len(self.mixture) > 0, "task.mixture: needs at least one source")
    require(self.train_size > 0 and self.held_out_size > 0, "task: train_size and held_out_size must be at least 1")
    require(self.deadline > 0, f"task.deadline={self.deadline}: must be > 0 seconds")
    require(self.workers > 0, f"task.workers={self.workers}: must be at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# Training


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


@dataclasses.dataclass(frozen=True)
class PackingConfig:
  """Shape of a training microbatch: `rows` rows of `length` tokens, several sequences in a row."""

  length: int
  rows: int

  def __post_init__(self):
    require(self.length > 1 and self.rows > 0, f"packing: length={self.length} and rows={self.rows} are too small")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Cold start: imitation of worked answers, until the measured accuracy is reached."""

  steps: int  # at most; 0: no SFT
  batch_size: int = 64  # examples a step
  target_accuracy: float = 1.0  # stop once a probe of held-out problems reaches this
  probe_every: int = 25  # steps between probes
  probe_from: int = 0  # no probe before this step
  probe_problems: int = 128
  probe_samples: int = 4
  router_bias_rate: float = 1e-3  # sign update of the selection bias by load (bailing_moe_v2.md 3.10)
  mtp_loss_scale: float = 0.1
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4)

  def __post_init__(self):
    require(self.steps >= 0, f"sft.steps={self.steps}: must be at least 0")
    require(self.batch_size > 0 and self.probe_every > 0, "sft: batch_size and probe_every must be at least 1")
    require(0 < self.target_accuracy <= 1, f"sft.target_accuracy={self.target_accuracy}: from above 0 to 1")
    require(self.probe_problems > 0 and self.probe_samples > 0, "sft: probe_problems and probe_samples must be > 0")
    require(self.router_bias_rate >= 0, "sft.router_bias_rate: must be at least 0")


class Advantage(Enum):
  """Group-relative advantages (papers.md Part 3, equation 1)."""

  GRPO = "grpo"  # (R - mean) / std
  MEAN_ONLY = "mean_only"  # R - mean


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """Reasoning RL with IcePop."""

  steps: int
  minibatches: int = 1  # optimizer steps per rollout batch
  advantage: Advantage = Advantage.GRPO
  objective: IcePopConfig = IcePopConfig()
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-6)
  eval_every: int = 0  # RL steps between probes of held-out problems; 0: only at the end
  eval_problems: int = 128
  eval_samples: int = 4

  def __post_init__(self):
    coerce_enum(self, "advantage", Advantage, "rl")
    require(self.steps >= 0, f"rl.steps={self.steps}: must be at least 0")
    require(self.minibatches > 0, f"rl.minibatches={self.minibatches}: must be at least 1")
    require(self.eval_every >= 0, f"rl.eval_every={self.eval_every}: must be at least 0")
    require(self.eval_problems > 0 and self.eval_samples > 0, "rl: eval_problems and eval_samples must be > 0")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """The measurement that a run ends with."""

  problems: int = 512
  samples: int = 8
  slots: int = 256  # the engine's, while it measures

  def __post_init__(self):
    require(self.problems > 0 and self.samples > 0 and self.slots > 0, "eval: problems, samples and slots must be > 0")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: int = 10  # steps
  keep: int = 2  # how many of the newest stay

  def __post_init__(self):
    require(self.every > 0, f"checkpoint.every={self.every}: must be at least 1")
    require(self.keep > 0, f"checkpoint.keep={self.keep}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One run, from cold start to the end of RL."""

  name: str
  model: ModelConfig
  task: TaskConfig
  sft: SFTConfig
  rl: RLConfig
  rollout: RolloutConfig
  packing: PackingConfig
  tokenizer: TokenizerConfig = TokenizerConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  init: str = ""  # a checkpoint to start from; empty: random weights
  seed: int = 0

  def __post_init__(self):
    require(bool(self.name), "name: a run needs one")
    require(0 <= self.seed < 2**31, f"seed={self.seed}: from 0 to 2**31 - 1")
    require(
      self.rollout.max_len <= self.model.max_position_embeddings,
      f"rollout.max_prompt_tokens + rollout.max_tokens = {self.rollout.max_len}: more than"
      f" model.max_position_embeddings={self.model.max_position_embeddings}",
    )
    require(
      self.rollout.max_len <= self.packing.length,
      f"packing.length={self.packing.length}: a rollout of rollout.max_prompt_tokens + rollout.max_tokens ="
      f" {self.rollout.max_len} tokens would not fit in a row",
    )
    require(
      self.rl.steps == 0 or (self.rollout.top_p == 1.0 and self.rollout.top_k == 0),
      "rollout.top_p < 1 or rollout.top_k > 0 contradicts rl.steps > 0: the trainer scores the whole distribution,"
      " so tokens must be sampled from it (evaluate has flags of its own)",
    )
    require(
      self.rl.objective.kl_coef == 0.0 or self.rl.steps == 0,
      "rl.objective.kl_coef > 0 needs a reference model, which this job does not place",
    )
    self._check_parallel()
    require(
      self.eval.problems <= self.task.held_out_size,
      f"eval.problems={self.eval.problems}: only task.held_out_size={self.task.held_out_size} are held out",
    )
    for name, count in (("sft.probe_problems", self.sft.probe_problems), ("rl.eval_problems", self.rl.eval_problems)):
      require(
        count <= self.task.held_out_size,
        f"{name}={count}: only task.held_out_size={self.task.held_out_size} are held out",
      )

  def _check_parallel(self) -> None:
    """Trainer and engine share their devices here, and rows and slots must fall into equal parts."""
    train, rollout = self.model.parallel, self.rollout.parallel or self.model.parallel
    require(
      rollout.mesh.num_devices == train.mesh.num_devices,
      f"rollout.parallel.mesh has {rollout.mesh.num_devices} devices, model.parallel.mesh {train.mesh.num_devices}:"
      " trainer and engine share their devices",
    )
    dataclasses.replace(self.model, parallel=rollout)  # the engine's cuts must fit the model as well
    for name, value, parallel in (
      ("packing.rows", self.packing.rows, train),
      ("rollout.slots", self.rollout.slots, rollout),
      ("rollout.prefill_batch", self.rollout.prefill_batch, rollout),
      ("eval.slots", self.eval.slots, rollout),
    ):
      parts = parallel.batch_parts
      require(value % parts == 0, f"{name}={value}: must be a multiple of {parts}, the devices that share rows")
