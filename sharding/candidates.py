"""The placements that the planner tries: valid run configs, each a strategy, a split of the devices and layouts.

    strategy        co-located, interleaving (where there are a reference and a reward model), disaggregated
    split           disaggregated: 1, 2, 4 or 6 eighths of the devices, in every order, for these owners of devices
                        actor + critic | engine + what judges          actor | critic | engine + what judges
                        actor + critic | engine | what judges          actor | critic | engine | what judges
                    The shadow critic is always with the engine, its host.
    trainer         experts over up to 64 devices and the rest fsdp;  replicas;  fsdp alone
    engine          replicas with experts over up to 64 or 8 devices and all other weights whole, or heads over 4;
                    everything cut as in training, and gathered at each token
    memory          placement.switching where trainer and engine share devices; `saving`: optimizer state and layer inputs
                    at the host
    rows, slots     the config's rows, rounded up to what all layouts divide; slots as many as fit

An odd factor in a number of devices is a factor of replicas: widths are powers of two.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from configs.base import ConfigError
from configs.optimizer import Memory, OptimizerConfig
from configs.parallel import ExpertParallel, MeshConfig, ParallelConfig, ShardingRules
from configs.placement import PlacementConfig, Role, Strategy, Switching
from configs.scaling import moe_chunk, rounded
from configs.schema import ModelConfig, Remat, RLConfig, RunConfig

_EXPERT_PARALLEL = (64, 8)
_TENSOR_PARALLEL = (1, 4)
_PARTS = 8  # of the devices, in a split
_SIZES = (1, 2, 4, 6)  # of these
_JUDGES = (Role.REFERENCE, Role.REWARD)


def candidates(config: RunConfig, devices: int, may_change: bool) -> Iterator[RunConfig]:
  """All of them.

  Args:
    may_change: whether each has as many slots as there are rollouts in flight, for `fewer_slots` to go down from, and both
      forms of switching are tried; else the config's.
  """
  if may_change:
    config = _with_slots(config, config.rollout.pool)
  yield from _together(config, devices, list(Switching) if may_change else [config.placement.switching])
  yield from _apart(config, devices)


def fewer_slots(config: RunConfig) -> RunConfig | None:
  """With half of the slots; None where each device of the engine has one."""
  parts = (config.rollout.parallel or config.model.parallel).batch_parts
  slots = max(rounded(config.rollout.slots // 2, parts), parts)
  return _with_slots(config, slots) if slots < config.rollout.slots else None


def naive(config: RunConfig, devices: int) -> RunConfig:
  """All models as one entity: each over all devices by fsdp, the engine as well, and everything stays where it is.

  Raises:
    ConfigError: the model cannot be cut so.
  """
  power = devices & -devices
  layout = _layout(config.model, MeshConfig(devices // power, power), ShardingRules())
  return _placed(config, PlacementConfig(), layout, layout)


def trainer_layouts(model: ModelConfig, devices: int) -> list[ParallelConfig]:
  """From the most expert parallelism to none.

  Raises:
    ConfigError: the model cannot be cut so.
  """
  power = devices & -devices
  expert = math.gcd(math.gcd(power, model.num_experts), _EXPERT_PARALLEL[0])
  odd = devices // power
  meshes = [MeshConfig(odd, power // expert, expert), MeshConfig(data=devices), MeshConfig(odd, power)]
  layouts = _valid(model, (_layout(model, mesh, ShardingRules()) for mesh in dict.fromkeys(meshes)))
  if not layouts:
    raise ConfigError(f"{devices} devices: no layout of the trainer cuts the model into equal parts")
  return layouts


def engine_layouts(model: ModelConfig, devices: int) -> list[ParallelConfig]:
  power = devices & -devices
  whole = ShardingRules(embed=())
  found = []
  for tensor, most in itertools.product(_TENSOR_PARALLEL, _EXPERT_PARALLEL):
    expert = math.gcd(math.gcd(power // math.gcd(power, tensor), model.num_experts), most)
    if devices % (tensor * expert) == 0:
      found.append((MeshConfig(data=devices // (tensor * expert), expert=expert, tensor=tensor), whole))
  found += [(one.mesh, ShardingRules()) for one in trainer_layouts(model, devices)]
  return _valid(model, (_layout(model, mesh, rules) for mesh, rules in dict.fromkeys(found)))


def _layout(model: ModelConfig, mesh: MeshConfig, rules: ShardingRules) -> ParallelConfig:
  exchange = ExpertParallel.ALL_TO_ALL if mesh.expert > 1 else ExpertParallel.LOCAL
  return ParallelConfig(mesh, rules, exchange, moe_chunk=moe_chunk(model))


def _valid(model: ModelConfig, layouts: Iterable[ParallelConfig]) -> list[ParallelConfig]:
  found = []
  for layout in layouts:
    try:
      dataclasses.replace(model, parallel=layout)
    except ConfigError:
      continue  # a width that so many devices do not divide
    found.append(layout)
  return found


def _together(config: RunConfig, devices: int, switchings: Sequence[Switching]) -> Iterator[RunConfig]:
  strategies = [Strategy.COLOCATED]
  if config.roles >= set(_JUDGES) and devices % 2 == 0:
    strategies.append(Strategy.INTERLEAVING)
  stream = any(phase.stream for phase in (config.rl, config.rlhf) if phase.steps)
  choices = itertools.product(
    strategies,
    trainer_layouts(config.model, devices),
    engine_layouts(config.model, devices),
    # A part of the answers is trained on while others are drawn: nothing can leave.
    [Switching.KEEP] if stream else switchings,
  )
  for strategy, actor, engine, switching in choices:
    yield from _tried(config, PlacementConfig(strategy, switching=switching), actor, engine)


def _apart(config: RunConfig, devices: int) -> Iterator[RunConfig]:
  unit = devices // math.gcd(devices, _PARTS)
  critics = [role for role in (Role.CRITIC,) if role in config.roles]
  judges = [role for role in _JUDGES if role in config.roles][:1]  # the other one is its guest
  for owners in dict.fromkeys((*critic, *judge) for critic in ((), critics) for judge in ((), judges)):
    for sizes in _compositions(devices // unit, 2 + len(owners)):
      yield from _split(config, owners, [size * unit for size in sizes])


def _split(config: RunConfig, owners: Sequence[Role], sizes: list[int]) -> Iterator[RunConfig]:
  """Disaggregated, with sizes for the actor, the engine and each other owner."""
  try:
    trainers = trainer_layouts(config.model, sizes[0])
    others = [trainer_layouts(config.model, size) for size in sizes[2:]]
  except ConfigError:
    return
  for index, actor in enumerate(trainers):
    own = {role.value: layouts[min(index, len(layouts) - 1)] for role, layouts in zip(owners, others, strict=True)}
    for engine in engine_layouts(config.model, sizes[1]):
      yield from _tried(config, PlacementConfig(Strategy.DISAGGREGATED, **own), actor, engine)


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
  for sizes in itertools.product(_SIZES, repeat=parts):
    if sum(sizes) == total:
      yield sizes


def _tried(config, placement, actor, engine) -> Iterator[RunConfig]:
  try:
    yield _placed(config, placement, actor, engine)
  except ConfigError:
    return  # rows or slots that these layouts do not divide


def _placed(config: RunConfig, placement: PlacementConfig, actor: ParallelConfig, engine: ParallelConfig) -> RunConfig:
  """The run with these layouts, its rows and slots rounded up to what they divide."""
  own = [getattr(placement, role) for role in ("critic", "reference", "reward", "shadow_critic")]
  # Whoever has no layout of its own takes that of the actor or of the engine, or half of the actor's.
  rows = math.lcm(actor.batch_parts, *(layout.batch_parts for layout in own if layout is not None))
  if placement.strategy is Strategy.DISAGGREGATED:
    rows = math.lcm(rows, engine.batch_parts)
  rollout, parts = config.rollout, engine.batch_parts
  slots = rounded(rollout.slots, parts)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, parallel=actor),
    rollout=dataclasses.replace(
      rollout,
      parallel=engine,
      slots=slots,
      pool=max(rollout.pool, slots),
      prefill_batch=rounded(rollout.prefill_batch, parts),
      pages=rounded(rollout.pages, parts),
    ),
    packing=dataclasses.replace(config.packing, rows=rounded(config.packing.rows, rows)),
    eval=dataclasses.replace(config.eval, slots=rounded(config.eval.slots, parts)),
    placement=placement,
  )


def _with_slots(config: RunConfig, slots: int) -> RunConfig:
  rollout = config.rollout
  return dataclasses.replace(config, rollout=dataclasses.replace(rollout, slots=slots, pool=max(rollout.pool, slots)))


def saving(config: RunConfig) -> RunConfig:
  """Time for memory: optimizer state and layer inputs wait in host memory."""

  def waits(optimizer: OptimizerConfig) -> OptimizerConfig:
    return dataclasses.replace(optimizer, memory=Memory.HOST)

  def phase(one: RLConfig) -> RLConfig:
    ppo = dataclasses.replace(one.ppo, optimizer=waits(one.ppo.optimizer))
    return dataclasses.replace(one, optimizer=waits(one.optimizer), ppo=ppo)

  model = dataclasses.replace(config.model, remat=Remat.OFFLOAD)
  return dataclasses.replace(config, model=model, rl=phase(config.rl), rlhf=phase(config.rlhf))
