"""The objectives that IcePop is compared with: values and gradients against a float64 loop, bounds, hostile numbers."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import OBJECTIVES, ConfigError, IcePopConfig
from kernels.icepop import icepop_loss, sequence_weight, verdict
from kernels.icepop.calibration import binary_kl
from kernels.icepop.reference import icepop_loss_reference

LENGTHS = (7, 3, 1, 5)
MASK = np.arange(8) < np.asarray(LENGTHS)[:, None]
IDS = np.broadcast_to(np.arange(4)[:, None], MASK.shape)
VARIANTS = OBJECTIVES | {
  "gspo, wide clip": dataclasses.replace(OBJECTIVES["gspo"], clip_low=0.1, clip_high=0.15),
  "gspo on the band": IcePopConfig(level="sequence", clip_low=0.05, denominator="kept", kl_coef=0.1),
  "gspo on the engine": dataclasses.replace(OBJECTIVES["gspo"], old="engine", aggregate="token_mean"),
  "band, truncated": IcePopConfig(weight="truncated", truncation=1.1, aggregate="token_mean"),
  "kpop of theta": IcePopConfig(masking="binary_kl", max_binary_kl=0.05, weight="one", calibration="theta_over_infer"),
  "kpop, kept": IcePopConfig(masking="binary_kl", max_binary_kl=0.02, denominator="kept"),
}


def batch(seed=0):
  """[B, T]: k and r cross all bounds, advantages are a sequence's, what lies outside of the mask is NaN."""
  rng = np.random.default_rng(seed)
  old = -rng.exponential(1.0, MASK.shape)
  arrays = {
    "logp": old + rng.normal(0, 0.3, MASK.shape),
    "logp_old": old,
    "logp_infer": old + rng.normal(0, 0.8, MASK.shape),
    "advantages": np.broadcast_to(rng.normal(size=(4, 1)), MASK.shape),
    "logp_ref": old + rng.normal(0, 0.5, MASK.shape),
  }
  return {name: np.where(MASK, x, np.nan).astype(np.float32) for name, x in arrays.items()}


@functools.partial(jax.jit, static_argnames="config")
def run(arrays, mask, config, **options):
  """(loss, gradient, metrics)."""
  rest = {name: x for name, x in arrays.items() if name not in ("logp", "logp_ref")}
  if config.kl_coef:
    options["logp_ref"] = arrays["logp_ref"]
  loss = lambda logp: icepop_loss(logp=logp, **rest, mask=mask, config=config, **options)  # noqa: E731
  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["logp"])
  return value, gradient, metrics


def reference(arrays, config, logp=None):
  rows = {n: [row[inside].astype(float) for row, inside in zip(x, MASK, strict=True)] for n, x in arrays.items()}
  return icepop_loss_reference(
    rows["logp"] if logp is None else logp, rows["logp_old"], rows["logp_infer"], rows["advantages"], config,
    rows["logp_ref"] if config.kl_coef else None,
  )  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient_are_those_of_the_loops(name):
  config, arrays = VARIANTS[name], batch()
  value, gradient, metrics = run(arrays, MASK, config)
  np.testing.assert_allclose(value, reference(arrays, config), rtol=2e-5, atol=1e-7)
  rows, step = [row[inside].astype(float) for row, inside in zip(arrays["logp"], MASK, strict=True)], 1e-6
  numeric = np.zeros(MASK.shape)
  for i, row in enumerate(rows):
    for t in range(len(row)):
      ends = []
      for sign in (1, -1):
        moved = [own.copy() for own in rows]
        moved[i][t] += sign * step
        ends.append(reference(arrays, config, moved))
      numeric[i, t] = (ends[0] - ends[1]) / (2 * step)
  np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-7)
  left_out = int(metrics["masked_low"] + metrics["masked_high"])
  assert left_out == 0 if config.masking == "none" else 0 < left_out < MASK.sum()
  assert metrics["masked_nonfinite"] == 0


@pytest.mark.parametrize("name", ["gspo, wide clip", "gspo on the band"])
def test_sequences_in_packed_rows_and_in_two_microbatches(name):
  """A row each, segments of one row, flat tokens, two arrays: the same loss and gradients."""
  config, arrays = VARIANTS[name], batch()
  value, gradient, metrics = run(arrays, MASK, config)
  for shape in ((1, -1), (2, -1), (-1,)):
    packed = {key: x.reshape(shape) for key, x in arrays.items()}
    got = run(packed, MASK.reshape(shape), config, segment_ids=IDS.reshape(shape))
    np.testing.assert_allclose(got[0], value, rtol=1e-5)
    np.testing.assert_allclose(got[1].reshape(MASK.shape), gradient, rtol=1e-5, atol=1e-8)
  with np.errstate(invalid="ignore"):
    kept = verdict(arrays["logp"], *[arrays["logp_old"]] * 2, arrays["logp_infer"], config, np).kept & MASK
  counted = kept if config.denominator == "kept" else MASK
  weights = [sequence_weight(int(row.sum()), 4, int(counted.sum()), config) for row in counted]
  weights = np.broadcast_to(np.array(weights, np.float32)[:, None], MASK.shape)
  halves = []
  for part in (slice(0, 2), slice(2, None)):
    own = {key: x[part].reshape(-1) for key, x in arrays.items()}
    ids = IDS[part].reshape(-1)
    halves.append(run(own, MASK[part].reshape(-1), config, weights=weights[part].reshape(-1), segment_ids=ids))
  np.testing.assert_allclose(halves[0][0] + halves[1][0], value, rtol=1e-5)
  got = np.concatenate([half[1] for half in halves]).reshape(MASK.shape)
  np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-8)
  assert halves[0][2]["clipped_low"] + halves[1][2]["clipped_low"] == metrics["clipped_low"]


def test_a_sequence_is_clipped_as_a_whole():
  """log r averages to the clip's bounds and just beyond: every token keeps its gradient, or none does."""
  gains = np.array([1.0, 1.0, -1.0, -1.0], np.float32)[:, None]
  mean = np.log([1 + 3.9e-4, 1 + 4.1e-4, 1 - 2.9e-4, 1 - 3.1e-4])
  log_r = np.zeros((4, 5), np.float32)
  log_r[:, 0], log_r[:, 1] = 0.4 + 5 * mean, -0.4
  arrays = {"logp": log_r, "logp_old": np.zeros_like(log_r), "logp_infer": np.zeros_like(log_r)}
  arrays["advantages"] = np.broadcast_to(gains, log_r.shape)
  _, gradient, metrics = run(arrays, np.ones_like(log_r, bool), OBJECTIVES["gspo"])
  gradient = np.asarray(gradient)
  want = np.broadcast_to(-np.exp(mean[[0, 2], None]) * gains[[0, 2]] / 20, (2, 5))
  np.testing.assert_allclose(gradient[[0, 2]], want, rtol=1e-5)
  assert not np.any(gradient[[1, 3]]) and metrics["clipped_high"] == metrics["clipped_low"] == 5


def test_a_token_left_out_has_no_part_in_its_sequences_ratio():
  arrays = batch()
  arrays["logp_infer"][0, 2] = arrays["logp_old"][0, 2] + 5
  config = VARIANTS["gspo on the band"]
  config = dataclasses.replace(config, kl_coef=0.0)
  value, gradient, _ = run(arrays, MASK, config)
  assert np.any(gradient[0]) and gradient[0, 2] == 0
  arrays["logp"][0, 2] += 3
  again, same, _ = run(arrays, MASK, config)
  assert again == value
  np.testing.assert_array_equal(same, gradient)


def one_token(config, **fields):
  arrays = {"logp": 0.0, "logp_old": 0.0, "logp_infer": 0.0, "advantages": 1.0} | fields
  arrays = {name: np.full((1, 1), x, np.float32) for name, x in arrays.items()}
  value, gradient, metrics = run(arrays, np.ones((1, 1), bool), config)
  counts = {name for name, x in metrics.items() if x.dtype == jnp.int32 and int(x) and name != "tokens"}
  return float(value), float(gradient[0, 0]), counts


LN = math.log
TABLE = {
  "tis: below C": ("tis", {"logp_infer": -LN(1.9)}, -1.9, -1.9, set()),
  "tis: above C": ("tis", {"logp_infer": -LN(50)}, -2.0, -2.0, set()),
  "tis: far below 1": ("tis", {"logp_infer": LN(50)}, -0.02, -0.02, set()),
  "tis: no number": ("tis", {"logp_infer": -math.inf}, 0.0, 0.0, {"masked_nonfinite"}),
  "grpo: k has no influence": ("grpo", {"logp_infer": -LN(50)}, -1.0, -1.0, set()),
  "grpo: clipped": ("grpo", {"logp": LN(1.5), "logp_infer": LN(50)}, -1.2, 0.0, {"clipped_high"}),
  "engine: the ratio is to the engine": ("grpo_infer_old", {"logp_infer": -LN(1.1)}, -1.1, -1.1, set()),
  "engine: theta_old has no influence": ("grpo_infer_old", {"logp_old": math.nan}, -1.0, -1.0, set()),
  "engine: A > 0 is clipped": ("grpo_infer_old", {"logp_infer": -LN(3)}, -1.2, 0.0, {"clipped_high"}),
  "engine: A < 0 is not": ("grpo_infer_old", {"logp_infer": -LN(3), "advantages": -1.0}, 3.0, 3.0, set()),
  "engine: no number": ("grpo_infer_old", {"logp_infer": -math.inf}, 0.0, 0.0, {"masked_nonfinite"}),
  "kpop: both certain": ("kpop", {}, -1.0, -1.0, set()),
  "kpop: certain to float32, nearly so": ("kpop", {"logp_infer": -1e-4}, -1.0001, -1.0001, set()),
  "kpop: rounded to above 1": ("kpop", {"logp": 1e-6, "logp_old": 1e-6, "logp_infer": -2e-6}, -1.0, -1.0, set()),
  "kpop: certain, and a coin": ("kpop", {"logp_infer": LN(0.5)}, 0.0, 0.0, {"masked_high"}),
  "kpop: a coin, and certain": ("kpop", {"logp": LN(0.5), "logp_old": LN(0.5)}, 0.0, 0.0, {"masked_low"}),
  "kpop: rare tokens may differ much": (
    "kpop", {"logp": -7.0, "logp_old": -7.0, "logp_infer": -9.0}, -math.exp(2), -math.exp(2), set(),
  ),
  "kpop: impossible in the trainer": ("kpop", {"logp": -1e4, "logp_old": -1e4, "logp_infer": -0.1}, 0, 0, {"masked_low"}),
  "kpop: no number": ("kpop", {"logp_infer": math.nan}, 0.0, 0.0, {"masked_nonfinite"}),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_table(case):
  name, fields, loss, gradient, counters = TABLE[case]
  got = one_token(OBJECTIVES[name], **fields)
  np.testing.assert_allclose(got[:2], [loss, gradient], rtol=5e-6, atol=1e-7)
  assert got[2] == counters


def test_binary_kl_and_its_bound():
  p, q = np.float64(0.7), np.float64(0.45)
  forward = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
  backward = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
  for pair in ((p, q), (q, p)):
    np.testing.assert_allclose(binary_kl(*np.log(pair), np), max(forward, backward), rtol=1e-12)
  wide = -np.logspace(-7, 1.5, 40)
  got = binary_kl(*np.float32(np.meshgrid(wide, wide)), np)
  want = binary_kl(*np.meshgrid(wide, wide), np)
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-5)
  assert np.isfinite(got).all() and (np.abs(np.diag(got)) == 0).all()
  # The bound belongs to what is kept.
  logp, infer = np.float32(LN(0.7)), np.float32(LN(0.45))
  bound = float(binary_kl(logp, infer, np))
  at = lambda bound: verdict(logp, logp, logp, infer, dataclasses.replace(OBJECTIVES["kpop"], max_binary_kl=bound), np)  # noqa: E731
  assert at(bound).kept and at(bound * (1 - 1e-6)).high


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_makes_nan(name):
  config = VARIANTS[name]
  hostile = np.array([math.nan, math.inf, -math.inf, 0.0, -1.0, -80.0, -1e30, 50.0], np.float32)
  logp, old, infer = (x.reshape(8, -1) for x in np.meshgrid(hostile, hostile, hostile, indexing="ij"))
  arrays = {"logp": logp, "logp_old": old, "logp_infer": infer, "logp_ref": old[:, ::-1]}
  arrays["advantages"] = np.where(np.arange(64) % 2, 1.0, -1.0).astype(np.float32) * np.ones((8, 1), np.float32)
  ids = np.broadcast_to(np.arange(64) // 4, (8, 64))
  value, gradient, metrics = run(arrays, np.ones((8, 64), bool), config, segment_ids=ids)
  assert np.isfinite(value) and np.isfinite(gradient).all() and metrics["masked_nonfinite"] > 0
  empty = {key: x[:0] for key, x in arrays.items()}
  value, _, metrics = run(empty, np.ones((0, 64), bool), config, segment_ids=ids[:0])
  assert value == 0 and metrics["tokens"] == 0


def test_contradictions_are_refused():
  for fields, message in (
    ({"masking": "none", "alpha": 0.4}, r"objective\.alpha=0\.4: is read with masking=band only"),
    ({"masking": "binary_kl", "beta": 2.0}, r"objective\.beta=2\.0: is read with masking=band only"),
    ({"max_binary_kl": 0.2}, r"objective\.max_binary_kl=0\.2: is read with masking=binary_kl only"),
    ({"truncation": 3.0}, r"objective\.truncation=3\.0: is read with weight=truncated only"),
    ({"weight": "truncated", "truncation": 0.0}, r"objective\.truncation=0\.0: must be > 0"),
    ({"masking": "binary_kl", "max_binary_kl": 0.0}, r"objective\.max_binary_kl=0\.0: must be > 0"),
    ({"old": "engine"}, r"needs masking=none and weight=one, not masking=band and weight=ratio"),
    ({"old": "engine", "masking": "none"}, r"not masking=none and weight=ratio"),
    ({"masking": "none", "weight": "one", "calibration": "theta_over_infer"}, r"nothing reads k"),
    ({"masking": "none", "denominator": "kept"}, r"contradicts masking=none, which leaves nothing out"),
    ({"level": "word"}, r"objective\.level='word': one of token, sequence"),
  ):
    with pytest.raises(ConfigError, match=message) as error:
      IcePopConfig(**fields)
    assert "\n" not in str(error.value)
  flat = {name: x[0] for name, x in batch().items() if name != "logp_ref"}
  config = dataclasses.replace(OBJECTIVES["gspo"], aggregate="token_mean")
  with pytest.raises(ConfigError, match=r"level=sequence: arrays \[N\] need segment_ids"):
    icepop_loss(**flat, mask=MASK[0], config=config)
