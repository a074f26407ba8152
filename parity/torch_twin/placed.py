"""RLHF with its roles on the ranks of a `Placement`: colocated, interleaving, disaggregated, or a map of one's own.

One process a rank, spawned here: nccl where there is a GPU for every rank, otherwise gloo on the CPU.  All ranks run the
same program; each does the work of its own roles, in the order of `Role`, so that roles on different ranks work at the
same time and roles on the same ranks take turns (papers.md 2.3, 2.4).  A step:

    weights of version v cross to the shadow models                       sharded.Bridge
    actor: log-probs at theta_old    reference: log-probs                 each on its own part, rows dealt over it
    reward model: scores             shadow critic, or critic: values
    everybody's results are exchanged, each with the version it was made with
    every rank computes the advantages of all, the same ones
    for each minibatch: the actor's ranks and the critic's take one AdamW step each

The maths is `ppo.py`'s; what is added is who does what.  The result must not depend on the placement.
"""

import contextlib
import dataclasses
import os
import pathlib
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from configs.schema import Role, require
from parity import rlhf
from parity.rlhf import RLHFCase, Steps
from parity.torch_twin import ppo, sharded, step
from parity.torch_twin.sharded import BLANK, Bridge, Part, VersionError
from ring_jax.records import Rollout
from sharding.placement import Placement

_SHADOWS = {Role.ROLLOUT: Role.ACTOR, Role.SHADOW_CRITIC: Role.CRITIC}  # whose weights they work with
_BEGINS_AS = {**_SHADOWS, Role.REFERENCE: Role.ACTOR}


class Draw(Protocol):
  """A source of rollouts, in the process of the shadow actor's first rank; must be picklable."""

  def draw(self, params: Mapping[str, Any], version: int) -> rlhf.Minibatches: ...

  def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Job:
  """One case under one placement, whose devices are the ranks."""

  case: RLHFCase
  placement: Placement
  rows: int = 5  # sequences of one forward pass
  draw: Draw | None = None  # in place of the case's own rollouts; of these only the number of steps is then read

  def __post_init__(self):
    ranks, roles = self.placement.devices, self.placement.parts.keys()
    require(ranks == tuple(range(len(ranks))), f"placement: devices {list(ranks)}: the ranks from 0 on")
    missing = sorted(self.case.phase.roles - roles)
    require(not missing, f"placement: no devices for {missing[0]}, which {self.case.name} needs" if missing else "")


def run(jobs: Sequence[Job]) -> list[Steps]:
  """Runs jobs one after the other on the same processes.

  Raises:
    ConfigError: jobs for different numbers of ranks.
    torch.multiprocessing.ProcessRaisedException: with the traceback of the rank that failed.
  """
  sizes = {len(job.placement.devices) for job in jobs}
  require(len(sizes) == 1, f"placement: jobs for {sorted(sizes)} ranks: all must be for as many")
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / "jobs").write_bytes(pickle.dumps(list(jobs)))
    multiprocessing.spawn(_process, (*sizes, folder), nprocs=sizes.pop())
    return [_merged(pathlib.Path(folder), number) for number in range(len(jobs))]


def _process(rank: int, world: int, folder: str) -> None:
  on_gpus = torch.cuda.device_count() >= world
  device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
  if on_gpus:
    torch.cuda.set_device(device)
  else:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
  backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"  # what is exchanged lies on the host
  dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
  for number, job in enumerate(pickle.loads((pathlib.Path(folder) / "jobs").read_bytes())):
    worker = Worker(job, rank, device)
    with contextlib.closing(worker):
      experience = [worker.step(version) for version in range(len(job.case.steps))]
    found = {"rollouts": worker.rollouts, "experience": experience, "losses": worker.losses, "norms": worker.norms}
    found["params"] = worker.params()
    (pathlib.Path(folder) / f"{number}.{rank}").write_bytes(pickle.dumps(found))
  dist.barrier()
  dist.destroy_process_group()


def _merged(folder: pathlib.Path, number: int) -> Steps:
  """What the ranks left behind: the experience is everybody's, parameters are their first rank's."""
  files = sorted(folder.glob(f"{number}.*"), key=lambda file: int(file.suffix[1:]))
  found = [pickle.loads(file.read_bytes()) for file in files]
  for rank, one in enumerate(found[1:], 1):
    for version, (own, first) in enumerate(zip(one["experience"], found[0]["experience"], strict=True)):
      if any(not np.array_equal(own[name], first[name], equal_nan=True) for name in first):
        raise VersionError(f"step {version}: ranks 0 and {rank} computed different experience")
  by_role = ({role: v for one in found for role, v in one[name].items()} for name in ("losses", "norms", "params"))
  return Steps(found[0]["rollouts"], found[0]["experience"], *by_role)


class Worker:
  """One rank of one job."""

  def __init__(self, job: Job, rank: int, device: torch.device):
    self._job, self._config = job, job.case.phase
    self._scorer = ppo.scorer_of(job.case, job.rows)
    groups = _Groups(rank)
    parts = {role: tuple(job.placement.devices_of(role)) for role in job.placement.roles if self._needed(role)}
    self._parts = {role: Part(ranks, rank, device, groups.of(ranks)) for role, ranks in parts.items()}
    self._models = {role: self._build(role) for role, part in self._parts.items() if part.inside}
    self._bridges = {
      shadow: Bridge(self._parts[source], part, groups.of(Bridge.ranks(parts[source], parts[shadow])))
      for shadow, source in _SHADOWS.items() if (part := self._parts.get(shadow)) is not None
    }  # fmt: skip
    self._versions = dict.fromkeys(rlhf.LEARNERS, 0) | dict.fromkeys(_SHADOWS, -1)
    self._optimizers = {
      role: sharded.ShardedOptimizer(
        self._models[role], ppo.optimizer_config(role, self._config), job.case.optimizer_steps, self._parts[role]
      )
      for role in rlhf.LEARNERS if role in self._models
    }  # fmt: skip
    self.losses, self.norms = ({role: [] for role in self._optimizers} for _ in range(2))
    self.rollouts: list[rlhf.Minibatches] = []

  def _needed(self, role: Role) -> bool:
    return _SHADOWS.get(role, role) in self._config.roles

  def _build(self, role: Role) -> Any:
    case = self._job.case
    return sharded.build(case.run.model, case.params[_BEGINS_AS.get(role, role)], self._parts[role])

  def close(self) -> None:
    if self._job.draw is not None:
      self._job.draw.close()

  def params(self) -> dict[Role, Any]:
    """Of the models that train and whose first rank this is."""
    found = {role: sharded.params_of(self._models[role]) for role in self._optimizers}
    return {role: tree for role, tree in found.items() if self._parts[role].leads}

  def step(self, version: int) -> dict[str, np.ndarray]:
    """One step; returns its experience, on every rank."""
    for shadow, bridge in self._bridges.items():
      source = _SHADOWS[shadow]
      given, own = self._models.get(source), self._models.get(shadow)
      if given is not None or own is not None:
        self._versions[shadow] = bridge.cross(given, own, self._versions[source])
    minibatches = self._rollouts(version)
    self.rollouts.append(minibatches)
    judged = self._judge(minibatches, version)
    done = []
    for rollouts, fields in zip(minibatches, judged, strict=True):
      if self._config.stream:
        fields |= self._exchange([self._log_probs(Role.ACTOR, "logp_old", rollouts)], version)[0]
      experience = ppo.experience_of(rollouts, fields, self._config)
      done.append(experience.fields)
      self._train(rollouts, experience)
    for role in self._optimizers:
      self._versions[role] += 1
    return rlhf.flat(done)

  def _rollouts(self, version: int) -> rlhf.Minibatches:
    if self._job.draw is None:
      return self._job.case.steps[version]
    part, drawn = self._parts[Role.ROLLOUT], [None]
    if part.inside:
      params = sharded.params_of(self._models[Role.ROLLOUT])
      if part.leads:
        drawn = [self._job.draw.draw(params, version)]
    dist.broadcast_object_list(drawn, part.ranks[0])
    return drawn[0]

  # -------------------------------------------------------------------------------------------------------------------
  # Judging

  def _judge(self, minibatches: rlhf.Minibatches, version: int) -> list[dict[str, list[Any]]]:
    """The fields of each minibatch that models say; each role works where it is, and all get everything."""
    critic = Role.SHADOW_CRITIC if Role.SHADOW_CRITIC in self._parts else Role.CRITIC
    mine = []
    for rollouts in minibatches:
      found = {} if self._config.stream else self._log_probs(Role.ACTOR, "logp_old", rollouts)
      found |= self._log_probs(Role.ROLLOUT, "logp_rollout", rollouts)
      found |= self._log_probs(Role.REFERENCE, "logp_ref", rollouts)
      found |= self._ask(critic, "values", rollouts, lambda model, own: ppo.answer_values(model, own, self._job.rows))
      found |= self._ask(Role.REWARD, "scores", rollouts, lambda model, own: ppo.scores_of(model, own, self._job.rows))
      mine.append(found)
    return self._exchange(mine, version)

  def _log_probs(self, role: Role, field: str, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    return self._ask(role, field, rollouts, lambda model, own: step.answer_logps(model, own, self._scorer))

  def _ask(self, role: Role, field: str, rollouts: Sequence[Rollout], say: Callable) -> dict[str, Any]:
    """{field: (version, {index of a rollout: what the model says})} of this rank's rows."""
    if role not in self._models:
      return {}
    part = self._parts[role]
    said = say(self._models[role], part.deal(rollouts, BLANK))
    return {field: (self._versions.get(role), dict(zip(part.own(len(rollouts)), said, strict=False)))}

  def _exchange(self, mine: list[dict[str, Any]], version: int) -> list[dict[str, list[Any]]]:
    """Everybody's results, in the order of rollouts.

    Raises:
      VersionError: results of other weights than this step's.
    """
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    merged = []
    for number in range(len(mine)):
      fields: dict[str, dict[int, Any]] = {}
      for rank, theirs in enumerate(everybody):
        for field, (made_with, said) in theirs[number].items():
          if made_with not in (None, version):  # None: of a model that does not change
            raise VersionError(f"step {version}: rank {rank} computed {field} with weights of version {made_with}")
          fields.setdefault(field, {}).update(said)
      merged.append({field: [said[i] for i in sorted(said)] for field, said in fields.items()})
    return merged

  # -------------------------------------------------------------------------------------------------------------------
  # Training

  def _train(self, rollouts: Sequence[Rollout], experience: ppo.Experience) -> None:
    """One step of the actor and of the critic, each on its ranks, from this rank's rows."""
    lessons = ppo.actor_lessons(rollouts, experience)
    if not lessons:
      return
    if Role.ACTOR in self._optimizers:
      icepop = self._config.objective
      totals, blank = step.totals_of(lessons, icepop), _blank(lessons[0])
      mine = self._parts[Role.ACTOR].deal(lessons, blank)
      loss, _ = step.actor_gradients(self._models[Role.ACTOR], mine, totals, icepop, self._scorer)
      self._update(Role.ACTOR, loss)
    if Role.CRITIC in self._optimizers:
      valued, tokens = ppo.critic_lessons(rollouts, experience), ppo.answer_tokens(rollouts)
      mine = self._parts[Role.CRITIC].deal(valued, _blank(valued[0]))
      loss = ppo.critic_gradients(self._models[Role.CRITIC], mine, tokens, self._config.ppo, self._job.rows)
      self._update(Role.CRITIC, loss)

  def _update(self, role: Role, loss: float) -> None:
    self.losses[role].append(self._parts[role].total(loss))
    self.norms[role].append(self._optimizers[role].step())


def _blank(like: Any) -> Any:
  """A lesson about no token, with the fields that the others have."""
  nothing = {name: None if value is None else np.zeros(0, np.float32) for name, value in like._asdict().items()}
  return type(like)(**(nothing | {"rollout": BLANK}))


class _Groups:
  """Process groups by their ranks; every process must ask for the same ones in the same order."""

  def __init__(self, rank: int):
    self._rank, self._known = rank, {}

  def of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """None: one rank alone, or this process is none of them."""
    if len(ranks) > 1 and ranks not in self._known:
      self._known[ranks] = dist.new_group(list(ranks))
    return self._known.get(ranks) if self._rank in ranks else None
