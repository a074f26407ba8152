"""One step's training from experience: IcePop for the actor, clipped value loss for the critic (papers.md 1.4, 2.4).

log-probs at theta_old      of all minibatches before the first update; a single minibatch gets them from the gradient
                            pass, as theta_old is theta there
for each minibatch:
    advantages              of the group, or of the critic
    actor: gradient, AdamW      critic: gradient, AdamW         at the same time, where they have different devices
"""

import dataclasses

import numpy as np

from configs.schema import Advantage, Denominator, PackingConfig, RLConfig, Role
from ring_jax.rl.metrics import step_metrics
from ring_jax.train.batches import Minibatch, model_tokens, rl_fields, rl_minibatches
from ring_jax.train.experience import Experience, Spans, by_critic, relative
from ring_jax.train.roles import Roles, Weights
from ring_jax.train.scalar_batches import value_batches
from ring_jax.train.scalar_programs import value_metrics
from ring_jax.train.turns import Turns
from sharding.processes import fetch

_TOKEN_FIELDS = ("logp", "logp_old", "logp_infer", "advantages", "entropy")  # of `step_metrics`


@dataclasses.dataclass
class _Tally:
  """What the minibatches of a step were like."""

  tokens: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=lambda: {name: [] for name in _TOKEN_FIELDS})
  losses: list[float] = dataclasses.field(default_factory=list)
  norms: list[float] = dataclasses.field(default_factory=list)
  critic: list[dict[str, float]] = dataclasses.field(default_factory=list)
  returns: list[np.ndarray] = dataclasses.field(default_factory=list)
  positions: int = 0


class Learner:
  """Trains a phase's actor and critic; one `begin` ... `end` a step.

  Args:
    name: of the phase: its optimizer's.
  """

  def __init__(self, name: str, phase: RLConfig, packing: PackingConfig, seed: int, roles: Roles, turns: Turns):
    self._name, self._phase, self._packing, self._seed = name, phase, packing, seed
    self._roles, self._turns = roles, turns
    self._by_critic = phase.advantage is Advantage.GAE
    self._kl_reward = self._by_critic and phase.ppo.kl_coef > 0

  def begin(self, version: int) -> None:
    self._version, self._tally = version, _Tally()

  def train(self, weights: Weights, experience: Experience, span: Spans) -> np.ndarray:
    """Updates the weights in place of the old ones; returns one advantage a rollout, for the log."""
    if self._by_critic:
      advantages, kept = None, experience
    else:
      advantages, signal = relative(experience, self._phase.advantage)
      kept = experience.take(np.flatnonzero(signal))
    minibatches = rl_minibatches(kept.rollouts, self._packing, self._phase.minibatches, (self._seed, self._version))
    self._tally.positions += sum(
      int((batch.segment_ids > 0).sum()) for part in minibatches for batch in part.microbatches
    )
    with self._turns.of(Role.ACTOR), span("logp"):
      old = [self._old_logps(weights, part, len(minibatches) == 1) for part in minibatches]
    shown = np.zeros(len(experience.rollouts), np.float32) if advantages is None else advantages
    with span("train"):
      for part, logp_old in zip(minibatches, old, strict=True):
        chosen = kept.take(part.index)
        if self._by_critic:
          old_logps = [rollout.logps for rollout in part.rollouts] if logp_old is None else part.gather(logp_old)
          own, returns = by_critic(chosen, self._phase.ppo, old_logps)
          shown[part.index] = [float(np.mean(values)) if len(values) else 0.0 for values in own]
        else:
          own, returns = advantages[np.flatnonzero(signal)][part.index], None
        self._update(weights, part, chosen, own, returns, logp_old, span)
    return shown

  def end(self) -> tuple[dict[str, float], int]:
    """(metrics of the step, positions trained on, prompts included)."""
    tally = self._tally
    joined = {name: np.concatenate(values) if values else np.zeros(0) for name, values in tally.tokens.items()}
    metrics = step_metrics(**joined, mask=np.ones_like(joined["logp"], bool), config=self._phase.objective)
    if tally.norms:
      metrics |= {"loss": float(np.mean(tally.losses)), "grad_norm": max(tally.norms)}
    if tally.critic:
      metrics |= {f"critic/{name}": float(np.mean([one[name] for one in tally.critic])) for name in tally.critic[0]}
    return metrics | {"optimizer_steps": len(tally.norms)}, tally.positions

  def _old_logps(self, weights: Weights, part: Minibatch, alone: bool) -> list[np.ndarray] | None:
    """Log-probs [R, T] at theta_old of each microbatch; None where the gradient pass will give them itself."""
    if alone and self._phase.objective.denominator is Denominator.ALL and not self._kl_reward:
      return None
    return [fetch(self._roles.actor.logprobs(weights.actor, model_tokens(batch))) for batch in part.microbatches]

  def _update(self, weights: Weights, part: Minibatch, chosen: Experience, advantages, returns, logp_old, span) -> None:
    def actor() -> None:
      self._update_actor(weights, part, chosen, advantages, logp_old)

    def critic() -> None:
      with span("critic"):
        self._update_critic(weights, part, chosen, returns)

    self._turns.together({Role.ACTOR: actor} | ({Role.CRITIC: critic} if self._by_critic else {}))

  def _update_actor(self, weights: Weights, part: Minibatch, chosen: Experience, advantages, logp_old) -> None:
    programs, objective, tally = self._roles.actor, self._phase.objective, self._tally
    logp_ref = part.spread(chosen.logp_ref) if objective.kl_coef > 0 else None
    sums = None
    every = rl_fields(part, advantages, logp_old, objective, logp_ref)
    for batch, fields in zip(part.microbatches, every, strict=True):
      sums, out = programs.rl_gradients(weights.actor, sums, model_tokens(batch), fields, objective, logp_old is None)
      logp_RxT, entropy_RxT = fetch(out)
      inside = fields.mask_RxT > 0
      old_RxT = logp_RxT if logp_old is None else fields.logp_old_RxT
      values = (logp_RxT, old_RxT, fields.logp_infer_RxT, fields.advantages_RxT, entropy_RxT)
      for name, value in zip(_TOKEN_FIELDS, values, strict=True):
        tally.tokens[name].append(value[inside])
    tally.losses.append(float(sums.loss))
    weights.actor, weights.actor_state, norm = programs.apply(
      weights.actor, weights.actor_state, sums.params, self._name
    )
    tally.norms.append(float(norm))

  def _update_critic(self, weights: Weights, part: Minibatch, chosen: Experience, returns: list[np.ndarray]) -> None:
    programs, sums = self._roles.critic(self._name), None
    for tokens, fields in value_batches(part.rollouts, chosen.values, returns, self._phase.ppo, self._packing):
      sums = programs.value_gradients(weights.critic, sums, tokens, fields)
    metrics = value_metrics(sums)
    weights.critic, weights.critic_state, norm = programs.apply(weights.critic, weights.critic_state, sums.params)
    self._tally.critic.append(metrics | {"grad_norm": float(norm)})
