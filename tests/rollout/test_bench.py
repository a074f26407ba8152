"""The bench's own arithmetic, our side of it on a small model, and peers that are not there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.parallel import MeshConfig
from configs.schema import RolloutDtype
from ring_jax import model as ring_model
from ring_jax.checkpoint import hf
from rollout.bench import models, report
from rollout.bench.host import HostShare
from rollout.bench.ours import Cut, Ours, mesh_of
from rollout.bench.peers import Peer, PeerError

MODEL = dataclasses.replace(
  models.TINY, vocab_size=96, hidden_size=32, num_hidden_layers=2, head_dim=8, rotary_dim=4, intermediate_size=48,
  moe_intermediate_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
  return models.random_params(MODEL)


def test_ratios_are_of_one_round():
  """The second round was slow for both: the ratio's median is 2, not the ratio of medians."""
  result = report.summary({report.OURS: [30.0, 2.0, 20.0], "vllm": [10.0, 1.0, 20.0]})
  assert result["ratio"] == {"vllm": {"median": 2.0, "low": 1.0, "high": 3.0}}
  assert result["tokens_per_second"][report.OURS] == {"median": 20.0, "low": 2.0, "high": 30.0}


def test_shapes_are_those_of_the_notes():
  assert ring_model.num_params(models.TINY) == 1_686_960
  assert ring_model.num_params(models.SMALL) == 106_161_888


@pytest.mark.parametrize(
  ("cut", "slots", "devices", "used"),
  [
    (Cut.DATA, 3, 1, MeshConfig()),
    (Cut.DATA, 4, 2, MeshConfig(data=2)),
    (Cut.DATA, 3, 2, MeshConfig()),
    (Cut.TENSOR, 3, 2, MeshConfig(tensor=2)),
    (Cut.TENSOR, 4, 4, MeshConfig(data=2, tensor=2)),
  ],
)
def test_our_side_draws_what_it_says(params, cut, slots, devices, used):
  """Log-probs of every slot, whether its prompt came in the first prefill or in a later one, are the model's."""
  mesh = mesh_of(cut, devices, slots, MODEL.num_key_value_heads)
  assert mesh == used
  ours = Ours(MODEL, params, RolloutDtype.FLOAT32, slots=slots, prompt=1500, length=1510, steps=4, mesh=mesh)
  prompts = np.random.default_rng(0).integers(0, 96, (slots, 1500)).tolist()
  seconds, token_NxB, logp_NxB = ours.generate(prompts, 6)
  assert seconds > 0 and token_NxB.shape == logp_NxB.shape == (6, slots)
  rows = jnp.asarray([prompt + token_NxB[:, slot].tolist() for slot, prompt in enumerate(prompts)])
  hidden = jax.jit(lambda params, rows: ring_model.forward(MODEL, params, rows).hidden_BxTxD)(params, rows)
  logps = jax.nn.log_softmax(hidden[:, 1499:-1] @ params["lm_head"]["kernel"])
  want_BxN = np.take_along_axis(np.asarray(logps), token_NxB.T[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(logp_NxB, want_BxN.T, atol=2e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2)])
def test_the_host_has_a_share(params, mesh):
  share = HostShare(MODEL, params, RolloutDtype.FLOAT32, slots=4, prompt=8, tokens=8, steps=4, mesh=mesh)
  assert 0.0 < share.measure() < 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_has_the_engine_s_weights(params, dtype, tmp_path):
  models.save(tmp_path / "folder", MODEL, params, RolloutDtype(dtype))
  config, loaded = hf.load(tmp_path / "folder")
  assert config.dtype == dtype
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    stored = loaded
    for key in path:
      stored = stored[key.key]
    np.testing.assert_array_equal(stored, leaf.astype(stored.dtype))
  assert loaded["lm_head"]["kernel"].dtype == dtype


def test_a_peer_that_is_not_there_is_one_line():
  with pytest.raises(PeerError, match="vllm's process ended with status 1 while starting") as error:
    Peer("vllm", 1, interpreter="/bin/false")
  assert "\n" not in str(error.value)


def test_the_report_names_who_is_missing():
  spread = report.Spread.of([1.0, 2.0])._asdict()
  cell = {1: report.summary({report.OURS: [4.0]})}
  result = {
    "model": "tiny", "parameters": 10, "dtype": "float32", "rounds": 1, "decode_shape": "a", "prefill_shape": "b",
    "machine": {"processor": "p", "threads": 2, "clock": "wall"}, "versions": {"jax": "1"}, "absent": {"vllm": "no such"},
    "cut": "data",
    "decode": cell, "prefill": cell, "host_share": {1: spread}, "largest_logp_difference": {},
  }  # fmt: skip
  text = "\n".join(report.lines(result))
  assert "vllm: not there (no such)" in text and math.isclose(spread["median"], 1.5)
