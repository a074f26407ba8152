"""Programs compiled for TPUs that are not here: what the command says of them."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from configs import ring_1t, ring_flash, ring_mini, ring_tiny
from configs.loading import override
from configs.schema import ConfigError
from ring_jax.compiled import fit, flops, layout
from ring_jax.compiled.programs import Kind, lower
from sharding import hlo
from sharding.hardware import chip_named
from sharding.topology import Topology

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "ring_jax.launch.compile", "--config=configs/ring_tiny.py", *arguments],
    cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


@pytest.mark.tpu
def test_the_command_compiles_the_train_step_and_says_what_it_needs(tmp_path):
  done = command("--topology=v5e:2x2", "--program=train_step", "--json", f"--report={tmp_path / 'reports'}")
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["fits"] and found["devices"] == 4 and 0 < found["hbm_bytes"] < found["hbm_limit"]
  assert [one["name"] for one in found["programs"]] == ["gradients", "update"]
  gradients, update = found["programs"]
  # Parameters are cut by four, but for norms and router biases; the optimizer holds two of each.
  whole = 4 * 226_864
  assert whole / 4 <= gradients["bytes"]["parameters"] <= whole / 3.5
  assert update["bytes"]["optimizer"] == pytest.approx(2 * gradients["bytes"]["parameters"], rel=0.01)
  assert gradients["collectives"]["all-to-all"]["count"] > 0 and found["flops"] > 1e8
  (kept,) = (tmp_path / "reports").iterdir()
  assert kept.name == "ring_tiny_v5e_2x2_train_step.json" and json.loads(kept.read_text())["fits"]


@pytest.mark.tpu
@pytest.mark.parametrize("kind", [Kind.PREFILL, Kind.DECODE, Kind.TRANSFER])
def test_the_engine_s_programs_compile(kind):
  topology = Topology.parse("v5e:2x2")
  config, _ = layout.laid_out(ring_tiny.get_config(), topology)
  config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, page_size=16))
  (unit,) = lower(config, kind, topology.devices())
  found = fit.compiled(config, kind, unit, topology.chip)
  assert found.fits and found.bytes["parameters"] > 200_000
  assert kind is not Kind.DECODE or found.bytes["kv_cache"] > 0


def test_mistakes_are_one_line():
  for arguments, says in (
    (["--topology=v5p-8"], "expected CHIP:AxB"),
    (["--topology=v5e:2x2", "--config.model.parallel.mesh.fsdp=2"], "is 2 devices, but there are 4"),
  ):
    done = command(*arguments)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("module", [ring_mini, ring_flash, ring_1t])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:16x16", "2*v5p:8x8x8"])
def test_the_default_mesh_uses_every_device_and_can_be_said_by_overrides(module, topology):
  topology, before = Topology.parse(topology), module.get_config()
  config, overrides = layout.laid_out(before, topology)
  assert config.model.parallel.mesh.num_devices == topology.num_devices and config.packing.rows == topology.num_devices
  assert override(before, overrides) == config
  assert layout.laid_out(config, topology) == (config, {})


def test_the_smallest_slice_is_searched_by_formula():
  found = layout.candidates(ring_mini.get_config(), Kind.TRAIN_STEP, chip_named("v5e"))
  assert [str(one.topology) for one in found] == ["v5e:2x2", "v5e:2x4", "v5e:4x4"]
  assert [one.fits for one in found] == [False, False, True]
  assert found[0].hbm_bytes > found[1].hbm_bytes > found[2].hbm_bytes
  assert [str(one) for one in layout.from_slice(found[2].topology)][:2] == ["v5e:4x4", "v5e:4x8"]
  with pytest.raises(ConfigError, match=r"train_step fits no slice of v5e; v5e:16x16 would need .* GiB a device"):
    layout.candidates(ring_1t.get_config(), Kind.TRAIN_STEP, chip_named("v5e"))


@pytest.mark.tpu
def test_the_command_finds_the_smallest_slice(tmp_path):
  done = command("--topology=v5e", "--program=transfer", "--length=128", "--json")
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["fits"] and found["topology"] == "v5e:2x2" and found["by_formula"]["v5e:2x2"] > 0


def test_what_does_not_fit_says_by_how_much_and_what_would_help():
  config = ring_mini.get_config()
  program = {
    "name": "gradients",
    "hbm_bytes": 20 << 30,
    "hbm_limit": 16 << 30,
    "bytes": {"temp": 6 << 30, "resident": 8 << 30},
  }
  says = fit.advice({"program": "train_step", "programs": [program]}, config)
  assert "4.00 GiB more" in says and "moe_chunk" in says and "rl.optimizer.memory=host (8.00 GiB)" in says


def test_flops_follow_the_published_active_parameters():
  """2 FLOPs a token and active parameter: 1.43e9 of Ring-mini, attention scores and the embedding apart."""
  model = ring_mini.get_config().model
  forward = flops.forward(model, 0) + flops.head(model)
  embedding = model.vocab_size * model.hidden_size
  assert forward / 2 == pytest.approx(1.4330e9 - embedding, rel=0.01)


HLO = """
HloModule jit_f
%body.1 (p: (s32[], bf16[64])) -> (s32[], bf16[64]) {
  %ag = bf16[64]{0:T(256)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %t = (s32[], bf16[64]{0:T(256)}) tuple(%i, %ag)
}
%cond.1 (p: (s32[], bf16[64])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}
%rare (p: f32[16]) -> f32[16] {
  ROOT %a2a = f32[16]{0} all-to-all(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
}
%often (p: f32[16]) -> f32[16] {
  ROOT %p2 = f32[16]{0} copy(%p)
}
ENTRY %main (a: bf16[64]) -> f32[16] {
  %w = (s32[], bf16[64]{0}) while(%init), condition=%cond.1, body=%body.1
  %rs = (f32[64]{0}, f32[16]{0}) reduce-scatter-start(%g), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c2 = f32[16]{0} conditional(%i, %g, %g), branch_computations={%often, %rare}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
  found = hlo.collectives(HLO)
  gather = found["all-gather"]
  assert (gather.count, gather.bytes, gather.largest, gather.group) == (5, 5 * 128, 128, 4)
  assert (found["reduce-scatter"].bytes, found["reduce-scatter"].group) == (256, 4)
  assert "all-to-all" not in found and found["conditional all-to-all"].bytes == 64


def test_arrays_as_wide_as_the_vocabulary_are_found():
  text = "%a = bf16[4,8,640]{2,1,0} fusion(%x)\n  %b = f32[640,16]{1,0} parameter(0)\n %c = f32[6400]{0} copy(%d)"
  assert hlo.most_rows(text, 640) == 32
  assert hlo.most_rows(text, 6400) == 1
  assert hlo.most_rows(text, 64) == 0


def test_what_eight_devices_exchange_is_read_from_a_real_program():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
  with jax.set_mesh(mesh):
    x = jax.device_put(jax.numpy.ones((8, 128)), jax.NamedSharding(mesh, jax.P("x")))
    step = lambda c, _: (jax.reshard(jax.reshard(c, jax.P()) * 2, jax.P("x")), None)  # noqa: E731
    text = jax.jit(lambda x: jax.lax.scan(step, x, length=3)[0]).lower(x).compile().as_text()
  gather = hlo.collectives(text)["all-gather"]
  assert (gather.count, gather.bytes) == (3, 3 * 8 * 128 * 4)
