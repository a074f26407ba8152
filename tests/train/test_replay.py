"""Router replay, from the engine's router to the trainer's gradient."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.ring_tiny import get_config
from configs.schema import ConfigError, PackingConfig
from ring_jax import model as ring_model
from ring_jax.records import Rollout
from ring_jax.rl import replay
from ring_jax.train.batches import rl_fields, rl_minibatches
from ring_jax.train.programs import Programs
from rollout.driver import RolloutDriver
from rollout.engine import RingEngine
from rollout.scheduler import C3POScheduler, SchedulerError
from rollout.worker import EngineWorker

MODEL = dataclasses.replace(
  get_config().model, vocab_size=64, hidden_size=32, num_hidden_layers=3, num_experts=16, num_experts_per_tok=4,
)  # fmt: skip
ROLLOUT = dataclasses.replace(
  get_config().rollout, token_budget=260, slots=16, pool=32, group_size=4, max_prompt_tokens=8, max_tokens=24,
  router_replay=True, steps_per_dispatch=4,
)  # fmt: skip
MASK = np.arange(64) != 5
PACKING = PackingConfig(length=40, rows=4)
LAYERS, K = 2, 4


@pytest.fixture(scope="module")
def params():
  """Random norms and selection biases, some of them below zero."""
  rng = np.random.default_rng(3)

  def shaken(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
    return 1.5 * leaf + (0.1 * noise if path[-1].key in ("scale", "bias") else 0)

  return jax.tree_util.tree_map_with_path(shaken, jax.device_get(ring_model.init_params(MODEL, 1)))


def generated(params, iterations=1, **changes):
  """Rollouts of a driver's last iteration; what is unfinished is interrupted in between, and prefilled again."""
  config = dataclasses.replace(ROLLOUT, **changes)
  engine = RingEngine(MODEL, config, eos_ids=[7], vocab_mask_V=MASK, seed=3)
  scheduler = C3POScheduler(config)
  rng, stored = np.random.default_rng(0), engine.load_params(params)
  prompts = lambda count: [(0, rng.integers(8, 60, rng.integers(1, 9)).tolist()) for _ in range(count)]  # noqa: E731
  driver = RolloutDriver(EngineWorker(engine), scheduler, config.max_tokens)
  for version in range(iterations):
    result, _ = driver.iterate(stored, version, prompts)
    saved = json.loads(json.dumps(scheduler.state_dict()))
    scheduler.load_state_dict(saved)
    assert scheduler.state_dict() == saved
  return result.rollouts


@functools.cache
def programs():
  config = get_config()
  config = dataclasses.replace(
    config, model=MODEL, packing=PACKING, rollout=dataclasses.replace(ROLLOUT, temperature=1.0),
  )  # fmt: skip
  return config, Programs(config, MASK, {"rl": optax.sgd(1.0)})


def distances(params, rollouts, replayed):
  """|log-prob of the engine - of the trainer|, of all tokens."""
  (part,) = rl_minibatches(rollouts, PACKING)
  logps = part.gather([np.asarray(programs()[1].logprobs(params, tokens)) for tokens in part.tokens(replayed)])
  return np.abs(np.concatenate(logps) - np.concatenate([rollout.logps for rollout in part.rollouts]))


@pytest.fixture(scope="module")
def rollouts(params):
  return generated(params, iterations=3)


def test_the_engine_records_what_its_router_chose(params, rollouts):
  """In float32 that is what the trainer's router chooses at the position before the token, interrupted or not."""
  assert any(len(set(rollout.versions)) > 1 for rollout in rollouts)
  for rollout in rollouts[:6]:
    assert len(rollout.experts) == len(rollout.tokens) and len(rollout.experts[0]) == LAYERS * K
    row = np.zeros((1, 32), np.int32)
    row[0, : len(rollout.prompt) + len(rollout.tokens)] = rollout.prompt + rollout.tokens
    out = _forward(params, row)
    at = slice(len(rollout.prompt) - 1, len(rollout.prompt) + len(rollout.tokens) - 1)
    np.testing.assert_array_equal(replay.decode(rollout.experts, MODEL), out.experts_LxBxTxK[:, 0, at])


@jax.jit
def _forward(params, tokens_BxT):
  return ring_model.forward(MODEL, params, tokens_BxT, return_experts=True, mtp=False)


def test_recording_changes_no_token_and_replay_of_an_exact_engine_changes_nothing(params, rollouts):
  plain = generated(params, iterations=3, router_replay=False)
  assert [rollout.tokens for rollout in plain] == [rollout.tokens for rollout in rollouts]
  for own, other in zip(plain, rollouts, strict=True):
    np.testing.assert_allclose(own.logps, other.logps, atol=1e-5)
    assert not own.experts
  (part,) = rl_minibatches(rollouts, PACKING)
  for own, given in zip(part.tokens(), part.tokens(MODEL), strict=True):
    assert own.experts_LxRxTxK is None
    inside = given.experts_LxRxTxK[0, :, :, 0] >= 0
    assert inside.any() and (given.experts_LxRxTxK[:, ~inside] == -1).all()
    a, b = (programs()[1].logprobs(params, tokens) for tokens in (own, given))
    np.testing.assert_allclose(a, b, atol=1e-6)
  assert distances(params, rollouts, MODEL).max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_replay_brings_the_trainer_nearer_to_a_rounded_engine(params, dtype):
  rollouts = generated(params, dtype=dtype)
  own, replayed = (distances(params, rollouts, model) for model in (None, MODEL))
  print(f"{dtype}: mean {own.mean():.2e} -> {replayed.mean():.2e}, max {own.max():.2e} -> {replayed.max():.2e}")
  assert replayed.mean() < own.mean() and replayed.max() <= own.max()


def test_gradient_of_a_replayed_microbatch_is_that_of_finite_differences(params):
  """With random experts: what the trainer would choose itself has no part in it, but for the tokens without a record."""
  config, own = programs()
  rng, rollouts = np.random.default_rng(5), []
  for uid in range(6):
    size = int(rng.integers(3, 12))
    ids = lambda count: rng.integers(8, 60, count).tolist()  # noqa: E731
    rollout = Rollout(uid, 0, 0, ids(rng.integers(1, 7)), ids(size), [-3.0] * size, [0] * size)
    picks = [[rng.permutation(16)[:K] for _ in range(LAYERS)] for _ in range(size)]
    rollout.experts = [b"", *replay.encode(np.array(picks, np.uint8))[1:]]
    rollouts.append(rollout)
  (part,) = rl_minibatches(rollouts, PACKING)
  (tokens,), objective = part.tokens(MODEL), dataclasses.replace(config.rl.objective, masking="none", weight="one")
  (fields,) = rl_fields(part, rng.normal(size=len(rollouts)), None, objective)
  direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
  direction["moe_layers"]["moe"]["router"]["bias"] *= 0
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    model = dataclasses.replace(MODEL, dtype="float64")
    loss = jax.jit(lambda p: _expected_gain(model, p, tokens, fields))
    ends = [loss(jax.tree.map(lambda p, d, s=s: p + s * d, wide, direction)) for s in (3e-5, -3e-5)]
    numeric = (ends[0] - ends[1]) / 6e-5
  sums, _ = own.rl_gradients(params, None, tokens, fields, objective, True)
  # -sum w A r at r = 1 has the gradient of -sum w A logp.
  along = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(sums.params), jax.tree.leaves(direction), strict=True))
  assert along == pytest.approx(-float(numeric), rel=5e-4)
  router = sums.params["moe_layers"]["moe"]["router"]
  assert np.any(router["kernel"]) and not np.any(router["bias"])


def _expected_gain(model, params, tokens, fields):
  out = ring_model.forward(
    model, params, tokens.tokens_RxT, tokens.positions_RxT, tokens.segments_RxT,
    experts_LxBxTxK=tokens.experts_LxRxTxK, mtp=False,
  )  # fmt: skip
  logits = jnp.where(MASK, out.hidden_BxTxD @ params["lm_head"]["kernel"], -jnp.inf)
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens.targets_RxT[..., None], axis=-1)[..., 0]
  return jnp.sum(jnp.where(fields.mask_RxT > 0, fields.weights_RxT * fields.advantages_RxT * logp, 0.0))


def test_records_travel_as_json_and_know_where_nothing_is_known():
  rollout = Rollout(0, 0, 0, [1, 2])
  rollout.extend([3], [-1.0], 0)
  rollout.extend([4, 5], [-1.0, -2.0], 1, [b"\x01\xff", b"\x00\x02"])
  rollout.extend([6], [-1.0], 2)
  assert rollout.experts == [b"", b"\x01\xff", b"\x00\x02", b""]
  again = Rollout.from_dict(json.loads(json.dumps(rollout.to_dict())))
  assert again == rollout
  older = rollout.to_dict()
  del older["experts"]
  assert Rollout.from_dict(older).experts == []
  rollout.restart()
  assert rollout.experts == []


@pytest.mark.parametrize(("experts", "size"), [(16, 1), (256, 1), (300, 2)])
def test_ids_as_they_travel(experts, size):
  model = dataclasses.replace(MODEL, num_experts=experts, n_group=1, topk_group=1)
  rng = np.random.default_rng(0)
  ids = rng.integers(0, experts, (5, LAYERS, K)).astype(replay.ids_dtype(experts))
  entries = replay.encode(ids)
  assert {len(entry) for entry in entries} == {LAYERS * K * size}
  decoded = replay.decode([*entries, b""], model)
  np.testing.assert_array_equal(decoded[:, :5], ids.transpose(1, 0, 2))
  assert (decoded[:, 5] == replay.OWN).all()
  assert replay.decode([], model).shape == (LAYERS, 0, K)
  with pytest.raises(ValueError, match="experts of 3 bytes"):
    replay.decode([b"abc"], model)


def test_mistakes_are_one_line():
  config = get_config()
  dense = dataclasses.replace(config.model, first_k_dense_replace=config.model.num_hidden_layers)
  with pytest.raises(ConfigError, match=r"rollout\.router_replay=true: the model has no MoE layers"):
    dataclasses.replace(config, model=dense, rollout=dataclasses.replace(config.rollout, router_replay=True))
  scheduler = C3POScheduler(ROLLOUT)
  scheduler.begin_iteration()
  scheduler.admit([(0, [1])])
  scheduler.place()
  with pytest.raises(SchedulerError, match="rollout 0 got 2 tokens but the experts of 1"):
    scheduler.record(0, [1, 2], [-1.0, -1.0], 0, [b"ab"])
