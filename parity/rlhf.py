"""A phase of RLHF from recorded rollouts: what goes in, and what comes out of it on either path.  Plain NumPy.

One step takes the recorded rollouts of its minibatches and does, at weights of version v:

    reference, reward model, critic judge every minibatch        before the first update
    the actor's log-probs at theta_old                           likewise; streaming: before the minibatch's own update
    advantages                                                   on the host
    for each minibatch: one AdamW step of the actor, and one of the critic where there is one

The recorded log-probs are the first actor's own under another engine's error: near for most tokens, out of the band for
some.  What comes out must not depend on where the roles work, nor on who computes it.

Where they work is what `RunConfig.seats` says of the case's run, as it is `placed`, on either path.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.schema import (
  MeshConfig,
  ParallelConfig,
  PlacementConfig,
  RLConfig,
  Role,
  RunConfig,
  Strategy,
  require,
)
from ring_jax.records import Rollout
from sharding.placement import Placement

Tree = Mapping[str, Any]
Minibatches = list[list[Rollout]]

# Fields of `Steps.experience`, in the order of computation.
EXPERIENCE = ("logp_infer", "logp_rollout", "logp_old", "logp_ref", "values", "scores", "advantages", "returns")
LEARNERS = (Role.ACTOR, Role.CRITIC)
STRATEGIES = (Strategy.COLOCATED, Strategy.INTERLEAVING, Strategy.DISAGGREGATED)


@dataclasses.dataclass(frozen=True)
class RLHFCase:
  """Where a phase begins, and what it is fed with."""

  name: str
  run: RunConfig  # model, rlhf (the phase, and the only one), rollout.temperature, packing
  params: Mapping[
    Role, Tree
  ]  # of the actor (the reference begins as it), and of critic and reward model where they are
  steps: list[Minibatches]
  vocab_mask_V: np.ndarray  # bool: the ids that can be drawn

  def __post_init__(self):
    missing = sorted(self.phase.roles - {Role.ROLLOUT, Role.REFERENCE} - self.params.keys())
    require(not missing, f"{self.name}: no parameters for the {missing[0]}, which its phase has" if missing else "")
    require(all(map(len, self.steps)), f"{self.name}: a step without a minibatch")
    for step, minibatches in enumerate(self.steps):
      once = [group for rollouts in minibatches for group in {rollout.group for rollout in rollouts}]
      split = sorted(group for group in set(once) if once.count(group) > 1)
      require(not split, f"{self.name}: step {step}: group {split[0]} is in two minibatches" if split else "")

  @property
  def phase(self) -> RLConfig:
    return self.run.rlhf

  @property
  def optimizer_steps(self) -> int:
    """That the learning rate's schedule is for."""
    return self.phase.steps * self.phase.minibatches


@dataclasses.dataclass
class Steps:
  """What the steps gave."""

  rollouts: list[Minibatches]  # of each step: what was trained on
  experience: list[dict[str, np.ndarray]]  # of each step: float32, flat, one minibatch and rollout after the other
  losses: dict[Role, list[float]]  # of each optimizer step
  norms: dict[Role, list[float]]  # likewise: of the gradient, before clipping
  params: dict[Role, Tree]  # at the end


def flat(minibatches: Sequence[Mapping[str, Sequence[Any] | None]]) -> dict[str, np.ndarray]:
  """The experience of a step from that of its minibatches, whose fields have an array or a number a rollout."""
  found = {}
  for name in EXPERIENCE:
    values = [value for fields in minibatches if fields.get(name) is not None for value in fields[name]]
    if values:
      found[name] = np.concatenate([np.atleast_1d(np.asarray(value, np.float32)) for value in values])
  return found


def placed(run: RunConfig, strategy: Strategy, devices: int) -> RunConfig:
  """The run with its roles on so many devices."""
  cut = lambda count: ParallelConfig(MeshConfig(fsdp=count))  # noqa: E731
  actor, rollout, placement = cut(devices), None, PlacementConfig(strategy)
  if strategy is Strategy.DISAGGREGATED:
    # Half train the actor; the critic, where there is one, has half of the others; the engine's have whole models.
    own = devices // 4 if Role.CRITIC in run.rlhf.roles else 0
    actor, rollout = cut(devices // 2), ParallelConfig(MeshConfig(data=devices - devices // 2 - own))
    placement = PlacementConfig(strategy, critic=cut(own) if own else None)
  return dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, parallel=actor),
    rollout=dataclasses.replace(run.rollout, parallel=rollout),
    placement=placement,
  )


def placement_of(strategy: Strategy, devices: Sequence[Any], run: RunConfig) -> Placement:
  """Of either path: devices are ranks or `jax.devices()`."""
  return Placement.of_seats(strategy, placed(run, strategy, len(devices)).seats, devices)


def strategies_of(config: RLConfig) -> list[Strategy]:
  """Interleaving is for a reference beside a reward model."""
  pair = config.roles >= {Role.REFERENCE, Role.REWARD}
  return [strategy for strategy in STRATEGIES if pair or strategy is not Strategy.INTERLEAVING]
