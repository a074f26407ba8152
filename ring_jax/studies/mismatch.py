"""How far engines are from the trainer, with the same trained weights: by dtype, engine, position and layer.

    cold start        a checkpoint of SFT, a seed each, of a shape that vLLM has kernels for
    one engine        samples answers to unseen problems; the trainer in float32 scores the same tokens

No objective is involved: k = pi_train / pi_infer is the one that IcePop then sees (Ring-1T equation 2), and what its range
would drop is counted.  Which experts a token takes is that of a forward pass with the engine's weights in its dtype; vLLM
tells its own.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs import ring_tiny
from configs.schema import IcePopConfig, RolloutDtype, RunConfig
from parity.vllm import trainer
from parity.vllm.export import export
from parity.vllm.runner import VLLM, Sampling
from ring_jax.checkpoint.resolve import Opened, open_checkpoint
from ring_jax.data.tasks import Problem
from ring_jax.records import FinishReason, Rollout
from ring_jax.rewards.pool import ScoringPool
from ring_jax.rl.metrics import step_metrics
from ring_jax.studies import figures
from ring_jax.studies.statistics import interval
from ring_jax.studies.study import Figure, Place, Point, Report, Result, Results, Settings, Study, Table
from ring_jax.studies.training import COLD, cold_start, from_cold_starts, quick
from ring_jax.train.assets import prepare_tasks
from ring_jax.train.evaluation import Evaluator
from ring_jax.train.scoring import Scorer
from rollout import weights

_OURS, _VLLM = "ours_", "vllm_"
ENGINES: Mapping[str, str] = {
  **{f"{_OURS}{dtype.value}": f"ours, {dtype.value}" for dtype in RolloutDtype},
  f"{_VLLM}float32": "vLLM, float32",
  f"{_VLLM}bfloat16": "vLLM, bfloat16",
}
_QUICK = ("ours_float32", "ours_int4")
_CHUNK = 256  # sequences that the trainer scores at once


def config_of(settings: Settings) -> RunConfig:
  """The tiny run; heads of 32, for which vLLM has kernels."""
  base = ring_tiny.get_config()
  config = dataclasses.replace(
    base,
    name="mismatch",
    model=dataclasses.replace(base.model, head_dim=32),
    eval=dataclasses.replace(base.eval, samples=4),
  )
  return quick(config) if settings.quick else config


class Mismatch(Study):
  name = "mismatch"
  title = "How far engines are from the trainer"
  claim = (
    "Ring-1T, section 2.3.2, and the IcePop blog: engine and trainer with the same weights disagree, a mixture of experts more"
    " than a dense model, since a token may take other experts; the share of tokens that do grows with depth, and the"
    " disagreement with position."
  )

  def points(self, settings: Settings) -> list[Point]:
    return from_cold_starts(settings, _QUICK if settings.quick else ENGINES)

  def measure(self, point: Point, settings: Settings, place: Place) -> Result:
    config = config_of(settings)
    if point.arm == COLD:
      return cold_start(config, point.seed, place)
    config = dataclasses.replace(config, seed=point.seed)
    workdir = place.of(point.needs[0]) / "run"
    opened = open_checkpoint(str(workdir))
    tokenizer, tasks = prepare_tasks(config.task, config.tokenizer, config.rollout, config.seed, "", workdir)
    problems = tasks.held_out()[: config.eval.problems]
    with ScoringPool(config.task) as pool:
      draw = _draw_ours if point.arm.startswith(_OURS) else _draw_vllm
      rollouts, experts = draw(point.arm, config, opened, Scorer(pool, tokenizer), problems)
    # Ours never draws what the tokenizer has no text for, and normalises without it, as the trainer does; vLLM knows nothing of it.
    mask_V = tokenizer.sampleable_mask(config.model.vocab_size) if point.arm.startswith(_OURS) else None
    return _compared(config, opened, rollouts, experts, mask_V)

  def report(self, settings: Settings, results: Results) -> Report:
    arms = [arm for arm in results.arms() if arm != COLD]
    return Report(
      findings=_findings(results, arms),
      tables=[_table(results, arms), _layers(results, arms)],
      figures=[_picture(results, arms)],
      not_shown=[
        "Engines on a GPU or a TPU, whose kernels differ from the trainer's; here our engine and the trainer share theirs, so that"
        " their float32 agreement is a matter of one code base and vLLM's is not.",
        "Layers: the model has three, two of them with experts, so that growth with depth is two points.",
        "Long answers: at most 12 tokens.",
      ],
    )


# ---- engines

Experts = list[dict[int, np.ndarray]]  # a sequence each: ids [T, K] by layer


def _draw_ours(
  arm: str, config: RunConfig, opened: Opened, scorer: Scorer, problems: Sequence[Problem]
) -> tuple[list[Rollout], Experts]:
  dtype = RolloutDtype(arm.removeprefix(_OURS))
  evaluator = Evaluator(
    config.model, config.rollout, slots=config.eval.slots, samples=config.eval.samples, scorer=scorer, seed=config.seed,
    dtype=dtype,
  )  # fmt: skip
  rollouts = evaluator.answers(opened.params, problems)
  engine = evaluator.engine
  stored = weights.unpack(engine.load_params(opened.params), engine.model.dtype)
  return rollouts, _in_chunks(lambda ids: trainer.experts(engine.model, stored, ids), rollouts)


def _draw_vllm(
  arm: str, config: RunConfig, opened: Opened, scorer: Scorer, problems: Sequence[Problem]
) -> tuple[list[Rollout], Experts]:
  dtype, eos = arm.removeprefix(_VLLM), scorer.tokenizer.eos_ids
  prompts = [scorer.tokenizer.encode(problem.prompt) for problem in problems]
  probe = trainer.make_probe(config.model, opened.params)
  sampling = Sampling(max_tokens=config.rollout.max_tokens, seed=config.seed, n=config.eval.samples, stop=tuple(eos))
  with tempfile.TemporaryDirectory() as scratch, VLLM() as vllm:
    folder = export(f"{scratch}/model", config.model, opened.params, dtype)
    drawn = vllm.run(folder, dtype=dtype, probe=probe, prompts=prompts, sampling=sampling).samples
    rollouts = [
      Rollout(
        uid=index * sampling.n + number, group=index, problem=index, prompt=prompts[index], tokens=sample.tokens,
        logps=sample.logps, versions=[0] * len(sample.tokens), finish_reason=FinishReason(sample.finish_reason),
      )
      for index, samples in enumerate(drawn)
      for number, sample in enumerate(samples)
    ]  # fmt: skip
    scorer.score(rollouts, lambda rollout: problems[rollout.problem])
    scored = vllm.run(
      folder, dtype=dtype, probe=probe, score=[one.prompt + one.tokens for one in rollouts], experts=True
    )
  return rollouts, scored.experts


def _in_chunks(function, rollouts: Sequence[Rollout]) -> list[Any]:
  sequences = [rollout.prompt + rollout.tokens for rollout in rollouts]
  return [one for start in range(0, len(sequences), _CHUNK) for one in function(sequences[start : start + _CHUNK])]


def _compared(
  config: RunConfig, opened: Opened, rollouts: Sequence[Rollout], experts: Experts, mask_V: np.ndarray | None
) -> Result:
  """What the trainer says of the engine's tokens; `mask_V` are the ids that the engine may draw."""
  model, params = config.model, opened.params
  of_sequence = _in_chunks(lambda ids: trainer.logps(model, params, ids, vocab_mask_V=mask_V), rollouts)
  own = _in_chunks(lambda ids: trainer.experts(model, params, ids), rollouts)
  logp = [all_T[len(one.prompt) - 1 :] for one, all_T in zip(rollouts, of_sequence, strict=True)]
  infer = [np.array(one.logps, np.float32) for one in rollouts]
  logp_N, infer_N = np.concatenate(logp), np.concatenate(infer)
  nothing_N = np.zeros(len(logp_N), np.float32)
  found = step_metrics(
    logp=logp_N, logp_old=None, logp_infer=infer_N, advantages=nothing_N, entropy=nothing_N,
    mask=np.ones(len(logp_N), bool), config=IcePopConfig(),
  )  # fmt: skip
  positions = np.concatenate([np.arange(len(one.tokens)) for one in rollouts])
  distance_N = np.abs(logp_N - infer_N)
  return {
    **{name: value for name, value in found.items() if name.startswith("mismatch/")},
    "tokens": len(logp_N),
    "reward": float(np.mean([one.reward for one in rollouts])),
    "by_position": [float(distance_N[positions == one].mean()) for one in range(positions.max() + 1)],
    **_by_experts(rollouts, experts, own, distance_N),
  }


def _differing(rollout: Rollout, one: dict[int, np.ndarray], other: dict[int, np.ndarray], layer: int) -> np.ndarray:
  """Whether the positions that predict the answer's tokens take other experts in this layer."""
  first, last = len(rollout.prompt) - 1, len(rollout.prompt) + len(rollout.tokens) - 1
  sets = [np.sort(chosen[layer][first:last], axis=1) for chosen in (one, other)]
  return (sets[0] != sets[1]).any(axis=1)


def _by_experts(
  rollouts: Sequence[Rollout], experts: Experts, own: Experts, distance_N: np.ndarray
) -> dict[str, dict[str, float | None]]:
  """Share of the answers' tokens that take other experts, by layer; mean |delta| of those that do in any, and of the others."""
  differing = {
    layer: np.concatenate([_differing(*three, layer) for three in zip(rollouts, experts, own, strict=True)])
    for layer in sorted(own[0])
  }
  other_N = np.any(list(differing.values()), axis=0)
  mean = lambda chosen: float(distance_N[chosen].mean()) if chosen.any() else None  # noqa: E731
  return {
    "other_experts": {str(layer): float(differing_N.mean()) for layer, differing_N in differing.items()},
    "with_other_experts": {"same": mean(~other_N), "other": mean(other_N)},
  }


# ---- what it says


def _of(results: Results, arm: str, name: str):
  return interval([one[name] for one in results.of(arm)])


def _findings(results: Results, arms: Sequence[str]) -> list[str]:
  found = []
  exact = [arm for arm in ("ours_float32", "vllm_float32") if arm in arms]
  if exact:
    largest = max(one["mismatch/delta_max"] for arm in exact for one in results.of(arm))
    names = " and ".join(ENGINES[arm] for arm in exact)
    found.append(f"In float32 engine and trainer agree on every token: |Δlogp| of at most {largest:.1e} ({names}).")
  low = [arm for arm in arms if _of(results, arm, "mismatch/masked").mean > 0]
  if low:
    worst = max(low, key=lambda arm: _of(results, arm, "mismatch/masked").mean)
    share = _of(results, worst, "mismatch/masked").format(2, 100, "%")
    found.append(
      f"IcePop's range (0.5, 5) drops most with {ENGINES[worst]}: {share} of the tokens; nothing with float32."
    )
  coarse = [arm for arm in arms if _of(results, arm, "mismatch/delta_mean").mean > 1e-5]
  if coarse:
    deeper = sum(_grows(results, arm) for arm in coarse)
    found.append(
      f"A token takes other experts more often in the last layer than in the first with {deeper} of {len(coarse)} engines of lower"
      " precision, and where it does the difference is larger."
    )
  return found


def _grows(results: Results, arm: str) -> bool:
  first, *_, last = (
    interval([one["other_experts"][layer] for one in results.of(arm)]).mean
    for layer in results.of(arm)[0]["other_experts"]
  )
  return last > first


def _table(results: Results, arms: Sequence[str]) -> Table:
  rows = [
    [
      ENGINES[arm],
      *(_small(_of(results, arm, f"mismatch/{name}")) for name in ("delta_mean", "delta_p99", "delta_max", "kl_k3")),
      *(_of(results, arm, f"mismatch/{name}").format(2, 100, "%") for name in ("masked_low", "masked_high")),
      _of(results, arm, "mismatch/ess").format(3),
      _of(results, arm, "reward").format(1, 100, "%"),
    ]
    for arm in arms
  ]
  header = ["engine", "mean |Δlogp|", "p99", "largest", "KL (k3)", "k < 0.5", "k > 5", "effective sample", "reward"]
  return Table("Engine against trainer, a token", header, rows)


def _layers(results: Results, arms: Sequence[str]) -> Table:
  layers = list(results.of(arms[0])[0]["other_experts"])
  rows = [
    [
      ENGINES[arm],
      *(interval([one["other_experts"][layer] for one in results.of(arm)]).format(2, 100, "%") for layer in layers),
      *(_small(interval([one["with_other_experts"][kind] for one in results.of(arm)])) for kind in ("same", "other")),
    ]
    for arm in arms
  ]
  header = [
    "engine",
    *(f"other experts, layer {layer}" for layer in layers),
    "mean |Δlogp|, same experts",
    "other experts",
  ]
  return Table("Tokens that take other experts than in the trainer", header, rows)


def _small(one) -> str:
  """In three digits, whatever its size."""
  if not one.count:
    return "none"
  digits = 4 if abs(one.mean) < 1 else 2
  return f"{one.mean:.1e}" if 0 < abs(one.mean) < 1e-3 else one.format(digits)


def _picture(results: Results, arms: Sequence[str]) -> Figure:
  by_position = {}
  for arm in arms:
    if _of(results, arm, "mismatch/delta_mean").mean > 1e-5:
      runs = [one["by_position"] for one in results.of(arm)]
      length = min(map(len, runs))
      by_position[ENGINES[arm]] = (range(1, length + 1), [run[:length] for run in runs])
  with figures.picture(1, 2, width=5) as (figure, axes):
    figures.curves(axes[0], by_position, "Mean |Δlogp| by position", xlabel="token of the answer", log=True)
    rewards = {ENGINES[arm]: _of(results, arm, "reward") for arm in arms}
    figures.bars(axes[1], rewards, "Reward of the engine's own answers")
    figures.legend_below(figure, axes[0])
    return Figure("engines", "Discrepancy by position, and what it costs in reward", figures.png(figure))
