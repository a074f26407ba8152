"""The PyTorch/vLLM path trains: from vLLM's rollouts both trainers end with the same parameters, or the tier says where not."""

import pytest

from parity import recorded
from parity.suites import engine, objective, step
from parity.torch_twin import weights
from ring_jax.train.report.samples import SampleLog


@pytest.fixture(scope="module")
def rollouts():
  return step.vllm_rollouts(None, groups=4)


def test_a_step_from_vllm_s_rollouts(monkeypatch, rollouts):
  assert len(rollouts) == 16 and {rollout.reward for rollout in rollouts} == {0.0, 1.0}
  monkeypatch.setattr(step, "vllm_rollouts", lambda interpreter, groups: rollouts)  # made once for both tests
  suite = step.run()
  assert suite.passed, [tier.first_failure.describe() for tier in suite.tiers if not tier.passed]
  assert any(row.max > 0 for tier in suite.tiers for row in tier.rows), "compared with itself"

  honest = weights.build

  def broken(config, params, device="cpu"):
    model = honest(config, params, device)
    for layer in list(model.model.layers)[config.first_k_dense_replace :]:
      for parameter in layer.mlp.shared_experts.down_proj.parameters():
        parameter.data.mul_(config.routed_scaling_factor)  # the shared expert scaled like the routed ones
    return model

  monkeypatch.setattr(step.weights, "build", broken)
  suite = step.run()
  assert not suite.passed and suite.tiers[0].first_failure.name == "objective"


def test_recorded_rollouts_come_back_from_a_run_s_files(rollouts, tmp_path):
  advantages = [float(rollout.uid) for rollout in rollouts]
  SampleLog(tmp_path).write(3, 0, rollouts, advantages, lambda rollout: ("prompt", "answer"))
  found = recorded.read(tmp_path)
  assert found.advantages_R.tolist() == advantages
  for one, other in zip(rollouts, found.rollouts, strict=True):
    assert (one.uid, one.prompt, one.tokens, one.logps, one.versions, one.reward) == (
      other.uid, other.prompt, other.tokens, other.logps, other.versions, other.reward,
    )  # fmt: skip
  # A replay computes what the first run computed.
  make = lambda given: objective.Training(  # noqa: E731
    step.Case("replay", engine.MODEL), objective.QUICK[0], weights.build, lambda _: given
  )
  assert make(found.rollouts).torch["losses"] == make(rollouts).torch["losses"]
