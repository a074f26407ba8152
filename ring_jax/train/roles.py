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
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from configs.schema import ParallelConfig, Role, RunConfig
from ring_jax.model import Params, abstract_params, abstract_scalar
from ring_jax.train.batches import Minibatch, model_tokens
from ring_jax.train.programs import Programs
from ring_jax.train.scalar_programs import ScalarPrograms
from sharding.placement import Placement
from sharding.processes import fetch


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
  placement: of all of its roles.
  vocab_mask_V: bool; the ids that may be drawn.
  optimizers: of what is trained, by name: `sft`, `rl`, `rlhf` for the actor, `critic`, `reward`.
  """

  def __init__(
    self,
    config: RunConfig,
    placement: Placement,
    vocab_mask_V: np.ndarray,
    optimizers: dict[str, optax.GradientTransformation],
  ):
    self._config, self._mask_V, self._optimizers = config, vocab_mask_V, optimizers
    self.placement = placement
    self._seats = config.seats
    # Without a mesh where there is nothing to lay out.
    alone = len(placement.devices) == 1
    self.meshes: dict[Role, Mesh | None] = {
      role: None if alone else placement.mesh(role, seat.parallel.mesh) for role, seat in self._seats.items()
    }
    self._policies: dict[Any, Programs] = {}
    self._scalars: dict[Any, ScalarPrograms] = {}

  @property
  def actor(self) -> Programs:
    return self._policy(Role.ACTOR)

  @property
  def judge(self) -> Role:
    """Who says what a state is worth."""
    return Role.SHADOW_CRITIC if Role.SHADOW_CRITIC in self._seats else Role.CRITIC

  def scalar(self, role: Role) -> ScalarPrograms:
    """The programs of a critic or a reward model."""
    key = (self.meshes[role], self._seats[role].parallel)
    if key not in self._scalars:
      self._scalars[key] = ScalarPrograms(self._model_of(role), self._optimizers, self.meshes[role])
    return self._scalars[key]

  def _policy(self, role: Role) -> Programs:
    key = (self.meshes[role], self._seats[role].parallel)
    if key not in self._policies:
      config = dataclasses.replace(self._config, model=self._model_of(role))
      self._policies[key] = Programs(config, self._mask_V, self._optimizers, self.meshes[role])
    return self._policies[key]

  def _model_of(self, role: Role):
    parallel: ParallelConfig = self._seats[role].parallel
    return dataclasses.replace(self._config.model, parallel=parallel)

  # ---- where trees lie

  def abstract(self, role: Role) -> Params:
    """The role's parameters: shapes and shardings."""
    scalar = role not in (Role.ACTOR, Role.REFERENCE)
    return (abstract_scalar if scalar else abstract_params)(self._model_of(role), self.meshes[role])

  def hand_over(self, params: Params, role: Role) -> Params:
    """A copy of parameters, of whatever layout, as the role lays them out."""
    if self.meshes[role] is None:
      return jax.tree.map(jax.numpy.copy, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract(role))
    return jax.device_put(params, shardings, may_alias=False)

  # ---- what they compute: [R, T] of each microbatch

  def reference_logps(self, params: Params, batch: Minibatch) -> list[np.ndarray]:
    programs = self._policy(Role.REFERENCE)
    return [fetch(programs.logprobs(params, model_tokens(one))) for one in batch.microbatches]

  def values(self, role: Role, params: Params, batch: Minibatch) -> list[np.ndarray]:
    programs = self.scalar(role)
    return [fetch(programs.values(params, model_tokens(one))) for one in batch.microbatches]
