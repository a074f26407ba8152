"""The published metrics of a step: by hand, against the loss's own counts, and without NaN on anything."""

import dataclasses
import math

import numpy as np
import pytest

from configs.schema import OBJECTIVES, IcePopConfig
from kernels.icepop import icepop_loss
from ring_jax.rl.metrics import calibrate, step_metrics


def step(n=4000, seed=0, mismatch=0.5):
  rng = np.random.default_rng(seed)
  logp_old = -rng.exponential(1.0, n)
  arrays = {
    "logp": logp_old + rng.normal(0, 0.2, n),
    "logp_old": logp_old,
    "logp_infer": logp_old + rng.normal(0, mismatch, n),
    "advantages": rng.normal(size=n),
    "entropy": rng.exponential(1.0, n),
  }
  return {name: x.astype(np.float32) for name, x in arrays.items()}, rng.random(n) < 0.8


def test_by_hand():
  """Four tokens with k = 1, 2, 1/4, 8 and one that the engine says is impossible."""
  log_k = np.log([1.0, 2.0, 0.25, 8.0])
  metrics = step_metrics(
    logp=np.array([0.0, math.log(1.5), math.log(0.5), 0.0, 0.0]),
    logp_old=np.zeros(5),
    logp_infer=np.append(-log_k, -np.inf),
    advantages=np.array([1.0, 1.0, -1.0, 1.0, 1.0]),
    entropy=np.array([1.0, 2.0, 3.0, 4.0, 5.0]),
    mask=np.ones(5, bool),
    config=IcePopConfig(),
  )
  want = {
    "mismatch/masked": 3 / 5,
    "mismatch/masked_low": 1 / 5,
    "mismatch/masked_high": 1 / 5,
    "mismatch/masked_nonfinite": 1 / 5,
    "mismatch/truncated": 0.0,
    "mismatch/kl_k1": -log_k.mean(),
    "mismatch/kl_k3": (np.exp(log_k) - 1 - log_k).mean(),
    "mismatch/delta_mean": np.abs(log_k).mean(),
    "mismatch/delta_p50": np.quantile(np.abs(log_k), 0.5),
    "mismatch/delta_p95": np.quantile(np.abs(log_k), 0.95),
    "mismatch/delta_p99": np.quantile(np.abs(log_k), 0.99),
    "mismatch/delta_max": math.log(8),
    "mismatch/ess": 11.25**2 / (4 * (1 + 4 + 1 / 16 + 64)),
    "policy/entropy": 3.0,
    "policy/entropy_masked": 4.0,
    "policy/logp": (math.log(1.5) + math.log(0.5)) / 4,
    "policy/logp_infer": -log_k.mean(),
    "policy/clip_low": 0.0,  # the token whose ratio is too low is masked already
    "policy/clip_high": 1 / 5,
    "policy/ratio_max": 1.5,
    "policy/tokens": 5,
  }
  assert metrics.keys() == want.keys()
  for name, value in want.items():
    assert metrics[name] == pytest.approx(value, rel=1e-5), name


CONFIGS = {name: dataclasses.replace(config, aggregate="token_mean") for name, config in OBJECTIVES.items()}
CONFIGS["theta_over_infer"] = IcePopConfig(calibration="theta_over_infer", aggregate="token_mean")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_old", [True, False])
def test_counts_are_those_of_the_loss(name, with_old):
  config = CONFIGS[name]
  arrays, mask = step()
  sequences = np.arange(len(mask)) // 7
  if config.level == "sequence":
    arrays["advantages"] = np.repeat(arrays["advantages"][::7], 7)[: len(mask)]
  arrays["logp_infer"][:50] = -np.inf
  arrays["logp"][50:60] = np.nan
  if not with_old:
    arrays["logp_old"] = None
  metrics = step_metrics(**arrays, mask=mask, config=config, sequences=sequences)
  entropy = arrays.pop("entropy")
  _, counts = icepop_loss(**arrays, mask=mask, config=config, segment_ids=sequences)
  tokens = int(counts["tokens"])
  for published, counted in (
    ("mismatch/masked_low", "masked_low"),
    ("mismatch/masked_high", "masked_high"),
    ("mismatch/masked_nonfinite", "masked_nonfinite"),
    ("policy/clip_low", "clipped_low"),
    ("policy/clip_high", "clipped_high"),
  ):
    assert round(metrics[published] * tokens) == int(counts[counted]), published
  assert metrics["policy/tokens"] == tokens
  kept = calibrate(arrays["logp"], arrays["logp_old"], arrays["logp_infer"], config).kept
  assert metrics["policy/entropy_masked"] == pytest.approx(entropy[mask & ~kept].mean(), rel=1e-5)


def test_of_the_variants():
  """TIS cuts weights; with the engine's log-probs as old, the mismatch is that of theta; GSPO has one ratio a sequence."""
  arrays, mask = step()
  log_k = (arrays["logp_old"] - arrays["logp_infer"])[mask]
  tis = step_metrics(**arrays, mask=mask, config=OBJECTIVES["tis"])
  assert tis["mismatch/masked"] == 0 and tis["mismatch/truncated"] == np.mean(log_k > math.log(2)) > 0.01
  engine = step_metrics(**arrays, mask=mask, config=OBJECTIVES["grpo_infer_old"])
  log_r = (arrays["logp"] - arrays["logp_infer"])[mask]
  assert engine["mismatch/delta_mean"] == pytest.approx(np.abs(log_r).mean(), rel=1e-5)
  assert engine["policy/ratio_max"] == pytest.approx(np.exp(log_r.max()), rel=1e-5)
  sequences = np.arange(len(mask)) // 10
  gspo = step_metrics(**arrays, mask=mask, config=OBJECTIVES["gspo"], sequences=sequences)
  log_s = [(arrays["logp"] - arrays["logp_old"])[mask & (sequences == i)].mean() for i in range(400)]
  assert gspo["policy/ratio_max"] == pytest.approx(np.exp(max(log_s)), rel=1e-5)


def test_kl_estimates_agree_with_the_truth():
  """Tokens drawn from one categorical, scored by another: k1 and k3 both estimate KL(infer || train)."""
  rng = np.random.default_rng(0)
  infer, train = rng.dirichlet(np.full(20, 2.0)), rng.dirichlet(np.full(20, 2.0))
  train = 0.7 * infer + 0.3 * train
  drawn = rng.choice(20, 100_000, p=infer)
  metrics = step_metrics(
    logp=np.log(train)[drawn], logp_old=None, logp_infer=np.log(infer)[drawn], advantages=np.ones(len(drawn)),
    entropy=np.ones(len(drawn)), mask=np.ones(len(drawn), bool), config=IcePopConfig(),
  )  # fmt: skip
  truth = float(np.sum(infer * np.log(infer / train)))
  assert metrics["mismatch/kl_k3"] == pytest.approx(truth, rel=0.05)
  assert metrics["mismatch/kl_k1"] == pytest.approx(truth, rel=0.15)
  assert metrics["policy/ratio_max"] == 1.0


@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_never_nan(hostile):
  arrays, mask = step(20)
  for name in arrays:
    changed = {n: np.full_like(x, hostile) if n == name else x for n, x in arrays.items()}
    for config in OBJECTIVES.values():
      metrics = step_metrics(**changed, mask=mask, config=config, sequences=np.arange(20) // 3)
      assert all(math.isfinite(x) for x in metrics.values()), (name, metrics)


def test_empty():
  arrays, mask = step(20)
  for m in (np.zeros(20, bool), None):
    part = arrays if m is not None else {name: x[:0] for name, x in arrays.items()}
    metrics = step_metrics(**part, mask=mask[:0] if m is None else m, config=IcePopConfig())
    assert set(metrics.values()) == {0.0}
