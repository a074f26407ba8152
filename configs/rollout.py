"""The engine and the C3PO++ scheduler (Ring-1T Algorithm 1; papers.md 1.5)."""

import dataclasses

from configs.base import Enum, coerce_enum, require
from configs.parallel import ParallelConfig


class RolloutDtype(Enum):
  """The dtype the engine's weights are stored in; quantised ones have a scale per output channel."""

  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"
  FP8 = "fp8"  # e4m3
  INT8 = "int8"
  INT4 = "int4"


class RolloutSchedule(Enum):
  """What makes an iteration: the token budget of C3PO++, or a batch of prompts, as it is compared with."""

  C3PO = "c3po"  # prompts come while the pool has room; the budget ends it; what is unfinished goes on in the next one
  SYNCHRONOUS = "synchronous"  # `batch_groups` prompts, each until its longest answer has ended
  OVERSAMPLE_RESUME = (
    "oversample_resume"  # `launch_groups` prompts; it ends with the first `batch_groups`; the rest goes on
  )
  OVERSAMPLE_DISCARD = "oversample_discard"  # the same; the rest is lost, with what of it had ended


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
  slots: int  # sequences decoded at once; of each rollout worker, where there are any
  pool: int = 0  # Omega_infer, rollouts in flight (in slots and waiting); 0: as many as slots, and at least one group
  retention: int = 2  # sigma: how many iterations a rollout may survive unfinished
  group_size: int = 8  # G
  schedule: RolloutSchedule = RolloutSchedule.C3PO
  batch_groups: int = 0  # prompts of an iteration, of the schedules that are batches; these do not look at the budget
  launch_groups: int = 0  # prompts under way at once, of those that over-sample
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
  pages: int = 0  # of the whole engine, for all of its slots; 0: as many as they need at full length
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0  # 0: off
  event_log: bool = True  # every decision into the workdir's events.jsonl, to be replayed and looked at
  router_replay: bool = False  # the engine records each token's experts, and the actor trains on them (R3)
  parallel: ParallelConfig | None = None  # of the engine; None: as the trainer's (model.parallel)
  # Rollout workers, HOST:PORT each, with `slots` of their own; none: the engine runs in this process.  With workers the
  # order of events is a matter of time, so that a run is not reproducible bit for bit (docs/workers.md).
  workers: tuple[str, ...] = ()
  workers_file: str = ""  # with more addresses, one a line, read again and again; empty: none

  def __post_init__(self):
    for name, kind in (
      ("unit", Unit), ("budget_counts", BudgetCounts), ("retention_counts", RetentionCounts), ("on_purge", OnPurge),
      ("kv_policy", KVPolicy), ("dtype", RolloutDtype), ("schedule", RolloutSchedule),
    ):  # fmt: skip
      coerce_enum(self, name, kind, "rollout")
    self._check_schedule()
    if self.pool == 0:
      object.__setattr__(self, "pool", max(self.slots, self.group_size, self.launched * self.group_size))
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
      self.pool >= self.launched * self.group_size,
      f"rollout.pool={self.pool}: {self.launched} prompts at once are {self.launched * self.group_size} rollouts",
    )
    require(
      self.page_size >= 0 and self.page_size & (self.page_size - 1) == 0,
      f"rollout.page_size={self.page_size}: a power of two, or 0",
    )
    for index, address in enumerate(self.workers):
      check_address(address, f"rollout.workers.{index}")
    require(self.pages >= 0, f"rollout.pages={self.pages}: must be at least 0")
    require(not self.pages or self.page_size, f"rollout.pages={self.pages}: needs rollout.page_size")
    require(self.temperature > 0, f"rollout.temperature={self.temperature}: must be > 0")
    require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p}: from above 0 to 1")
    require(self.top_k >= 0, f"rollout.top_k={self.top_k}: must be at least 0 (0: off)")
    require(
      not (self.router_replay and self.is_remote),
      "rollout.router_replay=true: remote workers do not send the experts of their tokens (rollout.workers)",
    )

  def _check_schedule(self) -> None:
    name, batch, launch = self.schedule, self.batch_groups, self.launch_groups
    if name is RolloutSchedule.C3PO:
      require(
        batch == launch == 0,
        f"rollout.batch_groups={batch}, launch_groups={launch}: rollout.schedule=c3po has a budget and no batches",
      )
      return
    require(batch > 0, f"rollout.batch_groups={batch}: rollout.schedule={name} needs at least 1")
    if name is RolloutSchedule.SYNCHRONOUS:
      require(
        launch == 0, f"rollout.launch_groups={launch}: rollout.schedule=synchronous launches rollout.batch_groups"
      )
    else:
      require(
        launch >= batch, f"rollout.launch_groups={launch}: rollout.schedule={name} needs at least batch_groups={batch}"
      )
    require(
      self.unit is Unit.GROUP, f"rollout.schedule={name}: a batch is of whole groups, not rollout.unit={self.unit}"
    )

  @property
  def launched(self) -> int:
    """Prompts that a batch's iteration has under way; 0: there are no batches."""
    return self.launch_groups or self.batch_groups

  @property
  def is_remote(self) -> bool:
    """Whether other processes decode."""
    return bool(self.workers or self.workers_file)

  @property
  def max_len(self) -> int:
    """Positions that one slot's cache must hold."""
    return self.max_prompt_tokens + self.max_tokens

  def check_pages(self, parts: int) -> None:
    """Raises ConfigError: a prompt may need more pages than each of so many devices has."""
    capacity = self.pages // parts * self.page_size
    require(
      not self.pages or capacity > self.max_prompt_tokens,
      f"rollout.pages={self.pages}: {capacity} positions on a device, but a prompt may have"
      f" rollout.max_prompt_tokens={self.max_prompt_tokens}",
    )


def check_address(address: str, where: str) -> None:
  """Raises ConfigError: it is not HOST:PORT."""
  host, _, port = address.rpartition(":")
  good = bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16 and not set(address) & set(" /,")
  require(good, f"{where}={address!r}: must be HOST:PORT, as in 10.0.0.7:8470")
