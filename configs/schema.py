"""The configuration of a run: one tree of frozen dataclasses, valid once it exists.

Every class checks its own fields on construction and `RunConfig` checks what several of them say together, so that no
other file has to.  A mistake raises `ConfigError` with one line that names the field, the value and what would be right.
Nothing here imports JAX: a config can be read, printed and compared on any machine.

The parts have files of their own, and their names are here too: model, parallel, placement, task, rollout, objective.

Source of the RL fields: Ring-1T sections 2.3 and 2.4 (papers.md 1.2, 1.4, 1.5).
"""

import dataclasses
import functools

from configs import placement as placing
from configs.base import ConfigError, Enum, coerce_enum, require, to_dict
from configs.model import ModelConfig, Remat, YarnConfig
from configs.objective import (
  OBJECTIVES,
  Advantage,
  Aggregate,
  Calibration,
  Denominator,
  IcePopConfig,
  Masking,
  OldPolicy,
  PPOConfig,
  RatioLevel,
  Reward,
  TokenWeight,
)
from configs.optimizer import Memory, OptimizerConfig, Schedule
from configs.parallel import ExpertParallel, MeshConfig, ParallelConfig, ShardingRules
from configs.placement import PlacementConfig, Role, Strategy, Switching
from configs.rollout import (
  BudgetCounts,
  KVPolicy,
  OnPurge,
  RetentionCounts,
  RolloutConfig,
  RolloutDtype,
  RolloutSchedule,
  Unit,
)
from configs.task import AnswerFormat, ChatTemplate, TaskConfig, TaskSource, TokenizerConfig

__all__ = [
  "OBJECTIVES",
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
  "Masking",
  "Memory",
  "MeshConfig",
  "ModelConfig",
  "OldPolicy",
  "OnPurge",
  "OptimizerConfig",
  "PPOConfig",
  "PackingConfig",
  "ParallelConfig",
  "PlacementConfig",
  "RLConfig",
  "RatioLevel",
  "Remat",
  "RetentionCounts",
  "Reward",
  "RewardModelConfig",
  "Role",
  "RolloutConfig",
  "RolloutDtype",
  "RolloutSchedule",
  "RunConfig",
  "SFTConfig",
  "Schedule",
  "ShardingRules",
  "Strategy",
  "Switching",
  "TaskConfig",
  "TaskSource",
  "TokenWeight",
  "TokenizerConfig",
  "Unit",
  "YarnConfig",
  "require",
  "to_dict",
]


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


@dataclasses.dataclass(frozen=True)
class RLConfig:
  """One phase of RL.  Which roles it needs follows from what it asks for, see `roles`."""

  steps: int
  minibatches: int = 1  # optimizer steps per rollout batch
  stream: int = 0  # rollouts of a minibatch that is trained on as soon as so many have ended; 0: all have ended first
  staleness: int = 0  # versions by which the weights of a step's rollouts may be behind
  reward: Reward = Reward.VERIFIER
  advantage: Advantage = Advantage.GRPO
  objective: IcePopConfig = IcePopConfig()
  ppo: PPOConfig = PPOConfig()  # read where advantage=gae
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-6)
  eval_every: int = 0  # RL steps between probes of held-out problems; 0: only at the end
  eval_problems: int = 128
  eval_samples: int = 4

  def __post_init__(self):
    coerce_enum(self, "advantage", Advantage, "rl")
    coerce_enum(self, "reward", Reward, "rl")
    require(self.steps >= 0, f"rl.steps={self.steps}: must be at least 0")
    require(self.minibatches > 0, f"rl.minibatches={self.minibatches}: must be at least 1")
    require(self.stream >= 0, f"rl.stream={self.stream}: must be at least 0")
    require(
      self.stream == 0 or self.minibatches == 1,
      f"rl.stream={self.stream} contradicts rl.minibatches={self.minibatches}: what ends first is trained on first",
    )
    require(
      self.advantage is not Advantage.GAE or self.objective.level is RatioLevel.TOKEN,
      "rl.objective.level=sequence contradicts rl.advantage=gae: one ratio a sequence needs one advantage a sequence",
    )
    require(0 <= self.staleness <= 1, f"rl.staleness={self.staleness}: 0, or 1 for one step off-policy")
    require(self.eval_every >= 0, f"rl.eval_every={self.eval_every}: must be at least 0")
    require(self.eval_problems > 0 and self.eval_samples > 0, "rl: eval_problems and eval_samples must be > 0")

  @property
  def roles(self) -> frozenset[Role]:
    """The roles of this phase; the shadow critic is the placement's affair."""
    found = {Role.ACTOR, Role.ROLLOUT}
    if self.advantage is Advantage.GAE:
      found.add(Role.CRITIC)
    if self.objective.kl_coef > 0 or (self.advantage is Advantage.GAE and self.ppo.kl_coef > 0):
      found.add(Role.REFERENCE)
    if self.reward is Reward.MODEL:
      found.add(Role.REWARD)
    return frozenset(found)


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
  """Training of the reward model on preference pairs, from the actor's weights as they are before it."""

  steps: int = 0  # 0: no reward model
  batch_size: int = 32  # pairs a step
  probe_pairs: int = 256  # held-out pairs that its accuracy is measured on
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)

  def __post_init__(self):
    require(self.steps >= 0, f"reward_model.steps={self.steps}: must be at least 0")
    require(self.batch_size > 0 and self.probe_pairs > 0, "reward_model: batch_size and probe_pairs must be > 0")


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
  reward_model: RewardModelConfig = RewardModelConfig()
  rlhf: RLConfig = RLConfig(steps=0)  # general RL, after reasoning RL
  placement: PlacementConfig = PlacementConfig()
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
      not self.rollout.router_replay or self.model.num_moe_layers > 0,
      f"rollout.router_replay=true: the model has no MoE layers (model.first_k_dense_replace="
      f"{self.model.first_k_dense_replace}, num_hidden_layers={self.model.num_hidden_layers})",
    )
    require(
      self.rollout.max_len <= self.packing.length,
      f"packing.length={self.packing.length}: a rollout of rollout.max_prompt_tokens + rollout.max_tokens ="
      f" {self.rollout.max_len} tokens would not fit in a row",
    )
    for name, phase in (("rl", self.rl), ("rlhf", self.rlhf)):
      self._check_phase(name, phase)
    self._check_parallel()
    self._check_switching()
    self._check_workers()
    require(
      self.eval.problems <= self.task.held_out_size,
      f"eval.problems={self.eval.problems}: only task.held_out_size={self.task.held_out_size} are held out",
    )
    for name, count in (
      ("sft.probe_problems", self.sft.probe_problems),
      ("rl.eval_problems", self.rl.eval_problems),
      ("reward_model.probe_pairs", self.reward_model.probe_pairs if self.reward_model.steps else 0),
      ("rlhf.eval_problems", self.rlhf.eval_problems if self.rlhf.steps else 0),
    ):
      require(
        count <= self.task.held_out_size,
        f"{name}={count}: only task.held_out_size={self.task.held_out_size} are held out",
      )

  def _check_workers(self) -> None:
    """Where other processes decode, no device of the trainer's is left to the engine alone."""
    if not self.rollout.is_remote:
      return
    require(
      self.placement.switching is Switching.KEEP,
      "placement.switching=host makes room for the engine, but rollout.workers decode elsewhere",
    )
    seats = self.seats
    require(
      set(seats[Role.ROLLOUT].devices) <= set(seats[Role.ACTOR].devices),
      f"placement.strategy={self.placement.strategy} gives the engine devices that would be idle: rollout.workers decode"
      " elsewhere",
    )

  def _check_switching(self) -> None:
    if self.placement.switching is Switching.KEEP:
      return
    require(
      self.rollout.kv_policy is KVPolicy.RECOMPUTE,
      "placement.switching=host frees the cache during training, but rollout.kv_policy=keep goes on with it",
    )
    seats = self.seats
    require(
      bool(set(seats[Role.ACTOR].devices) & set(seats[Role.ROLLOUT].devices)),
      f"placement.switching=host: with placement.strategy={self.placement.strategy} trainer and engine share no device",
    )

  def _check_phase(self, name: str, phase: RLConfig) -> None:
    require(
      phase.steps == 0 or (self.rollout.top_p == 1.0 and self.rollout.top_k == 0),
      f"rollout.top_p < 1 or rollout.top_k > 0 contradicts {name}.steps > 0: the trainer scores the whole distribution,"
      " so tokens must be sampled from it (evaluate has flags of its own)",
    )
    require(
      phase.steps == 0 or phase.reward is Reward.VERIFIER or (self.reward_model.steps > 0 and name == "rlhf"),
      f"{name}.reward=model: the reward model is trained after reasoning RL, for rlhf, and needs reward_model.steps > 0",
    )

  def phase(self, name: str) -> RLConfig:
    """Of RL: rl or rlhf."""
    return {"rl": self.rl, "rlhf": self.rlhf}[name]

  @property
  def roles(self) -> frozenset[Role]:
    """Of all phases that have steps."""
    found = frozenset({Role.ACTOR, Role.ROLLOUT}).union(*(phase.roles for phase in (self.rl, self.rlhf) if phase.steps))
    apart = self.placement.strategy is Strategy.DISAGGREGATED or Role.SHADOW_CRITIC in self.placement.devices
    return found | {Role.SHADOW_CRITIC} if apart and Role.CRITIC in found else found

  @functools.cached_property
  def seats(self) -> placing.Seats:
    """The devices and the layout of every role."""
    rollout = self.rollout.parallel or self.model.parallel
    return placing.seats(self.placement, self.roles, self.model.parallel, rollout)

  def _check_parallel(self) -> None:
    """Every layout fits the model, and rows and slots fall into equal parts."""
    for role, seat in self.seats.items():
      dataclasses.replace(self.model, parallel=seat.parallel)  # raises where the model cannot be cut so
      sizes = [("packing.rows", self.packing.rows)]
      if role is Role.ROLLOUT:
        sizes = [
          ("rollout.slots", self.rollout.slots),
          ("rollout.prefill_batch", self.rollout.prefill_batch),
          ("rollout.pages", self.rollout.pages),
          ("eval.slots", self.eval.slots),
        ]
      parts = seat.parallel.batch_parts
      for name, value in sizes:
        require(
          value % parts == 0, f"{name}={value}: must be a multiple of {parts}, the devices of {role} that share rows"
        )
    self.rollout.check_pages(self.seats[Role.ROLLOUT].parallel.batch_parts)
