"""One step's training from experience: IcePop for the actor, clipped value loss for the critic (papers.md 1.4, 2.4).

log-probs at theta_old      of all minibatches before the first update; a single minibatch gets them from the gradient
                            pass, as theta_old is theta there
for each minibatch:
    advantages              of the group, or of the critic
    actor: gradient, AdamW      critic: gradient, AdamW         at the same time, where they have different devices
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from configs.schema import Advantage, Denominator, ModelConfig, OldPolicy, PackingConfig, RLConfig, Role
from ring_jax.rl.metrics import step_metrics
from ring_jax.train.batches import Minibatch, deal, minibatch, rl_fields
from ring_jax.train.experience import Experience, Spans, by_critic, relative
from ring_jax.train.roles import Roles, Weights
from ring_jax.train.scalar_batches import value_batches
from ring_jax.train.scalar_programs import value_metrics
from ring_jax.train.turns import Turns
from sharding.processes import fetch

_TOKEN_FIELDS = ("logp", "logp_old", "logp_infer", "advantages", "entropy", "sequences")  # of `step_metrics`


@dataclasses.dataclass
class Tally:
  """What the minibatches of a step were like."""

  tokens: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=lambda: {name: [] for name in _TOKEN_FIELDS})
  losses: list[float] = dataclasses.field(default_factory=list)  # the actor's, one an optimizer step
  norms: list[float] = dataclasses.field(default_factory=list)  # of its gradients, before clipping
  critic: list[dict[str, float]] = dataclasses.field(default_factory=list)  # `value_metrics` and grad_norm, likewise
  positions: int = 0
  sequences: int = 0  # trained on


class Learner:
  """Trains a phase's actor and critic; one `begin` ... `end` a step.

  Args:
    name: of the phase: its optimizer's.
    replayed: the actor, if it is to route tokens as the engine did; None: it routes them itself.

  `tally` is of the step that was begun last.
  """

  def __init__(
    self,
    name: str,
    phase: RLConfig,
    packing: PackingConfig,
    seed: int,
    roles: Roles,
    turns: Turns,
    replayed: ModelConfig | None = None,
  ):
    self._name, self._phase, self._packing, self._seed = name, phase, packing, seed
    self._roles, self._turns, self._replayed = roles, turns, replayed
    self._by_critic = phase.advantage is Advantage.GAE
    self._kl_reward = self._by_critic and phase.ppo.kl_coef > 0

  def begin(self, version: int) -> None:
    self._version, self.tally = version, Tally()

  def train(self, weights: Weights, experience: Experience, span: Spans) -> None:
    """Updates the weights, in place of the old ones, from minibatches that are dealt of the experience."""
    useful = np.ones(len(experience.rollouts), bool)
    if not self._by_critic:
      advantages, useful = relative(experience, self._phase.advantage)
      experience.advantages = list(advantages)
    parts = deal(np.flatnonzero(useful), self._phase.minibatches, (self._seed, self._version))
    self.learn(weights, experience, parts, span)

  def learn(self, weights: Weights, experience: Experience, parts: Sequence[np.ndarray], span: Spans) -> None:
    """Updates the weights once a part of the experience; what the parts are trained on is written into it.

    Args:
      parts: indices of rollouts; without a critic, their advantages are there already.
    """
    minibatches = [minibatch(part, experience.rollouts, self._packing) for part in parts]
    with self._turns.of(Role.ACTOR), span("logp"):
      old = [self._old_logps(weights, batch, len(minibatches) == 1) for batch in minibatches]
    with span("train"):
      for batch, logp_old in zip(minibatches, old, strict=True):
        self.tally.positions += sum(int((one.segment_ids > 0).sum()) for one in batch.microbatches)
        if self._by_critic:
          # Without a pass of its own there is no KL term that would look at them.
          logps = [rollout.logps for rollout in batch.rollouts] if logp_old is None else batch.gather(logp_old)
          found = by_critic(experience, batch.index, self._phase.ppo, logps)
          for i, advantages, returns in zip(batch.index, *found, strict=True):
            experience.advantages[i], experience.returns[i] = advantages, returns
        self._update(weights, batch, experience, logp_old, span)

  def end(self) -> tuple[dict[str, float], int]:
    """(metrics of the step, positions trained on, prompts included)."""
    tally = self.tally
    joined = {name: np.concatenate(values) if values else np.zeros(0) for name, values in tally.tokens.items()}
    metrics = step_metrics(**joined, mask=np.ones_like(joined["logp"], bool), config=self._phase.objective)
    if tally.norms:
      metrics |= {"loss": float(np.mean(tally.losses)), "grad_norm": max(tally.norms)}
    if tally.critic:
      metrics |= {f"critic/{name}": float(np.mean([one[name] for one in tally.critic])) for name in tally.critic[0]}
    return metrics | {"optimizer_steps": len(tally.norms)}, tally.positions

  def _old_logps(self, weights: Weights, part: Minibatch, alone: bool) -> list[np.ndarray] | None:
    """Log-probs [R, T] at theta_old of each microbatch; None where nothing reads them, or the gradient pass will give them
    itself."""
    objective = self._phase.objective
    unread = objective.old is OldPolicy.ENGINE or (alone and objective.denominator is Denominator.ALL)
    if unread and not self._kl_reward:
      return None
    return [fetch(self._roles.actor.logprobs(weights.actor, tokens)) for tokens in part.tokens(self._replayed)]

  def _update(self, weights: Weights, batch: Minibatch, experience: Experience, logp_old, span: Spans) -> None:
    def actor() -> None:
      self._update_actor(weights, batch, experience, logp_old)

    def critic() -> None:
      with span("critic"):
        self._update_critic(weights, batch, experience)

    self._turns.together({Role.ACTOR: actor} | ({Role.CRITIC: critic} if self._by_critic else {}))

  def _update_actor(self, weights: Weights, batch: Minibatch, experience: Experience, logp_old) -> None:
    programs, objective, tally = self._roles.actor, self._phase.objective, self.tally
    pick = lambda values: [values[i] for i in batch.index]  # noqa: E731
    logp_ref = batch.spread(pick(experience.logp_ref)) if objective.kl_coef > 0 else None
    sums, used = None, []
    sequences = batch.spread(range(tally.sequences, tally.sequences + len(batch.rollouts)))
    tally.sequences += len(batch.rollouts)
    every = rl_fields(batch, pick(experience.advantages), logp_old, objective, logp_ref)
    for tokens, fields, sequences_RxT in zip(batch.tokens(self._replayed), every, sequences, strict=True):
      sums, out = programs.rl_gradients(weights.actor, sums, tokens, fields, objective, logp_old is None)
      logp_RxT, entropy_RxT = fetch(out)
      inside = fields.mask_RxT > 0
      used.append(logp_RxT if logp_old is None else fields.logp_old_RxT)
      values = (logp_RxT, used[-1], fields.logp_infer_RxT, fields.advantages_RxT, entropy_RxT, sequences_RxT)
      for name, value in zip(_TOKEN_FIELDS, values, strict=True):
        tally.tokens[name].append(value[inside])
    for i, own in zip(batch.index, batch.gather(used), strict=True):
      experience.logp_old[i] = own
    tally.losses.append(float(sums.loss))
    weights.actor, weights.actor_state, norm = programs.apply(
      weights.actor, weights.actor_state, sums.params, self._name
    )
    tally.norms.append(float(norm))

  def _update_critic(self, weights: Weights, batch: Minibatch, experience: Experience) -> None:
    programs, sums = self._roles.critic(self._name), None
    old, returns = ([values[i] for i in batch.index] for values in (experience.values, experience.returns))
    for tokens, fields in value_batches(batch, old, returns, self._phase.ppo):
      sums = programs.value_gradients(weights.critic, sums, tokens, fields)
    metrics = value_metrics(sums)
    weights.critic, weights.critic_state, norm = programs.apply(weights.critic, weights.critic_state, sums.params)
    self.tally.critic.append(metrics | {"grad_norm": float(norm)})
