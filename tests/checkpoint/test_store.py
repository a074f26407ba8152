"""Checkpoints of a run: what is saved comes back bit for bit, and nothing that breaks costs the last good one."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from configs import ring_tiny
from configs.schema import MeshConfig, ParallelConfig, to_dict
from ring_jax.checkpoint import hf, store
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.checkpoint.store import RunStore, steps
from ring_jax.model import abstract_params, init_params
from sharding import rules
from sharding.mesh import make_mesh
from tests.checkpoint import hf_folder
from tests.configs import small_run

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
HOST = {"rng": [1, 2], "rollouts": {"7": {"logps": [-0.1, -1e-300]}}, "name": "ü"}


def tree(value: float = 0.0) -> dict:
  """Several dtypes, a stack, a scalar, and values that a cast would change."""
  rng = np.random.default_rng(0)
  return {
    "layers": {"w": jnp.asarray(rng.normal(size=(3, 8, 6)).astype(np.float32) + value)},
    "head": jnp.asarray(rng.normal(size=(5, 7)), jnp.bfloat16),
    "count": jnp.asarray(int(value), jnp.int32),
    "odd": jnp.asarray([np.nan, np.inf, -0.0, 1e-45], jnp.float32),
  }


def floats(params):
  return {"layers": params["layers"], "head": params["head"]}


def abstract(values):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values)


def same_bits(first, second) -> bool:
  assert jax.tree.structure(first) == jax.tree.structure(second)
  pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
  return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def save(run: RunStore, step: int, **more) -> tuple:
  params = tree(step)
  state = OPTIMIZER.init(floats(params))
  run.save(step, params, state, HOST | {"step": step}, {"name": "x"}, **more)
  return params, state


def restore(run: RunStore, **more) -> store.Restored:
  return run.restore(abstract(tree()), abstract(OPTIMIZER.init(floats(tree()))), **more)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
  extra = {"cache": jnp.arange(6, dtype=jnp.int8), "flags": jnp.asarray([True, False])}
  with RunStore(tmp_path / "checkpoints", keep=2) as run:
    assert run.latest_step() is None
    with pytest.raises(CheckpointError, match=r"has no checkpoint$"):
      restore(run)
    params, state = save(run, 10, extra=extra)
    run.wait()
    assert run.latest_step() == 10
    with pytest.raises(CheckpointError, match="exists; a step is saved once"):
      save(run, 10)
  with RunStore(tmp_path / "checkpoints", keep=2) as run:
    found = restore(run, extra=abstract(extra))
    assert (found.step, found.host, found.config) == (10, HOST | {"step": 10}, {"name": "x"})
    assert same_bits(found.params, params) and same_bits(found.optimizer_state, state) and same_bits(found.extra, extra)
    assert restore(run).extra is None
    assert {leaf.sharding for leaf in jax.tree.leaves(found.params)} == {SingleDeviceSharding(jax.devices()[0])}


def test_the_newest_are_kept_and_any_can_be_asked_for(tmp_path):
  with RunStore(tmp_path, keep=2) as run:
    for step in (1, 2, 10):
      save(run, step)
    run.wait()
    assert steps(tmp_path) == [2, 10] and run.latest_step() == 10
    assert restore(run, step=2).host["step"] == 2
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 1 \(there: 2, 10\)"):
      restore(run, step=1)


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  advance = jax.jit(lambda values: jax.tree.map(lambda leaf: leaf + 1, values), donate_argnums=0)
  params = advance({"w": jnp.zeros((2000, 1000))})
  with RunStore(tmp_path, keep=4) as run:
    for step in range(1, 4):
      run.save(step, params, {"n": jnp.zeros(())}, {}, {})
      params = advance(params)
    for step in range(1, 4):
      found = run.restore(abstract(params), {"n": jax.ShapeDtypeStruct((), jnp.float32)}, step=step)
      assert (found.params["w"] == step).all()


def damage(folder: pathlib.Path, how: str, rng: random.Random) -> None:
  """Breaks what is surely read: the largest file of the parameters' database, or all of it."""
  largest = max((folder / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  if how == "truncated":
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  elif how == "zeros":
    largest.write_bytes(bytes(largest.stat().st_size))
  elif how == "bit":
    data = bytearray(largest.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    largest.write_bytes(data)
  elif how == "no_json":
    shutil.rmtree(folder / "run")
  elif how == "half_json":
    path = folder / "run" / "metadata"
    path.write_text(path.read_text()[:20])
  elif how == "no_optimizer":
    shutil.rmtree(folder / "optimizer")
  elif how == "empty":
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("how", ["truncated", "zeros", "bit", "no_json", "half_json", "no_optimizer", "empty"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, how, caplog, capfd):
  with RunStore(tmp_path, keep=3) as run:
    expected, _ = save(run, 1)
    save(run, 2)
    run.wait()
    damage(tmp_path / "2", how, random.Random(how))
    capfd.readouterr()
    found = restore(run)
    assert found.step == 1 and same_bits(found.params, expected)
    warnings = [record.message for record in caplog.records if str(tmp_path) in record.message]
    assert len(warnings) == 1 and warnings[0].endswith("; going back to the checkpoint before it")
    time.sleep(0.1)
    assert "Traceback" not in capfd.readouterr().err
    # The damaged one is out of the way, so that the run can save the step again.
    assert steps(tmp_path) == [1] and (tmp_path / "2.damaged").is_dir()
    save(run, 2)
    assert restore(run).step == 2


def test_when_nothing_can_be_read_nothing_is_moved(tmp_path):
  with RunStore(tmp_path, keep=3) as run:
    for step in (1, 2):
      save(run, step)
      run.wait()
      damage(tmp_path / str(step), "truncated", random.Random(0))
    with pytest.raises(CheckpointError, match=r"/1.*: is damaged: ") as caught:
      restore(run)
    assert "\n" not in str(caught.value) and steps(tmp_path) == [1, 2]


def test_another_model_is_an_error_not_a_fallback(tmp_path):
  with RunStore(tmp_path, keep=3) as run:
    save(run, 1)
    save(run, 2)
    run.wait()
    state = abstract(OPTIMIZER.init(floats(tree())))
    for change, message in (
      (
        {"head": jax.ShapeDtypeStruct((5, 8), jnp.bfloat16)},
        r"head is bfloat16\[5, 7\], the config says bfloat16\[5, 8",
      ),
      ({"head": jax.ShapeDtypeStruct((5, 7), jnp.float32)}, r"head is bfloat16\[5, 7\], the config says float32\[5, 7"),
      ({"more": jax.ShapeDtypeStruct((1,), jnp.float32)}, "more is missing: another config wrote it"),
    ):
      with pytest.raises(CheckpointError, match=message):
        run.restore(abstract(tree()) | change, state)
    short = {name: leaf for name, leaf in abstract(tree()).items() if name != "head"}
    with pytest.raises(CheckpointError, match="head is extra: another config wrote it"):
      run.restore(short, state)
    assert steps(tmp_path) == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Death and full disks

SAVER = """
import resource, signal, sys
import jax.numpy as jnp, numpy as np
from ring_jax.checkpoint.store import RunStore
from ring_jax.checkpoint.errors import CheckpointError

directory, first, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
noise = rng.normal(size=(400, 1000)).astype(np.float32)  # does not compress
with RunStore(directory, keep=1) as run:
  if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  for step in range(first, 10_000):
    params = {f"w{i}": jnp.asarray(noise + step + i) for i in range(4)}
    try:
      run.save(step, params, {"n": jnp.asarray(step)}, {"step": step}, {})
      run.wait()
    except CheckpointError as error:
      sys.exit(f"error: {error}")
    print(step, flush=True)
    if step == first and first == 0:
      break
"""
SHAPES = {f"w{i}": jax.ShapeDtypeStruct((400, 1000), jnp.float32) for i in range(4)}


def saver(directory: pathlib.Path, first: int, limit: int = 0) -> subprocess.Popen:
  command = [sys.executable, "-c", SAVER, str(directory), str(first), str(limit)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check(directory: pathlib.Path, least: int) -> int:
  """The newest checkpoint is whole and at least as new as what was reported as saved."""
  with RunStore(directory, keep=1) as run:
    found = run.restore(SHAPES, {"n": jax.ShapeDtypeStruct((), jnp.int32)})
    assert found.step >= least and found.host == {"step": found.step}
    noise = np.random.default_rng(0).normal(size=(400, 1000)).astype(np.float32)
    for i in range(4):
      np.testing.assert_array_equal(found.params[f"w{i}"], noise + found.step + i)
    left = [path.name for path in directory.iterdir()]
    assert left == [str(found.step)], "what the killed process left is cleared away"
  return found.step


def test_sigkill_in_the_middle_of_a_save_costs_nothing(tmp_path):
  rng, interrupted, first = random.Random(1), 0, 1
  for _ in range(5):
    process = saver(tmp_path, first)
    saved = int(process.stdout.readline())
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not list(tmp_path.glob("*.orbax-checkpoint-tmp*")):
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = process.stdout.read().split()
    process.stdout.close()
    process.stderr.close()
    interrupted += bool(list(tmp_path.glob("*.orbax-checkpoint-tmp*")))
    first = check(tmp_path, int(lines[-1]) if lines else saved) + 1
  assert interrupted >= 2, "the kills hit saves"


def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path):
  """A limit on file sizes stands for the disk: writes fail in the middle of a save, as they do when it is full."""
  assert saver(tmp_path, 0).communicate()[0] == "0\n"
  process = saver(tmp_path, 1, limit=200_000)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 1 and out == ""
  assert err == f"error: {tmp_path}: saving a checkpoint failed: File too large\n"
  assert check(tmp_path, 0) == 0


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path):
  huge = np.broadcast_to(np.float32(0), (10**14,))  # 400 TB, of which four bytes exist
  with RunStore(tmp_path, keep=1) as run:
    with pytest.raises(CheckpointError, match=r"checkpoint of 400,000,00\d\.\d MB, but only [\d,.]+ MB are free"):
      run.save(1, {"w": huge}, {}, {}, {})
    assert not list(tmp_path.iterdir())
    save(run, 1)
    assert restore(run).step == 1


# ---------------------------------------------------------------------------------------------------------------------
# open_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  fields = hf_folder.fields(num_hidden_layers=2)
  folder = hf_folder.write(tmp_path_factory.mktemp("hf"), fields, hf_folder.random_tensors(fields))
  return folder, *hf.load(folder)


def test_the_three_kinds_of_checkpoint_open_alike(tmp_path, model):
  folder, config, params = model
  run_config = to_dict(small_run.get_config()) | {"model": to_dict(config)}
  (tmp_path / "config.json").write_text(json.dumps(run_config))  # as a run's workdir has it
  with RunStore(tmp_path / "checkpoints", keep=3) as run:
    for step in (4, 8):
      scaled = jax.tree.map(lambda leaf, step=step: leaf * step, params)
      run.save(step, scaled, {"n": jnp.zeros(())}, HOST, run_config)
  opened = open_checkpoint(folder)
  assert opened.config == config and opened.step is None and same_bits(opened.params, params)
  opened = open_checkpoint(tmp_path)
  assert opened.config == config and opened.step == 8
  assert opened.extras == {"folder": tmp_path / "checkpoints" / "8", "config": run_config, "host": HOST}
  assert same_bits(opened.params, jax.tree.map(lambda leaf: leaf * 8, params))
  opened = open_checkpoint(tmp_path / "checkpoints" / "4", dtype="bfloat16")
  assert opened.step == 4 and opened.config.dtype == opened.config.param_dtype == "bfloat16"
  assert opened.params["lm_head"]["kernel"].dtype == jnp.bfloat16
  assert opened.params["moe_layers"]["moe"]["router"]["kernel"].dtype == jnp.float32
  # A reader goes back too, and leaves the files as they are.
  damage(tmp_path / "checkpoints" / "8", "truncated", random.Random(0))
  assert open_checkpoint(tmp_path).step == 4
  assert steps(tmp_path / "checkpoints") == [4, 8]
  with pytest.raises(CheckpointError, match="is damaged"):
    open_checkpoint(tmp_path / "checkpoints" / "8")


def test_what_is_no_checkpoint_says_what_one_looks_like(tmp_path):
  for path, found in ((tmp_path / "none", "no such folder"), (tmp_path, "nothing of the kind in it")):
    with pytest.raises(CheckpointError) as caught:
      open_checkpoint(path)
    assert str(caught.value) == (
      f"{path}: is no checkpoint ({found}); give a Hugging Face folder (config.json and model.safetensors or"
      " model.safetensors.index.json), an Orbax step folder (with params/ in it), or a workdir (with"
      " checkpoints/<step>/ in it)"
    )
  os.mkdir(tmp_path / "checkpoints")
  with pytest.raises(CheckpointError, match=r"checkpoints: has no checkpoint$"):
    open_checkpoint(tmp_path)


def test_what_four_devices_wrote_is_read_on_one_and_on_others_laid_out_otherwise(tmp_path):
  """Shapes and shardings come from the mesh that reads; parameters, moments and counts are the same bits."""
  model = ring_tiny.get_config().model

  def on(mesh):
    own = dataclasses.replace(model, parallel=ParallelConfig(mesh=mesh))
    devices = make_mesh(mesh, jax.devices()[: mesh.num_devices]) if mesh.num_devices > 1 else None
    return own, devices, rules.Program(devices, OPTIMIZER.init)

  own, devices, init = on(MeshConfig(fsdp=4))
  params = init_params(own, 0, devices)
  state = jax.tree.map(lambda leaf: leaf + 1, init(params))
  with RunStore(tmp_path, keep=1) as run:
    run.save(1, params, state, {}, {})
    run.wait()
    for mesh in (MeshConfig(), MeshConfig(tensor=2), MeshConfig(data=2, fsdp=2)):
      other, devices, init = on(mesh)
      abstract_tree = abstract_params(other, devices)
      found = run.restore(abstract_tree, init.shapes(abstract_tree))
      assert same_bits(found.params, params) and same_bits(found.optimizer_state, state)
      for leaf, expected in zip(jax.tree.leaves(found.params), jax.tree.leaves(abstract_tree), strict=True):
        assert len(leaf.sharding.device_set) == mesh.num_devices
        assert devices is None or leaf.sharding == expected.sharding
