"""RLHF under every placement, on either path: the same experience, losses and parameters from the same recorded rollouts.

The standard is the PyTorch twin in one process (torch_twin/ppo.py).  Against it stand the twin with its roles on four
processes (torch_twin/placed.py) and a run's own classes on eight JAX devices (placement_jax.py), each colocated,
interleaving and disaggregated.  Both read the seats of the same run config, one with ranks for devices.

Two phases: IcePop with group-relative advantages of a verifier's rewards, and with those of a critic (GAE) of a reward
model's scores.  Both have a reference, several minibatches a step, and sampled log-probs of which some are out of IcePop's
band; the second has all roles, as interleaving needs.

On request a third phase has vLLM as the shadow actor of the disaggregated placement: it draws the rollouts of every step.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from configs.schema import (
  Advantage,
  IcePopConfig,
  PackingConfig,
  PPOConfig,
  Reward,
  RewardModelConfig,
  RLConfig,
  Role,
  RunConfig,
  Strategy,
)
from parity import cases, rlhf
from parity.cases import Case
from parity.compare import Row, Suite, Tier, compare
from parity.rlhf import RLHFCase, Steps
from parity.suites import engine, objective, placement_jax
from parity.torch_twin import placed, ppo, step, weights
from parity.vllm.runner import Sampling
from parity.vllm.shadow import ShadowActor
from ring_jax.records import Rollout

# Tolerances, relative to the largest value of a field: of the whole phase, since rewards of tokens may all be small.
# Log-probs, values and scores have a scale of their own: 1.
EXPERIENCE, LOSSES, PARAMETERS = 2e-5, 1e-5, 1e-6
RANKS = 4
TORCH, JAX = "PyTorch placed against alone", "JAX against PyTorch"
# Dense and sparse layers, and an MTP layer, which no role uses and only the actor has.
MODEL = Case(
  "placement",
  dataclasses.replace(
    cases.QUICK[2].config, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=40,
    num_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16,
  ),
  bias_shift=-3.0,
  seed=11,
)  # fmt: skip
_STEPS = 3
_ROLLOUTS = (8, 3)  # of each minibatch of a step; the second leaves one of four ranks without a row
_PACKING = PackingConfig(length=32, rows=8)  # rows for every device; a minibatch leaves some of them empty

# As `objective.FAST`, but twice as many steps add up.
_ADAMW = dataclasses.replace(objective.FAST, eps=1e-5)
_RL = RLConfig(
  steps=_STEPS,
  minibatches=len(_ROLLOUTS),
  advantage=Advantage.GAE,
  reward=Reward.MODEL,
  objective=IcePopConfig(kl_coef=0.3),
  ppo=PPOConfig(kl_coef=0.3, reward_clip=0.5, gamma=0.97, value_clip=0.02, optimizer=_ADAMW),
  optimizer=_ADAMW,
)
QUICK = (
  ("IcePop, groups", dataclasses.replace(_RL, advantage=Advantage.GRPO, reward=Reward.VERIFIER)),
  ("IcePop, critic", _RL),
)
FULL = (
  *QUICK,
  ("critic, streaming", dataclasses.replace(_RL, stream=max(_ROLLOUTS), minibatches=1)),
  ("groups of a reward model, streaming",
   dataclasses.replace(_RL, advantage=Advantage.GRPO, stream=max(_ROLLOUTS), minibatches=1)),
  ("verifier, mean only, no KL",
   dataclasses.replace(_RL, advantage=Advantage.MEAN_ONLY, reward=Reward.VERIFIER, objective=IcePopConfig())),
)  # fmt: skip

Placed = Callable[[Sequence[placed.Job]], list[Steps]]


def record(model: Case, name: str, config: RLConfig, seed: int = 0) -> RLHFCase:
  """A phase over random models and random answers, scored by the first actor and moved (`objective.record_rollouts`)."""
  run = run_config(model, name, config)
  mask_V = np.arange(model.config.vocab_size) < model.config.vocab_size - 4
  params = {Role.ACTOR: cases.random_params(model.config, model.seed, model.bias_shift)}
  for offset, role in enumerate(sorted(config.roles & {Role.CRITIC, Role.REWARD}), 1):
    params[role] = scalar_params(model, model.seed + offset)
  actor, scorer = weights.build(model.config, params[Role.ACTOR]), step.Scorer(run.rollout.temperature, mask_V)
  steps: list[rlhf.Minibatches] = [[] for _ in range(_STEPS)]
  for number in range(_STEPS * len(_ROLLOUTS)):
    rollouts = objective.record_rollouts(
      model, lambda rollouts: step.answer_logps(actor, rollouts, scorer), seed + number, _ROLLOUTS[number % 2]
    )
    steps[number // len(_ROLLOUTS)].append([_renumbered(rollout, 100 * number) for rollout in rollouts])
  return RLHFCase(name, run, params, steps, mask_V)


def run_config(model: Case, name: str, config: RLConfig) -> RunConfig:
  """A run's configuration around the phase."""
  run = objective.run_config(model, objective.QUICK[0])
  return dataclasses.replace(
    run,
    name=name,
    rl=dataclasses.replace(run.rl, steps=0),
    rlhf=config,
    reward_model=RewardModelConfig(steps=1),
    packing=_PACKING,
  )


def scalar_params(model: Case, seed: int) -> dict[str, Any]:
  """A critic or reward model of which nothing is 0."""
  trunk = cases.random_params(dataclasses.replace(model.config, num_nextn_predict_layers=0), seed, model.bias_shift)
  del trunk["lm_head"]
  random = np.random.default_rng(seed)
  kernel_D = random.normal(0.0, 0.5 * model.config.hidden_size**-0.5, model.config.hidden_size)
  head = {"kernel": kernel_D.astype(np.float32), "bias": np.float32(random.normal(0.0, 0.3))}
  return {"trunk": trunk, "head": head}


def _renumbered(rollout: Rollout, first: int) -> Rollout:
  return dataclasses.replace(rollout, uid=first + rollout.uid, group=first + rollout.group)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def experience_rows(got: Steps, expected: Steps, _: Case, name: str) -> list[Row]:
  rows = []
  for version, (own, other) in enumerate(zip(got.experience, expected.experience, strict=True)):
    for field in rlhf.EXPERIENCE:
      if field in other:
        scale = max(1.0, *(float(np.abs(one[field]).max(initial=0.0)) for one in expected.experience))
        value = own.get(field, np.zeros(0))
        rows.append(compare(f"{field} of step {version}", value, other[field], tolerance=EXPERIENCE, case=name,
                            scale=scale))  # fmt: skip
  return rows


def loss_rows(got: Steps, expected: Steps, _: Case, name: str) -> list[Row]:
  """Norms show what neither AdamW nor clipping lets through: a gradient averaged over ranks, which should be a sum."""
  # The actor's loss is a sum of terms the size of an advantage, which may cancel.
  scales = {Role.ACTOR: float(np.mean([np.abs(one["advantages"]).mean() for one in expected.experience]))}
  rows = []
  for role, losses in expected.losses.items():
    given = got.losses.get(role, ())
    rows.append(compare(f"{role} loss", given, losses, tolerance=LOSSES, case=name, scale=scales.get(role)))
    given = got.norms.get(role, ())
    rows.append(compare(f"{role} gradient norm", given, expected.norms[role], tolerance=LOSSES, case=name))
  return rows


def parameter_rows(got: Steps, expected: Steps, model: Case, name: str) -> list[Row]:
  rows = []
  for role, theirs in expected.params.items():
    ours = got.params[role]
    if "head" in theirs:
      head = {part: [tree["head"][part] for tree in (ours, theirs)] for part in theirs["head"]}
      rows += [compare(f"{role} head.{part}", *both, tolerance=PARAMETERS, case=name) for part, both in head.items()]
      ours, theirs = ours["trunk"], theirs["trunk"]
    rows += objective.tree_rows(str(role), ours, theirs, model, name, PARAMETERS)
  return rows


def run(quick: bool = True, interpreter: str | None = None, vllm_draws: bool = False) -> Suite:
  """All tiers.

  Args:
    quick: the phases that CI needs.
    interpreter: the Python that has vLLM; default: this one.
    vllm_draws: whether to run one more phase, whose rollouts vLLM draws.

  Raises:
    VLLMError: vLLM is not there, or does not hold the trainer's weights.
  """
  suite = Suite("placement", recorded_tiers(quick))
  if vllm_draws:
    suite.tiers += vllm_tiers(interpreter)
  return suite


def recorded_tiers(quick: bool, run_placed: Placed = placed.run) -> list[Tier]:
  """Args:
  run_placed: how the twin runs across processes.
  """
  recorded = [record(MODEL, name, config, 100 * i) for i, (name, config) in enumerate(QUICK if quick else FULL)]
  alone = [ppo.run_alone(case) for case in recorded]
  asked = [(i, strategy) for i, case in enumerate(recorded) for strategy in rlhf.strategies_of(case.phase)]
  begin = time.perf_counter()
  found = {TORCH: run_placed(
    [placed.Job(recorded[i], rlhf.placement_of(strategy, range(RANKS), recorded[i].run)) for i, strategy in asked]
  )}  # fmt: skip
  middle = time.perf_counter()
  found[JAX] = placement_jax.run([(strategy, recorded[i]) for i, strategy in asked])
  seconds = {TORCH: middle - begin, JAX: time.perf_counter() - middle}
  kinds = (
    ("experience", "every role says the same of the same rollouts, wherever it is", experience_rows),
    ("losses", "all optimizer steps of actor and critic have the same losses and gradient norms", loss_rows),
    ("parameters", f"after {_STEPS} steps actor and critic have the same parameters", parameter_rows),
  )
  tiers = []
  for kind, proves, rows_of in kinds:
    for pair, results in found.items():
      rows = []
      for (i, strategy), got in zip(asked, results, strict=True):
        rows += rows_of(got, alone[i], MODEL, f"{recorded[i].name}, {strategy}")
      tiers.append(Tier(kind, proves, pair, rows, seconds[pair] if kind == "experience" else 0.0))
  return tiers


# ---------------------------------------------------------------------------------------------------------------------
# vLLM draws


def vllm_tiers(interpreter: str | None, steps: int = 2) -> list[Tier]:
  """vLLM as the shadow actor of the disaggregated placement; then its rollouts replayed in one process."""
  begin = time.perf_counter()
  model, config = Case("vLLM draws", engine.MODEL, seed=4), FULL[-1][1]
  run = run_config(model, model.name, config)
  params = {Role.ACTOR: cases.random_params(model.config, model.seed)}
  case = RLHFCase(model.name, run, params, [[[]]] * steps, np.ones(model.config.vocab_size, bool))
  prompts = [engine.random_prompts(model.config, 4, seed=version) for version in range(steps)]
  sampling = Sampling(max_tokens=8, n=4, temperature=run.rollout.temperature)
  draw = ShadowActor(model.config, prompts, sampling, engine.verify, interpreter)
  placement = rlhf.placement_of(Strategy.DISAGGREGATED, range(RANKS), run)
  (found,) = placed.run([placed.Job(case, placement, draw=draw)])
  seconds = time.perf_counter() - begin
  alone = ppo.run_alone(dataclasses.replace(case, steps=found.rollouts))
  drawn = [
    compare(f"vLLM's log-probs of step {version}", one["logp_infer"], other["logp_rollout"],
            tolerance=engine.VLLM_TOLERANCE, case=model.name, scale=1.0)
    for version, (one, other) in enumerate(zip(found.experience, alone.experience, strict=True))
  ]  # fmt: skip
  same = [*loss_rows(found, alone, model, model.name), *parameter_rows(found, alone, model, model.name)]
  proves = "what vLLM draws in each step comes from the weights that crossed to it"
  return [
    Tier("shadow actor", proves, "vLLM against trainer", drawn, seconds),
    Tier("shadow actor parameters", "and trains the same way in one process", TORCH, same),
  ]
