"""Plans of transfers: every byte once, from balanced replicas, in bounded buckets."""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from configs.base import ConfigError
from sharding.transfer import Route, plan_transfer

DEVICES = jax.devices()


def mesh(start, **sizes):
  count = math.prod(sizes.values())
  return Mesh(np.array(DEVICES[start : start + count]).reshape(tuple(sizes.values())), tuple(sizes))


def abstract(shape, sharding, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def on(mesh, *spec):
  return NamedSharding(mesh, P(*spec))


TRAIN, ROLLOUT = mesh(0, fsdp=2, expert=2), mesh(4, expert=2, tensor=2)
LAYOUTS = {
  "fsdp x expert to tensor x expert": (on(TRAIN, None, "expert", "fsdp"), on(ROLLOUT, None, "expert", None, "tensor")),
  "two axes on one dimension": (on(TRAIN, None, ("fsdp", "expert")), on(ROLLOUT, None, None, ("tensor", "expert"))),
  "replicas at the source": (on(TRAIN, None, "expert"), on(ROLLOUT, None, None, "tensor")),
  "replicas at the target": (on(TRAIN, None, "expert", "fsdp"), on(ROLLOUT, None, "tensor")),
  "one device to many": (SingleDeviceSharding(DEVICES[1]), on(ROLLOUT, None, "expert", "tensor")),
  "many to one device": (on(TRAIN, None, None, "fsdp", "expert"), SingleDeviceSharding(DEVICES[7])),
  "the same devices in another order": (
    on(TRAIN, None, "fsdp", "expert"),
    on(Mesh(TRAIN.devices.T[::-1], ("a", "b")), None, "a", "b"),
  ),
  "devices in common": (on(mesh(0, a=6), None, "a"), on(mesh(2, a=3, b=2), None, "b", "a")),
  "nothing to do": (on(TRAIN, None, "fsdp"), on(TRAIN, None, "fsdp")),
}
SHAPE = (3, 12, 12, 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_element_of_every_target_shard_comes_once(name):
  source, target = LAYOUTS[name]
  plan = plan_transfer({"w": abstract(SHAPE, source)}, {"w": abstract(SHAPE, target)})
  (leaf,) = plan.leaves
  held = source.devices_indices_map(SHAPE)
  counts = {device: np.zeros(SHAPE, int) for device in target.devices_indices_map(SHAPE)}
  moved = local = 0
  for piece in leaf.part(0):  # small enough to be whole
    part = tuple(slice(a, b) for a, b in piece.box_Nx2)
    at_source = np.zeros(SHAPE, bool)
    at_source[held[plan.devices[piece.source]]] = True
    assert at_source[part].all(), "the source device must hold what it sends"
    counts[plan.devices[piece.target]][part] += 1
    size = 4 * math.prod(piece.shape)
    moved, local = (moved, local + size) if piece.source == piece.target else (moved + size, local)
  for device, index in target.devices_indices_map(SHAPE).items():
    wanted = np.zeros(SHAPE, int)
    wanted[index] = 1
    np.testing.assert_array_equal(counts[device], wanted)
  assert (plan.moved, plan.local) == (moved, local) and moved + local == plan.needed
  assert plan.received_D.sum() == moved
  if name == "nothing to do":
    assert moved == 0 and "nothing to move" in plan.summary()
  elif set(held).isdisjoint(counts):
    assert local == 0 and "1.00" in plan.summary()
  else:
    kept = sum(
      bool(math.prod(max(min(a[1], b[1]) - max(a[0], b[0]), 0) for a, b in zip(one, other, strict=True)))
      for one, other in (
        [[cut.indices(n)[:2] for cut, n in zip(side[device], SHAPE, strict=True)] for side in (held, target.devices_indices_map(SHAPE))]
        for device in set(held) & set(counts)
      )
    )  # fmt: skip
    assert (local > 0) == (kept > 0), "what a device holds already must stay there"


def test_replicas_share_the_work_over_many_tensors():
  """Each of 24 tensors is whole on 4 devices and goes whole to 4 others."""
  rng = np.random.default_rng(0)
  shapes = {f"w{i}": (int(n),) for i, n in enumerate(rng.integers(50, 1000, 24))}
  whole, wanted = on(mesh(0, a=4)), on(mesh(4, a=4))
  plan = plan_transfer(*({name: abstract(shape, where) for name, shape in shapes.items()} for where in (whole, wanted)))
  sent = plan.sent_D[:4]
  assert sent.sum() == plan.needed == 16 * sum(n for (n,) in shapes.values())
  assert sent.max() - sent.min() <= 4 * 1000 and sent.max() <= 1.02 * sent.mean()


def test_the_least_loaded_replica_sends():
  """Device 0 alone holds the large tensor; the small one is on 0 and 1, and must come from 1."""
  source = {"large": abstract((100,), SingleDeviceSharding(DEVICES[0])), "small": abstract((10,), on(mesh(0, a=2)))}
  target = {name: abstract(leaf.shape, SingleDeviceSharding(DEVICES[2])) for name, leaf in source.items()}
  plan = plan_transfer(source, target)
  assert dict(zip(plan.devices, plan.sent_D.tolist(), strict=True)) == {DEVICES[0]: 400, DEVICES[1]: 40, DEVICES[2]: 0}


@pytest.mark.parametrize("bucket_bytes", [400, 1000, 3000, 1 << 20])
def test_no_device_sends_or_receives_more_than_a_bucket(bucket_bytes):
  shapes = {"a": (3, 12, 12, 4), "b": (7, 4, 4, 4), "c": (1, 4, 100, 4), "d": (0, 4, 4, 4)}
  source, target = LAYOUTS["fsdp x expert to tensor x expert"]
  plan = plan_transfer(
    {name: abstract(shape, source) for name, shape in shapes.items()},
    {name: abstract(shape, target) for name, shape in shapes.items()},
    bucket_bytes=bucket_bytes,
  )
  seen = np.zeros(4, np.int64)
  for bucket in plan.buckets:
    load = np.zeros((2, 8), np.int64)
    for i, part in bucket.parts:
      for piece in plan.leaves[i].part(part):
        size = 4 * math.prod(piece.shape)
        load[0, piece.source] += size
        load[1, piece.target] += size
        seen[i] += size
    assert bucket.bytes == load[0].sum() == load[1].sum() and bucket.peak == load.max() <= bucket_bytes
  assert seen.tolist() == [4 * math.prod(shape) for shape in shapes.values()] and seen.sum() == plan.moved
  assert plan.extra_bytes <= 2 * bucket_bytes
  assert (len(plan.buckets) == 1) == (bucket_bytes == 1 << 20)


def test_a_bucket_smaller_than_a_row_is_refused():
  source, target = LAYOUTS["fsdp x expert to tensor x expert"]
  with pytest.raises(ConfigError, match=r"bucket_bytes=16: a row of w is \d+"):
    plan_transfer({"w": abstract(SHAPE, source)}, {"w": abstract(SHAPE, target)}, bucket_bytes=16)


def test_scalars_and_empty_tensors():
  tree = lambda where: {"scalar": abstract((), where), "empty": abstract((4, 0), where)}  # noqa: E731
  plan = plan_transfer(tree(on(TRAIN)), tree(on(ROLLOUT)))
  assert plan.needed == plan.moved == 16
  assert plan_transfer({}, {}).buckets == ()


@pytest.mark.parametrize(
  "change, says",
  [
    ({"w": abstract((4,), None)}, "w: the target has no sharding"),
    ({}, "w is in the source only"),
    ({"w": abstract((4,), on(ROLLOUT)), "v": abstract((4,), on(ROLLOUT))}, "v is in the target only"),
    ({"w": abstract((8,), on(ROLLOUT))}, r"w is \(4,\) at the source, \(8,\) at the target"),
    ({"w": abstract((4,), on(ROLLOUT), jnp.bfloat16)}, "cast it at the source first"),
  ],
)
def test_trees_that_differ_are_one_clear_error(change, says):
  with pytest.raises(ConfigError, match=says) as caught:
    plan_transfer({"w": abstract((4,), on(TRAIN))}, change)
  assert "\n" not in str(caught.value)


class FakeSharding:
  """A layout of many devices: a grid of boxes over some dimensions, repeated."""

  def __init__(self, first, cuts, repeats):
    self._first, self._cuts, self._repeats = first, cuts, repeats

  def devices_indices_map(self, shape):
    grids = [
      [slice(i * n // cut, (i + 1) * n // cut) for i in range(cut)] for n, cut in zip(shape, self._cuts, strict=True)
    ]
    boxes = list(itertools.product(*grids)) * self._repeats
    return {self._first + i: box for i, box in enumerate(boxes)}


def test_twenty_stacked_tensors_on_two_times_256_devices():
  """Layouts that cut across each other: every source device meets every target device."""
  shape = (76, 256, 8192, 2048)
  source, target = FakeSharding(0, (1, 64, 1, 1), 4), FakeSharding(1000, (1, 1, 1, 64), 4)
  leaf = lambda where: types.SimpleNamespace(shape=shape, dtype=jnp.dtype(jnp.bfloat16), sharding=where)  # noqa: E731
  plan = plan_transfer(*({f"w{i}": leaf(where) for i in range(20)} for where in (source, target)), route=Route.WHOLE)
  assert plan.moved == plan.needed == 20 * 4 * 2 * math.prod(shape) and len(plan.devices) == 512
  assert sum(len(leaf.pair_Px2) for leaf in plan.leaves) == 20 * 64 * 256
  sent = plan.sent_D[:256]
  assert sent.max() == sent.min(), "equal replicas must send the same"
  assert max(bucket.peak for bucket in plan.buckets) <= plan.bucket_bytes
