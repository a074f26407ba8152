"""Train/inference mismatch, measured: the trainer in float32 against every engine that can sample for it.

Ours in float32, bfloat16, fp8, int8 and int4, and real vLLM in float32 and bfloat16.  Each engine samples; the trainer
scores what was sampled; per token, |difference of log-probs| is what IcePop then sees (papers.md, Ring-1T equation 2).
A row also says which share of tokens IcePop would drop, and how many tokens took other experts in which layer: large
differences are almost always another expert.

float32 engines are held to a tolerance.  For the others the difference is the result, not a defect: their tolerance is
infinite, and a row fails only if the difference is zero, for then the engine did not do what its name says.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from configs.schema import Advantage, IcePopConfig, ModelConfig, RolloutConfig, RolloutDtype
from parity import recorded
from parity.cases import random_params
from parity.compare import Row, Suite, Tier, compare
from parity.vllm import trainer
from parity.vllm.export import export
from parity.vllm.runner import VLLM, Probe, Sampling
from ring_jax.model import Params
from ring_jax.records import Rollout
from ring_jax.rl.advantages import group_advantages
from ring_jax.rl.metrics import calibrate
from rollout import weights
from rollout.engine import Insertion, RingEngine

OURS_TOLERANCE = 1e-5
VLLM_TOLERANCE = 2e-5

# Small, of shapes that vLLM has CPU kernels for; hidden is not heads x head_dim.
MODEL = ModelConfig(
  vocab_size=320,
  hidden_size=64,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=32,
  intermediate_size=96,
  moe_intermediate_size=32,
  num_experts=8,
  num_experts_per_tok=2,
  n_group=2,
  topk_group=1,
  routed_scaling_factor=2.5,
  rope_theta=10_000.0,
  max_position_embeddings=256,
)
_LOW_PRECISION = (RolloutDtype.BFLOAT16, RolloutDtype.FP8, RolloutDtype.INT8, RolloutDtype.INT4)


class Measured(NamedTuple):
  """What an engine did with its tokens, and what the trainer says of the same ones; one entry a sequence."""

  sequences: list[list[int]]  # prompt and answer
  answers: list[int]  # tokens of the answer
  logps: list[np.ndarray]  # the engine's, of the answer's tokens
  trainer_logps: list[np.ndarray]  # [T - 1], of every token from the second on
  experts: list[dict[int, np.ndarray]]  # [T, K] by layer
  trainer_experts: list[dict[int, np.ndarray]]


def random_model(config: ModelConfig = MODEL, seed: int = 0) -> Params:
  """Random norms, selection biases and matrices of a scale at which mistakes show."""
  return random_params(config, seed)


def random_prompts(config: ModelConfig, count: int, seed: int = 0) -> list[list[int]]:
  """From 3 to 40 tokens each."""
  rng = np.random.default_rng(seed)
  return [rng.integers(0, config.vocab_size, size).tolist() for size in rng.integers(3, 41, count)]


def run(quick: bool = True, interpreter: str | None = None) -> Suite:
  """All tiers.

  Args:
    quick: a few hundred sampled tokens an engine; otherwise thousands.
    interpreter: the Python that has vLLM; default: this one.

  Raises:
    VLLMError: vLLM is not there, or does not hold the trainer's weights.
  """
  params = random_model()
  return Suite("engine", [*our_tiers(MODEL, params, quick), *vllm_tiers(MODEL, params, quick, interpreter)])


# ---------------------------------------------------------------------------------------------------------------------
# Our engine


def our_tiers(config: ModelConfig, params: Params, quick: bool = True) -> list[Tier]:
  """Our engine in float32, held to a tolerance, and in every lower precision, measured."""
  started = time.monotonic()
  exact = our_rows(config, params, RolloutDtype.FLOAT32, quick)
  middle = time.monotonic()
  measured = [row for dtype in _LOW_PRECISION for row in our_rows(config, params, dtype, quick)]
  return [
    Tier(
      "engine", "the rollout engine's log-probs, from its cache, are the trainer's", "engine against trainer", exact,
      middle - started,
    ),
    Tier(
      "engine mismatch", "how far an engine of lower precision is from the trainer: a measurement",
      "engine against trainer", measured, time.monotonic() - middle,
    ),
  ]  # fmt: skip


def our_rows(config: ModelConfig, params: Params, dtype: RolloutDtype, quick: bool = True) -> list[Row]:
  """Rows of our engine with weights of this dtype."""
  measured = sample_ours(config, params, dtype, quick)
  case = f"ours, {dtype.value}"
  tolerance = OURS_TOLERANCE if dtype is RolloutDtype.FLOAT32 else math.inf
  return [_logp_row(case, "sampled log-probs", measured, tolerance), *_expert_rows(case, measured, tolerance)]


def sample_ours(config: ModelConfig, params: Params, dtype: RolloutDtype, quick: bool = True) -> Measured:
  """The engine samples; the trainer scores.  Experts: of a forward pass with the engine's weights in its dtype."""
  slots, steps = (32, 24) if quick else (128, 48)
  rollout = RolloutConfig(
    token_budget=slots * steps, slots=slots, group_size=4, dtype=dtype, max_prompt_tokens=64, max_tokens=64,
    prefill_batch=slots // 4,
  )  # fmt: skip
  engine = RingEngine(
    config, rollout, eos_ids=[config.vocab_size - 1], vocab_mask_V=np.ones(config.vocab_size, bool), seed=5
  )
  stored = engine.load_params(params)
  prompts = random_prompts(config, slots // 4)
  insertions = [Insertion(row=slot // 4, slot=slot, uid=slot, max_tokens=steps) for slot in range(slots)]
  state = engine.insert_batch(engine.prefill_batch(stored, prompts), engine.init_decode_state(), insertions)
  _, drawn = engine.decode(stored, state, steps)
  token_NxB, logp_NxB, valid_NxB, _ = jax.device_get(drawn)
  answers = [token_NxB[valid_NxB[:, slot], slot].tolist() for slot in range(slots)]
  sequences = [prompts[slot // 4] + answer for slot, answer in enumerate(answers)]
  return Measured(
    sequences,
    [len(answer) for answer in answers],
    [logp_NxB[valid_NxB[:, slot], slot] for slot in range(slots)],
    trainer.logps(config, params, sequences),
    trainer.experts(engine.model, weights.unpack(stored, engine.model.dtype), sequences),
    trainer.experts(config, params, sequences),
  )


# ---------------------------------------------------------------------------------------------------------------------
# vLLM


def vllm_tiers(config: ModelConfig, params: Params, quick: bool = True, interpreter: str | None = None) -> list[Tier]:
  """vLLM in float32, held to a tolerance, and in bfloat16, measured; one child process for both."""
  tiers = []
  with tempfile.TemporaryDirectory() as folder, VLLM(interpreter) as vllm:
    probe = trainer.make_probe(config, params)
    for dtype, name, proves in (
      ("float32", "vLLM", "real vLLM's prompt and sampled log-probs, and its experts, are the trainer's"),
      ("bfloat16", "vLLM mismatch", "how far vLLM in bfloat16 is from the trainer: a measurement"),
    ):
      started = time.monotonic()
      exported = export(f"{folder}/{dtype}", config, params, dtype)
      rows = vllm_rows(vllm, exported, probe, config, params, dtype, quick)
      tiers.append(Tier(name, proves, "vLLM against trainer", rows, time.monotonic() - started))
  return tiers


def vllm_rows(
  vllm: VLLM, folder, probe: Probe, config: ModelConfig, params: Params, dtype: str, quick: bool = True
) -> list[Row]:
  """Rows of vLLM on an exported folder: it samples, and then scores what it sampled as a prompt."""
  prompts = random_prompts(config, 8 if quick else 32)
  sampling = Sampling(max_tokens=24 if quick else 48, n=4, seed=7)
  drawn = vllm.run(folder, dtype=dtype, probe=probe, prompts=prompts, sampling=sampling)
  sequences, answers, sampled = [], [], []
  for prompt, group in zip(prompts, drawn.samples, strict=True):
    for sample in group:
      sequences.append(prompt + sample.tokens)
      answers.append(len(sample.tokens))
      sampled.append(np.asarray(sample.logps))
  scored = vllm.run(folder, dtype=dtype, probe=probe, score=sequences, experts=True)
  of_trainer = trainer.logps(config, params, sequences), scored.experts, trainer.experts(config, params, sequences)
  case, tolerance = f"vLLM, {dtype}", VLLM_TOLERANCE if dtype == "float32" else math.inf
  of_prompts = Measured(sequences, [len(ids) - 1 for ids in sequences], scored.scored, *of_trainer)
  of_samples = Measured(sequences, answers, sampled, *of_trainer)
  return [
    _logp_row(case, "prompt log-probs", of_prompts, tolerance),
    _logp_row(case, "sampled log-probs", of_samples, tolerance),
    *_expert_rows(case, of_samples, tolerance),
  ]


def verify(rollout: Rollout) -> float:
  """A verifier that a random model sometimes satisfies: an answer is right if its tokens' sum is even."""
  return float(sum(rollout.tokens) % 2 == 0)


def one_step(
  vllm: VLLM, folder, probe: Probe, config: ModelConfig, groups: int = 4, group_size: int = 4, max_tokens: int = 16,
  seed: int = 0, temperature: float = 1.0, kind: Advantage = Advantage.GRPO,
) -> tuple[list[Rollout], np.ndarray]:  # fmt: skip
  """The rollout half of an RL step on the PyTorch/vLLM path: vLLM's rollouts, verified, and their advantages.

  What comes back can be given to the PyTorch step and to the JAX step alike.
  """
  prompts = random_prompts(config, groups, seed)
  sampling = Sampling(max_tokens=max_tokens, n=group_size, seed=seed, temperature=temperature)
  rollouts = recorded.from_vllm(prompts, vllm.run(folder, probe=probe, prompts=prompts, sampling=sampling).samples)
  for rollout in rollouts:
    rollout.reward = verify(rollout)
  rewards, of_group = [rollout.reward for rollout in rollouts], [rollout.group for rollout in rollouts]
  return rollouts, group_advantages(rewards, of_group, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _logp_row(case: str, name: str, measured: Measured, tolerance: float) -> Row:
  engine_N = np.concatenate(measured.logps)
  trainer_N = np.concatenate(
    [logps[-count:] for logps, count in zip(measured.trainer_logps, measured.answers, strict=True)]
  )
  verdict = calibrate(trainer_N, None, engine_N, IcePopConfig())
  shares = {
    "masked": float(np.mean(~verdict.kept)),
    "masked_low": float(np.mean(verdict.low)),
    "masked_high": float(np.mean(verdict.high)),
    "masked_nonfinite": float(np.mean(verdict.nonfinite)),
    "other_experts": float(np.mean(np.concatenate(_any_layer(measured)))),
  }
  return _must_differ(compare(name, engine_N, trainer_N, tolerance=tolerance, case=case, scale=1.0, extra=shares))


def _expert_rows(case: str, measured: Measured, tolerance: float) -> list[Row]:
  """One row a layer: 1 for a token whose set of experts differs, 0 otherwise; `share` is their mean."""
  rows = []
  for layer in measured.trainer_experts[0]:
    differs_N = np.concatenate(_other_experts(measured, layer)).astype(np.float32)
    row = compare(
      "experts differ", differs_N, np.zeros_like(differs_N), tolerance=0.0 if math.isfinite(tolerance) else math.inf,
      case=case, layer=layer, scale=1.0, extra={"share": float(differs_N.mean())},
    )  # fmt: skip
    rows.append(row)
  return rows


def _other_experts(measured: Measured, layer: int) -> list[np.ndarray]:
  """bool [T] a sequence: whether the token's set of experts differs in this layer."""
  pairs: Sequence[tuple[Mapping[int, np.ndarray], Mapping[int, np.ndarray]]] = list(
    zip(measured.experts, measured.trainer_experts, strict=True)
  )
  return [(np.sort(one[layer]) != np.sort(other[layer])).any(axis=-1) for one, other in pairs]


def _any_layer(measured: Measured) -> list[np.ndarray]:
  """bool [T] a sequence: whether the token's experts differ in any layer."""
  by_layer = [_other_experts(measured, layer) for layer in measured.trainer_experts[0]]
  return [np.any(layers, axis=0) for layers in zip(*by_layer, strict=True)]


def _must_differ(row: Row) -> Row:
  if math.isfinite(row.tolerance) or row.max > 0.0:
    return row
  return dataclasses.replace(
    row, passed=False, note="equal to the trainer in every bit: not the engine it claims to be"
  )
