"""The JAX side of the placement suite: the same phase, roles on parts of eight devices that the CPU plays.

    run([(strategy, case), ...])      in a process of its own, since JAX fixes the number of devices when it starts
    jax_steps(strategy, case)         inside of it

Parameters are cut over the devices of their role (fsdp); a shadow model gets the trained weights before every step.  Every
role works on its own mesh and gives its results to the host, from where the trainer's devices get them.

Dimension key: R rows (one sequence each), T positions, n tokens of an answer, N = R * T, D hidden.
"""

import dataclasses
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.schema import (
  Advantage,
  Denominator,
  IcePopConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  ParallelConfig,
  PPOConfig,
  Reward,
  RLConfig,
  Role,
  Strategy,
)
from kernels.icepop import policy_loss, sequence_weight
from kernels.linear_logprob import linear_logprob
from parity import rlhf
from parity.rlhf import RLHFCase, Steps
from ring_jax.model import forward, param_shardings
from ring_jax.records import Rollout
from ring_jax.rl.advantages import group_advantages, has_signal
from ring_jax.rl.metrics import calibrate
from ring_jax.train.batches import at_predictions
from ring_jax.train.optimizer import make_optimizer
from sharding import rules
from sharding.placement import Placement

DEVICES = 8
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
  phase = _Phase(case, rlhf.placement_of(strategy, jax.devices(), case.phase))
  experience = [phase.step(minibatches) for minibatches in case.steps]
  params = {role: jax.device_get(phase.models[role].params) for role in phase.losses}
  return Steps(case.steps, experience, phase.losses, phase.norms, params)


class _Programs:
  """What a model computes on its mesh: a policy, whose loss is IcePop, or a scalar model, whose loss is PPO's."""

  def __init__(
    self, config: ModelConfig, mesh: Mesh, temperature: float, drawable: tuple[bool, ...], loss: IcePopConfig | PPOConfig,
    optimizer: OptimizerConfig, steps: int,
  ):  # fmt: skip
    self._config, self._rules, self._loss = config, config.parallel.rules, loss
    self._temperature, self._mask_V = temperature, np.asarray(drawable)
    self._adamw = make_optimizer(optimizer, steps)
    scalar = isinstance(loss, PPOConfig)
    self._loss_of = self._value_loss if scalar else self._policy_loss
    self.say = rules.Program(mesh, self._values if scalar else self._logps)
    self.init = rules.Program(mesh, self._adamw.init)
    self.update = rules.Program(mesh, self._update)

  def _update(self, params, state, batch):
    loss, gradients = jax.value_and_grad(self._loss_of)(params, batch)
    updates, state = self._adamw.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss, optax.global_norm(gradients)

  def _hidden(self, trunk, batch):
    out = forward(self._config, trunk, batch["tokens"], segment_ids_BxT=batch["segments"], mtp=False)
    return out.hidden_BxTxD

  def _head(self, params, batch):
    """Arguments of the objective's kernels: hidden [N, D], the output matrix, targets [N]."""
    hidden_RxTxD = self._hidden(params, batch)
    kernel_DxV = rules.reshard(params["lm_head"]["kernel"], self._rules, None, "vocab")
    targets_RxT = jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
    return hidden_RxTxD.reshape(-1, hidden_RxTxD.shape[-1]), kernel_DxV, self._field(targets_RxT).reshape(-1)

  def _field(self, x_RxT):
    return rules.reshard(jnp.asarray(x_RxT), self._rules, "batch", None)

  def _logps(self, params, batch):
    scored = linear_logprob(*self._head(params, batch), temperature=self._temperature, vocab_mask=self._mask_V)
    return scored.logp.reshape(batch["tokens"].shape)

  def _values(self, params, batch):
    hidden_RxTxD = self._hidden(params["trunk"], batch).astype(jnp.float32)
    return jnp.einsum("rtd,d->rt", hidden_RxTxD, params["head"]["kernel"]) + params["head"]["bias"]

  def _policy_loss(self, params, batch):
    names = ("logp_old", "logp_infer", "advantages", "mask", "weights", "logp_ref")
    old, infer, gain, mask, weights, ref = (self._field(batch[name]).reshape(-1) for name in names)
    return policy_loss(
      *self._head(params, batch), old, infer, gain, mask, self._loss,
      temperature=self._temperature, vocab_mask=self._mask_V, weights=weights, logp_ref_N=ref,
    )[0]  # fmt: skip

  def _value_loss(self, params, batch):
    values = self._values(params, batch)
    old, returns, mask = (self._field(batch[name]) for name in ("values", "returns", "mask"))
    near = jnp.clip(values, old - self._loss.value_clip, old + self._loss.value_clip)
    worse = jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
    return self._loss.value_coef / 2 * jnp.sum(worse * mask) / batch["mask"].sum()


_programs = functools.cache(_Programs)  # compiled once for all roles, strategies and cases that need the same


class _Model:
  """Parameters of one role on its devices."""

  def __init__(self, case: RLHFCase, placement: Placement, role: Role, tree: Any):
    parallel = ParallelConfig(MeshConfig(fsdp=len(placement.devices_of(role))))
    mesh, config = placement.mesh(role, parallel.mesh), dataclasses.replace(case.run.model, parallel=parallel)
    loss, optimizer = case.phase.objective, case.phase.optimizer
    if "head" in tree:
      config = dataclasses.replace(config, num_nextn_predict_layers=0)
      loss, optimizer = case.phase.ppo, case.phase.ppo.optimizer
    drawable = tuple(case.vocab_mask_V.tolist())
    self._programs = _programs(
      config, mesh, case.run.rollout.temperature, drawable, loss, optimizer, case.optimizer_steps
    )
    self._shardings, self._state = param_shardings(config, mesh), None
    if "head" in tree:
      del self._shardings["lm_head"]
      everywhere = NamedSharding(mesh, PartitionSpec())
      self._shardings = {"trunk": self._shardings, "head": {"kernel": everywhere, "bias": everywhere}}
    self.take(tree)

  def take(self, tree: Any) -> None:
    self.params = jax.device_put(tree, self._shardings)

  def say(self, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[R, T]: log-probs of the next tokens, or values."""
    return np.asarray(self._programs.say(self.params, batch))

  def train(self, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """(loss, norm of the gradient)."""
    if self._state is None:
      self._state = self._programs.init(self.params)
    self.params, self._state, loss, norm = self._programs.update(self.params, self._state, batch)
    return float(loss), float(norm)


class _Phase:
  def __init__(self, case: RLHFCase, placement: Placement):
    self._config, roles = case.phase, placement.roles
    begins_as = {Role.ROLLOUT: Role.ACTOR, Role.REFERENCE: Role.ACTOR, Role.SHADOW_CRITIC: Role.CRITIC}
    self.models = {role: _Model(case, placement, role, case.params[begins_as.get(role, role)]) for role in roles}
    self.losses, self.norms = ({role: [] for role in rlhf.LEARNERS if role in roles} for _ in range(2))
    self._critic = Role.SHADOW_CRITIC if Role.SHADOW_CRITIC in roles else Role.CRITIC
    minibatches = [rollouts for step in case.steps for rollouts in step]
    longest = max(len(rollout.prompt) + rollout.length for rollouts in minibatches for rollout in rollouts)
    # Multiples of 8, the devices that rows are cut over, so that cases share programs.
    self._shape = tuple(DEVICES * -(-size // DEVICES) for size in (max(map(len, minibatches)), longest))

  def step(self, minibatches: Sequence[Sequence[Rollout]]) -> dict[str, np.ndarray]:
    for shadow, source in ((Role.ROLLOUT, Role.ACTOR), (Role.SHADOW_CRITIC, Role.CRITIC)):
      if shadow in self.models:
        self.models[shadow].take(self.models[source].params)
    judged = [self._judge(rollouts) for rollouts in minibatches]
    for rollouts, fields in zip(minibatches, judged, strict=True):
      if self._config.stream:
        fields["logp_old"] = self._ask(Role.ACTOR, rollouts)
      self._train(rollouts, fields)
    return rlhf.flat(judged)

  def _judge(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    asked = {"logp_rollout": Role.ROLLOUT, "logp_old": Role.ACTOR, "logp_ref": Role.REFERENCE, "values": self._critic}
    fields = {name: self._ask(role, rollouts) for name, role in asked.items() if role in self.models}
    fields["logp_infer"] = [np.asarray(rollout.logps, np.float32) for rollout in rollouts]
    if self._config.reward is Reward.MODEL:
      fields["scores"] = self._ask(Role.REWARD, rollouts, last=True)
    else:
      fields["scores"] = [rollout.reward for rollout in rollouts]
    return fields

  def _ask(self, role: Role, rollouts: Sequence[Rollout], last: bool = False) -> list[Any]:
    """[n] of each rollout; or one number, at its last token."""
    said_RxT = self.models[role].say(self._batch(rollouts, {}))
    ends = [len(rollout.prompt) + rollout.length - 1 for rollout in rollouts]
    if last:
      return [said_RxT[row, end] for row, end in enumerate(ends)]
    return [said_RxT[row, end - r.length : end] for row, (end, r) in enumerate(zip(ends, rollouts, strict=True))]

  def _batch(self, rollouts: Sequence[Rollout], fields: dict[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """[R, T] each: tokens, segments, and fields that have a number for each token of an answer."""
    batch = {name: np.zeros(self._shape, np.int32) for name in ("tokens", "segments")}
    batch |= {name: np.zeros(self._shape, np.float32) for name in fields}
    for row, rollout in enumerate(rollouts):
      ids = [*rollout.prompt, *rollout.tokens]
      batch["tokens"][row, : len(ids)], batch["segments"][row, : len(ids)] = ids, 1
      for name, values in fields.items():
        batch[name][row, : len(ids)] = at_predictions(len(rollout.prompt), values[row])
    return batch

  def _train(self, rollouts: Sequence[Rollout], fields: dict[str, Any]) -> None:
    """One step of the actor and of the critic; adds advantages and returns to `fields`."""
    config, trained = self._config, np.ones(len(rollouts), bool)
    if config.advantage is Advantage.GAE:
      fields |= _gae(fields, config.ppo)
    else:
      groups = [rollout.group for rollout in rollouts]
      numbers = group_advantages(fields["scores"], groups, config.advantage)
      fields["advantages"] = [np.full(r.length, a) for r, a in zip(rollouts, numbers, strict=True)]
      trained = has_signal(fields["scores"], groups)
    if not trained.any():
      return
    chosen = np.flatnonzero(trained)
    own = {name: [values[i] for i in chosen] for name, values in fields.items()}
    rollouts = [rollouts[i] for i in chosen]
    own["mask"] = [np.ones(rollout.length) for rollout in rollouts]
    own["weights"] = _weights(own, config)
    own.setdefault("logp_ref", own["logp_old"])
    del own["scores"]
    batch = self._batch(rollouts, own)
    for role, losses in self.losses.items():
      loss, norm = self.models[role].train(batch)
      losses.append(loss)
      self.norms[role].append(norm)


def _weights(fields: dict[str, Any], config: RLConfig) -> list[np.ndarray]:
  """[n] of each rollout: what a token of it weighs in its minibatch."""
  icepop, counted = config.objective, fields["mask"]
  if icepop.denominator is Denominator.KEPT:
    pairs = zip(fields["logp_old"], fields["logp_infer"], strict=True)
    counted = [calibrate(old, old, infer, icepop).kept for old, infer in pairs]
  sizes = [int(one.sum()) for one in counted]
  each = [sequence_weight(size, len(sizes), sum(sizes), icepop) for size in sizes]
  return [np.full(len(mask), weight) for mask, weight in zip(fields["mask"], each, strict=True)]


def _gae(fields: dict[str, Any], ppo: PPOConfig) -> dict[str, list[np.ndarray]]:
  """A_t = sum_l (gamma lam)^l delta_{t+l}, as a product with the matrix of these powers."""
  found: dict[str, list[np.ndarray]] = {"advantages": [], "returns": []}
  for i, values in enumerate(fields["values"]):
    rewards_n = np.zeros(len(values))
    if ppo.kl_coef > 0:
      rewards_n = -ppo.kl_coef * np.subtract(fields["logp_old"][i], fields["logp_ref"][i], dtype=np.float64)
    rewards_n[-1] += min(max(fields["scores"][i], -ppo.reward_clip), ppo.reward_clip)
    delta_n = rewards_n + ppo.gamma * np.append(values[1:], 0.0) - values
    ahead_nxn = np.arange(len(values)) - np.arange(len(values))[:, None]
    powers_nxn = np.where(ahead_nxn >= 0, (ppo.gamma * ppo.lam) ** np.maximum(ahead_nxn, 0), 0.0)
    found["advantages"].append((powers_nxn @ delta_n).astype(np.float32))
    found["returns"].append((powers_nxn @ delta_n + values).astype(np.float32))
  return found


if __name__ == "__main__":
  _jobs = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
  pathlib.Path(sys.argv[2]).write_bytes(pickle.dumps([jax_steps(*job) for job in _jobs]))
