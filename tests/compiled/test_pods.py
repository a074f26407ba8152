"""The real models' programs for whole pods, compiled by the real TPU compiler: what docs/sharding.md says of them."""

import dataclasses
import importlib
import pkgutil

import jax
import pytest

from configs import pods, ring_tiny
from configs.scaling import at_length
from configs.schema import ExpertParallel, MeshConfig, PackingConfig, ParallelConfig
from ring_jax.compiled import fit, flops, layout, memory
from ring_jax.compiled.programs import Kind, lower
from sharding.hardware import chip_named
from sharding.topology import Topology

NAMES = sorted(module.name for module in pkgutil.iter_modules(pods.__path__))
CONTEXT = 65_536


def preset(name):
  """Its config, and the topology that it names."""
  module = importlib.import_module(f"configs.pods.{name}")
  return module.get_config(), Topology.parse(module.TOPOLOGY)


def reports(config, kind, topology):
  return [fit.compiled(config, kind, unit, topology.chip) for unit in lower(config, kind, topology.devices())]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_laid_out_for_its_topology_and_fits_it_by_formula(name):
  config, topology = preset(name)
  assert config.model.parallel.mesh.num_devices == topology.num_devices and config.packing.length == 32_768
  for kind, one in ((Kind.TRAIN_STEP, config), (Kind.DECODE, at_length(config, CONTEXT))):
    assert memory.total(one, kind) <= topology.chip.hbm_bytes


@pytest.mark.parametrize("name", [name for name in NAMES if "1t" in name])
def test_a_ring_1t_preset_is_the_smallest_slice_that_the_search_finds(name):
  config, topology = preset(name)
  alone = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, parallel=ParallelConfig()),
    rollout=dataclasses.replace(config.rollout, parallel=None),
  )
  tried = layout.candidates(alone, Kind.TRAIN_STEP, topology.chip)
  assert [one.fits for one in tried] == [False] * (len(tried) - 1) + [True]
  assert tried[-1].topology == topology


@pytest.fixture
def uncached():
  """What has no device cannot be read back from JAX's cache."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.pods
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", NAMES)
def test_the_training_step_fits(name):
  config, topology = preset(name)
  for found in reports(config, Kind.TRAIN_STEP, topology):
    _check(found, config, Kind.TRAIN_STEP)
    if config.model.parallel.mesh.fsdp == 1:  # experts stay where they are; tokens travel
      head = 2 * config.model.vocab_size * config.model.hidden_size
      gathered = found.collectives.get("all-gather", {"largest": 0})
      assert gathered["largest"] <= head
    assert found.logit_rows <= config.model.hidden_size, "an array of tokens times vocabulary"


@pytest.mark.pods
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", NAMES)
def test_decoding_fits_at_64k(name):
  config, topology = preset(name)
  config = at_length(config, CONTEXT)
  (found,) = reports(config, Kind.DECODE, topology)
  if "tpu7x" in name:  # the compiler copies weights into tiles of another kind, which the formula does not know
    assert found.fits, fit_text(found)
  else:
    _check(found, config, Kind.DECODE)


def _check(found, config, kind):
  assert found.fits, fit_text(found)
  predicted = sum(memory.of(config, kind, found.name).values())
  assert predicted == pytest.approx(found.hbm_bytes, rel=0.10), (found.name, predicted / 2**30, fit_text(found))


def fit_text(found):
  return {name: round(size / 2**30, 2) for name, size in found.bytes.items()} | {"limit": found.hbm_limit / 2**30}


@pytest.mark.pods
@pytest.mark.usefixtures("uncached")
def test_flops_of_a_device_fall_with_their_number():
  """The same 8 rows on 1, 2, 4 and 8 devices of one topology."""
  devices, base = Topology.parse("v5e:2x4").devices(), ring_tiny.get_config()
  counted = []
  for count in (1, 2, 4, 8):
    model = dataclasses.replace(base.model, parallel=ParallelConfig(MeshConfig(fsdp=count)))
    config = dataclasses.replace(base, model=model, packing=PackingConfig(length=2048, rows=8))
    unit = next(lower(config, Kind.TRAIN_STEP, devices[:count]))
    counted.append(count * unit.lowered.compile().cost_analysis()["flops"])
  assert max(counted) <= 1.01 * min(counted), counted


@pytest.mark.pods
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("chip", ["v5p", "v6e", "tpu7x"])
def test_compiled_flops_are_those_of_the_formula(chip):
  """Of Ring-mini with one layer of each kind: the compiler counts a loop's body once, and here no loop turns twice."""
  topology = Topology.parse({2: f"{chip}:2x2", 3: f"{chip}:2x2x1"}[chip_named(chip).torus_dims])
  config, _ = preset("ring_mini_v5p")
  devices = topology.num_devices
  parallel = ParallelConfig(MeshConfig(fsdp=devices), expert_parallel=ExpertParallel.LOCAL)
  config = dataclasses.replace(
    at_length(config, 4096),
    model=dataclasses.replace(config.model, parallel=parallel, num_hidden_layers=2),
    packing=dataclasses.replace(config.packing, rows=devices, length=4096),
    rollout=dataclasses.replace(config.rollout, parallel=None, slots=128, max_tokens=2048),
  )
  unit = next(lower(config, Kind.TRAIN_STEP, topology.devices()))
  counted = unit.lowered.compile().cost_analysis()["flops"]
  ideal = flops.of(config, Kind.TRAIN_STEP, "gradients")
  assert 1 / 1.1 <= counted / ideal <= 1.1, counted / ideal
