"""The backward pass and the step: objective value -> gradients of every parameter -> parameters after AdamW steps.

The JAX side is the trainer's own: `rl_minibatches`, `Programs` and `make_optimizer`, over packed microbatches.  The twin's is
`torch_twin.step.rl_step`, one sequence a row.  Both train on the same recorded rollouts, whose log-probs are the model's
own under another engine's error: near for most tokens, out of the band for some.

The objectives that IcePop is compared with are held against the twin's by themselves, on those log-probs, with the gradient
of every token; only the full suite trains a model on each of them.

Cross-entropy with the MTP layer's loss is compared as well, and without an MTP layer also with Glm4Moe.

Dimension key: B rows, T positions.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from configs import ring_tiny
from configs.schema import (
  OBJECTIVES,
  Aggregate,
  Denominator,
  IcePopConfig,
  OldPolicy,
  OptimizerConfig,
  PackingConfig,
  RunConfig,
)
from kernels.icepop import icepop_loss
from parity import cases, glm4_moe
from parity.cases import Case
from parity.compare import Row, Suite, Tier, compare
from parity.suites.model import JAX_GLM, JAX_TWIN, TWIN_GLM, Build
from parity.torch_twin import objective, step, weights
from parity.torch_twin.model import device_of
from ring_jax.records import FinishReason, Rollout
from ring_jax.rl.advantages import group_advantages
from ring_jax.train.batches import model_tokens, rl_fields, rl_minibatches
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.programs import Programs, Tokens

LOSS, GRADIENTS, PARAMETERS = 1e-5, 1e-5, 1e-6  # tolerances, relative to the tensor's largest value
STEPS = 3  # of AdamW
# AdamW moves an element by the full rate however small its gradient is.  Where the gradient is of the size of float32's
# noise (1e-8 here), so is what the two sides disagree about: at a rate of 3e-4 with eps=1e-8 one element in a thousand
# ends up to 8e-6 apart, and 99 % of them within 1e-7.  The two below stay under 1e-6: Ring-1T's own rate (papers.md 1.2),
# and a fast one, at which a mistake in clipping, warm-up or decay shows, with an eps above the noise.
PUBLISHED = OptimizerConfig(learning_rate=2e-6, warmup_steps=2, grad_clip=100.0)  # never clips
FAST = OptimizerConfig(learning_rate=1e-4, warmup_steps=2, eps=1e-6, weight_decay=0.1)  # always clips
MTP_SCALE = 0.1
TEMPERATURE = 0.8
PACKING = PackingConfig(length=48, rows=2)


@dataclasses.dataclass(frozen=True)
class Objective:
  """A variant of the objective; the quick ones between them take every path of `rl.py`."""

  name: str
  icepop: IcePopConfig
  minibatches: int  # 1: theta_old is theta
  optimizer: OptimizerConfig = FAST


QUICK = (
  Objective("one minibatch", IcePopConfig(), 1),
  Objective(
    "three minibatches, kept tokens", IcePopConfig(clip_high=0.28, denominator=Denominator.KEPT), STEPS, PUBLISHED
  ),
)
FULL = (
  *QUICK,
  Objective("token mean, mask of ones", IcePopConfig(aggregate=Aggregate.TOKEN_MEAN, weight="one"), STEPS),
  Objective("token budget, two policies",
            IcePopConfig(aggregate=Aggregate.TOKEN_BUDGET, token_budget=300, calibration="theta_over_infer"), STEPS),
  *(Objective(name, config, STEPS) for name, config in OBJECTIVES.items() if name != "icepop"),
)  # fmt: skip
# Beside those that have names: what they may be combined to.
COMBINED = {
  "band, truncated": IcePopConfig(weight="truncated", truncation=1.2, denominator=Denominator.KEPT),
  "gspo on the band": dataclasses.replace(OBJECTIVES["icepop"], level="sequence", clip_low=0.02, clip_high=0.03),
  "gspo on the engine": dataclasses.replace(OBJECTIVES["gspo"], old="engine", aggregate=Aggregate.TOKEN_MEAN),
  "kpop, kept tokens": dataclasses.replace(OBJECTIVES["kpop"], weight="one", denominator=Denominator.KEPT),
}


def record_rollouts(case: Case, logp_of, seed: int = 0, count: int = 12) -> list[Rollout]:
  """Answers of random tokens in groups of four, scored by the model and moved as another engine would move them.

  Args:
    case: gives the vocabulary.
    logp_of: rollouts -> log-probs of each one's answer.
  """
  random = np.random.default_rng(seed)
  rollouts = []
  for uid in range(count):
    prompt = random.integers(0, case.config.vocab_size - 4, random.integers(2, 8)).tolist()
    tokens = random.integers(0, case.config.vocab_size - 4, random.integers(3, 14)).tolist()
    rollout = Rollout(uid, uid // 4, uid // 4, prompt, tokens, [0.0] * len(tokens), [0] * len(tokens))
    rollout.finish_reason, rollout.reward = FinishReason.STOP, float(uid % 4 == uid // 4 or random.random() < 0.3)
    rollouts.append(rollout)
  for rollout, logp in zip(rollouts, logp_of(rollouts), strict=True):
    # Far off: log k is +-2, well outside of the band [-0.69, 1.61]; otherwise well inside.
    far = random.random(len(logp)) < 0.1
    error = np.where(far, random.choice([-2.0, 2.0], len(logp)), random.uniform(-0.3, 0.3, len(logp)))
    rollout.logps = [float(np.float32(value)) for value in logp - error]
  return rollouts


def run_config(case: Case, variant: Objective) -> RunConfig:
  """A run's configuration around the case; only what `Programs` reads of it matters."""
  base = ring_tiny.get_config()
  return dataclasses.replace(
    base,
    name=case.name,
    model=case.config,
    packing=PACKING,
    sft=dataclasses.replace(base.sft, mtp_loss_scale=MTP_SCALE),
    rl=dataclasses.replace(
      base.rl, minibatches=variant.minibatches, objective=variant.icepop, optimizer=variant.optimizer
    ),
    rollout=dataclasses.replace(base.rollout, temperature=TEMPERATURE),
  )


Recording = Callable[[RunConfig], list[Rollout]]


class Training:
  """One case under one objective, on both sides."""

  def __init__(self, case: Case, variant: Objective, build: Build, recorded: Recording | None = None):
    """Args:
    recorded: what to train on; default: `record_rollouts`.
    """
    self.case, self.name = case, f"{case.name}, {variant.name}"
    self.run = run_config(case, variant)
    self.params = cases.random_params(case.config, case.seed, case.bias_shift)
    # The last ids are never drawn; an engine that knows of no mask may draw all.
    reach = case.config.vocab_size - (4 if recorded is None else 0)
    self.mask_V = np.arange(case.config.vocab_size) < reach
    self.optimizer = make_optimizer(variant.optimizer, STEPS)
    self.programs = Programs(self.run, self.mask_V, {"rl": self.optimizer})
    self.build = build
    self.scorer = step.Scorer(self.run.rollout.temperature, self.mask_V, rows=5)
    self.twin = build(case.config, self.params)
    self.rollouts = recorded(self.run) if recorded else self._record()
    rewards, groups = zip(*((rollout.reward, rollout.group) for rollout in self.rollouts), strict=True)
    self.advantages = group_advantages(rewards, groups, self.run.rl.advantage)
    self.twin_advantages = objective.advantages_of(rewards, groups, self.run.rl.advantage)

  def _record(self) -> list[Rollout]:
    honest = weights.build(self.case.config, self.params)  # rollouts do not depend on what is being judged
    return record_rollouts(
      self.case, lambda rollouts: step.answer_logps(honest, rollouts, self.scorer), self.case.seed + 100
    )

  @functools.cached_property
  def jax(self) -> dict[str, Any]:
    """Losses, the first gradient, and parameters after `STEPS` optimizer steps, by the trainer's programs."""
    rl, params = self.run.rl, jax.tree.map(jax.numpy.asarray, self.params)
    opt_state, losses, norms, first = self.optimizer.init(params), [], [], None
    for version in range(STEPS // rl.minibatches):
      minibatches = rl_minibatches(self.rollouts, PACKING, rl.minibatches, (self.run.seed, version))
      alone = len(minibatches) == 1 and rl.objective.denominator is Denominator.ALL
      alone |= rl.objective.old is OldPolicy.ENGINE
      old = [
        None if alone else [jax.device_get(self.programs.logprobs(params, model_tokens(b))) for b in part.microbatches]
        for part in minibatches
      ]
      for part, logp_old in zip(minibatches, old, strict=True):
        sums = None
        every = rl_fields(part, self.advantages[part.index], logp_old, rl.objective)
        for batch, fields in zip(part.microbatches, every, strict=True):
          sums, _ = self.programs.rl_gradients(
            params, sums, model_tokens(batch), fields, rl.objective, logp_old is None
          )
        first = jax.device_get(sums.params) if first is None else first
        losses.append(float(sums.loss))
        params, opt_state, norm = self.programs.apply(params, opt_state, sums.params, "rl")
        norms.append(float(norm))
    return {"losses": losses, "norms": norms, "gradients": first, "params": jax.device_get(params)}

  @functools.cached_property
  def torch(self) -> dict[str, Any]:
    """The same by the twin."""
    rl = self.run.rl
    optimizer, losses, norms = _Recording(self.twin, rl.optimizer, STEPS), [], []
    for version in range(STEPS // rl.minibatches):
      report = step.rl_step(
        self.twin, optimizer, self.rollouts, self.twin_advantages, rl, seed=(self.run.seed, version), scorer=self.scorer
      )
      losses, norms = losses + report.losses, norms + report.norms
      kept = np.concatenate(report.kept)
    found = {"losses": losses, "norms": norms, "gradients": optimizer.first, "kept": kept}
    return found | {"params": weights.params_of(self.twin)}

  def objective_rows(self) -> list[Row]:
    outside = {"outside_band": float(np.mean(~self.torch["kept"]))}
    return [
      compare("advantages", self.advantages, self.twin_advantages, tolerance=LOSS, case=self.name),
      self._compare("objective", "losses", slice(1), extra=outside),
    ]

  def gradient_rows(self) -> list[Row]:
    rows = tree_rows("gradient of", self.jax["gradients"], self.torch["gradients"], self.case, self.name, GRADIENTS)
    return [*rows, self._compare("gradient norm", "norms", slice(1))]

  def parameter_rows(self) -> list[Row]:
    rows = tree_rows("", self.jax["params"], self.torch["params"], self.case, self.name, PARAMETERS)
    # The later steps' losses and norms depend on the parameters before them.
    later = slice(1, None)
    return [*rows, self._compare("later objectives", "losses", later), self._compare("later norms", "norms", later)]

  def variant_rows(self) -> list[Row]:
    """Loss and gradient of every token, of all objectives, from these rollouts' log-probs."""
    (part,) = rl_minibatches(self.rollouts, PACKING)
    old = step.answer_logps(self.twin, self.rollouts, self.scorer)
    random = np.random.default_rng(self.case.seed)
    theta = [logp + random.normal(0, 0.15, len(logp)).astype(np.float32) for logp in old]
    rows = []
    for name, config in (OBJECTIVES | COMBINED).items():
      sides = (_jax_objective, _torch_objective)
      got, expected = (side(part, theta, old, self.advantages, config) for side in sides)
      for title, index in (("loss", 0), ("gradient of log-probs", 1)):
        case = f"{self.name}, {name}"
        scale = {"scale": float(np.abs(expected[1]).max())} if index == 0 else {}
        rows.append(compare(title, got[index], expected[index], tolerance=LOSS, case=case, **scale))
    return rows

  def _compare(self, title: str, name: str, which: slice, **extra: Any) -> Row:
    # An objective is a sum of terms the size of an advantage, which may cancel: to nearly nothing on policy.
    scale = {"scale": float(np.mean(np.abs(self.advantages)))} if name == "losses" else {}
    got, expected = self.jax[name][which], self.torch[name][which]
    return compare(title, got, expected, tolerance=LOSS, case=self.name, **scale, **extra)


def _jax_objective(part, theta, old, advantages, config: IcePopConfig) -> tuple[float, np.ndarray]:
  """(loss, gradients of all answers one after the other), from packed microbatches."""
  fields = rl_fields(part, advantages, part.spread(old), config)
  loss, gradients = 0.0, []
  for batch, one, theta_RxT in zip(part.microbatches, fields, part.spread(theta), strict=True):

    def loss_of(logp_RxT, batch=batch, one=one):
      return icepop_loss(
        logp_RxT, one.logp_old_RxT, one.logp_infer_RxT, one.advantages_RxT, one.mask_RxT, config,
        weights=one.weights_RxT, segment_ids=batch.segment_ids,
      )[0]  # fmt: skip

    value, gradient = jax.value_and_grad(loss_of)(jax.numpy.asarray(theta_RxT))
    loss += float(value)
    gradients.append(np.asarray(gradient))
  return loss, np.concatenate(part.gather(gradients))


def _torch_objective(part, theta, old, advantages, config: IcePopConfig) -> tuple[float, np.ndarray]:
  """The same by the twin, one sequence a row."""
  batch = step.sequences_of(part.rollouts, torch.get_default_device())
  logp, logp_old = batch.spread(theta).requires_grad_(), batch.spread(old)
  infer = batch.spread([rollout.logps for rollout in part.rollouts])
  counted = objective.counted_tokens(batch.mask, logp_old, infer, config)
  weights_ = objective.weights_of(counted, len(part.rollouts), int(counted.sum()), config)
  loss = objective.icepop(logp, logp_old, infer, batch.spread(advantages), batch.mask, weights_, config).loss
  loss.backward()
  return loss.item(), np.concatenate(batch.gather(logp.grad))


class _Recording(step.TwinOptimizer):
  """Keeps the gradients of the first step as they came."""

  first: dict[str, Any] | None = None

  def __init__(self, model, config, total_steps):
    super().__init__(model, config, total_steps)
    self._model = model

  def step(self) -> float:
    if self.first is None:
      self.first = weights.gradients_of(self._model)
    return super().step()


def tree_rows(
  prefix: str, got: Mapping, expected: Mapping, case: Case, name: str, tolerance: float, *, partial: bool = False
) -> list[Row]:
  """A row for every tensor, stacked ones layer by layer.

  Args:
    partial: `expected` may lack tensors (an oracle without a selection bias).
  """
  rows, theirs = [], dict(_leaves(expected))
  for path, value in _leaves(got):
    if partial and path not in theirs:
      continue
    title, other = f"{prefix} {path}".strip(), theirs[path]
    first = {"dense_layers": 0, "moe_layers": case.config.first_k_dense_replace}.get(path.split(".")[0])
    if first is None:
      layer = case.config.num_hidden_layers if path.startswith("mtp.block") else None
      rows.append(compare(title, value, other, tolerance=tolerance, case=name, layer=layer))
    else:
      for index in range(len(value)):
        rows.append(compare(title, value[index], other[index], tolerance=tolerance, case=name, layer=first + index))
  return sorted(rows, key=lambda row: -1 if row.layer is None and "embed" in row.name else (row.layer or 0))


def _leaves(tree: Mapping):
  for path, value in jax.tree_util.tree_leaves_with_path(dict(tree)):
    yield ".".join(key.key for key in path), np.asarray(value)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy: three ways


class CrossEntropy:
  """Mean cross-entropy of whole rows, the loss of SFT, plus the MTP layer's where there is one."""

  def __init__(self, case: Case, build: Build):
    self.case = case
    self.params = cases.random_params(case.config, case.seed, case.bias_shift)
    random = np.random.default_rng(case.seed)
    self.tokens = random.integers(0, case.config.vocab_size, (PACKING.rows, PACKING.length)).astype(np.int32)
    self.build = build

  @functools.cached_property
  def jax(self) -> dict[str, Any]:
    B, T = self.tokens.shape
    programs = Programs(run_config(self.case, QUICK[0]), np.ones(self.case.config.vocab_size, bool), {})
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    targets = np.roll(self.tokens, -1, axis=1)
    weights_BxT = np.full((B, T), 1.0 / (B * (T - 1)), np.float32)
    weights_BxT[:, -1] = targets[:, -1] = 0
    batch = Tokens(self.tokens, positions, np.ones((B, T), np.int32), targets)
    return jax.device_get(programs.sft_gradients(self.params, None, batch, weights_BxT)).params

  @functools.cached_property
  def torch(self) -> dict[str, Any]:
    model = self.build(self.case.config, self.params)
    tokens = torch.from_numpy(self.tokens).long().to(device_of(model))
    out = model(tokens)
    loss = _entropy(model, out.hidden_BxTxD, tokens, 1)
    if out.mtp_hidden_BxTxD is not None:
      # Position t predicts t + 2; the mean is still over all T - 1 targets of a row.
      share = (tokens.shape[1] - 2) / (tokens.shape[1] - 1)
      loss = loss + MTP_SCALE * share * _entropy(model, out.mtp_hidden_BxTxD, tokens, 2)
    loss.backward()
    return weights.gradients_of(model)

  @functools.cached_property
  def oracle(self) -> dict[str, Any] | None:
    config = self.case.config
    if config.num_nextn_predict_layers or not config.num_shared_experts or not config.norm_topk_prob:
      return None
    return glm4_moe.loss_and_gradients(glm4_moe.build(config, self.params), config, self.tokens)[1]

  def rows(self, pair: str) -> list[Row]:
    if pair != JAX_TWIN and self.oracle is None:
      return []
    got = self.torch if pair == TWIN_GLM else self.jax
    expected = self.torch if pair == JAX_TWIN else self.oracle
    name = f"{self.case.name}, cross-entropy"
    return tree_rows("gradient of", got, expected, self.case, name, GRADIENTS, partial=pair != JAX_TWIN)


def _entropy(model, hidden_BxTxD, tokens_BxT, ahead: int) -> torch.Tensor:
  logits = model.logits(hidden_BxTxD[:, :-ahead])
  return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BxT[:, ahead:].flatten())


def run(quick: bool = True, build: Build = weights.build) -> Suite:
  """All tiers.

  Args:
    quick: the cases that CI needs.
    build: how the twin is made of a configuration and parameters.
  """
  chosen = cases.cases(quick)
  if quick:
    trainings = [Training(chosen[0], QUICK[0], build), Training(chosen[2], QUICK[1], build)]
  else:
    trainings = [Training(case, variant, build) for case in chosen for variant in FULL]
  entropies = [CrossEntropy(case, build) for case in (chosen[1:] if quick else chosen)]
  proves = "advantages and the IcePop loss are the same"
  objective_rows = [trainings[0].variant_rows, *(training.objective_rows for training in trainings)]
  tiers = [_tier("objective", proves, JAX_TWIN, objective_rows)]
  proves = "the gradient of every parameter is the same"
  entropy_rows = [functools.partial(entropy.rows, JAX_TWIN) for entropy in entropies]
  tiers.append(_tier("gradients", proves, JAX_TWIN, (*entropy_rows, *(item.gradient_rows for item in trainings))))
  for pair in (JAX_GLM, TWIN_GLM):
    tiers.append(_tier("gradients", proves, pair, (functools.partial(entropy.rows, pair) for entropy in entropies)))
  proves = f"either path ends with the same parameters after {STEPS} AdamW steps on the same rollouts"
  tiers.append(_tier("parameters", proves, JAX_TWIN, (training.parameter_rows for training in trainings)))
  return Suite("objective", [tier for tier in tiers if tier.rows])


def _tier(name: str, proves: str, pair: str, parts) -> Tier:
  begin = time.perf_counter()
  rows = [row for part in parts for row in part()]
  return Tier(name, proves, pair, rows, time.perf_counter() - begin)
