"""What a job consists of, made from its config: data, roles on their devices, phases; and the weights that they work on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from configs.placement import num_devices
from configs.schema import Role, RolloutConfig, RunConfig
from ring_jax.checkpoint.store import Restored
from ring_jax.data.preferences import Pair, Preferences
from ring_jax.data.tasks import Problem
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.model import scalar_from_actor
from ring_jax.rewards.pool import ScoringPool
from ring_jax.train.assets import initial_params, prepare_tasks
from ring_jax.train.orchestrator import Orchestrator
from ring_jax.train.preference import RewardModelPhase
from ring_jax.train.roles import Roles, Weights
from ring_jax.train.scoring import Scorer
from ring_jax.train.sft import SFTPhase
from ring_jax.train.stream import PairStream, ProblemStream
from ring_jax.train.turns import Turns
from ring_jax.train.workdir import Workdir
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.events import EventLog
from rollout.probe import EngineProbe
from rollout.remote import wire
from rollout.remote.pool import WorkerPool
from rollout.remote.shared import SharedPool
from rollout.scheduler import C3POScheduler
from rollout.worker import EngineWorker
from sharding import processes

_RL = ("rl", "rlhf")


@dataclasses.dataclass
class Parts:
  """The machinery of a job; its state is elsewhere, but for cursors, scheduler and the engine's cache."""

  config: RunConfig
  tokenizer: Tokenizer
  held_out: list[Problem]
  held_out_pairs: list[Pair]
  scorer: Scorer
  roles: Roles
  scheduler: C3POScheduler
  worker: EngineWorker | WorkerPool | SharedPool
  streams: dict[str, ProblemStream | PairStream]
  sft: SFTPhase
  reward: RewardModelPhase | None  # None: the run has none
  rl: dict[str, Orchestrator]

  @classmethod
  def of(
    cls,
    config: RunConfig,
    workdir: Workdir,
    pool: ScoringPool | None,
    span: Callable[..., Any],
    log: EventLog | None,
  ) -> "Parts":
    """Args:
    pool: running, on the first process.
    span: times and shows work; takes its kind and the step.
    log: of the rollouts' scheduling.
    """
    tokenizer, tasks = prepare_tasks(
      config.task, config.tokenizer, config.rollout, config.seed, config.init, workdir.path
    )
    mask_V = tokenizer.sampleable_mask(config.model.vocab_size)
    roles = Roles(config, jax.devices()[: num_devices(config.seats)], mask_V)
    turns = Turns(roles.placement)
    engine = RingEngine(
      config.model, config.rollout, eos_ids=tokenizer.eos_ids, vocab_mask_V=mask_V, seed=config.seed,
      mesh=roles.meshes[Role.ROLLOUT],
    )  # fmt: skip
    scheduler = C3POScheduler(config.rollout)
    if config.rollout.is_remote:
      worker = _remote(config.rollout, engine)
    else:
      worker = EngineWorker(engine, lambda: turns.of(Role.ROLLOUT))
    driver = RolloutDriver(worker, scheduler, config.rollout.max_tokens, log=log)
    streams = {name: ProblemStream(tasks, tokenizer) for name in ("sft", "rl")}
    scorer, problems = Scorer(pool, tokenizer), streams["rl"]
    score = lambda rollouts: scorer.score(rollouts, lambda rollout: problems.problem(rollout.problem))  # noqa: E731
    reward, held_out_pairs = None, []
    if Role.REWARD in config.roles:
      pairs = Preferences(tasks, tokenizer, config.seed, config.rollout.max_tokens)
      streams["reward"] = PairStream(pairs)
      held_out_pairs = pairs.held_out(config.reward_model.probe_pairs)
      reward = RewardModelPhase(config, roles.reward, streams["reward"])
    mesh = roles.meshes[Role.ACTOR]
    # A remote engine has no probe: every piece of its weights has a checksum, and settings are compared.
    local = isinstance(worker, EngineWorker)
    probe = EngineProbe(config.model, mesh, engine) if local and mesh is not None else None
    phases = {
      name: Orchestrator(config, name, roles, turns, engine, worker, driver, score, problems, probe, span)
      for name in _RL
    }
    return cls(
      config, tokenizer, tasks.held_out(), held_out_pairs, scorer, roles, scheduler, worker, streams,
      SFTPhase(config, roles.actor, streams["sft"]), reward, phases,
    )  # fmt: skip

  def close(self) -> None:
    """Lets go of rollout workers in other processes."""
    if not isinstance(self.worker, EngineWorker):
      self.worker.close()

  # ---- weights

  def fresh(self) -> Weights:
    """As a run begins."""
    model, init, seed = self.config.model, self.config.init, self.config.seed
    params = initial_params(model, init, seed, self.roles.meshes[Role.ACTOR])
    return Weights(params, self.roles.actor.init_optimizer(params, "sft"))

  def begin(self, phase: str, weights: Weights) -> None:
    """What a phase trains and looks up, made of what there is: the reference is the actor as it is now, the reward model
    starts from the actor, the critic from the reward model or, without one, from the actor.
    """
    roles, config = self.roles, self.config
    weights.reference = weights.critic = weights.critic_state = weights.reward_state = None
    if phase == "reward":
      weights.reward = roles.hand_over(scalar_from_actor(weights.actor), Role.REWARD)
      weights.reward_state = roles.reward.init_optimizer(weights.reward)
      return
    weights.actor_state = roles.actor.init_optimizer(weights.actor, phase)
    wanted = config.phase(phase).roles if config.phase(phase).steps else ()
    if Role.REFERENCE in wanted:
      weights.reference = roles.hand_over(weights.actor, Role.REFERENCE)
    if Role.CRITIC in wanted:
      start = scalar_from_actor(weights.actor) if weights.reward is None else weights.reward
      weights.critic = roles.hand_over(start, Role.CRITIC)
      weights.critic_state = roles.critic(phase).init_optimizer(weights.critic)
    if Role.REWARD not in wanted:
      weights.reward = None

  # ---- what a checkpoint holds beside the actor

  def extra(self, weights: Weights) -> dict[str, Any] | None:
    """Arrays: other roles, and the engine's cache where it must go on with what it has."""
    found = weights.beside_actor()
    if isinstance(self.worker, EngineWorker) and self.worker.kept_state is not None:
      found["cache"] = self.worker.kept_state
    return found or None

  def abstract_extra(self, phase: str) -> dict[str, Any] | None:
    """The shapes and shardings of `extra`, as it is in a phase."""
    roles = self.roles
    phase, found = self._last(phase), {}
    if phase == "reward":
      found["reward"] = roles.abstract(Role.REWARD)
      found["reward_state"] = roles.reward.abstract_optimizer(found["reward"])
    elif phase in _RL and self.config.phase(phase).steps:
      wanted = self.config.phase(phase).roles
      for role in (Role.REFERENCE, Role.CRITIC, Role.REWARD):
        if role in wanted:
          found[role.value] = roles.abstract(role)
      if Role.CRITIC in wanted:
        found["critic_state"] = roles.critic(phase).abstract_optimizer(found["critic"])
    if isinstance(self.worker, EngineWorker) and (cache := self.worker.abstract_kept_state()) is not None:
      found["cache"] = cache
    return found or None

  def abstract_actor_state(self, phase: str) -> Any:
    phase = "rl" if phase == "reward" else self._last(phase)
    return self.roles.actor.abstract_optimizer(self.roles.abstract(Role.ACTOR), phase)

  def largest_checkpoint(self) -> Any:
    """Shapes of all that the fullest phase saves."""
    phases = [
      self.abstract_extra(phase) for phase in ("sft", "rl", "reward", "rlhf") if phase != "reward" or self.reward
    ]
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    return self.roles.abstract(Role.ACTOR), self.abstract_actor_state("sft"), max(phases, key=size)

  def restored(self, found: Restored) -> Weights:
    """The weights of a checkpoint; the engine's cache goes to its worker."""
    extra = dict(found.extra or {})
    if "cache" in extra:
      self.worker.restore(extra.pop("cache"))
    return Weights(found.params, found.optimizer_state, **extra)

  def _last(self, phase: str) -> str:
    """The phase that a finished run ended with."""
    if phase != "done":
      return phase
    return "rlhf" if self.config.rlhf.steps else "rl"


def _remote(config: RolloutConfig, engine: RingEngine) -> WorkerPool | SharedPool:
  group, pool = processes.group(), None
  if group.is_first:
    pool = WorkerPool(config.workers, engine, token=wire.read_token(), file=config.workers_file)
  return pool if group.count == 1 else SharedPool(pool, group)
