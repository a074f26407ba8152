"""Scores of random Hugging Face folders against transformers' Glm4Moe and a PyTorch re-derivation of the MTP layer."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Glm4MoeForCausalLM

from configs.schema import ConfigError
from parity import glm4_moe
from ring_jax.checkpoint.hf_config import from_hf
from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.launch.score import check_range, read_tokens, score
from ring_jax.model import forward
from tests.checkpoint import hf_folder

TOLERANCE = 1e-5
ROTARY_DIM = {"rope_theta": 10_000.0, "rotary_dim": 4}
ROPE_PARAMETERS = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}}
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
CASES = {
  # biased scores are all negative: a mask of 0 instead of -inf would choose other experts
  "groups_negative_bias": (hf_folder.fields(), -3.0),
  "no_dense_layer_no_groups": (
    hf_folder.fields(ROTARY_DIM, first_k_dense_replace=0, n_group=0, topk_group=0, num_shared_experts=2), 0.0,
  ),
  "two_dense_layers": (
    hf_folder.fields(ROPE_PARAMETERS, first_k_dense_replace=2, n_group=1, topk_group=1, norm_topk_prob=False), 0.5,
  ),
  "yarn": (hf_folder.fields(ROTARY_DIM | YARN, model_type="bailing_moe_v2"), 0.0),
}  # fmt: skip


def run_score(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, "-m", "ring_jax.launch.score", *flags], capture_output=True, text=True)


def tokens_of(config: dict, rows: int = 2, length: int = 20) -> np.ndarray:
  return np.random.default_rng(7).integers(0, config["vocab_size"], (rows, length))


def close(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
  assert ours.shape == theirs.shape, what
  worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
  assert worst <= TOLERANCE, f"{what}: relative to scale {worst:.2e}"


def glm_state(config: dict, tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
  """The folder's tensors under GLM's names, without any code of this project."""
  H, K, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
  state = {}
  for name, array in tensors.items():
    tensor = torch.from_numpy(array.astype(np.float32))
    if name.endswith("attention.query_key_value.weight"):
      for part, rows in zip("qkv", tensor.split([H * d, K * d, K * d]), strict=True):
        state[name.replace("attention.query_key_value", f"self_attn.{part}_proj")] = rows
    elif ".experts." not in name:
      for old, new in (
        ("word_embeddings", "embed_tokens"), ("attention.dense", "self_attn.o_proj"),
        ("attention.query_layernorm", "self_attn.q_norm"), ("attention.key_layernorm", "self_attn.k_norm"),
        ("gate.expert_bias", "gate.e_score_correction_bias"),
      ):  # fmt: skip
        name = name.replace(old, new)
      state[name] = tensor
  for i in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
    at = f"model.layers.{i}.mlp.experts"
    part = {
      kind: torch.stack(
        [torch.from_numpy(tensors[f"{at}.{e}.{kind}_proj.weight"]) for e in range(config["num_experts"])]
      )
      for kind in ("gate", "up", "down")
    }
    state[f"{at}.gate_up_proj"] = torch.cat([part["gate"], part["up"]], dim=1)
    state[f"{at}.down_proj"] = part["down"]
  return state


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_agree_with_glm4_moe(case, tmp_path):
  fields, bias = CASES[case]
  tensors = hf_folder.random_tensors(fields, seed=len(case), bias=bias)
  folder = hf_folder.write(tmp_path / "hf", fields, tensors)
  tokens_BxT = tokens_of(fields)
  config, params, _, _ = open_checkpoint(folder)

  # The oracle holds the folder's tensors, renamed here; parity.glm4_moe must come to the same ones from our tree.
  oracle = Glm4MoeForCausalLM(glm4_moe.glm_config(config)).eval()
  oracle.load_state_dict(glm_state(fields, tensors), strict=True)
  ours = glm4_moe.build(config, params)
  for name, tensor in oracle.state_dict().items():
    assert torch.equal(ours.state_dict()[name], tensor), name

  close(score(config, params, tokens_BxT)["logits"], glm4_moe.logits(oracle, tokens_BxT), "logits")

  def loss_of(params):
    hidden_BxTxD = forward(config, params, tokens_BxT).hidden_BxTxD
    logp_BxTxV = jax.nn.log_softmax(hidden_BxTxD[:, :-1] @ params["lm_head"]["kernel"])
    return -jnp.take_along_axis(logp_BxTxV, tokens_BxT[:, 1:, None], axis=-1).mean()

  loss, grads = jax.jit(jax.value_and_grad(loss_of))(params)
  their_loss, their_grads = glm4_moe.loss_and_gradients(oracle, config, tokens_BxT)
  assert abs(float(loss) - their_loss) <= TOLERANCE * their_loss
  biases = grads["moe_layers"]["moe"]["router"].pop("bias")
  assert not biases.any()
  paths = jax.tree_util.tree_leaves_with_path(grads)
  assert jax.tree.structure(grads) == jax.tree.structure(their_grads)
  for (path, leaf), theirs in zip(paths, jax.tree.leaves(their_grads), strict=True):
    close(np.asarray(leaf), theirs, jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------------------------------------------------
# The multi-token-prediction layer, derived again in PyTorch (bailing_moe_v2.md section 3.9)


def rms(x, weight, eps=1e-6):
  return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x_BxHxTxd, theta, r):
  T = x_BxHxTxd.shape[2]
  angle = torch.arange(T)[:, None] * theta ** (-torch.arange(r // 2) * 2 / r)
  a, b, rest = x_BxHxTxd[..., : r // 2], x_BxHxTxd[..., r // 2 : r], x_BxHxTxd[..., r:]
  return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def mtp_logits(fields, tensors, tokens, hidden):
  """`hidden`: of the main model, after its final norm."""
  at = f"model.layers.{fields['num_hidden_layers']}."
  w = {name.removeprefix(at).removesuffix(".weight"): torch.from_numpy(array) for name, array in tensors.items()}
  H, K, d = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]
  B, T = tokens.shape

  def mlp(x, prefix):
    return (F.silu(x @ w[f"{prefix}.gate_proj"].T) * (x @ w[f"{prefix}.up_proj"].T)) @ w[f"{prefix}.down_proj"].T

  following = torch.cat([tokens[:, 1:], torch.zeros(B, 1, dtype=torch.long)], 1)
  embedded = w["model.word_embeddings"][following]
  x = torch.cat([rms(embedded, w["enorm"]), rms(hidden, w["hnorm"])], -1) @ w["eh_proj"].T
  qkv = (rms(x, w["input_layernorm"]) @ w["attention.query_key_value"].T).view(B, T, H + 2 * K, d).transpose(1, 2)
  q, k, v = qkv.split([H, K, K], 1)
  r = int(d * fields["partial_rotary_factor"])
  q = rotate(rms(q, w["attention.query_layernorm"]), fields["rope_theta"], r)
  k = rotate(rms(k, w["attention.key_layernorm"]), fields["rope_theta"], r)
  k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
  weights = (q @ k.transpose(2, 3) / d**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
  x = x + (weights @ v).transpose(1, 2).reshape(B, T, H * d) @ w["attention.dense"].T
  y = rms(x, w["post_attention_layernorm"])
  s = (y @ w["mlp.gate"].T).sigmoid()
  c = (s + w["mlp.gate.expert_bias"]).view(B, T, fields["n_group"], -1)
  kept = F.one_hot(c.topk(2, -1)[0].sum(-1).topk(fields["topk_group"], -1)[1], fields["n_group"]).sum(-2).bool()
  ids = c.masked_fill(~kept[..., None], -torch.inf).flatten(2).topk(fields["num_experts_per_tok"], -1)[1]
  chosen = s.gather(-1, ids)
  gates = torch.zeros_like(s).scatter(-1, ids, chosen / chosen.sum(-1, keepdim=True) * fields["routed_scaling_factor"])
  x = x + sum(gates[..., e : e + 1] * mlp(y, f"mlp.experts.{e}") for e in range(fields["num_experts"]))
  x = x + mlp(y, "mlp.shared_experts")
  return rms(x, w["final_layernorm"]) @ w["lm_head"].T


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
  """(config.json, tensors, ids, out.npz) of one run of the command on a folder with an MTP layer."""
  folder = tmp_path_factory.mktemp("score")
  fields = hf_folder.fields(num_nextn_predict_layers=1)
  tensors = hf_folder.random_tensors(fields, seed=3)
  hf_folder.write(folder / "hf", fields, tensors, files=1)
  tokens_BxT = tokens_of(fields)
  np.save(folder / "ids.npy", tokens_BxT)
  files = (f"--checkpoint={folder}/hf", f"--tokens={folder}/ids.npy", f"--out={folder}/out.npz")
  done = run_score(*files, "--dtype=float32")
  assert done.returncode == 0, done.stderr
  assert done.stdout == f"wrote {folder}/out.npz: logits [2, 20, 40], logp [2, 19], mtp [2, 20, 40]\n"
  return fields, tensors, tokens_BxT, np.load(folder / "out.npz")


def test_command_agrees_with_glm4_moe_and_the_mtp_derivation(scored):
  fields, tensors, tokens_BxT, out = scored
  main = {name: array for name, array in tensors.items() if not name.startswith("model.layers.3.")}
  oracle = Glm4MoeForCausalLM(glm4_moe.glm_config(from_hf(fields))).eval()
  oracle.load_state_dict(glm_state(fields, main), strict=True)
  tokens = torch.from_numpy(tokens_BxT)
  with torch.no_grad():
    hidden = oracle.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = oracle.lm_head(hidden)
    logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    mtp = mtp_logits(fields, tensors, tokens, hidden)
  close(out["logits"], logits.numpy(), "logits")
  close(out["logp"], logp.numpy(), "logp")
  close(out["mtp"], mtp.numpy(), "mtp")
  assert {out[name].dtype for name in out} == {np.dtype(np.float32)}


def test_full_rotary_would_be_noticed(tmp_path):
  """Both spellings of half rotation agree bit for bit, and full rotation is far away: the test has teeth."""
  base = hf_folder.fields({"rope_theta": 10_000.0}, num_hidden_layers=1)
  tensors = hf_folder.random_tensors(base, seed=1)
  logits = {}
  for name, rope in (("dim", {"rotary_dim": 4}), ("factor", {"partial_rotary_factor": 0.5}), ("full", {})):
    hf_folder.write(tmp_path / name, base | rope, tensors)
    config, params, _, _ = open_checkpoint(tmp_path / name)
    logits[name] = score(config, params, tokens_of(base, rows=1))["logits"]
  assert (logits["dim"] == logits["factor"]).all()
  assert np.abs(logits["dim"] - logits["full"]).max() > 0.01


@pytest.mark.parametrize(
  ("array", "message"),
  [
    (np.zeros((2, 3), np.float32), "holds float32, must be an array of integers"),
    (np.zeros(3, np.int32), "has shape [3], must be [B, T] with at least one token"),
    (np.zeros((0, 3), np.int32), "has shape [0, 3], must be [B, T] with at least one token"),
    (np.array([{}]), "is not a .npy file of numbers (Object arrays cannot be loaded when allow_pickle=False)"),
  ],
)
def test_bad_tokens_are_one_clear_error(array, message, tmp_path):
  np.save(tmp_path / "ids.npy", array)
  with pytest.raises(ConfigError) as caught:
    read_tokens(str(tmp_path / "ids.npy"))
  assert str(caught.value) == f"--tokens={tmp_path}/ids.npy: {message}"


def test_ids_outside_of_the_vocabulary_are_refused(tmp_path):
  check_range(np.array([[0, 39]]), vocab_size=40)
  for value in (-1, 40, 2**40):
    with pytest.raises(ConfigError, match=f"^--tokens: holds id {value}, must be from 0 to 39 "):
      check_range(np.array([[3, value]]), vocab_size=40)
