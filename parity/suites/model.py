"""The forward pass, piece by piece: router -> one block -> hidden states and logits -> token log-probs.

In the first two tiers the twin gets the JAX model's own input of every layer, so that a layer is judged by itself and a
failing row names the layer that is wrong.  From the logits on, both run from the tokens, on packed rows; the outside oracle
(transformers' Glm4Moe) gets every sequence by itself, so that packing is judged too.

Dimension key: B rows, T positions, N valid tokens, D hidden, E experts, K experts a token, V vocabulary.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from configs.schema import ModelConfig
from kernels.linear_logprob import linear_logprob
from kernels.precision import full_products
from parity import cases, glm4_moe
from parity.cases import Case
from parity.compare import Row, Suite, Tier, compare
from parity.torch_twin import objective, weights
from parity.torch_twin.model import RingTwin, device_of, rotation, visible
from ring_jax.model import forward
from ring_jax.model.layers import rotary_tables
from ring_jax.model.router import route
from ring_jax.model.transformer import Block

WEIGHTS, HIDDEN, LOGITS, LOGPS = 1e-5, 1e-5, 1e-5, 2e-5  # tolerances; that of log-probs is absolute
BAND = (0.5, 5.0)  # IcePop's, of exp(difference)
JAX_TWIN, JAX_GLM, TWIN_GLM = "JAX against PyTorch", "JAX against Glm4Moe", "PyTorch against Glm4Moe"

WHOLE = -1  # stands for "no layer" inside of jit, whose dictionaries need keys that can be sorted

Build = Callable[[ModelConfig, Mapping[str, Any]], RingTwin]


class Forwards:
  """One case, run by all sides."""

  def __init__(self, case: Case, build: Build = weights.build):
    self.case, self.config = case, case.config
    self.params = cases.random_params(case.config, case.seed, case.bias_shift)
    self.batch = cases.packed_batch(case.config, case.seed)
    self.inside = self.batch.segment_ids > 0
    self.twin = build(case.config, self.params)
    self.tokens, self.positions, self.segments = map(
      self._put, (self.batch.tokens, self.batch.positions, self.batch.segment_ids)
    )

  def _put(self, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(device_of(self.twin))

  @functools.cached_property
  def jax(self) -> dict[tuple[int | None, str], np.ndarray]:
    """What the JAX model computes, by (layer, name); hidden states and logits by its public `forward`."""
    run, batch = jax.jit(functools.partial(_jax_layers, self.config)), self.batch
    with full_products(self.config.dtype):
      found = jax.device_get(run(self.params, batch.tokens, batch.positions, batch.segment_ids, batch.targets))
    return {(None if layer == WHOLE else layer, name): value for (layer, name), value in found.items()}

  @functools.cached_property
  def whole(self) -> dict[tuple[int | None, str], np.ndarray]:
    """The same of the twin, from the tokens."""
    collected: dict[tuple[int | None, str], torch.Tensor] = {}
    with torch.no_grad():
      out = self.twin(self.tokens, self.positions, self.segments, collected)
      collected[None, "logits"] = self.twin.logits(out.hidden_BxTxD)
      targets = self._put(self.batch.targets)
      collected[None, "logp"] = objective.token_scores(self.twin, out.hidden_BxTxD, targets, 1.0, None).logp
      if out.mtp_hidden_BxTxD is not None:
        collected[None, "mtp_logits"] = self.twin.logits(out.mtp_hidden_BxTxD)
    return {key: value.cpu().numpy() for key, value in collected.items()}

  @functools.cached_property
  def by_layer(self) -> dict[tuple[int | None, str], np.ndarray]:
    """The twin's layers, each with the JAX model's input of that layer."""
    collected: dict[tuple[int | None, str], torch.Tensor] = {}
    context = (rotation(self.twin.config, self.positions), visible(self.segments), self.segments > 0)
    with torch.no_grad():
      for layer in self.twin.model.layers:
        given = {name: self._put(self.jax[layer.number, name]) for name in ("input", "attended")}
        layer(given["input"], *context, collected)
        if layer.sparse:  # judged on the JAX model's attention, so that a wrong attention does not make it fail too

          def note(name: str, value: torch.Tensor, number=layer.number) -> None:
            collected[number, name] = value

          collected[layer.number, "feed_forward"] = layer.feed_forward(given["attended"], context[-1], note)
    return {key: value.cpu().numpy() for key, value in collected.items()}

  @functools.cached_property
  def oracle_logits(self) -> np.ndarray | None:
    """Logits [B, T, V] of Glm4Moe, of each sequence by itself; None where it is another architecture."""
    if not self.config.num_shared_experts or not self.config.norm_topk_prob:
      return None
    model = glm4_moe.build(self.config, self.params)
    places = self.batch.where
    alone_SxT = np.zeros((len(places), max(length for *_, length in places)), np.int32)
    for row, (_, source, first, length) in enumerate(places):
      alone_SxT[row, :length] = self.batch.tokens[source, first : first + length]
    logits_SxTxV = glm4_moe.logits(model, alone_SxT)
    out = np.zeros((*self.batch.tokens.shape, self.config.vocab_size), np.float32)
    for row, (_, source, first, length) in enumerate(places):
      out[source, first : first + length] = logits_SxTxV[row, :length]
    return out

  @property
  def layers(self) -> list[int]:
    return [layer.number for layer in self.twin.model.layers]


def _jax_layers(config: ModelConfig, params, tokens_BxT, positions_BxT, segments_BxT, targets_BxT):
  """Runs the layers one by one out of the model's own modules; hidden states come from the model itself."""
  out = forward(config, params, tokens_BxT, positions_BxT, segments_BxT)
  head_DxV = params["lm_head"]["kernel"]
  found = {(WHOLE, "hidden"): out.hidden_BxTxD, (WHOLE, "logits"): out.hidden_BxTxD @ head_DxV}
  logp_N = linear_logprob(out.hidden_BxTxD.reshape(-1, config.hidden_size), head_DxV, targets_BxT.reshape(-1)).logp
  found[WHOLE, "logp"] = logp_N.reshape(targets_BxT.shape)
  context = (rotary_tables(config, positions_BxT), segments_BxT)
  x_BxTxD = params["embed"]["embedding"][tokens_BxT]
  for number in range(config.num_hidden_layers):
    moe = number >= config.first_k_dense_replace
    stack = params["moe_layers" if moe else "dense_layers"]
    index = number - config.first_k_dense_replace if moe else number
    own = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf)[index], stack)
    x_BxTxD = _jax_block(config, moe, own, x_BxTxD, context, found, number)
  if out.mtp_hidden_BxTxD is not None:
    mtp = params["mtp"]
    following_BxT = jnp.pad(tokens_BxT[:, 1:], ((0, 0), (0, 1)))
    parts = (params["embed"]["embedding"][following_BxT], "enorm"), (out.hidden_BxTxD, "hnorm")
    normed = [_rms(value, mtp[name]["scale"], config.rms_norm_eps) for value, name in parts]
    x_BxTxD = jnp.concatenate(normed, axis=-1) @ mtp["eh_proj"]["kernel"]
    _jax_block(config, True, mtp["block"], x_BxTxD, context, found, config.num_hidden_layers)
    found |= {(WHOLE, "mtp_hidden"): out.mtp_hidden_BxTxD, (WHOLE, "mtp_logits"): out.mtp_hidden_BxTxD @ head_DxV}
  return found


def _rms(x, scale, eps):
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _jax_block(config: ModelConfig, moe: bool, params, x_BxTxD, context, found, number: int) -> jax.Array:
  """`ring_jax.model.transformer.Block` with these parameters; notes what it computes under its number."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Block(config, moe, nnx.Rngs(0))))
  nnx.replace_by_pure_dict(state, params)
  block = nnx.merge(graph, state)
  rotary, segments_BxT = context
  attention_BxTxD, _ = block.attention(block.input_norm(x_BxTxD), rotary, segments_BxT)
  out_BxTxD, _, _ = block(x_BxTxD, rotary, segments_BxT)
  attended_BxTxD = x_BxTxD + attention_BxTxD
  notes = {"input": x_BxTxD, "attention": attention_BxTxD, "attended": attended_BxTxD, "block": out_BxTxD}
  normed_BxTxD = block.post_norm(attended_BxTxD)
  if moe:
    router = block.moe.router
    routing = route(normed_BxTxD.reshape(-1, config.hidden_size), router.kernel[...], router.bias[...], config)
    B, T = segments_BxT.shape
    notes |= {"router_ids": routing.ids_NxK.reshape(B, T, -1), "router_weights": routing.weights_NxK.reshape(B, T, -1)}
    notes["feed_forward"] = block.moe(normed_BxTxD, segments_BxT > 0)[0]
  else:
    notes["feed_forward"] = block.mlp(normed_BxTxD)
  found.update({(number, name): value for name, value in notes.items()})
  return out_BxTxD


# ---------------------------------------------------------------------------------------------------------------------
# Tiers


def router_rows(run: Forwards) -> list[Row]:
  """Which experts a token takes, and with what weight; the order of a token's experts has no meaning."""
  rows = []
  for layer in run.layers:
    if (layer, "router_ids") not in run.jax:
      continue
    ids, weights_ = [], []
    for side in (run.by_layer, run.jax):
      ids_NxK, weight_NxK = side[layer, "router_ids"][run.inside], side[layer, "router_weights"][run.inside]
      table_NxE = np.zeros((len(ids_NxK), run.config.num_experts))
      np.put_along_axis(table_NxE, ids_NxK.astype(int), weight_NxK, axis=-1)
      ids.append(np.sort(ids_NxK, axis=-1))
      weights_.append(table_NxE)
    differ = {"other_experts": float((ids[0] != ids[1]).any(axis=-1).mean())}
    common = {"case": run.case.name, "layer": layer}
    rows.append(compare("router ids", *ids, tolerance=0.0, scale=1.0, extra=differ, **common))
    rows.append(compare("router weights", *weights_, tolerance=WEIGHTS, **common))
  return rows


def block_rows(run: Forwards) -> list[Row]:
  rows = []
  for layer in run.layers:
    for name in ("attention", "feed_forward", "block"):
      got, expected = (side[layer, name][run.inside] for side in (run.by_layer, run.jax))
      rows.append(compare(name, got, expected, tolerance=HIDDEN, case=run.case.name, layer=layer))
  return rows


def logits_rows(run: Forwards, pair: str) -> list[Row]:
  got, expected = _pair(run, pair)
  if expected is None:
    return []
  rows = []
  if pair == JAX_TWIN:
    rows = [
      compare(
        "block, from the tokens", run.jax[layer, "block"][run.inside], run.whole[layer, "block"][run.inside],
        tolerance=HIDDEN, case=run.case.name, layer=layer,
      )
      for layer in run.layers
    ]  # fmt: skip
  for name in ("hidden", "logits", "mtp_hidden", "mtp_logits"):
    if name in got and name in expected:
      left, right = got[name][run.inside], expected[name][run.inside]
      rows.append(compare(name, left, right, tolerance=LOGITS, case=run.case.name))
  return rows


def logprob_rows(run: Forwards, pair: str) -> list[Row]:
  got, expected = _pair(run, pair)
  if expected is None:
    return []
  inside = run.batch.target_mask
  row = logprob_row("token log-probs", got["logp"][inside], expected["logp"][inside], case=run.case.name)
  return [row]


def logprob_row(name: str, got: np.ndarray, expected: np.ndarray, *, case: str, tolerance: float = LOGPS) -> Row:
  """Log-probs have a scale of their own; beside the difference, the share of tokens that IcePop would drop."""
  ratio = np.exp(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
  outside = {"outside_band": float(np.mean((ratio < BAND[0]) | (ratio > BAND[1])))}
  return compare(name, got, expected, tolerance=tolerance, case=case, scale=1.0, extra=outside)


def _pair(run: Forwards, pair: str):
  """(got, expected) by name; expected None where the oracle does not apply."""
  left = run.jax if pair in (JAX_TWIN, JAX_GLM) else run.whole
  got = {name: value for (layer, name), value in left.items() if layer is None}
  if pair == JAX_TWIN:
    return got, {name: value for (layer, name), value in run.whole.items() if layer is None}
  if run.oracle_logits is None:
    return got, None
  table = torch.log_softmax(torch.from_numpy(run.oracle_logits), dim=-1)
  logp = table.gather(-1, torch.from_numpy(run.batch.targets).long()[..., None])[..., 0]
  return got, {"logits": run.oracle_logits, "logp": logp.numpy()}


def run(quick: bool = True, chosen: Sequence[Case] | None = None, build: Build = weights.build) -> Suite:
  """All tiers over the cases.

  Args:
    quick: the cases that CI needs.
    chosen: these cases instead.
    build: how the twin is made of a configuration and parameters.
  """
  runs = [Forwards(case, build) for case in (cases.cases(quick) if chosen is None else chosen)]
  tiers = [
    _tier("router", "a token takes the same experts with the same weights", JAX_TWIN, router_rows, runs),
    _tier("block", "each layer, given the same input, computes the same", JAX_TWIN, block_rows, runs),
  ]
  logits = "the whole model computes the same from packed rows of tokens"
  logps = "the trainer scores a token alike"
  for name, proves, rows in (("logits", logits, logits_rows), ("log-probs", logps, logprob_rows)):
    for pair in (JAX_TWIN, JAX_GLM, TWIN_GLM):
      tiers.append(_tier(name, proves, pair, functools.partial(rows, pair=pair), runs))
  return Suite("model", [tier for tier in tiers if tier.rows])


def _tier(name: str, proves: str, pair: str, rows: Callable[[Forwards], list[Row]], runs: Sequence[Forwards]) -> Tier:
  begin = time.perf_counter()
  found = [row for run in runs for row in rows(run)]
  return Tier(name, proves, pair, found, time.perf_counter() - begin)
