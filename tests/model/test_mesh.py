"""The model, training and rollouts on meshes of eight devices, against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.ring_tiny import get_config
from configs.schema import (
  OBJECTIVES,
  ConfigError,
  ExpertParallel,
  MeshConfig,
  PackingConfig,
  ParallelConfig,
  Remat,
  ShardingRules,
)
from ring_jax import model as ring_model
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.programs import Programs, RLFields, Tokens
from rollout.engine import Insertion, RingEngine, Sampling
from sharding.mesh import engine_mesh, make_mesh

RUN = get_config()
MODEL = dataclasses.replace(
  RUN.model, vocab_size=256, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=1, remat=Remat.FULL
)
ROWS, LENGTH = 8, 32
MASK = np.arange(256) < 250
# How tokens meet experts is test_exchange.py's; here it is what lies around.
MESHES = {
  "data fsdp tensor": ParallelConfig(MeshConfig(data=2, fsdp=2, tensor=2)),
  "fsdp expert": ParallelConfig(MeshConfig(fsdp=2, expert=4), expert_parallel=ExpertParallel.RAGGED_ALL_TO_ALL),
  "data expert tensor": ParallelConfig(MeshConfig(data=2, expert=2, tensor=2), expert_parallel="all_to_all"),
}


def run_config(parallel=ParallelConfig()):  # noqa: B008
  return dataclasses.replace(
    RUN, model=dataclasses.replace(MODEL, parallel=parallel), packing=PackingConfig(length=LENGTH, rows=ROWS)
  )


@pytest.fixture(scope="module")
def params():
  """On the host, with random norms and selection biases, some of them below zero."""
  rng = np.random.default_rng(3)

  def shaken(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
    return leaf + (0.3 * noise if path[-1].key in ("scale", "bias") else 0)

  return jax.tree_util.tree_map_with_path(shaken, jax.device_get(ring_model.init_params(MODEL, 1)))


@pytest.fixture(scope="module")
def batch():
  """Packed rows: two sequences each, one of them with padding, one row of padding alone."""
  rng = np.random.default_rng(0)
  shape = (ROWS, LENGTH)
  segments = np.ones(shape, np.int32)
  segments[:, 9:] = 2
  segments[1, 20:], segments[4] = 0, 0
  positions = np.where(segments == 2, np.arange(LENGTH) - 9, np.arange(LENGTH)).astype(np.int32)
  tokens = Tokens(*(rng.integers(0, 250, shape).astype(np.int32) for _ in range(1)), positions, segments,
                  rng.integers(0, 250, shape).astype(np.int32))  # fmt: skip
  inside = ((rng.random(shape) < 0.7) & (segments > 0)).astype(np.float32)
  near = lambda: (-5.5 + 0.3 * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
  fields = RLFields(near(), near(), rng.normal(size=shape).astype(np.float32), inside, inside / inside.sum())
  return tokens, fields


def trained(config, params, batch, mesh=None):
  """Everything that a training step computes."""
  tokens, fields = batch
  optimizers = {"rl": optax.sgd(0.1), "sft": optax.sgd(0.1)}
  programs = Programs(config, MASK, optimizers, mesh)
  shardings = None if mesh is None else ring_model.param_shardings(config.model, mesh)
  params = jax.device_put(params, shardings)
  sft = programs.sft_gradients(params, None, tokens, fields.weights_RxT)
  logps = programs.logprobs(params, tokens)
  sums, out = programs.rl_gradients(params, None, tokens, fields, config.rl.objective, False)
  for grads in (sft, sums):
    for leaf, parameter in zip(jax.tree.leaves(grads.params), jax.tree.leaves(params), strict=True):
      assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim)
  grads = jax.device_get((sft, sums, out))
  updated, _, norm = programs.apply(params, programs.init_optimizer(params, "rl"), sums.params, "rl")
  return *grads, jax.device_get(logps), jax.device_get(updated), float(norm)


@pytest.fixture(scope="module")
def alone(params, batch):
  return trained(run_config(), params, batch)


def distance(got, want):
  """Relative, in the norm of a whole tree; and the largest such distance of a single tensor."""
  norm = lambda leaves: np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))  # noqa: E731
  want = jax.tree.leaves(want)
  far = [np.float64(a) - np.float64(b) for a, b in zip(jax.tree.leaves(got), want, strict=True)]
  return norm(far) / norm(want), max(norm([a]) / max(norm([b]), 1e-30) for a, b in zip(far, want, strict=True))


@pytest.mark.parametrize("name", MESHES)
def test_a_training_step_is_that_of_one_device(name, params, batch, alone):
  parallel = MESHES[name]
  got = trained(run_config(parallel), params, batch, make_mesh(parallel.mesh))
  for ours, theirs in zip(got[:2], alone[:2], strict=True):
    np.testing.assert_array_equal(ours.counts_LxE, theirs.counts_LxE)
    assert abs(ours.loss - theirs.loss) <= 1e-6 * abs(theirs.loss)
    whole, worst = distance(ours.params, theirs.params)
    # A router's gradient is a difference of large numbers: its own float32 rounding is a few 1e-6.
    assert whole <= 1e-6 and worst <= 5e-6, (whole, worst)
  for ours, theirs in zip(got[2:], alone[2:], strict=True):
    assert distance(ours, theirs)[0] <= 1e-6


@pytest.mark.parametrize("name", ["data fsdp tensor"])
def test_sequence_ratios_do_not_see_the_mesh(name, params, batch):
  """GSPO's sums over sequences, whose rows lie on different devices."""
  parallel, objective = MESHES[name], dataclasses.replace(OBJECTIVES["gspo"], clip_low=0.05, clip_high=0.05)
  tokens, fields = batch
  found = []
  for config, mesh in ((run_config(), None), (run_config(parallel), make_mesh(parallel.mesh))):
    programs = Programs(config, MASK, {}, mesh)
    placed = jax.device_put(params, None if mesh is None else ring_model.param_shardings(config.model, mesh))
    sums, _ = programs.rl_gradients(placed, None, tokens, fields, objective, False)
    found.append(jax.device_get(sums))
  assert abs(found[1].loss - found[0].loss) <= 1e-6 * abs(found[0].loss)
  assert distance(found[1].params, found[0].params)[0] <= 1e-6


def test_given_experts_do_not_see_the_mesh(params, batch):
  """Router replay, for some tokens, over an exchange between devices: what was given is what is trained."""
  tokens, fields = batch
  parallel = MESHES["data expert tensor"]
  L, E, K = MODEL.num_moe_layers, MODEL.num_experts, MODEL.num_experts_per_tok
  rng = np.random.default_rng(4)
  experts = rng.permuted(np.broadcast_to(np.arange(E, dtype=np.int16), (L, ROWS, LENGTH, E)), axis=-1)[..., :K].copy()
  experts[:, :, ::5] = -1
  experts[..., 0, :] = -1
  whole = tokens._replace(experts_LxRxTxK=np.where(experts < 0, np.arange(K, dtype=np.int16), experts))
  found = []
  for config, mesh in ((run_config(), None), (run_config(parallel), make_mesh(parallel.mesh))):
    programs = Programs(config, MASK, {}, mesh)
    placed = jax.device_put(params, None if mesh is None else ring_model.param_shardings(config.model, mesh))
    sums = [
      programs.rl_gradients(placed, None, given, fields, config.rl.objective, False)[0]
      for given in (whole, tokens._replace(experts_LxRxTxK=experts))
    ]
    found.append(jax.device_get(sums))
  for ours, theirs in zip(found[1], found[0], strict=True):
    np.testing.assert_array_equal(ours.counts_LxE, theirs.counts_LxE)
    assert abs(ours.loss - theirs.loss) <= 1e-6 * abs(theirs.loss)
    assert distance(ours.params, theirs.params)[0] <= 1e-6
  valid = tokens.segments_RxT > 0
  given = [np.bincount(whole.experts_LxRxTxK[layer][valid].reshape(-1), minlength=E) for layer in range(L)]
  np.testing.assert_array_equal(found[1][0].counts_LxE, given)


def decoded(parallel, params, mesh=None, dtype="float32"):
  """Prefill, insertion into slots out of order, a release, and two dispatches; in int8 experts are recorded."""
  config = dataclasses.replace(RUN.rollout, slots=16, prefill_batch=8, dtype=dtype, router_replay=dtype == "int8")
  engine = RingEngine(
    dataclasses.replace(MODEL, parallel=parallel), config, eos_ids=(3,), vocab_mask_V=MASK, seed=7, mesh=mesh
  )
  if mesh is not None:  # as the trainer has them
    trainer = dataclasses.replace(parallel, rules=ShardingRules())
    params = jax.device_put(params, ring_model.param_shardings(dataclasses.replace(MODEL, parallel=trainer), mesh))
  stored = engine.load_params(params)
  rng = np.random.default_rng(5)
  prompts = [rng.integers(0, 250, length).tolist() for length in (5, 9, 3, 12, 7, 1, 16, 4)]
  draws = [Sampling(0.7, 1.0, 0, 7), Sampling(1.0, 0.8, 0, 7), Sampling(1.0, 1.0, 5, 7)]
  insertions = [Insertion(i % 8, i * 5 % 16, i, 9, draws[i % 3]) for i in range(14)]
  state = engine.insert_batch(engine.prefill_batch(stored, prompts), engine.init_decode_state(), insertions)
  state = engine.release(state, [i * 5 % 16 for i in range(12)])
  state, first = engine.decode(stored, state, 4)
  _, second = engine.decode(stored, state, 4)
  return jax.device_get((first, second))


WHOLE = ShardingRules(embed=())  # what the pods' rollouts use: nothing but experts is gathered


@pytest.mark.parametrize("name, cut", [("data fsdp tensor", ShardingRules()), ("data expert tensor", WHOLE)])
def test_rollouts_are_those_of_one_device(name, cut, params):
  parallel = dataclasses.replace(MESHES[name], rules=cut)
  dtype = "int8" if "expert" in name else "float32"
  got, want = decoded(parallel, params, make_mesh(parallel.mesh), dtype), decoded(ParallelConfig(), params, None, dtype)
  for ours, theirs in zip(got, want, strict=True):
    valid = theirs.valid_NxB
    np.testing.assert_array_equal(ours.valid_NxB, valid)
    np.testing.assert_array_equal(ours.token_NxB[valid], theirs.token_NxB[valid])
    np.testing.assert_allclose(ours.logp_NxB[valid], theirs.logp_NxB[valid], rtol=0, atol=5e-6)
    if dtype == "int8":
      np.testing.assert_array_equal(ours.experts_NxBxLxK[valid], theirs.experts_NxBxLxK[valid])
  assert want[0].valid_NxB.sum() > 40


def test_parameters_are_made_and_kept_in_their_shards():
  parallel = ParallelConfig(MeshConfig(fsdp=4, tensor=2))
  config = dataclasses.replace(MODEL, parallel=parallel)
  mesh = make_mesh(parallel.mesh)
  ours, theirs = ring_model.init_params(config, 5, mesh), ring_model.init_params(MODEL, 5)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))
  local = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(ours))
  assert local < ring_model.num_params(MODEL) / 6  # of eight; norms and router biases are whole everywhere
  programs = Programs(run_config(parallel), MASK, {"rl": optax.adam(1e-3)}, mesh)
  state = programs.init_optimizer(ours, "rl")
  for found, expected in zip(
    jax.tree.leaves(state), jax.tree.leaves(programs.abstract_optimizer(ours, "rl")), strict=True
  ):
    assert found.sharding.is_equivalent_to(expected.sharding, found.ndim)


def test_optimizer_state_can_wait_in_host_memory(params, batch):
  tokens, fields = batch
  parallel = ParallelConfig(MeshConfig(fsdp=8))
  config = run_config(parallel)
  mesh = make_mesh(parallel.mesh)
  results = []
  for memory in ("device", "host"):
    optimizer = dataclasses.replace(config.rl.optimizer, memory=memory, grad_clip=1e-4)  # which is less than the norm
    one = dataclasses.replace(config, rl=dataclasses.replace(config.rl, optimizer=optimizer))
    programs = Programs(one, MASK, {"rl": make_optimizer(optimizer, 4)}, mesh)
    placed = jax.device_put(params, ring_model.param_shardings(config.model, mesh))
    state = programs.init_optimizer(placed, "rl")
    grads = programs.rl_gradients(placed, None, tokens, fields, config.rl.objective, False)[0].params
    for _ in range(2):
      placed, state, _ = programs.apply(placed, state, jax.tree.map(jnp.copy, grads), "rl")
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
    wanted = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(programs.abstract_optimizer(placed, "rl"))}
    assert kinds == ({"pinned_host"} if memory == "host" else {"device"})
    assert wanted in (kinds, {None}) if memory == "device" else wanted == kinds
    results.append(jax.device_get((placed, state)))
  # The one is compiled layer by layer, the other as a whole.
  for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * max(np.abs(theirs).max(), 1e-12))


@pytest.mark.parametrize(
  "change, says",
  [
    (lambda: ParallelConfig(MeshConfig(expert=2)), "needs parallel.expert_parallel="),
    (lambda: MeshConfig(fsdp=0), "at least 1"),
    (lambda: ShardingRules(batch=("data", "row")), "mesh axis 'row'"),
    (lambda: ShardingRules(embed=("data",)), r"rules.embed: .*fsdp.* or \[\]"),
    (lambda: dataclasses.replace(MODEL, parallel=ParallelConfig(MeshConfig(tensor=4))), "num_key_value_heads=2"),
    (lambda: run_config(ParallelConfig(MeshConfig(fsdp=3))), "hidden_size=32: cannot be cut into 3"),
    (
      lambda: dataclasses.replace(run_config(ParallelConfig(MeshConfig(fsdp=8))), packing=PackingConfig(LENGTH, 6)),
      "packing",
    ),
    (lambda: make_mesh(MeshConfig(fsdp=3)), "is 3 devices, but there are 8"),
    (lambda: engine_mesh(MeshConfig(fsdp=16), "--mesh"), "^--mesh: 16 devices are wanted, but there are 8$"),
  ],
)
def test_what_cannot_be_cut_is_one_clear_error(change, says):
  with pytest.raises(ConfigError, match=says):
    change()
