"""Costs on a chip by formula: against products done by hand, and the memory of roles against whole programs."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import ring_mini
from configs.pods import ring_mini_v5p
from configs.schema import MeshConfig, ParallelConfig, PlacementConfig, Role, ShardingRules, Strategy
from ring_jax import model as ring_model
from ring_jax.compiled import flops, memory
from ring_jax.compiled.programs import Kind
from ring_jax.planning import roofline
from ring_jax.planning.holdings import holdings
from ring_jax.planning.rollouts import Rollouts, microbatches
from ring_jax.train.programs import Programs, Tokens
from rollout.simulator.lengths import Generator, Shape, Trace
from sharding.hardware import chip_named
from sharding.mesh import make_mesh
from sharding.planner import Stage, estimate, tightest
from sharding.topology import Topology
from tests.planning import rlhf_run

CHIP = chip_named("v5p")


def fixed(length, prompt):
  return lambda groups, size: Trace(size, [length] * groups * size, [prompt] * groups * size)


def laid_out(mesh, engine=None, placement=PlacementConfig()):  # noqa: B008 (frozen)
  config = rlhf_run.get_config()
  actor = ParallelConfig(mesh)
  rollout = dataclasses.replace(config.rollout, parallel=engine or actor)
  model = dataclasses.replace(config.model, parallel=actor)
  return dataclasses.replace(config, model=model, rollout=rollout, placement=placement)


def test_what_an_engine_does_is_counted_in_slots_and_steps():
  """Answers of one length: every step has all slots, and each slot 8 tokens of prompt and 0 to 9 of answer."""
  config = dataclasses.replace(
    rlhf_run.get_config().rollout,
    slots=16,
    pool=16,
    token_budget=160,
    group_size=8,
    steps_per_dispatch=1,
    max_tokens=10,
  )
  work = Rollouts(fixed(10, 8)).work(config)
  assert work.steps_by_active == {16: 10} and work.rollouts == 16 and work.tokens == 160 and work.positions == 288
  assert work.cached == 16 * sum(8 + drawn for drawn in range(10)) and work.prefill_tokens == 2 * 8
  assert work.attended == 9 and work.parts(4) == (1.0, 1.0, 1.0, 1.0)
  assert Rollouts(fixed(50, 8)).work(config) == work, "what an engine may not draw, it does not"


def test_a_large_run_is_simulated_in_proportion():
  config = dataclasses.replace(rlhf_run.get_config().rollout, slots=256, pool=2048, token_budget=200_000)
  draw = Generator(Shape.LOGNORMAL, mean=100, cap=400, prompt_tokens=10).draw
  small = dataclasses.replace(config, slots=64, pool=512, token_budget=50_000)
  large, part = Rollouts(draw).work(config), Rollouts(draw).work(small)
  assert large.steps == part.steps and large.tokens == 4 * part.tokens and large.ended == part.ended
  assert large.tokens == pytest.approx(200_000, rel=0.1)


def test_compute_bound_stages_take_their_flops_at_the_stated_efficiency():
  base = ring_mini_v5p.get_config()
  rl = dataclasses.replace(base.rl, minibatches=2)
  config = dataclasses.replace(base, rl=rl)
  rollouts = Rollouts(Generator(Shape.LOGNORMAL, mean=8192, cap=30_720, prompt_tokens=512).draw)
  costs = roofline.Roofline(CHIP, "rl", rollouts)
  work = rollouts.work(config.rollout)
  tokens = microbatches(config, "rl", work) * config.packing.rows * config.packing.length
  assert work.positions < tokens < 1.1 * work.positions
  logp, train = (costs.price(config, stage) for stage in (Stage.LOGP, Stage.TRAIN))
  token = flops.forward(config.model, work.attended) + flops.head(config.model)
  assert logp.bound == train.bound == "flops"
  assert logp.seconds == pytest.approx(tokens * token / 4 / (CHIP.flops * roofline.FLOPS))
  assert 3.9 < train.seconds / logp.seconds < 4.3  # with remat four passes, and the optimizer


def test_an_engine_whose_weights_are_cut_waits_for_links():
  model, devices = ring_mini.get_config().model, 64
  cut = dataclasses.replace(model, parallel=ParallelConfig(MeshConfig(fsdp=devices)))
  whole = dataclasses.replace(model, parallel=ParallelConfig(MeshConfig(data=devices), ShardingRules(embed=())))
  seconds = {}
  for name, one in (("cut", cut), ("whole", whole)):
    stored = sum(leaf.size for leaf in jax.tree.leaves(ring_model.abstract_params(one))) * 2
    step = roofline._Step(CHIP, one, {"parameters": stored // (devices if name == "cut" else 1)})
    seconds[name] = step.times(1024)
  numbers = ring_model.num_params(model) - model.vocab_size * model.hidden_size
  gathered = 2 * numbers * (1 - 1 / devices)
  assert seconds["cut"]["links"] == pytest.approx(gathered / (CHIP.link_bandwidth * 3 * roofline.LINKS), rel=0.02)
  # 16 tokens on a device choose 1 - (1 - 8/256)^16 = 40% of the experts.
  experts = 19 * 256 * 3 * 2048 * 512
  assert seconds["whole"]["hbm"] == pytest.approx(
    2 * (numbers - experts + 0.398 * experts) / (CHIP.hbm_bandwidth * roofline.HBM), rel=0.02
  )
  assert seconds["whole"]["links"] == 0


def test_weights_of_roles_are_those_of_their_trees():
  config = laid_out(MeshConfig(data=2, fsdp=4))
  params = ring_model.abstract_params(dataclasses.replace(config.model, parallel=ParallelConfig()))
  actor = holdings(config, "rlhf", Role.ACTOR)
  gradients, update = (memory.of(config, Kind.TRAIN_STEP, name) for name in ("gradients", "update"))
  assert actor.weights + actor.optimizer + actor.working == max(sum(gradients.values()), sum(update.values()))
  head = 4 * params["lm_head"]["kernel"].size // 4  # float32, cut over fsdp
  assert actor.weights - holdings(config, "rlhf", Role.CRITIC).weights == head
  assert holdings(config, "rlhf", Role.REWARD).weights == holdings(config, "rlhf", Role.CRITIC).weights
  assert holdings(config, "rlhf", Role.REFERENCE).weights == actor.weights
  assert holdings(config, "rlhf", Role.REFERENCE).optimizer == 0
  engine = memory.of(config, Kind.DECODE, "decode")
  assert holdings(config, "rlhf", Role.ROLLOUT).cache == engine["kv_cache"] > 0


@pytest.mark.pods
def test_a_forward_pass_over_packed_rows_needs_what_the_formula_says():
  """What frozen roles run, of Ring-mini with four layers on four chips, by the TPU compiler."""
  config = ring_mini_v5p.get_config()
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_hidden_layers=4))
  mesh = make_mesh(config.model.parallel.mesh, Topology.parse("v5p:2x2x1").devices())
  programs = Programs(config, np.ones(config.model.vocab_size, bool), {}, mesh)
  ints = jax.ShapeDtypeStruct((config.packing.rows, config.packing.length), np.int32)
  arguments = (ring_model.abstract_params(config.model, mesh), Tokens(*[ints] * 4))
  needed = programs.logprobs.lower(*arguments).compile().memory_analysis()
  predicted = sum(memory.frozen(config.model, config.packing, head=True).values())
  compiled = needed.argument_size_in_bytes + needed.temp_size_in_bytes + needed.output_size_in_bytes
  assert predicted == pytest.approx(compiled, rel=0.1)


def frozen_bytes(config):
  """Of the reference's and the reward model's weights, on each device."""
  held = {role: holdings(config, "rlhf", role).weights for role in (Role.REFERENCE, Role.REWARD)}
  return [sum(size for role, size in held.items() if device in config.seats[role].devices) for device in range(8)]


def test_interleaving_halves_what_frozen_models_hold_where_there_are_replicas():
  interleaving = PlacementConfig(Strategy.INTERLEAVING)
  together, apart = (
    frozen_bytes(laid_out(MeshConfig(data=2, fsdp=4), placement=one)) for one in (PlacementConfig(), interleaving)
  )
  assert len(set(together)) == 1 and sum(apart) == sum(together) / 2
  assert max(apart) < 0.6 * together[0]  # the reference alone has an lm_head
  # Where every device holds another part already, half of the devices hold parts of twice the size.
  together, apart = (
    frozen_bytes(laid_out(MeshConfig(fsdp=8), placement=one)) for one in (PlacementConfig(), interleaving)
  )
  assert sum(apart) == pytest.approx(sum(together), rel=0.1)
  found = tightest(laid_out(MeshConfig(data=8), placement=interleaving), "rlhf", roofline.Roofline(CHIP, "rlhf", None))
  assert found.bytes < tightest(laid_out(MeshConfig(data=8)), "rlhf", roofline.Roofline(CHIP, "rlhf", None)).bytes


def test_a_step_is_estimated_with_streaming_and_with_shadows():
  own = {"critic": ParallelConfig(MeshConfig(data=2))}
  config = laid_out(
    MeshConfig(data=2), ParallelConfig(MeshConfig(data=4)), PlacementConfig(Strategy.DISAGGREGATED, **own)
  )
  costs = roofline.Roofline(CHIP, "rlhf", Rollouts(fixed(12, 20)))
  plain = estimate(config, "rlhf", costs)
  streamed = dataclasses.replace(config, rlhf=dataclasses.replace(config.rlhf, stream=16, staleness=1))
  assert estimate(streamed, "rlhf", costs).seconds < plain.seconds
  assert plain.prices[Stage.GENERATE].bound in ("host", "latency")  # a toy model has nothing to compute
  assert {Stage.SYNC_CRITIC, Stage.VALUES, Stage.REWARD} <= plain.prices.keys()
