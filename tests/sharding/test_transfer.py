"""Transfers between real devices: the same bits, whatever the layouts; and broken ones, each caught by name."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from sharding.transfer import Holder, Probe, Route, TransferError, check, execute, move, plan_fan_out, plan_transfer
from tests.sharding.test_transfer_plan import DEVICES, LAYOUTS, ROLLOUT, TRAIN, on

ROOT = pathlib.Path(__file__).parents[2]
DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int8", "int4", "bool", "uint32", "float16"]


def bits(values):
  return np.ascontiguousarray(np.asarray(values)).reshape(-1).view(np.uint8)


def random(shape, dtype, seed=0):
  """Any bits at all, NaNs and minus zero among them; int4 and bool have fewer."""
  rng = np.random.default_rng(seed)
  if dtype in ("int4", "bool"):
    return np.asarray(rng.integers(0, 2 if dtype == "bool" else 8, shape)).astype(jnp.dtype(dtype))
  size = jnp.dtype(dtype).itemsize
  return np.frombuffer(rng.bytes(size * int(np.prod(shape))), np.uint8).view(jnp.dtype(dtype)).reshape(shape)


def tree(where, seed=0, shapes=None):
  """Tensors by name, laid out so."""
  rng = np.random.default_rng(seed)
  shapes = shapes or {"moe.up": (3, 4, 12, 8), "moe.down": (3, 4, 8, 12), "norm": (3, 8)}
  return {
    name: jax.device_put(rng.normal(size=shape).astype(np.float32), where[name] if isinstance(where, dict) else where)
    for name, shape in shapes.items()
  }


SOURCE = {
  "moe.up": on(TRAIN, None, "expert", "fsdp"),
  "moe.down": on(TRAIN, None, "expert", None, "fsdp"),
  "norm": on(TRAIN),
}
TARGET = {
  "moe.up": on(ROLLOUT, None, "expert", None, "tensor"),
  "moe.down": on(ROLLOUT, None, "expert"),
  "norm": on(ROLLOUT),
}


def wanted(source, where):
  return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), source, where)


ROUTES = pytest.mark.parametrize("route", [Route.HOST_VIEWS, Route.PIECES, Route.WHOLE])
PLANNED_ROUTES = pytest.mark.parametrize("route", [Route.HOST_VIEWS, Route.PIECES])


@ROUTES
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_target_has_the_same_bits_in_its_layout(name, route):
  source, target = LAYOUTS[name]
  shapes = {"a": (3, 12, 12, 4), "odd": (7, 12, 24, 4), "empty": (0, 12, 12, 4)}
  sent = {}
  for key, shape in shapes.items():
    for dtype in DTYPES if key == "a" and "tensor x expert" in name else DTYPES[:1]:
      sent[f"{key}.{dtype}"] = jax.device_put(random(shape, dtype), source)
  plan = plan_transfer(sent, wanted(sent, dict.fromkeys(sent, target)), bucket_bytes=4000, route=route)
  got = execute(plan, sent, 1).tree
  for key, leaf in got.items():
    assert leaf.sharding == target and leaf.dtype == sent[key].dtype
    for shard in leaf.addressable_shards:  # every replica
      np.testing.assert_array_equal(bits(shard.data), bits(np.asarray(sent[key])[shard.index]), err_msg=key)


@ROUTES
def test_scalars_travel_too(route):
  sent = {"scale": jax.device_put(np.float32(-2.5), SingleDeviceSharding(DEVICES[0]))}
  plan = plan_transfer(sent, wanted(sent, {"scale": on(ROLLOUT)}), route=route)
  assert [float(shard.data) for shard in execute(plan, sent, 1).tree["scale"].addressable_shards] == [-2.5] * 4


@ROUTES
def test_the_trainer_may_donate_what_it_sent(route):
  """Same devices, same layout: nothing moves, and yet nothing is shared."""
  sent = tree(SOURCE)
  expected = jax.device_get(sent)
  got = execute(plan_transfer(sent, wanted(sent, SOURCE), route=route), sent, 1).tree
  jax.block_until_ready(jax.jit(lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0)(sent))
  for leaf in jax.tree.leaves(sent):
    leaf.delete()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), expected)


def test_versions_grow_and_the_old_one_stays_when_a_transfer_fails(monkeypatch):
  holder, first, second = Holder(), tree(SOURCE, 1), tree(SOURCE, 2)
  plan = plan_transfer(first, wanted(first, TARGET))
  assert holder.current is None
  held = holder.receive(plan, first, 4)
  assert holder.current is held and held.version == 4
  for version in (4, 3):
    with pytest.raises(TransferError, match=f"version {version} after version 4: versions must grow"):
      holder.receive(plan, second, version)
  with monkeypatch.context() as broken, pytest.raises(TransferError):
    broken.setattr(move, "_copy", lambda out, values: None)
    holder.receive(plan, second, 5)
  assert holder.current is held
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(holder.current.tree), jax.device_get(first))
  assert holder.receive(plan, second, 5) is holder.current
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(holder.current.tree), jax.device_get(second))


def test_another_tree_than_the_plan_s_is_refused_by_name():
  sent = tree(SOURCE)
  plan = plan_transfer(sent, wanted(sent, TARGET))
  for change, says in (
    ({"norm": sent["norm"].astype(jnp.bfloat16)}, r"norm is bfloat16\[3, 8\], the plan says float32\[3, 8\]"),
    ({"norm": jax.device_put(sent["norm"], on(TRAIN, None, "fsdp"))}, "norm lies as"),
    ({"extra": sent["norm"]}, "extra is not in the plan"),
  ):
    with pytest.raises(TransferError, match=says):
      execute(plan, sent | change, 1)
  with pytest.raises(TransferError, match="norm is missing"):
    execute(plan, {name: leaf for name, leaf in sent.items() if name != "norm"}, 1)


def test_replicas_complete_one_another():
  """Every byte crosses once and is gathered then; the probe sees the whole tree."""
  sent = tree(SOURCE)
  plan = plan_fan_out(sent, wanted(sent, dict.fromkeys(sent, on(ROLLOUT))), bucket_bytes=2000)
  assert plan.moved == sum(leaf.nbytes for leaf in sent.values()) == plan.needed
  assert "\nthen 3 tensors" in plan.summary()
  got = Holder().receive(plan, sent, 1, Probe(log_probs, log_probs, 1e-5)).tree
  for name, leaf in got.items():
    assert leaf.sharding == on(ROLLOUT)
    for shard in leaf.addressable_shards:
      np.testing.assert_array_equal(bits(shard.data), bits(sent[name]))
  with pytest.raises(TransferError, match=r"the probe differs by .*, though every tensor arrived bit for bit"):
    Holder().receive(plan, sent, 1, Probe(log_probs, lambda tree: log_probs(tree) + 1, 1e-5))


# ---- broken transfers


def planned(bucket_bytes=1 << 20, route=None):
  sent = tree(SOURCE)
  return sent, plan_transfer(sent, wanted(sent, TARGET), bucket_bytes=bucket_bytes, route=route)


@PLANNED_ROUTES
def test_a_wrong_slice_is_caught_by_name(route):
  """The plan takes the shards of two source devices for each other's: every byte moves, the sum of all is the same."""
  sent, plan = planned(route=route)
  up = next(i for i, leaf in enumerate(plan.leaves) if leaf.name == "moe.up")
  layout = plan.leaves[up].source
  swapped = layout._replace(device_S=layout.device_S[[1, 0, 2, 3]])
  leaves = list(plan.leaves)
  leaves[up] = dataclasses.replace(leaves[up], source=swapped)
  with pytest.raises(
    TransferError, match=r"version 7: .*wrong place: moe\.up\[.*\] of \S+, which does not hold it"
  ) as caught:
    execute(dataclasses.replace(plan, leaves=tuple(leaves)), sent, 7)
  assert "moe.down" not in str(caught.value) and "norm" not in str(caught.value)


@PLANNED_ROUTES
def test_a_slice_from_the_wrong_rows_is_caught_by_name(route, monkeypatch):
  """Read a row too far on, and put where it belongs."""
  sent, plan = planned(400, route)
  boxes = move._boxes

  def shifted(leaf):
    source, target = boxes(leaf)
    if leaf.name == "moe.up":
      source = {device: box - [[1, 1], [0, 0], [0, 0], [0, 0]] for device, box in source.items()}
    return source, target

  monkeypatch.setattr(move, "_boxes", shifted)
  if route is Route.HOST_VIEWS:  # numpy reads nothing beyond the end, where XLA reads the last rows
    monkeypatch.setattr(move, "_copy", lambda out, values: out.__setitem__(..., values if len(values) else 0))
  with pytest.raises(TransferError, match=r"moe\.up\[.*\] on \S+ \(from \S+\): \d+ of \d+ elements differ") as caught:
    execute(plan, sent, 1)
  assert "moe.down" not in str(caught.value) and "norm" not in str(caught.value)


@PLANNED_ROUTES
def test_a_dropped_bucket_is_caught_by_name(route):
  sent, plan = planned(1500, route)
  lost = {plan.leaves[i].name for i, _ in plan.buckets[0].parts}
  with pytest.raises(TransferError, match=r"left out: .* on .*: \d+ of \d+ bytes arrived") as caught:
    execute(dataclasses.replace(plan, buckets=plan.buckets[1:]), sent, 1)
  assert len(plan.buckets) > 2 and all(name in str(caught.value) for name in lost)


def flipped(out, values, before):
  values = values.copy()
  values.view(np.uint32)[(0,) * values.ndim] ^= 1
  return values


@pytest.mark.parametrize(
  "change, says",
  [
    (flipped, r"moe\.down\[.*\] on \S+ \(from \S+\): 1 of \d+ elements differ"),
    (lambda out, values, before: before, r"moe\.down\[.*\] on \S+ \(from \S+\): \d+ of \d+ elements differ"),
    (lambda out, values, before: np.zeros_like(values), "all of them zero: it never arrived"),
  ],
  ids=["a flipped bit", "another part of the same shard", "zeros"],
)
def test_one_bad_copy_to_one_replica_is_caught_by_tensor_and_device(monkeypatch, change, says):
  sent = tree(SOURCE)
  plan = plan_transfer(sent, wanted(sent, dict.fromkeys(sent, on(ROLLOUT))), bucket_bytes=2000)
  copy, seen = move._copy, []

  def broken(out, values):
    if values.shape == (1, 2, 8, 6):
      seen.append(values)
      values = change(out, values, seen[0]) if len(seen) == 20 else values
    copy(out, values)

  monkeypatch.setattr(move, "_copy", broken)
  with pytest.raises(TransferError, match=says) as caught:
    execute(plan, sent, 1)
  assert "1 parts" in str(caught.value)


def test_a_stale_shard_is_caught_and_known_for_one(monkeypatch):
  holder, old, new = Holder(), tree(SOURCE, 1), tree(SOURCE, 2)
  plan = plan_transfer(old, wanted(old, TARGET))
  holder.receive(plan, old, 1)
  before = np.asarray(holder.current.tree["norm"])
  copy = move._copy
  monkeypatch.setattr(move, "_copy", lambda out, values: copy(out, before if out.shape == (3, 8) else values))
  with pytest.raises(
    TransferError, match=r"norm\[:, :\] on .*: 24 of 24 elements differ, stale: these are the bits of version 1"
  ):
    holder.receive(plan, new, 2)
  assert holder.current.version == 1


# ---- the probe


def log_probs(tree):
  hidden = jnp.ones((2, 8)) * (1 + tree["norm"][0])
  return jax.nn.log_softmax(hidden @ tree["moe.down"][0, 0])


def test_the_probe_compares_both_sides_and_a_good_transfer_passes():
  sent, plan = planned()
  holder = Holder()
  got = holder.receive(plan, sent, 1, Probe(log_probs, log_probs, 1e-5))
  np.testing.assert_allclose(log_probs(got.tree), log_probs(sent), atol=1e-5)


def test_the_probe_names_the_tensor_that_differs(monkeypatch):
  """With the comparison of bits out of the way."""
  sent, plan = planned()
  monkeypatch.setattr(check, "bits", lambda *_: None)
  copy = move._copy
  monkeypatch.setattr(move, "_copy", lambda out, values: copy(out, values * 2 if out.shape == (3, 8) else values))
  holder = Holder()
  with pytest.raises(
    TransferError, match=r"norm\[:, :\] on .*the probe differs|differ, and the probe differs by .*norm\[:, :\]"
  ) as caught:
    holder.receive(plan, sent, 3, Probe(log_probs, log_probs, 1e-5))
  assert "moe" not in str(caught.value) and holder.current is None


@pytest.mark.parametrize("wrong", [lambda tree: log_probs(tree) + 1e-3, lambda tree: log_probs(tree) * jnp.nan])
def test_the_probe_stops_where_the_bits_agree_and_the_numbers_do_not(wrong):
  sent, plan = planned()
  with pytest.raises(TransferError, match=r"the probe differs by .*, though every tensor arrived bit for bit"):
    Holder().receive(plan, sent, 1, Probe(log_probs, wrong, 1e-5))


def test_two_processes_change_the_layout_on_their_devices_and_say_what_they_cannot():
  with socket.create_server(("", 0)) as server:
    port = str(server.getsockname()[1])
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.sharding.transfer_processes", port, str(index)], cwd=ROOT,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for index in range(2)
  ]  # fmt: skip
  for process in started:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    results = [line.removeprefix("RESULT ") for line in out.splitlines() if line.startswith("RESULT")]
    assert results[:2] == ["whole True", "whole True"]
    assert results[2].startswith("version 3: w goes to other devices") and "Pathways" in results[2]
