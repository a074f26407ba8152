"""Real vLLM in one child process: the same numbers as the trainer, wrong weights caught, and errors in one line."""

import dataclasses
import json
import os
import shutil
import signal
import stat
import threading
import venv

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.schema import Advantage
from parity.suites import engine
from parity.vllm import trainer
from parity.vllm.errors import VLLMError, WrongWeightsError
from parity.vllm.export import export
from parity.vllm.runner import VLLM, Sampling
from ring_jax.checkpoint import hf
from ring_jax.records import FinishReason

CONFIG = engine.MODEL
PROMPT = list(range(3, 20))


@pytest.fixture(scope="module")
def params():
  return engine.random_model()


@pytest.fixture(scope="module")
def probe(params):
  return trainer.make_probe(CONFIG, params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
  return export(tmp_path_factory.mktemp("export") / "float32", CONFIG, params)


@pytest.fixture(scope="module")
def vllm():
  with VLLM() as child:
    yield child


def test_float32_is_the_trainer(vllm, folder, probe, params):
  rows = engine.vllm_rows(vllm, folder, probe, CONFIG, params, "float32")
  assert [row.name for row in rows[:2]] == ["prompt log-probs", "sampled log-probs"]
  assert [row.layer for row in rows[2:]] == [1, 2, 3]
  assert all(row.passed for row in rows), [row.describe() for row in rows]
  for row in rows[:2]:
    assert row.count > 700 and 0 < row.max <= 2e-5 and row.extra["masked"] == 0
  assert vllm.versions["vllm"] and vllm.versions["torch"] and vllm.device in ("cpu", "cuda")


def test_bfloat16_differs_and_some_tokens_take_other_experts(vllm, tmp_path, probe, params):
  rows = engine.vllm_rows(vllm, export(tmp_path / "b", CONFIG, params, "bfloat16"), probe, CONFIG, params, "bfloat16")
  assert 1e-3 < rows[1].p50 < 0.1 < rows[1].max, rows[1].describe()
  assert 0 < max(row.extra["share"] for row in rows[2:]) < 0.2


def test_temperature_and_stop_tokens(vllm, folder, probe, params):
  stop = tuple(range(0, 320, 8))
  sampling = Sampling(max_tokens=20, temperature=0.7, n=6, seed=1, stop=stop)
  (samples,) = vllm.run(folder, probe=probe, prompts=[PROMPT], sampling=sampling).samples
  assert len({tuple(sample.tokens) for sample in samples}) > 1, "n answers must differ"
  assert {"stop"} <= {sample.finish_reason for sample in samples}
  for sample in samples:
    assert (sample.tokens[-1] in stop) == (sample.finish_reason == "stop") and not set(sample.tokens[:-1]) & set(stop)
  expected = trainer.logps(CONFIG, params, [PROMPT + sample.tokens for sample in samples], temperature=0.7)
  for sample, logps in zip(samples, expected, strict=True):
    np.testing.assert_allclose(sample.logps, logps[len(PROMPT) - 1 :], atol=2e-5)


def test_a_step_of_rollouts(vllm, folder, probe, params):
  rollouts, advantages = engine.one_step(vllm, folder, probe, CONFIG, groups=6, group_size=4, max_tokens=8)
  assert len(rollouts) == 24 and [rollout.uid for rollout in rollouts] == list(range(24))
  for rollout in rollouts:
    assert rollout.versions == [0] * 8 and rollout.finish_reason is FinishReason.LENGTH
    assert rollout.reward == 1 - sum(rollout.tokens) % 2
  by_group = advantages.reshape(6, 4)
  assert np.abs(by_group.sum(axis=1)).max() < 1e-5 and np.abs(by_group).max() > 0.5
  logps = trainer.logps(CONFIG, params, [rollout.prompt + rollout.tokens for rollout in rollouts])
  for rollout, expected in zip(rollouts, logps, strict=True):
    np.testing.assert_allclose(rollout.logps, expected[-8:], atol=2e-5)
  mean_only = engine.group_advantages([r.reward for r in rollouts], [r.group for r in rollouts], Advantage.MEAN_ONLY)
  assert (np.sign(mean_only) == np.sign(advantages)).all()


# ---------------------------------------------------------------------------------------------------------------------
# A wrong hand-over


def other_step(folder, params):
  """The checkpoint of a neighbouring step: one norm of one layer, a tenth of a percent."""
  changed = jax.tree.map(np.array, params)
  changed["moe_layers"]["post_norm"]["scale"][1] *= 1.001
  shutil.rmtree(folder)
  export(folder, CONFIG, changed)


def one_tensor(folder, params):
  """The layers' key and value heads swapped, in a file whose names and shapes are all right."""
  (path,) = folder.glob("*.safetensors")
  tensors = load_file(path)
  name = "model.layers.2.attention.query_key_value.weight"
  q, k, v = np.split(tensors[name], [128, 192])
  tensors[name] = np.concatenate([q, v, k])
  save_file(tensors, path, metadata={"format": "pt"})


def config_that_lies(folder, params):
  """Right weights under a wrong config: all of a head rotates."""
  path = folder / "config.json"
  data = json.loads(path.read_text())
  data["partial_rotary_factor"] = data["rope_parameters"]["partial_rotary_factor"] = 1.0
  path.write_text(json.dumps(data))


@pytest.mark.parametrize("tamper", [other_step, one_tensor, config_that_lies])
def test_wrong_weights_are_caught(vllm, folder, tmp_path, probe, params, tamper):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  tamper(copy, params)
  with pytest.raises(
    WrongWeightsError, match=r"copy: vLLM does not hold the trainer's weights: the largest .* 0\.0001"
  ):
    vllm.run(copy, probe=probe, prompts=[PROMPT], sampling=Sampling(max_tokens=2))


def test_a_probe_in_bfloat16_tells_another_checkpoint_from_rounding(probe, params):
  half = jax.tree.map(lambda leaf: np.asarray(leaf, "bfloat16").astype(np.float32), params)
  (rounded,) = trainer.logps(CONFIG, half, [probe.tokens])
  probe.check(rounded, "bfloat16", "x")
  (other,) = trainer.logps(CONFIG, engine.random_model(seed=1), [probe.tokens])
  with pytest.raises(WrongWeightsError, match=r"x: .* the median difference .* at most 0\.1 is allowed in bfloat16"):
    probe.check(other, "bfloat16", "x")
  with pytest.raises(WrongWeightsError, match="nan"):
    probe.check(np.full_like(other, np.nan), "bfloat16", "x")


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_an_engine_that_fails_leaves_the_child_usable(vllm, folder, tmp_path, probe):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  (path,) = copy.glob("*.safetensors")
  path.write_bytes(path.read_bytes()[:5000])
  with pytest.raises(VLLMError, match=r"^vLLM failed while running .*copy: SafetensorError"):
    vllm.run(copy, score=[PROMPT])
  assert len(vllm.run(folder, probe=probe, score=[PROMPT]).scored[0]) == len(PROMPT) - 1


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"hidden_size": 48}, r"^model\.hidden_size=48: vLLM needs a multiple of 32$"),
    ({"moe_intermediate_size": 24}, r"^model\.moe_intermediate_size=24: vLLM needs a multiple of 32$"),
    ({"head_dim": 16}, r"^model\.head_dim=16: vLLM needs one of 32, 64, .*512$"),
  ],
)
def test_shapes_that_vllm_has_no_kernel_for(tmp_path, params, changes, message):
  with pytest.raises(VLLMError, match=message):
    export(tmp_path / "x", dataclasses.replace(CONFIG, rotary_dim=0, **changes), params)


def test_requests_that_cannot_be_served(vllm, folder, tmp_path, params):
  for request, message in (
    ({"score": [[1, 320]]}, r"^token id 320: the model's vocabulary has 320$"),
    ({"score": [[1]]}, "needs at least 2 tokens"),
    ({"prompts": [[1]]}, "prompts without sampling"),
    ({}, "nothing to score"),
    ({"prompts": [[1]], "sampling": Sampling(300)}, r"sequence of 301 tokens: model\.max_position_embeddings=256"),
  ):
    with pytest.raises(VLLMError, match=message):
      vllm.run(folder, **request)
  hf.save(tmp_path / "plain", CONFIG, params)
  config = json.loads((tmp_path / "plain" / "config.json").read_text())
  del config["auto_map"]
  (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
  with pytest.raises(
    VLLMError, match=r"plain: config\.json has no auto_map; write the folder with parity\.vllm\.export"
  ):
    vllm.run(tmp_path / "plain", score=[[1, 2]])


def test_interpreters(tmp_path):
  with pytest.raises(
    VLLMError, match=r"^vLLM's interpreter /no/python: cannot be started \(No such file or directory\)$"
  ):
    VLLM("/no/python")
  venv.create(tmp_path / "bare", with_pip=False)
  bare = str(tmp_path / "bare" / "bin" / "python")
  with pytest.raises(VLLMError, match=rf"{bare} has no usable vLLM \(No module named 'torch'\)$"):
    VLLM(bare)
  broken = tmp_path / "broken"
  broken.write_text("#!/bin/sh\necho first >&2\necho the library is missing >&2\nexit 3\n")
  broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
  with pytest.raises(VLLMError, match=r"ended with status 3 while starting; it said: first \| the library is missing$"):
    VLLM(str(broken))


def test_a_child_that_hangs_or_dies(folder, tmp_path):
  slow = tmp_path / "slow"
  slow.write_text("#!/bin/sh\nexec sleep 60\n")
  slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
  with pytest.raises(VLLMError, match=r"^vLLM: no answer within 0\.2 s while starting"):
    VLLM(str(slow), timeout=0.2)
  with VLLM() as child:
    threading.Timer(1.0, os.kill, (child.pid, signal.SIGKILL)).start()  # while an engine starts
    for message in (rf"ended with status -{signal.SIGKILL:d} while running ", "process .* ended"):
      with pytest.raises(VLLMError, match=message):
        child.run(folder, score=[PROMPT])
