"""The suites pass, and a broken copy of the model fails at the tier, layer and tensor where it is broken."""

import dataclasses

import numpy as np
import pytest
import torch

from parity import cases
from parity.suites import model as model_suite
from parity.suites import objective as objective_suite
from parity.torch_twin import model as twin
from parity.torch_twin import step, weights

# The first case has grouped experts, negative biased scores, one dense layer (0) and two MoE layers (1, 2).
CASE = cases.QUICK[0]


def test_model_suite_passes():
  suite = model_suite.run()
  assert suite.passed, [tier.first_failure.describe() for tier in suite.tiers if not tier.passed]
  assert [tier.name for tier in suite.tiers] == ["router", "block", *["logits"] * 3, *["log-probs"] * 3]
  named = {row.case for row in suite.tiers[0].rows}
  assert named == {case.name for case in cases.QUICK}
  assert {row.layer for row in suite.tiers[1].rows if row.case == "two-dense-mtp"} == {0, 1, 2, 3}  # 3: the MTP layer
  mtp = [row.name for row in suite.tiers[2].rows if row.case == "two-dense-mtp" and row.layer is None]
  assert mtp == ["hidden", "logits", "mtp_hidden", "mtp_logits"]
  assert all(row.extra["outside_band"] == 0 for tier in suite.tiers if tier.name == "log-probs" for row in tier.rows)


def test_objective_suite_passes():
  suite = objective_suite.run()
  assert suite.passed, [tier.first_failure.describe() for tier in suite.tiers if not tier.passed]
  assert [tier.name for tier in suite.tiers] == ["objective", *["gradients"] * 3, "parameters"]
  masked = [row.extra["outside_band"] for row in suite.tiers[0].rows if row.name == "objective"]
  assert all(0.01 < share < 0.3 for share in masked)


def broken_by(change):
  def build(config, params):
    model = weights.build(config, params)
    change(model)
    return model

  return build


def full_rotary(model):
  model.config = dataclasses.replace(model.config, rotary_dim=model.config.head_dim)


def biased_weights(model):
  for router in (module for module in model.modules() if isinstance(module, twin.Router)):
    weigh = router.weigh
    router.weigh = lambda scores, ids, weigh=weigh, router=router: weigh(scores + router.expert_bias, ids)


def zero_group_mask(model):
  for router in (module for module in model.modules() if isinstance(module, twin.Router)):
    router.OUTSIDE = 0.0


def scaled_shared_expert(model):
  for sparse in (module for module in model.modules() if isinstance(module, twin.SparseMLP)):
    sparse.combine = lambda routed, x, sparse=sparse: (
      routed + model.config.routed_scaling_factor * sparse.shared_experts(x)
    )


def norm_after_rotary(model):
  for own in (module for module in model.modules() if isinstance(module, twin.Attention)):
    own.position = lambda q, k, by, own=own: (
      own.query_layernorm(twin.rotate(q, by)),
      own.key_layernorm(twin.rotate(k, by)),
    )


def interleaved_qkv(model):
  """The matrix as Megatron has it: the queries, key and value of each kv head together."""
  config = model.config
  H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
  for own in (module for module in model.modules() if isinstance(module, twin.Attention)):
    rows = own.query_key_value.weight.detach().view(H + 2 * K, d, -1)
    q, k, v = rows.split((H, K, K))
    groups = [torch.cat((q[g * H // K : (g + 1) * H // K], k[g : g + 1], v[g : g + 1])) for g in range(K)]
    own.query_key_value.weight.data = torch.cat(groups).reshape((H + 2 * K) * d, -1)


BROKEN = [
  (full_rotary, "block", 0, "attention"),
  (biased_weights, "router", 1, "router weights"),
  (zero_group_mask, "router", 1, "router ids"),
  (scaled_shared_expert, "block", 1, "feed_forward"),
  (norm_after_rotary, "block", 0, "attention"),
  (interleaved_qkv, "block", 0, "attention"),
]


@pytest.mark.parametrize(("change", "tier", "layer", "name"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_copy_fails_where_it_is_broken(change, tier, layer, name):
  suite = model_suite.run(chosen=[CASE], build=broken_by(change))
  first = next(found for found in suite.tiers if not found.passed)
  row = first.first_failure
  assert (first.name, row.layer, row.name) == (tier, layer, name), row.describe()
  assert f"of layer {layer}" in row.describe()
  assert row.max > 100 * row.tolerance
  # It does not stay there: the whole model is wrong, against the outside oracle as well, and the healthy sides agree.
  assert {(found.name, found.pair) for found in suite.tiers if found.name == "logits" and not found.passed} == {
    ("logits", model_suite.JAX_TWIN),
    ("logits", model_suite.TWIN_GLM),
  }


def test_a_break_in_one_layer_is_named():
  def change(model):
    model.model.layers[2].attention.key_layernorm.weight.data[3] *= 1.01

  suite = model_suite.run(chosen=[CASE], build=broken_by(change))
  failed = [(tier.name, row.name, row.layer) for tier in suite.tiers[:2] for row in tier.rows if not row.passed]
  assert failed == [("block", "attention", 2), ("block", "block", 2)]


def first_failing_tier(training):
  for name in ("objective_rows", "gradient_rows", "parameter_rows"):
    wrong = [row for row in getattr(training, name)() if not row.passed]
    if wrong:
      return name, wrong[0]
  return None, None


def test_a_break_of_the_objective_is_found_there(monkeypatch):
  training = objective_suite.Training(CASE, objective_suite.QUICK[0], weights.build)
  monkeypatch.setattr(step.objective, "weights_of", lambda counted, sequences, tokens, config: torch.tensor(1 / tokens))
  name, row = first_failing_tier(training)
  assert name == "objective_rows" and row.name == "objective"


def test_a_break_of_the_optimizer_is_found_there(monkeypatch):
  def decay_everything(self, model, config, total_steps, init=step.TwinOptimizer.__init__):
    init(self, model, config, total_steps)
    for group in self._adamw.param_groups:
      group["weight_decay"] = config.weight_decay

  monkeypatch.setattr(step.TwinOptimizer, "__init__", decay_everything)
  training = objective_suite.Training(CASE, objective_suite.QUICK[0], weights.build)
  name, row = first_failing_tier(training)
  assert name == "parameter_rows" and row.name.endswith("scale")


def test_a_lost_gradient_is_named():
  def detach_values(model):
    own = model.model.layers[1].mlp.experts[0].down_proj
    own.forward = lambda x: torch.nn.functional.linear(x, own.weight.detach())

  training = objective_suite.Training(CASE, objective_suite.QUICK[0], broken_by(detach_values))
  name, row = first_failing_tier(training)
  assert (name, row.name, row.layer) == ("gradient_rows", "gradient of moe_layers.moe.experts.down", 1)
  assert row.worst[0] == 0  # the expert
  assert np.isfinite(row.max)
