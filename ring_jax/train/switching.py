"""Memory changes hands between rollouts and training, where both use the same devices (papers.md 1.6; AMem's role).

    rollout     engine: its weights and its cache on the devices          optimizer states in host memory
    training    engine: nothing                                           optimizer states on the devices

Parameters, reference and reward model stay.  Gradients exist only inside of a training step.  After each switch everything
that is alive must be what the ledger says (sharding/memory.py): what stays behind is found here, by name, and not when
something else runs out of memory.
"""

from typing import Any

import jax

from configs.schema import Memory, RunConfig
from ring_jax.train.roles import Weights
from rollout.worker import EngineWorker
from sharding.memory import Ledger, Place, free, to_device, to_host

_ROLLOUT, _TRAINING = "rollout", "training"
_ALWAYS = {_ROLLOUT: Place.DEVICE, _TRAINING: Place.DEVICE}
_HERE_IN_TRAINING = {_ROLLOUT: Place.HOST, _TRAINING: Place.DEVICE}
_HERE_IN_ROLLOUTS = {_ROLLOUT: Place.DEVICE, _TRAINING: Place.FREED}
_NEVER = {_ROLLOUT: Place.HOST, _TRAINING: Place.HOST}


class Switch:
  """Args:
  name: of the phase.
  slack_bytes: of small constants on a device that belong to nobody.
  """

  def __init__(self, config: RunConfig, name: str, worker: EngineWorker, **slack_bytes: int):
    phase = config.phase(name)
    self._worker = worker
    self._ledger = Ledger(**slack_bytes)
    self._known = False
    self._places = {
      ("actor", "parameters"): _ALWAYS,
      ("actor", "optimizer"): _waiting(phase.optimizer.memory),
      ("critic", "parameters"): _ALWAYS,
      ("critic", "optimizer"): _waiting(phase.ppo.optimizer.memory),
      ("reference", "parameters"): _ALWAYS,
      ("reward", "parameters"): _ALWAYS,
      ("rollout", "weights"): _HERE_IN_ROLLOUTS,
      ("rollout", "cache"): _HERE_IN_ROLLOUTS,
    }

  def to_rollout(self, weights: Weights, stored: Any) -> None:
    """Before an iteration; `stored` are the engine's weights.

    Raises:
      LedgerError: something is not where it should be.
    """
    weights.actor_state, weights.critic_state = to_host(weights.actor_state), to_host(weights.critic_state)
    self._worker.prepare()
    self._check(_ROLLOUT, weights, self._own(weights, stored))

  def to_training(self, weights: Weights, stored: Any) -> None:
    """After it; `stored` cannot be used any more."""
    own = self._own(weights, stored)
    self._worker.free()
    free(own)
    for name, state in (("actor_state", weights.actor_state), ("critic_state", weights.critic_state)):
      if self._places[name.removesuffix("_state"), "optimizer"] is _HERE_IN_TRAINING:
        setattr(weights, name, to_device(state))
    self._check(_TRAINING, weights, own)

  def _own(self, weights: Weights, stored: Any) -> list[Any]:
    """The engine's arrays that are not the actor's: where nothing is cast or moved, JAX hands on the very same ones."""
    actors = {id(leaf) for leaf in jax.tree.leaves(weights.actor)}
    return [leaf for leaf in jax.tree.leaves(stored) if id(leaf) not in actors]

  def _check(self, phase: str, weights: Weights, own: list[Any]) -> None:
    trees = {
      ("actor", "parameters"): weights.actor,
      ("actor", "optimizer"): weights.actor_state,
      ("critic", "parameters"): weights.critic,
      ("critic", "optimizer"): weights.critic_state,
      ("reference", "parameters"): weights.reference,
      ("reward", "parameters"): weights.reward,
      ("rollout", "weights"): own,
      ("rollout", "cache"): self._worker.state,
    }
    if not self._known:
      for key, tree in trees.items():
        self._ledger.register(*key, tree, self._places[key])
      self._ledger.baseline()
      self._known = True
    for key, tree in trees.items():
      self._ledger.hold(*key, tree)
    self._ledger.check(phase)


def _waiting(memory: Memory) -> dict[str, Place]:
  return _NEVER if memory is Memory.HOST else _HERE_IN_TRAINING
