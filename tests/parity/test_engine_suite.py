"""The mismatch table of our own engine, the walk that tells experts, and recorded rollouts; without vLLM."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs.schema import ConfigError, RolloutDtype
from parity import recorded
from parity.suites import engine
from parity.vllm import trainer
from ring_jax.model import forward
from ring_jax.records import FinishReason, Rollout
from ring_jax.train.report.samples import SampleLog

CONFIG = engine.MODEL


@pytest.fixture(scope="module")
def params():
  return engine.random_model()


def test_float32_is_the_trainer_and_int8_is_not(params):
  rows = engine.our_rows(CONFIG, params, RolloutDtype.FLOAT32)
  assert [(row.name, row.layer) for row in rows] == [
    ("sampled log-probs", None), ("experts differ", 1), ("experts differ", 2), ("experts differ", 3),
  ]  # fmt: skip
  assert all(row.passed for row in rows), [row.describe() for row in rows]
  assert rows[0].count > 500 and 0 < rows[0].max <= 1e-5 and rows[0].extra["masked"] == 0

  logp, *experts = engine.our_rows(CONFIG, params, RolloutDtype.INT8)
  assert logp.passed and 1e-3 < logp.p50 < 0.1 < logp.max, logp.describe()
  extra = logp.extra
  assert 0 < extra["masked"] < 0.1
  assert extra["masked"] == pytest.approx(extra["masked_low"] + extra["masked_high"])
  shares = [row.extra["share"] for row in experts]
  assert all(0 < share < 0.2 for share in shares)
  assert max(shares) <= extra["other_experts"] <= sum(shares) + 1e-6, (
    "a token counts once, in whatever layers it differs"
  )


def test_a_broken_engine_fails_at_its_layer(params):
  """The engine's weights with one router bias moved: log-probs and the first layer named are those that differ."""
  measured = engine.sample_ours(CONFIG, params, RolloutDtype.FLOAT32)
  broken = {**params, "moe_layers": {**params["moe_layers"]}}
  broken["moe_layers"]["moe"] = {**params["moe_layers"]["moe"]}
  router = params["moe_layers"]["moe"]["router"]
  bias_LxE = router["bias"].copy()
  bias_LxE[1] = np.roll(bias_LxE[1], 1)  # of layer 2
  broken["moe_layers"]["moe"]["router"] = {**router, "bias": bias_LxE}
  sequences = measured.sequences
  other = measured._replace(
    trainer_logps=trainer.logps(CONFIG, broken, sequences), trainer_experts=trainer.experts(CONFIG, broken, sequences)
  )
  rows = [engine._logp_row("x", "logp", other, 1e-5), *engine._expert_rows("x", other, 1e-5)]
  assert [row.passed for row in rows] == [False, True, False, False]


def test_an_engine_that_equals_the_trainer_is_not_one_of_lower_precision(params):
  measured = engine.sample_ours(CONFIG, params, RolloutDtype.FLOAT32)
  same = [logps[-count:] for logps, count in zip(measured.trainer_logps, measured.answers, strict=True)]
  row = engine._logp_row("ours, int8", "sampled log-probs", measured._replace(logps=same), float("inf"))
  assert not row.passed and "not the engine it claims to be" in row.describe()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_walk_is_the_forward_pass(params, dtype):
  config = dataclasses.replace(CONFIG, dtype=dtype)
  tokens, segments = trainer._rows(engine.random_prompts(CONFIG, 8))
  chosen, last = trainer.walk(config, params, tokens, segments)
  out = jax.jit(forward, static_argnums=0)(config, params, tokens, segment_ids_BxT=segments)
  scale = np.asarray(last, np.float32)
  variance = np.mean(scale**2, axis=-1, keepdims=True)
  hidden = scale / np.sqrt(variance + config.rms_norm_eps) * np.asarray(params["final_norm"]["scale"])
  valid = segments > 0
  difference = np.abs(hidden - np.asarray(out.hidden_BxTxD, np.float32))[valid]
  assert (difference.max() < 1e-5) if dtype == "float32" else (np.median(difference) < 0.01)
  counts = [
    np.bincount(ids[valid].reshape(-1), minlength=CONFIG.num_experts) for ids in map(np.asarray, chosen.values())
  ]
  if dtype == "float32":
    np.testing.assert_array_equal(counts, out.expert_counts_LxE)
  assert list(chosen) == [1, 2, 3] and np.sum(counts) == 3 * 2 * valid.sum()


# ---------------------------------------------------------------------------------------------------------------------
# Recorded rollouts


def some_rollouts():
  return [
    Rollout(uid=uid, group=uid // 2, problem=4 + uid // 2, prompt=[5, 6, uid], tokens=[7, 8], logps=[-0.5, -1.25],
            versions=[uid // 2, 1], finish_reason=FinishReason.STOP, reward=float(uid % 2))
    for uid in range(4)
  ]  # fmt: skip


def test_what_a_run_wrote_comes_back(tmp_path):
  (tmp_path / "rollouts").mkdir()
  log = SampleLog(tmp_path / "rollouts")
  first, second = some_rollouts(), some_rollouts()[:2]
  log.write(3, 1, first, [-1.0, 1.0, -1.0, 1.0], lambda rollout: ("prompt", "answer"))
  log.write(12, 2, second, [0.5, -0.5], lambda rollout: ("prompt", "answer"))
  rollouts, advantages = recorded.read(tmp_path, step=3)
  assert rollouts == first and advantages.tolist() == [-1.0, 1.0, -1.0, 1.0] and advantages.dtype == np.float32
  assert recorded.read(tmp_path).rollouts == second, "the last step of a workdir"
  assert recorded.read(tmp_path / "rollouts").rollouts == second
  assert recorded.read(tmp_path / "rollouts" / "step_000003.jsonl").rollouts == first


def test_what_is_not_a_recording_is_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"no step_\*\.jsonl there; give a jsonl file, a rollouts folder or a workdir"):
    recorded.read(tmp_path)
  with pytest.raises(ConfigError, match=r"no step_000007\.jsonl there"):
    recorded.read(tmp_path, step=7)
  SampleLog(tmp_path).write(1, 0, some_rollouts(), [0.0] * 4, lambda rollout: ("", ""))
  path = tmp_path / "step_000001.jsonl"
  lines = path.read_text().splitlines()
  data = json.loads(lines[1])
  for broken, message in (
    (lines[1][:20], "line 2 is not a recorded rollout: "),
    (json.dumps({**data, "logps": [0.0]}), "tokens, logps and versions differ in length"),
    (json.dumps({key: value for key, value in data.items() if key != "versions"}), "has no 'versions'"),
    (json.dumps({**data, "finish_reason": "tired"}), "tired"),
    ("[]", "line 2 is not"),
  ):
    path.write_text("\n".join([lines[0], broken]))
    with pytest.raises(ConfigError, match=message):
      recorded.read(path)
  path.write_text("")
  with pytest.raises(ConfigError, match="holds no rollouts"):
    recorded.read(path)
