"""Transfers between real devices: the same bits, whatever the layouts; and broken ones, each caught by name."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from configs.base import ConfigError
from sharding.memory import free
from sharding.transfer import (
  Keep,
  Probe,
  Route,
  TransferError,
  WeightLink,
  check,
  execute,
  host,
  plan_fan_out,
  plan_transfer,
  shards,
)  # fmt: skip
from sharding.transfer.plan import Layout
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
  first, second = tree(SOURCE, 1), tree(SOURCE, 2)
  link = WeightLink(wanted(first, TARGET))
  assert link.tree is None and link.version is None
  link.send(first, 4)
  for version in (4, 3):
    with pytest.raises(TransferError, match=f"version {version} after version 4: versions must grow"):
      link.send(second, version)
  with monkeypatch.context() as broken, pytest.raises(TransferError):
    broken.setattr(host, "_copy", lambda to, what: None)
    link.send(second, 5)
  assert link.version == 4
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(link.tree), jax.device_get(first))
  got = link.send(second, 5)
  assert link.version == 5
  for given in (got, link.tree):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(given), jax.device_get(second))
  link.send(first)
  assert link.version == 6


def test_a_plan_is_made_again_only_where_the_source_lies_otherwise():
  sent = tree(SOURCE)
  link = WeightLink(wanted(sent, TARGET))
  link.send(sent)
  plan = link.plan
  link.send(tree(SOURCE, 2))
  assert link.plan is plan
  other = jax.device_put(sent, dict.fromkeys(sent, on(TRAIN)))
  got = link.send(other)
  assert link.plan is not plan
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(sent))
  with pytest.raises(ConfigError, match="norm is in the target only"):
    link.send({name: leaf for name, leaf in sent.items() if name != "norm"})
  assert link.version == 2 and link.tree is not None


@pytest.mark.parametrize("keep", Keep)
def test_an_old_version_lives_as_long_as_its_keeper_says(keep, monkeypatch):
  link = WeightLink(wanted(tree(SOURCE), TARGET), keep=keep)
  got = link.send(tree(SOURCE, 1))
  held = [weakref.ref(leaf) for leaf in got.values()]
  seen = []
  copy = host._copy
  monkeypatch.setattr(
    host, "_copy", lambda to, what: (seen.append(sum(ref() is not None for ref in held)), copy(to, what))
  )
  assert link.tree.keys() == got.keys()
  del got
  assert (link.tree is None) == (keep is Keep.CALLER)
  link.send(tree(SOURCE, 2))
  assert set(seen) == {0 if keep is Keep.CALLER else 3}
  assert not any(ref() for ref in held)


def test_a_version_that_somebody_freed_is_not_there_and_the_next_one_arrives():
  link = WeightLink(wanted(tree(SOURCE), TARGET), keep=Keep.CALLER)
  free(link.send(tree(SOURCE, 1)))
  assert link.tree is None and link.version == 0
  got = link.send(tree(SOURCE, 2))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(tree(SOURCE, 2)))


def test_what_the_last_check_refuses_is_not_committed():
  link = WeightLink(wanted(tree(SOURCE), TARGET))
  first = link.send(tree(SOURCE, 1), 1)

  def refuse(arrived, version):
    assert link.version == 1 and version == 2 and arrived["norm"].shape == (3, 8)
    raise TransferError("not this one")

  with pytest.raises(TransferError, match="not this one"):
    link.send(tree(SOURCE, 2), 2, refuse)
  assert link.version == 1 and link.tree["norm"] is first["norm"]


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


@pytest.mark.parametrize("route, fans_out", [(Route.PIECES, True), (Route.HOST_VIEWS, False)])
def test_replicas_complete_one_another_where_bytes_cross_links(route, fans_out):
  """Every byte crosses once then, and is gathered among the replicas; in host memory that would be a copy more."""
  where = dict.fromkeys(SOURCE, on(ROLLOUT)) | {"moe.up": TARGET["moe.up"]}  # of which there is only one
  sent = tree(SOURCE)
  size = sum(leaf.nbytes for leaf in sent.values())
  link = WeightLink(wanted(sent, where), route=route, bucket_bytes=2000)
  got = link.send(sent, 1)
  assert (link.plan.then is not None) == fans_out
  if fans_out:
    assert link.plan.moved == size
    assert [leaf.name for leaf in link.plan.then.leaves] == [
      "moe.down",
      "norm",
    ] and "\nthen 2 tensors" in link.plan.summary()
    assert link.plan.then.moved + link.plan.then.local == 4 * (size - sent["moe.up"].nbytes)
  for name, leaf in got.items():
    assert leaf.sharding == where[name]
    for shard in leaf.addressable_shards:
      np.testing.assert_array_equal(bits(shard.data), bits(np.asarray(sent[name])[shard.index]))


def test_without_replicas_the_fan_out_is_the_direct_plan():
  sent = {"moe.up": tree(SOURCE)["moe.up"]}
  for target in (TARGET["moe.up"], on(ROLLOUT, None, None, ("expert", "tensor")), SingleDeviceSharding(DEVICES[5])):
    assert plan_fan_out(sent, wanted(sent, {"moe.up": target})).then is None


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
  boxes, up = Layout.boxes, next(leaf.source for leaf in plan.leaves if leaf.name == "moe.up")

  def shifted(layout):
    back = [[1, 1], [0, 0], [0, 0], [0, 0]]
    return {device: box - back if layout is up else box for device, box in boxes(layout).items()}

  monkeypatch.setattr(Layout, "boxes", shifted)
  if route is Route.HOST_VIEWS:  # numpy reads nothing beyond the end, where XLA reads the last rows
    monkeypatch.setattr(host, "_copy", lambda to, what: to.__setitem__(..., what if len(what) else 0))
  with pytest.raises(TransferError, match=r"moe\.up\[.*\] on \S+ \(from \S+\): \d+ of \d+ elements differ") as caught:
    execute(plan, sent, 1)
  assert "moe.down" not in str(caught.value) and "norm" not in str(caught.value)


@PLANNED_ROUTES
@pytest.mark.parametrize("instead", [None, 1], ids=["nothing", "another one twice"])
def test_a_dropped_bucket_is_caught_by_name(route, instead):
  sent, plan = planned(400, route)
  lost = {plan.leaves[i].name for i, _ in plan.buckets[0].parts}
  buckets = plan.buckets[1:] if instead is None else (plan.buckets[instead], *plan.buckets[1:])
  with pytest.raises(TransferError, match=r"left out: .* on .*: \d+ of \d+ bytes arrived") as caught:
    execute(dataclasses.replace(plan, buckets=buckets), sent, 1)
  assert len(plan.buckets) > 2 and all(name in str(caught.value) for name in lost)


def flipped(to, what, before):
  what = what.copy()
  what.reshape(-1)[0] ^= 1
  return what


@pytest.mark.parametrize(
  "change, says",
  [
    (flipped, r"moe\.down\[.*\] on \S+ \(from \S+\): 1 of \d+ elements differ"),
    (lambda to, what, before: before, r"moe\.down\[.*\] on \S+ \(from \S+\): \d+ of \d+ elements differ"),
    (lambda to, what, before: np.zeros_like(what), "all of them zero: it never arrived"),
  ],
  ids=["a flipped bit", "another part of the same shard", "zeros"],
)
def test_one_bad_copy_to_one_replica_is_caught_by_tensor_and_device(monkeypatch, change, says):
  sent = tree(SOURCE)
  plan = plan_transfer(sent, wanted(sent, dict.fromkeys(sent, on(ROLLOUT))), bucket_bytes=2000)
  copy, seen = host._copy, []

  def broken(to, what):
    if what.shape == (1, 2, 8, 3):  # of moe.down, in words of 64 bits
      seen.append(what)
      what = change(to, what, seen[0]) if len(seen) == 20 else what
    copy(to, what)

  monkeypatch.setattr(host, "_copy", broken)
  with pytest.raises(TransferError, match=says) as caught:
    execute(plan, sent, 1)
  assert "1 parts" in str(caught.value)


NORM = (3, 4)  # in words of 64 bits


def test_a_stale_shard_is_caught_and_known_for_one(monkeypatch):
  old, new = tree(SOURCE, 1), tree(SOURCE, 2)
  link = WeightLink(wanted(old, TARGET))
  before = np.asarray(link.send(old, 1)["norm"]).view(np.uint64)
  copy = host._copy
  monkeypatch.setattr(host, "_copy", lambda to, what: copy(to, before if to.shape == NORM else what))
  with pytest.raises(
    TransferError, match=r"norm\[:, :\] on .*: 24 of 24 elements differ, stale: these are the bits of version 1"
  ):
    link.send(new, 2)
  assert link.version == 1


def test_memory_that_was_not_looked_at_is_looked_at(monkeypatch):
  """The comparison of what was copied says nothing of arrays that hold something else afterwards."""
  sent, plan = planned()
  move = host.move

  def exchanged(plan, leaves):
    landed = move(plan, leaves)
    landed.arrived[:] = [
      leaf if leaf.ndim != 2 else jax.device_put(np.asarray(leaf) + 1, leaf.sharding) for leaf in landed.arrived
    ]
    return landed

  monkeypatch.setattr(host, "move", exchanged)
  with pytest.raises(
    TransferError, match=r"4 parts do not have .*norm\[:, :\] on .*: 24 of 24 elements differ"
  ) as caught:
    execute(plan, sent, 1)
  assert "moe" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(5, 300, 512), (3, 1, 200_003), (600_001,), (700, 513)])
def test_large_pieces_are_copied_and_compared_in_blocks(shape, dtype, monkeypatch):
  """In threads; one word that is wrong at the end of one of the blocks is noticed."""
  axis = max(range(len(shape)), key=lambda n: shape[n])
  spec = [None] * len(shape)
  if shape[axis] % 2 == 0:
    spec[axis] = "tensor"
  sent = {"w": jax.device_put(random(shape, dtype), SingleDeviceSharding(DEVICES[0]))}
  plan = plan_transfer(sent, wanted(sent, {"w": on(ROLLOUT, *spec)}))
  got = execute(plan, sent, 1).tree["w"]
  for shard in got.addressable_shards:
    np.testing.assert_array_equal(bits(shard.data), bits(np.asarray(sent["w"])[shard.index]))
  copy, calls = host._copy, []

  def last_word_wrong(to, what):
    copy(to, what)
    calls.append(to)
    if what.base is not None and len(calls) == count:
      to[(-1,) * to.ndim] ^= 1

  count = 2
  monkeypatch.setattr(host, "_copy", last_word_wrong)
  with pytest.raises(TransferError, match=r"1 parts do not have .*: 1 of"):
    execute(plan, sent, 1)
  assert len(calls) > 8 and max(block.nbytes for block in calls) <= shards._BLOCK_BYTES


# ---- the probe


def log_probs(tree):
  hidden = jnp.ones((2, 8)) * (1 + tree["norm"][0])
  return jax.nn.log_softmax(hidden @ tree["moe.down"][0, 0])


def probed(sent, wrong=None):
  """The last check of a link, and of both sides."""
  how = Probe(log_probs, wrong or log_probs, 1e-5)
  return lambda arrived, version: check.probe(how, sent, arrived, version, lambda tree: tree)


def test_the_probe_compares_both_sides_and_a_good_transfer_passes():
  sent = tree(SOURCE)
  got = WeightLink(wanted(sent, TARGET)).send(sent, 1, probed(sent))
  np.testing.assert_allclose(log_probs(got), log_probs(sent), atol=1e-5)


def test_the_probe_names_the_tensor_that_differs(monkeypatch):
  """With the comparison of bits out of the way."""
  sent = tree(SOURCE)
  link = WeightLink(wanted(sent, TARGET))
  monkeypatch.setattr(check, "bits", lambda *_: None)
  copy = host._copy
  monkeypatch.setattr(host, "_copy", lambda to, what: copy(to, what ^ 2**62 if to.shape == NORM else what))
  with pytest.raises(TransferError, match=r"differ, and the probe differs by .*norm\[:, :\] on") as caught:
    link.send(sent, 3, probed(sent))
  assert "moe" not in str(caught.value) and link.tree is None and link.version is None


@pytest.mark.parametrize("wrong", [lambda tree: log_probs(tree) + 1e-3, lambda tree: log_probs(tree) * jnp.nan])
def test_the_probe_stops_where_the_bits_agree_and_the_numbers_do_not(wrong):
  sent = tree(SOURCE)
  with pytest.raises(TransferError, match=r"the probe differs by .*, though every tensor arrived bit for bit"):
    WeightLink(wanted(sent, TARGET)).send(sent, 1, probed(sent, wrong))


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
