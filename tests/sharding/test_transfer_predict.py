"""Times of transfers on pods, against sums done by hand; and Ring-1T's."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs.base import ConfigError
from configs.pods import ring_1t_tpu7x, ring_1t_v5p
from configs.schema import RolloutDtype
from ring_jax.compiled import handover
from sharding.hardware import chip_named
from sharding.topology import Topology
from sharding.transfer import Route, fan_out, plan_transfer, predict
from tests.sharding.test_transfer_plan import ROLLOUT, TRAIN, abstract, on

ROOT = pathlib.Path(__file__).parents[2]


def described(name, monkeypatch):
  """Its halves, without the TPU compiler: devices are coordinates."""
  topology = Topology.parse(name)
  shape = [range(n) for n in topology.shape]
  grid = [types.SimpleNamespace(coords=(*at, 0)[:3]) for at in np.ndindex(*map(len, shape))]
  devices = [device for device in grid for _ in range(topology.chip.devices_per_chip)] * topology.slices
  monkeypatch.setattr(Topology, "devices", lambda _: devices)
  return predict.halves(topology)


@pytest.mark.parametrize(
  "name, size, links",
  [
    ("v5p:4x8x8", 128, 2 * 32),  # a torus in all dimensions: cut twice
    ("v5p:2x2x4", 8, 4),  # too small to wrap
    ("tpu7x:4x4x8", 128, 2 * 16),  # two devices a chip
    ("v6e:8x16", 64, 8),  # wraps only as a whole pod
    ("v6e:16x16", 128, 2 * 16),
  ],
)
def test_a_slice_is_cut_across_its_longest_side(name, size, links, monkeypatch):
  found = described(name, monkeypatch)
  assert len(found.first) == len(found.second) == size and found.host_bandwidth is None
  assert found.bandwidth == links * 90e9 and found.links.startswith(f"{links} links")


def test_two_slices_are_joined_by_the_data_centre_network(monkeypatch):
  found = described("2*v5p:4x4x4", monkeypatch)
  assert len(found.first) == 64 and found.bandwidth == 64 * 6.25e9 and found.device_bandwidth == 6.25e9
  for name, says in (("3*v5p:2x2x1", "3 slices have no halves"), ("v5p:1x1x3", "3 chips and has no halves")):
    with pytest.raises(ConfigError, match=says):
      described(name, monkeypatch)


def between(bandwidth, device_bandwidth):
  chip = chip_named("v5p")
  return predict.Halves([], [], "", bandwidth, device_bandwidth, None, chip)


def test_what_limits_is_named_and_replicas_complete_one_another():
  """4 MB that all four devices of the engine need whole, from four that hold a quarter each."""
  source, target = abstract((1 << 20,), on(TRAIN, ("fsdp", "expert"))), abstract((1 << 20,), on(ROLLOUT))
  direct, fanned = predict.predict({"w": source}, {"w": target}, between(1e9, 100e9))
  assert (direct.moved, fanned.moved, direct.needed) == (16 << 20, 4 << 20, 16 << 20)
  assert direct.limit == "between" and direct.total == pytest.approx((16 << 20) / 1e9)
  links = 6 * 90e9
  assert fanned.seconds["fan_out"] == pytest.approx((3 << 20) / links)
  assert fanned.total == pytest.approx((4 << 20) / 1e9 + (3 << 20) / links)
  direct, _ = predict.predict({"w": source}, {"w": target}, between(100e9, 1e9))
  assert direct.seconds["source"] == direct.seconds["target"] == pytest.approx((4 << 20) / 1e9)
  assert direct.limit in ("source", "target")


def test_the_cheaper_plan_is_taken():
  """Over links every byte that crosses counts more than one that stays among the target's devices; in host memory none does."""
  held = {"w": abstract((1 << 10,), on(TRAIN, ("fsdp", "expert")))}
  repeated, once = (
    {"w": abstract((1 << 10,), on(ROLLOUT))},
    {"w": abstract((1 << 10,), on(ROLLOUT, ("tensor", "expert")))},
  )
  size = 4 << 10
  for route in (Route.PIECES, Route.PATHWAYS, Route.WHOLE):
    direct = plan_transfer(held, repeated, route=route)
    found = fan_out.cheapest(held, repeated, route=route)
    assert found.then is not None and found.moved == size
    assert (direct.cost, found.cost) == (4 * 4 * size, 4 * size + 3 * size)
    assert fan_out.cheapest(held, once, route=route).then is None
    # On the same devices nothing crosses.
    assert fan_out.cheapest(held, {"w": abstract((1 << 10,), on(TRAIN))}, route=route).then is None
  assert fan_out.cheapest(held, repeated, route=Route.HOST_VIEWS).then is None


def test_tensors_are_scattered_only_where_they_divide():
  leaves = {
    "first": (abstract((8, 3), on(ROLLOUT)), P(("expert", "tensor"), None)),
    "second": (abstract((3, 8), on(ROLLOUT)), P(None, ("expert", "tensor"))),
    "some": (abstract((8, 6), on(ROLLOUT, "tensor")), P(("tensor", "expert"), None)),
    "neither": (abstract((3, 5), on(ROLLOUT)), P(None, None)),
    "both": (abstract((2, 2), on(ROLLOUT)), P("expert", "tensor")),
  }
  got = fan_out.scattered({name: leaf for name, (leaf, _) in leaves.items()})
  assert {name: leaf.sharding.spec for name, leaf in got.items()} == {name: spec for name, (_, spec) in leaves.items()}


def checked(ways, terabytes):
  direct, fanned = ways
  assert direct["moved"] == direct["needed"] == fanned["needed"], "every byte once"
  assert fanned["moved"] == pytest.approx(terabytes * 1e12, rel=0.02)
  assert direct["limit"] == fanned["limit"] == "between" and fanned["total"] < 0.6 * direct["total"] < 6


@pytest.mark.tpu
def test_ring_1t_on_one_slice_by_the_command():
  done = subprocess.run(
    [sys.executable, "-m", "ring_jax.launch.transfer", "--config=configs/pods/ring_1t_v5p.py", "--topology=v5p:4x8x8", "--json"],
    cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  checked(json.loads(done.stdout)["ways"], 2.0)


@pytest.mark.tpu
def test_ring_1t_in_fp8_on_two_slices():
  config = ring_1t_tpu7x.get_config()
  config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, dtype=RolloutDtype.FP8))
  found = handover.predicted(config, Topology.parse("2*tpu7x:4x4x4"))
  checked(found["ways"], 1.0)
  assert "limited by between" in handover.text(found)


def test_meshes_of_another_size_are_refused(monkeypatch):
  described("v5p:2x2x4", monkeypatch)
  with pytest.raises(ConfigError, match=r"mesh has 128 devices, but half of v5p:2x2x4 has 8 devices"):
    handover.predicted(ring_1t_v5p.get_config(), Topology.parse("v5p:2x2x4"))
