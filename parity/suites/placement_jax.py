"""The JAX side of the placement suite: the same phase through a run's own classes, on eight devices that the CPU plays.

    run([(strategy, case), ...])      in a process of its own, since JAX fixes the number of devices when it starts
    jax_steps(strategy, case)         inside of it

What works here is what works in a run (ring_jax/train): `Roles` on the meshes of the config's seats, `Judges`, `Learner`,
and the checked hand-over of weights.  Only the engine is missing, as its rollouts are given; on its devices the trainer's
own programs score them with the copy of the actor that arrived there.  A step:

    weights of version v    -> shadow actor, shadow critic
    minibatches             -> experience               streaming: one after the other; otherwise all at once
    experience              -> actor, critic            an update a minibatch
"""

import contextlib
import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from configs.schema import Role, Strategy
from parity import rlhf
from parity.rlhf import Minibatches, RLHFCase, Steps
from ring_jax.records import Rollout
from ring_jax.train.batches import model_tokens, rl_minibatches
from ring_jax.train.experience import Experience, Judges, relative
from ring_jax.train.learner import Learner
from ring_jax.train.roles import Roles, Weights
from ring_jax.train.turns import Turns
from sharding.processes import fetch

DEVICES = 8
_NAME = "rlhf"
_ROOT = pathlib.Path(__file__).parents[2]


class JAXError(RuntimeError):
  """The process that plays the devices failed."""


def run(jobs: Sequence[tuple[Strategy, RLHFCase]]) -> list[Steps]:
  """Raises:
  JAXError: with the end of what the process said.
  """
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
  with tempfile.TemporaryDirectory() as folder:
    given, found = pathlib.Path(folder) / "jobs", pathlib.Path(folder) / "steps"
    given.write_bytes(pickle.dumps(list(jobs)))
    command = [sys.executable, "-m", __name__, str(given), str(found)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
      raise JAXError(f"parity: the JAX side on {DEVICES} devices failed:\n{done.stderr[-4000:]}")
    return pickle.loads(found.read_bytes())


def jax_steps(strategy: Strategy, case: RLHFCase) -> Steps:
  """All steps of a case under a placement of all devices."""
  phase = _Phase(strategy, case)
  experience = [phase.step(minibatches, version) for version, minibatches in enumerate(case.steps)]
  params = {role: jax.device_get(getattr(phase.weights, role.value)) for role in phase.losses}
  return Steps(case.steps, experience, phase.losses, phase.norms, params)


class _Phase:
  """A case's weights and what works on them."""

  def __init__(self, strategy: Strategy, case: RLHFCase):
    run = rlhf.placed(case.run, strategy, DEVICES)
    self._phase, self._packing = run.rlhf, run.packing
    self._roles = Roles(run, jax.devices(), case.vocab_mask_V)
    self._turns = Turns(self._roles.placement)
    self._judge = Judges(run, _NAME, self._roles, self._turns, lambda _: Counter())  # rewards are recorded
    self._learner = Learner(_NAME, run.rlhf, run.packing, run.seed, self._roles, self._turns)
    self.weights = self._first(case)
    self.losses, self.norms = ({role: [] for role in rlhf.LEARNERS if role in run.rlhf.roles} for _ in range(2))

  def _first(self, case: RLHFCase) -> Weights:
    roles = self._roles
    given = {role: roles.hand_over(jax.device_put(tree, jax.devices()[0]), role) for role, tree in case.params.items()}
    weights = Weights(given[Role.ACTOR], roles.actor.init_optimizer(given[Role.ACTOR], _NAME))
    weights.reward = given.get(Role.REWARD)
    if Role.REFERENCE in self._phase.roles:
      weights.reference = roles.hand_over(weights.actor, Role.REFERENCE)
    if Role.CRITIC in self._phase.roles:
      weights.critic = given[Role.CRITIC]
      weights.critic_state = roles.critic(_NAME).init_optimizer(weights.critic)
    return weights

  def step(self, minibatches: Minibatches, version: int) -> dict[str, np.ndarray]:
    """Trains from `version` to `version + 1`; returns the step's experience."""
    weights, roles = self.weights, self._roles
    drawing = roles.hand_over(weights.actor, Role.ROLLOUT, version)
    shadow = weights.critic
    if roles.judge is Role.SHADOW_CRITIC:
      shadow = roles.hand_over(weights.critic, Role.SHADOW_CRITIC, version)
    minibatches = [[dataclasses.replace(rollout) for rollout in part] for part in minibatches]  # they get rewards
    chunks = [[part] for part in minibatches] if self._phase.stream else [minibatches]
    judged = [
      self._judge([rollout for part in chunk for rollout in part], weights, shadow, _untimed) for chunk in chunks
    ]
    drawn = [self._drawn(drawing, experience.rollouts) for experience in judged]
    self._learner.begin(version)
    for chunk, experience in zip(chunks, judged, strict=True):
      self._train(experience, list(map(len, chunk)))
    self._take_tally()
    return rlhf.flat([self._fields(*both) for both in zip(judged, drawn, strict=True)])

  def _drawn(self, drawing: Any, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """Log-probs of the answers by the shadow actor."""
    program = self._roles.rollout.logprobs
    with self._turns.of(Role.ROLLOUT):
      return [
        logps
        for batch in rl_minibatches(rollouts, self._packing)
        for logps in batch.gather([fetch(program(drawing, model_tokens(one))) for one in batch.microbatches])
      ]

  def _train(self, experience: Experience, sizes: Sequence[int]) -> None:
    """An update a minibatch, of which nothing may be left.

    Args:
      sizes: of the minibatches, one after the other.
    """
    useful = np.ones(len(experience.rollouts), bool)
    if Role.CRITIC not in self._phase.roles:
      advantages, useful = relative(experience, self._phase.advantage)
      experience.advantages = list(advantages)
    parts = np.split(np.arange(len(useful)), np.cumsum(sizes)[:-1])
    chosen = [part[useful[part]] for part in parts]
    self._learner.learn(self.weights, experience, [part for part in chosen if len(part)], _untimed)

  def _take_tally(self) -> None:
    tally = self._learner.tally
    self.losses[Role.ACTOR] += tally.losses
    self.norms[Role.ACTOR] += tally.norms
    if Role.CRITIC in self.losses:
      self.losses[Role.CRITIC] += [one["loss"] for one in tally.critic]
      self.norms[Role.CRITIC] += [one["grad_norm"] for one in tally.critic]

  def _fields(self, experience: Experience, drawn: list[np.ndarray]) -> dict[str, Any]:
    """As `rlhf.EXPERIENCE` names them."""
    rollouts = experience.rollouts
    return {
      "logp_infer": [rollout.logps for rollout in rollouts],
      "logp_rollout": drawn,
      "logp_old": experience.logp_old,
      "logp_ref": experience.logp_ref,
      "values": experience.values,
      "scores": [rollout.reward for rollout in rollouts],
      "advantages": [np.broadcast_to(one, r.length) for one, r in zip(experience.advantages, rollouts, strict=True)],
      "returns": None if experience.values is None else experience.returns,
    }


def _untimed(_: str) -> contextlib.AbstractContextManager[Any]:
  return contextlib.nullcontext()


if __name__ == "__main__":
  _jobs = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
  pathlib.Path(sys.argv[2]).write_bytes(pickle.dumps([jax_steps(*job) for job in _jobs]))
