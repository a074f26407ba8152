"""What the roles of RL hold and compute, each on its own devices (architecture decision 12; papers.md 2.2 to 2.4).

    actor           trained by the IcePop objective
    critic          trained on returns; judges too, where it has no shadow
    shadow critic   a copy of the critic that judges
    reference       the actor as it was when the phase began
    reward          a trunk with a scalar head: the score of an answer is its value at the last token
    rollout         the engine (rollout/engine.py)

Roles with the same layout on the same devices share their compiled programs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from configs.schema import OptimizerConfig, Role, RunConfig
from ring_jax.model import Params, abstract_params, abstract_scalar
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.programs import Programs
from ring_jax.train.scalar_programs import ScalarPrograms
from ring_jax.train.updates import Update
from sharding.placement import Placement
from sharding.transfer import Keep, WeightLink


@dataclasses.dataclass
class Weights:
  """What a phase trains and what it looks up; None: the role does not take part."""

  actor: Params
  actor_state: Any  # of its optimizer
  critic: Params | None = None
  critic_state: Any = None
  reference: Params | None = None
  reward: Params | None = None
  reward_state: Any = None  # while the reward model is trained

  def beside_actor(self) -> dict[str, Any]:
    """Everything but the actor, by name, for a checkpoint."""
    return {name: value for name, value in vars(self).items() if not name.startswith("actor") and value is not None}


class Roles:
  """Args:
  config: the run.
  devices: those of its placement.
  vocab_mask_V: bool; the ids that may be drawn.
  """

  def __init__(self, config: RunConfig, devices: Sequence[Any], vocab_mask_V: np.ndarray):
    self._config, self._mask_V, self._seats = config, vocab_mask_V, config.seats
    self.placement = Placement.of_seats(config.placement.strategy, self._seats, devices)
    # Without a mesh where there is nothing to lay out.
    self.meshes: dict[Role, Mesh | None] = {
      role: None if len(devices) == 1 else self.placement.mesh(role, seat.parallel.mesh)
      for role, seat in self._seats.items()
    }
    self._policies: dict[Any, Programs] = {}
    self._scalars: dict[Any, ScalarPrograms] = {}
    self._links: dict[Role, WeightLink] = {}

  @property
  def judge(self) -> Role:
    """Who says what a state is worth."""
    return Role.SHADOW_CRITIC if Role.SHADOW_CRITIC in self._seats else Role.CRITIC

  @property
  def actor(self) -> Programs:
    return self._policy(Role.ACTOR)

  @property
  def reference(self) -> Programs:
    return self._policy(Role.REFERENCE)

  @property
  def rollout(self) -> Programs:
    """The trainer's programs on the engine's devices: what they say of the weights that were handed over to there."""
    return self._policy(Role.ROLLOUT)

  @property
  def reward(self) -> ScalarPrograms:
    config = self._config.reward_model
    return self._scalar(Role.REWARD, config.optimizer, config.steps)

  def critic(self, phase: str, role: Role = Role.CRITIC) -> ScalarPrograms:
    """The critic of a phase, or its shadow."""
    config = self._config.phase(phase)
    return self._scalar(role, config.ppo.optimizer, config.steps * config.minibatches)

  def _scalar(self, role: Role, optimizer: OptimizerConfig, steps: int) -> ScalarPrograms:
    parallel = self._seats[role].parallel
    key = (self.meshes[role], parallel, optimizer, steps)
    if key not in self._scalars:
      update = Update(make_optimizer(optimizer, steps), optimizer)
      self._scalars[key] = ScalarPrograms(self._config, update, self.meshes[role], parallel)
    return self._scalars[key]

  def _policy(self, role: Role) -> Programs:
    config, parallel = self._config, self._seats[role].parallel
    key = (self.meshes[role], parallel)
    if key not in self._policies:
      optimizers = {
        "sft": make_optimizer(config.sft.optimizer, config.sft.steps),
        "rl": make_optimizer(config.rl.optimizer, config.rl.steps * config.rl.minibatches),
        "rlhf": make_optimizer(config.rlhf.optimizer, config.rlhf.steps * config.rlhf.minibatches),
      }
      self._policies[key] = Programs(config, self._mask_V, optimizers, self.meshes[role], parallel)
    return self._policies[key]

  # ---- where trees lie

  def abstract(self, role: Role) -> Params:
    """The role's parameters: shapes and shardings."""
    scalar = role in (Role.CRITIC, Role.SHADOW_CRITIC, Role.REWARD)
    model = dataclasses.replace(self._config.model, parallel=self._seats[role].parallel)
    return (abstract_scalar if scalar else abstract_params)(model, self.meshes[role])

  def hand_over(self, params: Params, role: Role, version: int | None = None) -> Params:
    """A copy of parameters, of whatever layout, as the role lays them out; checked bit for bit.

    Args:
      version: where the role has a mesh, larger than the last one that it was handed; None: the next.

    Raises:
      TransferError: what arrived is not what was sent.
    """
    if self.meshes[role] is None:
      return jax.tree.map(jax.numpy.copy, params)
    if role not in self._links:
      # What a phase ends with must not stay in memory for the sake of the next one.
      self._links[role] = WeightLink(self.abstract(role), keep=Keep.CALLER)
    return self._links[role].send(params, version)
