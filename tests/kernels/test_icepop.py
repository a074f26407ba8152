"""IcePop's conformance table: values, gradients, edges and hostile numbers, against equation 1 as a float64 loop."""

import dataclasses
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from configs.schema import Aggregate, Calibration, ConfigError, Denominator, IcePopConfig, TokenWeight
from kernels.icepop import icepop_loss, policy_loss, sequence_weight, token_weights
from kernels.icepop.reference import icepop_loss_reference
from kernels.linear_logprob import linear_logprob

LENGTHS = (7, 3, 1, 5)
NAN, INF = math.nan, math.inf


def batch(seed=0, lengths=LENGTHS, columns=8, mismatch=0.8):
  """[B, T] arrays in which k and r cross all their bounds; what lies outside the mask is NaN."""
  rng = np.random.default_rng(seed)
  mask = np.arange(columns) < np.asarray(lengths)[:, None]
  logp_old = -rng.exponential(1.5, mask.shape)
  arrays = {
    "logp": logp_old + rng.normal(0, 0.3, mask.shape),
    "logp_old": logp_old,
    "logp_infer": logp_old + rng.normal(0, mismatch, mask.shape),
    "advantages": rng.normal(size=mask.shape),
    "logp_ref": logp_old + rng.normal(0, 0.5, mask.shape),
  }
  return {name: np.where(mask, x, np.nan).astype(np.float32) for name, x in arrays.items()}, mask


def by_sequence(arrays, mask):
  return {n: None if x is None else [row[m] for row, m in zip(x, mask, strict=True)] for n, x in arrays.items()}


def reference(arrays, mask, config):
  sequences = by_sequence(arrays, mask)
  return icepop_loss_reference(
    sequences["logp"], sequences["logp_old"], sequences["logp_infer"], sequences["advantages"], config,
    sequences["logp_ref"] if config.kl_coef else None,
  )  # fmt: skip


def loss_and_gradient(arrays, mask, config, **options):
  arrays = jax.tree.map(jnp.asarray, arrays)

  def loss(logp):
    return icepop_loss(
      logp, arrays["logp_old"], arrays["logp_infer"], arrays["advantages"], mask, config,
      **({"logp_ref": arrays["logp_ref"]} if config.kl_coef else {}), **options,
    )  # fmt: skip

  (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(arrays["logp"])
  return value, gradient, metrics


def configs():
  for aggregate, weight, calibration, denominator, kl in itertools.product(
    Aggregate, TokenWeight, Calibration, Denominator, (0.0, 0.1)
  ):
    if denominator is Denominator.KEPT and (aggregate is Aggregate.TOKEN_BUDGET or calibration is Calibration.THETA):
      continue  # refused by the config
    yield IcePopConfig(
      aggregate=aggregate, weight=weight, calibration=calibration, denominator=denominator, kl_coef=kl,
      clip_low=0.2, clip_high=0.28, token_budget=100 if aggregate is Aggregate.TOKEN_BUDGET else 0,
    )  # fmt: skip


@pytest.mark.parametrize("three_policies", [True, False])
def test_every_option_against_equation_1(three_policies):
  arrays, mask = batch()
  if not three_policies:
    arrays["logp_old"] = None
  for config in configs():
    value, gradient, metrics = loss_and_gradient(arrays, mask, config)
    np.testing.assert_allclose(value, reference(arrays, mask, config), rtol=2e-5, atol=1e-7, err_msg=str(config))
    np.testing.assert_allclose(metrics["policy_loss"] + metrics["kl_loss"], metrics["loss"], rtol=1e-6, atol=1e-8)
    assert np.isfinite(gradient).all() and not np.any(np.asarray(gradient)[~mask])


def test_gradient_is_that_of_equation_3():
  """-M(k) r A / (G |y|) inside the band and the clip range, 0 elsewhere; and finite differences agree."""
  arrays, mask = batch()
  config = IcePopConfig()
  _, gradient, metrics = loss_and_gradient(arrays, mask, config)
  k = np.exp(arrays["logp_old"] - arrays["logp_infer"], dtype=np.float64)
  r = np.exp(arrays["logp"] - arrays["logp_old"], dtype=np.float64)
  a = arrays["advantages"].astype(np.float64)
  kept = mask & (k >= 0.5) & (k <= 5.0)
  cut = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
  want = np.where(kept & ~cut, -k * r * a, 0) / (len(LENGTHS) * np.asarray(LENGTHS)[:, None])
  np.testing.assert_allclose(gradient, want, rtol=2e-5, atol=1e-8)
  assert int(metrics["clipped_low"] + metrics["clipped_high"]) == np.count_nonzero(kept & cut) > 0
  assert int(metrics["masked_low"] + metrics["masked_high"]) == np.count_nonzero(mask & ~kept) > 0
  with jax.enable_x64(True):
    x64 = {name: np.where(mask, x, 0).astype(np.float64) for name, x in arrays.items()}
    config = dataclasses.replace(config, kl_coef=0.1)
    check_grads(
      lambda logp: icepop_loss(
        logp, x64["logp_old"], x64["logp_infer"], x64["advantages"], mask, config, logp_ref=x64["logp_ref"]
      )[0],
      (x64["logp"],), order=1, modes=["rev"],
    )  # fmt: skip


def one_token(logp=0.0, logp_old=0.0, logp_infer=0.0, advantage=1.0, **fields):
  """Loss, gradient and metrics of a single token."""
  wrap = lambda x: jnp.full((1, 1), x, jnp.float32)  # noqa: E731
  arrays = {
    "logp": wrap(logp),
    "logp_old": None if logp_old is None else wrap(logp_old),
    "logp_infer": wrap(logp_infer),
    "advantages": wrap(advantage),
  }
  value, gradient, metrics = loss_and_gradient(arrays, np.ones((1, 1), bool), IcePopConfig(**fields))
  return float(value), float(gradient[0, 0]), {n: int(x) for n, x in metrics.items() if x.dtype == jnp.int32}


STEP = 1e-4  # relative

# arguments, expected loss, expected gradient, the counter that is 1 (if any)
TABLE = {
  "on policy, engines agree": ({}, -1.0, -1.0, None),
  "no old policy given: r = 1, with a gradient": ({"logp": -3.0, "logp_old": None, "logp_infer": -3.0}, -1, -1, None),
  "k inside weighs k": ({"logp_infer": -math.log(2)}, -2.0, -2.0, None),
  "k inside weighs 1": ({"logp_infer": -math.log(2), "weight": "one"}, -1.0, -1.0, None),
  "k exactly alpha": ({"logp_infer": -math.log(0.5)}, -0.5, -0.5, None),
  "k just below alpha": ({"logp_infer": -math.log(0.5 * (1 - STEP))}, 0.0, 0.0, "masked_low"),
  "k exactly beta": ({"logp_infer": -math.log(5.0)}, -5.0, -5.0, None),
  "k just above beta": ({"logp_infer": -math.log(5.0 * (1 + STEP))}, 0.0, 0.0, "masked_high"),
  "alpha = beta = 1": ({"alpha": 1.0, "beta": 1.0}, -1.0, -1.0, None),
  "A > 0, r above the range": ({"logp": math.log(1.5)}, -1.2, 0.0, "clipped_high"),
  "A > 0, r below the range": ({"logp": math.log(0.5)}, -0.5, -0.5, None),
  "A < 0, r below the range": ({"logp": math.log(0.5), "advantage": -1.0}, 0.8, 0.0, "clipped_low"),
  "A < 0, r above the range": ({"logp": math.log(1.5), "advantage": -1.0}, 1.5, 1.5, None),
  "clip bounds are separate": ({"logp": math.log(1.25), "clip_high": 0.28}, -1.25, -1.25, None),
  "A = 0": ({"logp": 0.1, "advantage": 0.0}, 0.0, 0.0, None),
  "infer gives 0": ({"logp_infer": -INF}, 0.0, 0.0, "masked_nonfinite"),
  "infer gives 0, A = 0": ({"logp_infer": -INF, "advantage": 0.0}, 0.0, 0.0, "masked_nonfinite"),
  "infer gives NaN": ({"logp_infer": NAN}, 0.0, 0.0, "masked_nonfinite"),
  "k overflows": ({"logp_infer": -200.0}, 0.0, 0.0, "masked_nonfinite"),
  "old gives 0": ({"logp_old": -INF}, 0.0, 0.0, "masked_nonfinite"),
  "both give 0": ({"logp_old": -INF, "logp_infer": -INF}, 0.0, 0.0, "masked_nonfinite"),
  "all give 0": ({"logp": -INF, "logp_old": None, "logp_infer": -INF}, 0.0, 0.0, "masked_nonfinite"),
  "r overflows": ({"logp_old": -100.0, "logp_infer": -100.0, "advantage": -1.0}, 0.0, 0.0, "masked_nonfinite"),
  "theta is NaN": ({"logp": NAN}, 0.0, 0.0, "masked_nonfinite"),
  "k underflows": ({"logp": -99.0, "logp_old": -100.0}, 0.0, 0.0, "masked_low"),
  "k underflows, no lower bound": ({"logp": -200.0, "logp_old": -200.0, "alpha": 0.0}, 0.0, 0.0, None),
  "no upper bound": ({"logp_infer": -math.log(50), "beta": INF}, -50.0, -50.0, None),
  "theta over infer": ({"logp": math.log(1.1), "calibration": "theta_over_infer"}, -1.21, -1.21, None),
}


@pytest.mark.parametrize("case", TABLE)
def test_table(case):
  arguments, loss, gradient, counter = TABLE[case]
  got_loss, got_gradient, counts = one_token(**arguments)
  np.testing.assert_allclose([got_loss, got_gradient], [loss, gradient], rtol=3e-6, atol=1e-7)
  assert counts.pop("tokens") == 1
  assert {name for name, n in counts.items() if n} == ({counter} if counter else set())


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, -1.0, -80.0, -1e30, 50.0]), min_size=5, max_size=5))
def test_nothing_makes_nan(numbers):
  """Any value anywhere inside the mask: loss, gradient and metrics stay numbers.

  Advantages are finite by contract, and those of a group of G are at most sqrt(G): 1e30 of them could not be told from
  infinity once multiplied by a large r.
  """
  names = ("logp", "logp_old", "logp_infer", "logp_ref", "advantages")
  arrays = {n: np.full((1, 2), x, np.float32) for n, x in zip(names, numbers, strict=True)}
  arrays["advantages"] = np.nan_to_num(arrays["advantages"], posinf=1, neginf=-1).clip(-100, 100)
  value, gradient, metrics = loss_and_gradient(arrays, np.ones((1, 2), bool), IcePopConfig(kl_coef=0.1))
  assert np.isfinite(value) and np.isfinite(gradient).all()
  assert all(np.isfinite(x).all() for n, x in metrics.items() if n != "logp")


@pytest.mark.parametrize("aggregate", list(Aggregate))
@pytest.mark.parametrize("denominator", list(Denominator))
def test_packing_changes_nothing(aggregate, denominator):
  """Rows, segments of one row, flat tokens, and two arrays with weights: the same loss and gradients."""
  if aggregate is Aggregate.TOKEN_BUDGET and denominator is Denominator.KEPT:
    with pytest.raises(ConfigError, match="contradicts"):
      IcePopConfig(aggregate=aggregate, denominator=denominator, token_budget=100)
    return
  config = IcePopConfig(aggregate=aggregate, denominator=denominator, token_budget=100)
  arrays, mask = batch()
  value, gradient, metrics = loss_and_gradient(arrays, mask, config)

  ids = np.broadcast_to(np.arange(len(LENGTHS))[:, None], mask.shape)
  for shape in ((1, -1), (2, -1), (-1,)):
    packed = {name: x.reshape(shape) for name, x in arrays.items()}
    got = loss_and_gradient(packed, mask.reshape(shape), config, segment_ids=ids.reshape(shape))
    np.testing.assert_allclose(got[0], value, rtol=1e-6)
    np.testing.assert_allclose(got[1].reshape(mask.shape), gradient, rtol=1e-6)

  k = np.exp(arrays["logp_old"] - arrays["logp_infer"])
  counted = mask & (k >= 0.5) & (k <= 5) if denominator is Denominator.KEPT else mask
  weights = np.stack(
    [np.full(8, sequence_weight(int(row.sum()), len(LENGTHS), int(counted.sum()), config)) for row in counted]
  )
  halves = []
  for rows in (slice(0, 3), slice(3, None)):
    part = {name: x[rows] for name, x in arrays.items()}
    halves.append(loss_and_gradient(part, mask[rows], config, weights=weights[rows]))
  np.testing.assert_allclose(halves[0][0] + halves[1][0], value, rtol=1e-6)
  np.testing.assert_allclose(np.concatenate([halves[0][1], halves[1][1]]), gradient, rtol=1e-6)
  for name in ("tokens", "masked_low", "masked_high", "clipped_low", "clipped_high"):
    assert halves[0][2][name] + halves[1][2][name] == metrics[name]


def test_token_weights():
  mask = np.arange(8) < np.asarray([4, 2, 0])[:, None]
  mean = token_weights(jnp.asarray(mask), IcePopConfig())
  np.testing.assert_allclose(mean[:, 0], [1 / 8, 1 / 4, 0])
  np.testing.assert_allclose(jnp.sum(mean), 1.0)
  by_token = token_weights(jnp.asarray(mask), IcePopConfig(aggregate="token_mean"))
  np.testing.assert_allclose(by_token, mask / 6)
  budget = token_weights(jnp.asarray(mask), IcePopConfig(aggregate="token_budget", token_budget=50))
  np.testing.assert_allclose(budget, mask / 50)
  assert not np.any(token_weights(jnp.zeros((2, 3), bool), IcePopConfig()))


def test_policy_loss_is_the_two_ops_together():
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(24, 8)), rng.normal(size=(8, 50))
  targets = rng.integers(0, 40, 24)
  vocab_mask = np.arange(50) < 45
  x = np.where(vocab_mask, hidden @ head / 0.8, -np.inf)
  logp = x[np.arange(24), targets] - np.log(np.exp(x).sum(axis=1))
  infer = logp + rng.normal(0, 0.5, 24)
  advantages, mask = rng.normal(size=24), np.arange(24) % 5 != 0
  ids = np.arange(24) // 6

  def loss(hidden, head, logp_old, implementation):
    return policy_loss(
      hidden, head, jnp.asarray(targets), logp_old, jnp.asarray(infer, jnp.float32),
      jnp.asarray(advantages, jnp.float32), jnp.asarray(mask), IcePopConfig(),
      temperature=0.8, vocab_mask=jnp.asarray(vocab_mask), segment_ids=jnp.asarray(ids), implementation=implementation,
    )  # fmt: skip

  grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=3)
  sequences = [np.flatnonzero(mask & (ids == i)) for i in range(4)]
  split = lambda x: [x[tokens] for tokens in sequences]  # noqa: E731
  f32 = (jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))
  for old in (None, logp - 0.05):
    want = icepop_loss_reference(
      split(logp), None if old is None else split(old), split(infer), split(advantages), IcePopConfig()
    )
    old = None if old is None else jnp.asarray(old, jnp.float32)
    (value, metrics), gradients = grad(*f32, old, None)
    (plain_value, _), plain_gradients = grad(*f32, old, "reference")
    np.testing.assert_allclose([value, plain_value], want, rtol=1e-5)
    np.testing.assert_allclose(metrics["logp"], np.where(mask, logp, 0), rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(metrics["entropy"])[mask] > 0) and not np.any(np.asarray(metrics["entropy"])[~mask])
    for a, b in zip(gradients, plain_gradients, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not np.any(np.asarray(gradients[0])[~mask]) and not np.any(np.asarray(gradients[1])[:, ~vocab_mask])


def test_empty_batch():
  empty = {name: np.zeros((0,), np.float32) for name in ("logp", "logp_old", "logp_infer", "advantages")}
  config = IcePopConfig(aggregate="token_mean")
  value, gradient, metrics = loss_and_gradient(empty, np.zeros(0, bool), config)
  assert value == 0 and gradient.shape == (0,) and metrics["tokens"] == 0


def test_errors():
  arrays, mask = batch()
  del arrays["logp_ref"]
  with pytest.raises(ConfigError, match=r"kl_coef=0\.1: needs logp_ref"):
    icepop_loss(**arrays, mask=mask, config=IcePopConfig(kl_coef=0.1))
  with pytest.raises(ConfigError, match=r"arrays \[N\] need segment_ids or weights"):
    icepop_loss(**{n: x[0] for n, x in arrays.items()}, mask=mask[0], config=IcePopConfig())
  with pytest.raises(ValueError, match=r"mask \[4, 7\]: expected the shape of logp, \[4, 8\]"):
    icepop_loss(**arrays, mask=mask[:, 1:], config=IcePopConfig())
  with pytest.raises(ValueError, match="the minibatch must contain the sequence"):
    sequence_weight(5, 1, 4, IcePopConfig())


def policy_case(tokens=200, vocab=300):
  """Hidden states whose tokens meet all that rules a token out: prompt, both bounds of M, no number, both clips."""
  keys = jax.random.split(jax.random.key(3), 4)
  hidden_NxH = jax.random.normal(keys[0], (tokens, 16))
  head_HxV = jax.random.normal(keys[1], (16, vocab)) / 4
  targets_N = jax.random.randint(keys[2], (tokens,), 0, vocab)
  advantages_N = jnp.where(jnp.arange(tokens) % 2 == 0, 1.0, -1.0)
  return hidden_NxH, head_HxV, targets_N, advantages_N


@pytest.mark.parametrize("implementation", [None, "pallas_interpret"])
def test_what_is_ruled_out_gets_exactly_no_gradient(implementation):
  """Of each row of hidden states: prompt tokens, tokens that M masks, tokens that the clip cuts.  Even if it is NaN."""
  hidden_NxH, head_HxV, targets_N, _ = policy_case()
  advantages_N = jnp.where(jnp.arange(200) // 6 % 2 == 0, 1.0, -1.0)
  kind_N = jnp.arange(200) % 6  # 0: trained; 1: prompt; 2: k < alpha; 3: k > beta; 4: k infinite; 5: clipped
  clipped_N = kind_N == 5
  mask_N = kind_N != 1
  hidden_NxH = jnp.where(mask_N[:, None], hidden_NxH, jnp.nan)

  @jax.jit
  def run(hidden_NxH, head_HxV, logp_N):
    # r is exp(1) where it is clipped above, and exp(-1) where below.
    old_N = logp_N - jnp.where(clipped_N, advantages_N, 0.0)
    infer_N = old_N - jnp.select([kind_N == 2, kind_N == 3, kind_N == 4], [-1.0, 2.0, jnp.inf], 0.0)

    def loss(hidden_NxH, head_HxV):
      return policy_loss(
        hidden_NxH, head_HxV, targets_N, old_N, infer_N, advantages_N, mask_N,
        IcePopConfig(aggregate="token_mean"), implementation=implementation,
      )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden_NxH, head_HxV)

  logp_N = linear_logprob(hidden_NxH, head_HxV, targets_N, implementation=implementation).logp
  (value, metrics), (dhidden_NxH, dhead_HxV) = run(hidden_NxH, head_HxV, jnp.nan_to_num(logp_N))
  trained_N = np.asarray(kind_N == 0)
  counts = {name: int(metrics[name]) for name in ("tokens", "masked_low", "masked_high", "masked_nonfinite")}
  assert counts == {"tokens": 166, "masked_low": 33, "masked_high": 33, "masked_nonfinite": 33}
  assert metrics["clipped_low"] + metrics["clipped_high"] == 33 and metrics["clipped_low"] > 0 < metrics["clipped_high"]
  assert np.isfinite(value) and not np.any(dhidden_NxH[~trained_N])
  assert np.all(np.any(np.asarray(dhidden_NxH)[trained_N] != 0, axis=1))
  # The hidden states of what M or the mask rules out, by numbers that do not depend on theta, reach no gradient at all.
  others_NxH = jnp.where(((kind_N == 0) | clipped_N)[:, None], hidden_NxH, 7.0)
  _, (_, same_HxV) = run(others_NxH, head_HxV, jnp.nan_to_num(logp_N))
  np.testing.assert_array_equal(dhead_HxV, same_HxV)


@pytest.mark.parametrize("implementation", [None, "pallas_interpret"])
def test_first_minibatch_has_ratio_one(implementation):
  """The program that scores at theta_old and the one that trains, each compiled by itself: r = 1 in every bit."""
  hidden_NxH, head_HxV, targets_N, advantages_N = policy_case()
  options = {"temperature": 0.8, "vocab_mask": jnp.arange(300) != 7, "implementation": implementation}
  targets_N = jnp.where(targets_N == 7, 8, targets_N)
  score = jax.jit(lambda h, w: linear_logprob(h, w, targets_N, **options).logp)
  old_N = score(hidden_NxH, head_HxV)

  @jax.jit
  def train(hidden_NxH, head_HxV, old_N):
    loss = lambda h, w: policy_loss(  # noqa: E731
      h, w, targets_N, old_N, old_N, advantages_N, jnp.ones(200, bool), IcePopConfig(aggregate="token_mean"), **options
    )
    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden_NxH, head_HxV)

  (value, metrics), _ = train(hidden_NxH, head_HxV, old_N)
  np.testing.assert_array_equal(metrics["logp"], old_N)
  assert value == -jnp.mean(advantages_N) == 0  # r = k = 1
  assert metrics["masked_nonfinite"] == metrics["clipped_high"] == metrics["clipped_low"] == 0
