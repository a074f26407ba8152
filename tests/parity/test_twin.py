"""The PyTorch twin: its weights, its objective against the equation, its optimizer and its step."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from configs.schema import Advantage, Aggregate, IcePopConfig, OptimizerConfig, RLConfig
from kernels.icepop.reference import icepop_loss_reference
from parity import cases
from parity.suites.objective import record_rollouts
from parity.torch_twin import objective, step, weights
from ring_jax.rl.advantages import group_advantages

CASE = cases.QUICK[2]  # dense and MoE layers, and the MTP layer
PARAMS = cases.random_params(CASE.config, CASE.seed, CASE.bias_shift)


def recorded():
  model = weights.build(CASE.config, PARAMS)
  return model, record_rollouts(CASE, lambda rollouts: step.answer_logps(model, rollouts, step.Scorer()))


def test_parameters_survive_the_way_through_the_twin_bitwise():
  assert PARAMS["moe_layers"]["moe"]["router"]["bias"].max() < -1.5  # all biased scores are negative
  back = weights.params_of(weights.build(CASE.config, PARAMS))
  jax.tree.map(np.testing.assert_array_equal, PARAMS, back)


def test_a_tree_of_another_model_is_named():
  other = cases.random_params(dataclasses.replace(CASE.config, num_nextn_predict_layers=0), 0)
  with pytest.raises(ValueError, match="it has no 'mtp'"):
    weights.load(weights.build(CASE.config, PARAMS), other)


def test_packing_changes_nothing_and_bfloat16_runs():
  batch = cases.packed_batch(CASE.config, 5)
  arrays = [torch.from_numpy(array) for array in (batch.tokens, batch.positions, batch.segment_ids)]
  model, collected = weights.build(CASE.config, PARAMS), {}
  with torch.no_grad():
    packed = model(*arrays, collected)
    for _, row, first, length in batch.where:
      span = slice(first, first + length)
      alone = model(arrays[0][row : row + 1, span], mtp=False)
      torch.testing.assert_close(packed.hidden_BxTxD[row, span], alone.hidden_BxTxD[0], atol=2e-5, rtol=0)
    small = weights.build(dataclasses.replace(CASE.config, dtype="bfloat16"), PARAMS)
    hidden = small(*arrays).hidden_BxTxD
    assert hidden.dtype == torch.bfloat16 and small.logits(hidden).dtype == torch.float32
    inside = arrays[2] > 0
    error = (hidden.float() - packed.hidden_BxTxD)[inside].abs().median()
    assert 1e-4 < error < 0.1
  assert {layer for layer, name in collected if name == "router_ids"} == {2, 3}


@pytest.mark.parametrize("aggregate", list(Aggregate))
@pytest.mark.parametrize("weight", ["ratio", "one"])
@pytest.mark.parametrize("calibration", ["old_over_infer", "theta_over_infer"])
@pytest.mark.parametrize("denominator", ["all", "kept"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_objective_is_equation_1(aggregate, weight, calibration, denominator, kl_coef):
  kept = denominator == "kept"
  if kept and (aggregate is Aggregate.TOKEN_BUDGET or calibration == "theta_over_infer"):
    with pytest.raises(ValueError):
      IcePopConfig(
        aggregate=aggregate, calibration=calibration, denominator=denominator, token_budget=7
      )  # a contradiction
    return
  config = IcePopConfig(
    aggregate=aggregate, weight=weight, calibration=calibration, denominator=denominator, kl_coef=kl_coef,
    token_budget=7, clip_high=0.28,
  )  # fmt: skip
  random = np.random.default_rng(0)
  lengths = [5, 2, 9]
  logp, old, infer, ref = (
    [random.normal(-1.0, scale, n).astype(np.float32) for n in lengths] for scale in (0.3, 0.3, 0.8, 0.5)
  )
  infer[0][1] = -np.inf  # the engine says that it cannot have drawn this token
  gain = [np.full(n, value, np.float32) for n, value in zip(lengths, (1.0, -1.5, 0.5), strict=True)]
  expected = icepop_loss_reference(logp, old, infer, gain, config, ref if kl_coef else None)
  mask = torch.zeros(3, 12, dtype=torch.bool)
  for row, n in enumerate(lengths):
    mask[row, 1 : n + 1] = True

  def spread(values):
    out = torch.full((3, 12), torch.nan)
    out[mask] = torch.from_numpy(np.concatenate(values))
    return out

  theta = spread(logp).requires_grad_()
  counted = objective.counted_tokens(mask, spread(old), spread(infer), config)
  weights_ = objective.weights_of(counted, 3, int(counted.sum()), config)
  loss, inside = objective.icepop(
    theta, spread(old), spread(infer), spread(gain), mask, weights_, config, spread(ref) if kl_coef else None
  )
  loss.backward()
  assert loss.item() == pytest.approx(expected, rel=2e-6, abs=1e-7)
  assert 0 < inside.sum() < mask.sum() and torch.isfinite(theta.grad).all() and theta.grad.any()


def test_kl_without_a_reference_is_an_error():
  model, rollouts = recorded()
  config = RLConfig(steps=1, objective=IcePopConfig(kl_coef=0.1))
  optimizer = step.TwinOptimizer(model, config.optimizer, 1)
  with pytest.raises(ValueError, match=r"kl_coef=0\.1"):
    step.rl_step(model, optimizer, rollouts, [1.0] * len(rollouts), config, seed=0)
  with pytest.raises(ValueError, match="one of each"):
    step.rl_step(model, optimizer, rollouts, [1.0], config, seed=0)


@pytest.mark.parametrize("kind", list(Advantage))
def test_advantages_are_the_trainers(kind):
  random = np.random.default_rng(1)
  rewards, groups = random.integers(0, 3, 40) / 3, random.integers(0, 9, 40)
  expected = group_advantages(rewards, groups, kind)
  np.testing.assert_allclose(objective.advantages_of(rewards, groups, kind), expected, atol=2e-7)
  assert not objective.advantages_of([0.1] * 3, [4] * 3, kind).any()


def test_learning_rate_warms_up_and_decays():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine")
  optimizer = step.TwinOptimizer(weights.build(CASE.config, PARAMS), config, 12)
  rates = []
  for done in range(13):
    optimizer._done = done
    rates.append(optimizer.learning_rate())
  assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0.0)


def test_a_step_improves_its_objective_whatever_the_batch_size():
  config = RLConfig(steps=1, optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1))
  ends = []
  for rows in (3, 64):
    model, rollouts = recorded()
    gains = objective.advantages_of([r.reward for r in rollouts], [r.group for r in rollouts], Advantage.GRPO)
    before = step.answer_logps(model, rollouts, step.Scorer())
    optimizer = step.TwinOptimizer(model, config.optimizer, 1)
    report = step.rl_step(model, optimizer, rollouts, gains, config, seed=0, scorer=step.Scorer(rows=rows))
    after = step.answer_logps(model, rollouts, step.Scorer())
    kept = [inside.mean() for inside in report.kept]
    assert 0.5 < np.mean(kept) < 1.0 and len(report.norms) == 1
    moved = [(b - a).mean() * gain for a, b, gain in zip(before, after, gains, strict=True)]
    assert np.mean(moved) > 0
    ends.append(weights.params_of(model))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *ends)
  # The MTP layer has no part in the objective; decay acts on its matrices and not on its norms, as in the trainer.
  mtp, start = ends[0]["mtp"], PARAMS["mtp"]
  np.testing.assert_allclose(mtp["eh_proj"]["kernel"], start["eh_proj"]["kernel"] * (1 - 1e-4), rtol=1e-6)
  np.testing.assert_array_equal(mtp["enorm"]["scale"], start["enorm"]["scale"])
  np.testing.assert_array_equal(mtp["block"]["moe"]["router"]["bias"], start["block"]["moe"]["router"]["bias"])
