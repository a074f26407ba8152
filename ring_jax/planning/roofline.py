"""Costs of stages on a chip, by formula: the longest of three times, each at the part of the peak that programs reach.

    flops     the products that the mathematics asks for (ring_jax/compiled/flops.py), each microbatch padded to its shape
    hbm       weights that are read once a microbatch, or once a decode step; in decoding the caches beside
    links     what a layer gathers of its weights, the rows that travel to experts and back, sums along `tensor`; a
              collective has a latency beside, which decides where a decode step has few tokens

A training step takes forward, backward and, with remat, one more forward pass, then the optimizer's step, which is bound by
hbm, or by the host's link where the state waits there.  An engine reads of a layer's experts those that its tokens
choose: with n tokens in the exchange 1 - (1 - k/E)^n of them.  Weights travel to the engine in its own dtype; on the
same devices over all links, between different ones over one.

The efficiencies are this file's only free numbers, and none is measured here.  That of arithmetic lies within published
training runs of mixture-of-experts models on TPU (jax_practice.md section 4: 35% to 53% of the peak); those of memory, links
and host, the latency and the dispatch are assumed.  Factors between placements are worth more than seconds.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from configs.parallel import ParallelConfig
from configs.placement import Role
from configs.schema import Memory, ModelConfig, Remat, RunConfig
from ring_jax import model as ring_model
from ring_jax.compiled import flops, memory
from ring_jax.compiled.programs import Kind
from ring_jax.planning.holdings import holdings, optimizer_memory
from ring_jax.planning.rollouts import Rollouts, RolloutWork, microbatches, minibatches
from rollout.engine import computed_model
from sharding.hardware import Chip
from sharding.planner import Generation, Holdings, Price, Stage, meets, switched

FLOPS, HBM, LINKS, HOST = 0.45, 0.75, 0.7, 0.7  # of the peak
ROOM = 0.95  # of memory that a plan may fill: its formulas are as near as that to the compiler
LATENCY = 5e-6  # seconds, of a collective
DISPATCH = 1e-3  # seconds between two dispatches of decode steps: the host looks at what was drawn

Times = Mapping[str, float]  # by what bounds them


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Parameters, by what happens to them; those of `embed` are looked up and neither read nor gathered."""

  dense: int  # of all layers but the experts, and lm_head
  experts: int

  @classmethod
  @functools.cache
  def of(cls, model: ModelConfig) -> "_Sizes":
    model = dataclasses.replace(model, parallel=ParallelConfig())
    experts = model.num_moe_layers * model.num_experts * 3 * model.hidden_size * model.moe_intermediate_size
    return cls(ring_model.num_params(model) - experts - model.vocab_size * model.hidden_size, experts)


@dataclasses.dataclass(frozen=True)
class _Part:
  """What one device has and gathers of a model under its layout, in parameters."""

  dense: float
  experts: float
  gathered_dense: float  # from other devices, each time a layer runs
  gathered_experts: float

  @classmethod
  @functools.cache
  def of(cls, model: ModelConfig) -> "_Part":
    sizes, mesh, rules = _Sizes.of(model), model.parallel.mesh, model.parallel.rules
    cut = math.prod(getattr(mesh, axis) for axis in rules.embed)
    cut_experts = math.prod(getattr(mesh, axis) for axis in rules.expert_embed)
    dense, experts = sizes.dense / mesh.tensor, sizes.experts / (mesh.tensor * mesh.expert)
    return cls(dense, experts, dense * (1 - 1 / cut), experts * (1 - 1 / cut_experts))


class Roofline:
  """`sharding.planner.CostModel` of a chip.

  Args:
    phase: of RL, that is planned: rl or rlhf.
  """

  capacity = math.inf  # devices do not share a processor

  def __init__(self, chip: Chip, phase: str, rollouts: Rollouts):
    self._chip, self._phase, self._rollouts = chip, phase, rollouts
    self.limit = ROOM * chip.hbm_bytes

  def generation(self, config: RunConfig, parts: int) -> Generation:
    work = self._rollouts.work(config.rollout)
    times = _decode(self._chip, computed_model(config.model, config.rollout), config, work)
    bound = max(times, key=times.get)
    return Generation(Price(sum(times.values()), bound), work.parts(parts), work.rollouts, work.tokens)

  def price(self, config: RunConfig, stage: Stage) -> Price:
    work = self._rollouts.work(config.rollout)
    seats = config.seats
    shadow = Role.SHADOW_CRITIC if Role.SHADOW_CRITIC in seats else Role.CRITIC
    match stage:
      case Stage.SCORE:  # the verifiers work while others are drawn
        return Price(0.0, "host")
      case Stage.SYNC | Stage.SYNC_CRITIC:
        return self._sync(config, stage)
      case Stage.TO_HOST | Stage.FROM_HOST:
        held = sum(self.holdings(config, role).optimizer for role in switched(config, self._phase))
        return Price(held / (self._chip.host_bandwidth * HOST), "host")
      case Stage.TRAIN | Stage.CRITIC:
        role = Role.ACTOR if stage is Stage.TRAIN else Role.CRITIC
        return self._trained(config, role, work)
      case _:
        role = {Stage.LOGP: Role.ACTOR, Stage.REFERENCE: Role.REFERENCE, Stage.REWARD: Role.REWARD}.get(stage, shadow)
        model = dataclasses.replace(config.model, parallel=seats[role].parallel)
        head = role in (Role.ACTOR, Role.REFERENCE)
        return _longest(_passes(self._chip, model, self._rows(config, work), work.attended, passes=1, head=head))

  def holdings(self, config: RunConfig, role: Role) -> Holdings:
    return holdings(config, self._phase, role)

  def _trained(self, config: RunConfig, role: Role, work: RolloutWork) -> Price:
    """Gradients of all microbatches, and the optimizer's steps."""
    model = dataclasses.replace(config.model, parallel=config.seats[role].parallel)
    passes = 3 if model.remat is Remat.NONE else 4
    price = _longest(
      _passes(self._chip, model, self._rows(config, work), work.attended, passes, head=role is Role.ACTOR)
    )
    stored = self.holdings(config, role).weights
    steps = minibatches(config.phase(self._phase), work)
    if optimizer_memory(config.phase(self._phase), role) is Memory.HOST:
      update = 2 * 2 * stored / (self._chip.host_bandwidth * HOST)
    else:
      update = 7 * stored / (self._chip.hbm_bandwidth * HBM)
    return dataclasses.replace(price, seconds=price.seconds + steps * update)

  def _rows(self, config: RunConfig, work: RolloutWork) -> tuple[int, int]:
    """Microbatches of a step, and the tokens of each, padding included."""
    return microbatches(config, self._phase, work), config.packing.rows * config.packing.length

  def _sync(self, config: RunConfig, stage: Stage) -> Price:
    """Every device of the receiver gets its part; whoever sends one shares it with the others."""
    actor = stage is Stage.SYNC
    source, target = (Role.ACTOR, Role.ROLLOUT) if actor else (Role.CRITIC, Role.SHADOW_CRITIC)
    part = self.holdings(config, target).weights
    links = 1 if not meets(config.seats, source, target) else self._chip.torus_dims
    return Price(part / (links * self._chip.link_bandwidth * LINKS) + LATENCY, "links")


def _longest(times: Times) -> Price:
  bound = max(times, key=times.get)
  return Price(times[bound], bound)


def _passes(
  chip: Chip, model: ModelConfig, rows: tuple[int, int], attended: float, passes: int, head: bool
) -> dict[str, float]:
  """Of a step's rows, forward (1 pass) or forward and backward (3; 4 with remat).

  Args:
    model: in the layout in question.
    rows: microbatches, and tokens of each.
    head: whether log-probs are computed; else one value a token.
  """
  mesh, width = model.parallel.mesh, 2
  batches = rows[0]
  tokens = rows[0] * rows[1] / model.parallel.batch_parts  # of a device
  token = passes * flops.forward(model, attended) + (4 if passes > 1 else 1) * flops.head(model) * head
  part = _Part.of(model)
  gathered = batches * (part.gathered_dense + part.gathered_experts)
  # Weights and rows travel once a pass, the backward pass counting as one; gradients leave in float32.
  trips = max(passes - 1, 1)
  links = trips * (width * gathered + tokens * _exchanged(model))
  if passes > 1:
    links += 4 * gathered
  if passes > 1 and mesh.data > 1:  # replicas sum what each has
    links += 2 * 4 * batches * _stored(model, part)
  kept = 2 * width * tokens * model.hidden_size * model.num_hidden_layers
  return {
    "flops": tokens * token / mesh.tensor / (chip.flops * FLOPS),
    "hbm": width * passes * batches * (part.dense + part.experts) / (chip.hbm_bandwidth * HBM),
    "links": links / _links(chip),
    "host": kept / (chip.host_bandwidth * HOST) if passes > 1 and model.remat is Remat.OFFLOAD else 0.0,
  }


def _exchanged(model: ModelConfig) -> float:
  """Bytes that leave a device for one of its tokens, forward: rows to experts and back, sums along `tensor`."""
  mesh, row = model.parallel.mesh, 2 * model.hidden_size
  experts = 2 * model.num_moe_layers * model.num_experts_per_tok * row * (1 - 1 / mesh.expert)
  return experts / mesh.tensor + 2 * model.num_hidden_layers * 2 * row * (1 - 1 / mesh.tensor)


def _links(chip: Chip) -> float:
  return chip.link_bandwidth * chip.torus_dims * LINKS


def _decode(chip: Chip, model: ModelConfig, config: RunConfig, work: RolloutWork) -> dict[str, float]:
  """Seconds of all decode steps and prefills of a step of RL, by what bounds them."""
  times: dict[str, float] = dict.fromkeys(("flops", "hbm", "links", "latency", "host"), 0.0)
  step = _Step(chip, model, memory.of(config, Kind.DECODE, str(Kind.DECODE)))
  for active, count in work.steps_by_active.items():
    price = _longest(step.times(active))
    times[price.bound] += count * price.seconds
  times["latency"] += work.steps * step.latency
  times["host"] += work.steps / config.rollout.steps_per_dispatch * DISPATCH
  parallel = model.parallel
  token = 2 * 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers
  spread = parallel.batch_parts * parallel.mesh.tensor
  times["hbm"] += work.cached * token / spread / (chip.hbm_bandwidth * HBM)
  times["flops"] += work.prefill_tokens * flops.forward(model, work.attended) / spread / (chip.flops * FLOPS)
  return times


class _Step:
  """A decode step of an engine."""

  def __init__(self, chip: Chip, model: ModelConfig, held: Mapping[str, int]):
    self._chip, self._model = chip, model
    self._part = part = _Part.of(model)
    vocabulary = model.vocab_size * model.hidden_size  # looked up, not read
    # Bytes of a parameter as the engine stores it.
    self._width = held["parameters"] / (_stored(model, part) + vocabulary / _cut(model))
    mesh = model.parallel.mesh
    each = 2 * (mesh.expert > 1) + 2 * (mesh.tensor > 1) + (part.gathered_dense > 0)
    self.latency = each * model.num_hidden_layers * LATENCY

  def times(self, active: int) -> dict[str, float]:
    model, part, chip = self._model, self._part, self._chip
    mesh = model.parallel.mesh
    mine = math.ceil(active / model.parallel.batch_parts)
    met = mine * mesh.expert  # tokens that meet in an exchange
    touched = 1 - (1 - model.num_experts_per_tok / model.num_experts) ** met
    token = flops.forward(model, 0) + flops.head(model)
    gathered = part.gathered_dense + part.gathered_experts
    return {
      "flops": mine * token / mesh.tensor / (chip.flops * FLOPS),
      "hbm": self._width * (part.dense + part.experts * touched) / (chip.hbm_bandwidth * HBM),
      "links": (self._width * gathered + mine * _exchanged(model)) / _links(chip),
    }


def _cut(model: ModelConfig) -> int:
  """In how many parts the embedding lies."""
  rules, mesh = model.parallel.rules, model.parallel.mesh
  return math.prod(getattr(mesh, axis) for axis in (*rules.embed, *rules.vocab))


def _stored(model: ModelConfig, part: _Part) -> float:
  """Parameters that lie on a device."""
  return part.dense - part.gathered_dense + part.experts - part.gathered_experts
