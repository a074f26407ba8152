"""The ledger: arrays move between device and host memory, and what stays behind is found by name."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import ConfigError
from sharding.memory import Ledger, LedgerError, Place, free, to_device, to_host
from sharding.transfer import Keep, WeightLink
from tests.sharding.test_transfer_plan import ROLLOUT, TRAIN, abstract, on

CUT, WHOLE = on(TRAIN, "fsdp", "expert"), on(TRAIN)
AT_HOST = {"rollout": Place.HOST, "training": Place.DEVICE}
AT_ROLLOUT = {"rollout": Place.DEVICE, "training": Place.FREED}
ALWAYS = {"rollout": Place.DEVICE, "training": Place.DEVICE}


def state(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "mu": jax.device_put(rng.normal(size=(64, 96)).astype(np.float32), CUT),
    "count": jax.device_put(np.int32(seed), WHOLE),
  }


def cache():
  return jax.device_put(np.ones((8, 64, 32), np.float32), on(TRAIN, None, "fsdp"))


@pytest.fixture
def ledger():
  gc.collect()
  found = Ledger(slack_bytes=1000)
  found.baseline()
  return found


def switched(ledger):
  """Registered, and gone over to rollouts as it should be."""
  params, opt = state(1), state(2)
  ledger.register("actor", "parameters", params, ALWAYS)
  ledger.register("actor", "optimizer", opt, AT_HOST)
  ledger.register("rollout", "kv_cache", abstract((8, 64, 32), on(TRAIN, None, "fsdp")), AT_ROLLOUT)
  ledger.check("training")
  opt = to_host(opt)
  ledger.hold("actor", "optimizer", opt)
  kv = cache()
  ledger.hold("rollout", "kv_cache", kv)
  return params, opt, kv


def test_state_goes_to_the_host_and_comes_back_bit_for_bit():
  before = state(3)
  expected, kept = jax.device_get(before), dict(before)
  away = to_host(before)
  assert all(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(away))
  assert all(leaf.is_deleted() for leaf in kept.values())
  assert to_host(away)["mu"] is away["mu"], "what is there already stays"
  back = to_device(away)
  assert back["mu"].sharding == CUT and away["mu"].is_deleted()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), expected)


def test_phases_one_after_the_other(ledger):
  params, opt, kv = switched(ledger)
  for _ in range(2):
    ledger.check("rollout")
    free(kv)
    opt = to_device(opt)
    ledger.hold("actor", "optimizer", opt)
    opt = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(opt)
    ledger.hold("actor", "optimizer", opt)
    ledger.check("training")
    opt, kv = to_host(opt), cache()
    ledger.hold("actor", "optimizer", opt)
    ledger.hold("rollout", "kv_cache", kv)
  assert not jax.tree.leaves(params)[0].is_deleted()


def test_weights_that_arrive_are_their_receiver_s(ledger):
  """The old version goes before the new one comes, and the link holds nothing that belongs to nobody."""
  sent = state(1)
  link = WeightLink(jax.tree.map(lambda leaf: abstract(leaf.shape, on(ROLLOUT)), {"mu": sent["mu"]}), keep=Keep.CALLER)
  ledger.register("actor", "parameters", sent, ALWAYS)
  ledger.register("rollout", "weights", {"mu": abstract((64, 96), on(ROLLOUT))}, AT_ROLLOUT)
  for version in range(3):
    ledger.check("training")
    stored = link.send({"mu": sent["mu"]}, version)
    ledger.hold("rollout", "weights", stored)
    ledger.check("rollout")
    free(stored)
    assert link.tree is None and link.version == version


def test_a_look_at_values_is_no_leak(ledger):
  """JAX keeps views of the shards of what was looked at, which are live arrays too."""
  params, opt, kv = switched(ledger)
  for leaf in jax.tree.leaves((params, opt, kv)):
    np.asarray(leaf)
    assert leaf.addressable_shards[0].data is not None
  ledger.check("rollout")


def test_a_leaked_buffer_is_found_by_shape_and_count(ledger):
  switched_ = switched(ledger)
  leaked = [jax.device_put(np.ones((40, 50), np.float16), CUT) for _ in range(3)]
  with pytest.raises(LedgerError, match=r"unowned: 3 x float16\[40, 50\] on 4 \(device\), 12000 B"):
    ledger.check("rollout")
  del leaked
  ledger.check("rollout")
  del switched_


def test_a_copy_that_stayed_on_the_device_is_known_for_whose_it_was(ledger):
  opt = state(2)
  ledger.register("actor", "optimizer", opt, AT_HOST)
  away = jax.device_put(opt, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), opt))
  ledger.hold("actor", "optimizer", away)
  with pytest.raises(LedgerError, match=r"1 x float32\[64, 96\] on 4 \(device, once of actor optimizer\)"):
    ledger.check("rollout")
  free(opt)
  ledger.check("rollout")


@pytest.mark.parametrize("forgotten", ["kv_cache", "optimizer"])
def test_a_switch_that_was_forgotten_is_named_in_a_table(ledger, forgotten):
  params, opt, kv = switched(ledger)
  if forgotten == "kv_cache":
    opt = to_device(opt)
    ledger.hold("actor", "optimizer", opt)
    says = "rollout kv_cache should be freed, and is not"
  else:
    free(kv)
    says = "actor optimizer should be device, and is not"
  with pytest.raises(LedgerError, match=says) as caught:
    ledger.check("training")
  header, *rows = str(caught.value).splitlines()[1:]
  assert header.split() == ["role", "kind", "place", "on", "device", "measured", "on", "host", "measured"]
  cells = {tuple(row.split()[:2]): row.split() for row in rows}
  assert cells["actor", "parameters"][2:] == ["device", "6148", "B", "6148", "B", "0", "B", "0", "B"]
  if forgotten == "kv_cache":
    assert cells["rollout", "kv_cache"][2:] == ["freed", "0", "B", "32768", "B", "0", "B", "0", "B", "<-", "cpu:0"]
  else:
    assert cells["actor", "optimizer"][2:11] == ["device", "6148", "B", "0", "B", "0", "B", "6148", "B"]
  assert not params["mu"].is_deleted()


def test_a_part_that_is_missing_is_noticed(ledger):
  opt = state(2)
  ledger.register("actor", "optimizer", opt, AT_HOST)
  opt["mu"].delete()
  with pytest.raises(LedgerError, match="actor optimizer should be device, and is not"):
    ledger.check("training")


def test_what_is_registered_without_a_sharding_is_on_the_first_device(ledger):
  ledger.register("rollout", "kv_cache", jax.ShapeDtypeStruct((8, 64), jnp.float32), AT_ROLLOUT)
  with pytest.raises(LedgerError, match="rollout kv_cache should be device, and is not"):
    ledger.check("rollout")
  kv = jnp.ones((8, 64))
  ledger.hold("rollout", "kv_cache", kv)
  ledger.check("rollout")
  free(kv)
  ledger.check("training")


def test_the_ledger_keeps_nothing_alive(ledger):
  opt = state(2)
  ledger.register("actor", "optimizer", opt, {"training": Place.FREED})
  del opt
  gc.collect()
  ledger.check("training")


def test_constants_are_those_that_were_there(ledger):
  table = jnp.ones((1000, 10))
  with pytest.raises(LedgerError, match=r"float32\[1000, 10\]"):
    ledger.check("training")
  ledger.baseline()
  ledger.check("training")
  del table


def test_mistakes_are_one_clear_error(ledger):
  ledger.register("actor", "optimizer", state(), AT_HOST)
  for call, says in (
    (lambda: ledger.register("actor", "optimizer", state(), AT_HOST), "registered already"),
    (lambda: ledger.hold("critic", "optimizer", state()), "critic optimizer is not registered"),
    (lambda: ledger.check("sleep"), "actor optimizer has no place in phase 'sleep'"),
    (lambda: ledger.register("actor", "gradients", state(), {}), "no place in any phase"),
  ):
    with pytest.raises(ConfigError, match=says):
      call()
