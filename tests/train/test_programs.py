"""Gradients through packing, microbatches and minibatches, against plain loops over single sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.ring_tiny import get_config
from configs.schema import OBJECTIVES, Aggregate, Denominator, IcePopConfig, OptimizerConfig, PackingConfig
from kernels.icepop import icepop_loss
from ring_jax import model as ring_model
from ring_jax.records import Rollout
from ring_jax.train.batches import Example, model_tokens, rl_fields, rl_minibatches, sft_batches
from ring_jax.train.optimizer import learning_rate, make_optimizer
from ring_jax.train.programs import Programs

BASE = get_config()
MODEL = dataclasses.replace(
  BASE.model, vocab_size=48, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=1, moe_intermediate_size=32
)
MASK = np.arange(48) < 45
RNG = np.random.default_rng(0)


def make(objective=None, rows=3):
  config = dataclasses.replace(
    BASE, model=MODEL, packing=PackingConfig(length=40, rows=rows),
    rl=dataclasses.replace(BASE.rl, objective=objective or IcePopConfig()),
  )  # fmt: skip
  return config, Programs(config, MASK, {"rl": optax.sgd(1.0), "sft": optax.sgd(1.0)})


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(lambda leaf: leaf * 1.5, ring_model.init_params(MODEL, 0))


@jax.jit
def _padded_logps(params, tokens_BxT, valid_BxT):
  """One sequence a row, plain logits: log-probs of the next token, and the MTP layer's of the one after it."""
  out = ring_model.forward(MODEL, params, tokens_BxT, segment_ids_BxT=valid_BxT.astype(jnp.int32))

  def scored(hidden, shift):
    logps = jax.nn.log_softmax(jnp.where(MASK, hidden @ params["lm_head"]["kernel"], -1e30))
    targets = jnp.roll(tokens_BxT, -shift, axis=1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]

  return scored(out.hidden_BxTxD, 1), scored(out.mtp_hidden_BxTxD, 2)


def padded_logps(params, sequences):
  tokens = np.zeros((len(sequences), 24), np.int32)
  for row, sequence in enumerate(sequences):
    tokens[row, : len(sequence)] = sequence
  lengths = np.array([len(sequence) for sequence in sequences])
  return _padded_logps(params, tokens, np.arange(24) < lengths[:, None])


def assert_close(got, expected):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
    scale = max(float(jnp.abs(b).max()), 1e-3)
    np.testing.assert_allclose(a, b, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


def random_ids(low, high):
  return RNG.integers(0, 45, RNG.integers(low, high)).tolist()


def test_sft_gradient_is_that_of_single_sequences_with_the_mtp_loss(params):
  examples = [Example(random_ids(2, 8), random_ids(1, 12)) for _ in range(14)]
  total = sum(len(example.completion) for example in examples)

  def loss(params):
    first, second = padded_logps(params, [[*example.prompt, *example.completion] for example in examples])
    value = 0.0
    for row, example in enumerate(examples):
      start, end = len(example.prompt), len(example.prompt) + len(example.completion)
      value -= first[row, start - 1 : end - 1].sum() / total
      # Position t predicts t + 2; it counts where t + 2 is a completion token.
      value -= BASE.sft.mtp_loss_scale * second[row, max(start - 2, 0) : end - 2].sum() / total
    return value

  config, programs = make(rows=2)
  batches = sft_batches(examples, config.packing)
  assert len(batches) > 1
  sums = None
  for tokens, weights in batches:
    sums = programs.sft_gradients(params, sums, tokens, weights)
  expected_loss, expected = jax.value_and_grad(loss)(params)
  assert abs(float(sums.loss) - float(expected_loss)) < 1e-5
  assert_close(sums.params, expected)
  routed = sum(len(example.prompt) + len(example.completion) for example in examples) * MODEL.num_experts_per_tok
  assert int(sums.counts_LxE.sum()) == routed * MODEL.num_moe_layers


@pytest.fixture(scope="module")
def rollouts(params):
  """Ten rollouts of an engine that disagrees, here and there far beyond the band, and their advantages."""
  prompts, answers = [random_ids(2, 8) for _ in range(10)], [random_ids(1, 14) for _ in range(10)]
  logps, _ = padded_logps(params, [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
  made = []
  for uid, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    noise = RNG.normal(0, 0.3, len(answer)) + (RNG.random(len(answer)) < 0.15) * RNG.choice([-4, 4])
    own = np.asarray(logps)[uid, len(prompt) - 1 : len(prompt) - 1 + len(answer)] + noise
    made.append(Rollout(uid, uid // 2, uid, prompt, answer, own.tolist(), [0] * len(answer)))
  return made, RNG.normal(0, 1, 10).astype(np.float32)


@pytest.mark.parametrize(
  "objective",
  [
    IcePopConfig(),
    IcePopConfig(aggregate=Aggregate.TOKEN_MEAN, weight="one"),
    IcePopConfig(aggregate=Aggregate.TOKEN_BUDGET, token_budget=77),
    IcePopConfig(denominator=Denominator.KEPT),
    dataclasses.replace(OBJECTIVES["gspo"], clip_low=0.02, clip_high=0.05),
    OBJECTIVES["grpo_infer_old"],
  ],
  ids=["sequence_mean", "token_mean", "token_budget", "kept", "gspo", "grpo_infer_old"],
)
def test_rl_gradient_over_packed_microbatches_is_that_of_padded_rows(params, rollouts, objective):
  made, advantages = rollouts
  # theta is not theta_old: the ratio is not 1, and some tokens are clipped.
  theta = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)
  sequences = [[*r.prompt, *r.tokens] for r in made]
  at = np.zeros((3, len(made), 24), np.float32)
  for row, (rollout, advantage) in enumerate(zip(made, advantages, strict=True)):
    span = slice(len(rollout.prompt) - 1, len(rollout.prompt) - 1 + len(rollout.tokens))
    at[0, row, span], at[1, row, span], at[2, row, span] = rollout.logps, advantage, 1.0
  infer, spread, mask = at
  old, _ = padded_logps(params, sequences)

  def loss(theta):
    return icepop_loss(padded_logps(theta, sequences)[0], old, infer, spread, mask, objective)[0]

  expected_loss, expected = jax.value_and_grad(loss)(theta)

  config, programs = make(objective, rows=2)
  (minibatch,) = rl_minibatches(made, config.packing)
  assert len(minibatch.microbatches) > 1
  logp_old = [np.asarray(programs.logprobs(params, model_tokens(batch))) for batch in minibatch.microbatches]
  sums = None
  for batch, fields in zip(minibatch.microbatches, rl_fields(minibatch, advantages, logp_old, objective), strict=True):
    sums, _ = programs.rl_gradients(theta, sums, model_tokens(batch), fields, objective, False)
  assert abs(float(sums.loss) - float(expected_loss)) < 1e-5 * max(1.0, abs(float(expected_loss)))
  assert_close(sums.params, expected)


def test_the_only_minibatch_needs_no_old_logps(params, rollouts):
  """theta_old = theta: the gradient with log-probs recomputed by the trainer is the gradient without."""
  made, advantages = rollouts
  config, programs = make()
  (minibatch,) = rl_minibatches(made, config.packing)
  logp_old = [np.asarray(programs.logprobs(params, model_tokens(batch))) for batch in minibatch.microbatches]
  results = []
  for known in (logp_old, None):
    sums = None
    for batch, fields in zip(
      minibatch.microbatches, rl_fields(minibatch, advantages, known, IcePopConfig()), strict=True
    ):
      sums, (logp, entropy) = programs.rl_gradients(
        params, sums, model_tokens(batch), fields, IcePopConfig(), known is None
      )
      assert np.isfinite(logp).all() and (np.asarray(entropy)[fields.mask_RxT > 0] > 0).all()
    results.append(sums.params)
  assert_close(*results)


def test_minibatches_share_out_all_rollouts_and_their_order_is_seeded(rollouts):
  made, _ = rollouts
  packing = PackingConfig(length=40, rows=2)

  def tokens_of(seed):
    parts = rl_minibatches(made, packing, 3, seed)
    assert [len(part.rollouts) for part in parts] == [4, 3, 3]
    return [sum(int((batch.fields["mask"] > 0).sum()) for batch in part.microbatches) for part in parts]

  assert tokens_of(1) == tokens_of(1)
  assert sum(tokens_of(1)) == sum(len(rollout.tokens) for rollout in made)
  assert len({tuple(tokens_of(seed)) for seed in range(5)}) > 1
  assert rl_minibatches([], packing, 3, 0) == []


def test_optimizer_warms_up_decays_weights_only_and_leaves_selection_biases_alone(params):
  config = OptimizerConfig(learning_rate=0.1, warmup_steps=4, weight_decay=0.5, grad_clip=1.0)
  rate = learning_rate(config, 10)
  np.testing.assert_allclose([float(rate(step)) for step in range(6)], [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6)
  cosine = learning_rate(dataclasses.replace(config, schedule="cosine"), 10)
  assert float(cosine(4)) == pytest.approx(0.1) and float(cosine(10)) == pytest.approx(0.0, abs=1e-8)

  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    still = path[-1].key == "scale" or ring_model.is_router_bias(path)
    assert bool((update == 0).all()) == still, jax.tree_util.keystr(path)


def test_balancing_moves_the_selection_biases_and_nothing_else(params):
  _, programs = make()
  counts = np.zeros((MODEL.num_moe_layers, MODEL.num_experts), np.int32)
  counts[:, 0] = 80
  before = jax.device_get(params)
  after = programs.balance(jax.tree.map(jnp.array, params), counts)
  for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
    moved = not np.array_equal(old, new)
    assert moved == (ring_model.is_router_bias(path) and path[0].key == "moe_layers"), jax.tree_util.keystr(path)
  bias = after["moe_layers"]["moe"]["router"]["bias"]
  assert (bias[:, 0] < bias[:, 1]).all()
