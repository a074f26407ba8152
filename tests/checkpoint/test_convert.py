"""Conversion: bitwise both ways, going on after a kill, little memory, and nothing left of what is refused."""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from configs.schema import to_dict
from ring_jax.checkpoint import bench, convert, hf, orbax_files, store, targets
from ring_jax.checkpoint.convert import Options
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.launch.digest import digest
from tests.checkpoint import hf_folder
from tests.configs import small_run

INDEX = "model.safetensors.index.json"


def small_chunks(monkeypatch, limit=2000):
  """Chunks of parts of tensors, ragged ones too, at the sizes of a test."""
  whole = orbax_files.chunk_shape
  monkeypatch.setattr(orbax_files, "chunk_shape", lambda block, leaf: whole(block, leaf, limit))
  monkeypatch.setattr(targets, "_PIECE_BYTES", 500)


def random_folder(path: pathlib.Path, **changes) -> pathlib.Path:
  fields = hf_folder.fields(**changes)
  return hf_folder.write(path, fields, hf_folder.random_tensors(fields))


def bits_of(path) -> dict:
  return digest(open_checkpoint(path).params)


def save_run(directory: pathlib.Path, folder: pathlib.Path, step: int = 3) -> None:
  """The model of a Hugging Face folder as a run's checkpoint."""
  config, params = hf.load(folder)
  run = to_dict(dataclasses.replace(small_run.get_config(), model=config))
  with store.RunStore(directory / "checkpoints", keep=2) as saved:
    saved.save(step, params, {"n": jnp.zeros(())}, {"a": 1}, run)


def check_manifest(folder: pathlib.Path) -> None:
  manifest = json.loads((folder / "manifest.json").read_text())
  files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
  assert files == manifest["files"].keys() | {"manifest.json"}
  for name, entry in manifest["files"].items():
    data = (folder / name).read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name


def left_overs(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir() if "target" in path.name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_direction_is_bitwise(tmp_path, monkeypatch, dtype):
  small_chunks(monkeypatch)
  source = random_folder(tmp_path / "source", dtype=dtype, num_nextn_predict_layers=1)
  expected = bits_of(source)
  convert.convert(source, tmp_path / "orbax", Options("orbax"))
  assert len(list((tmp_path / "orbax" / "params" / "moe_layers.moe.experts.gate_up").iterdir())) > 16
  assert bits_of(tmp_path / "orbax") == expected
  convert.convert(tmp_path / "orbax", tmp_path / "hf", Options("hf", max_shard_bytes=20_000))
  assert bits_of(tmp_path / "hf") == expected
  convert.convert(tmp_path / "hf", tmp_path / "again", Options("orbax"))
  assert bits_of(tmp_path / "again") == expected
  save_run(tmp_path / "run", source)
  convert.convert(tmp_path / "run", tmp_path / "of_run", Options("hf"))
  assert bits_of(tmp_path / "of_run") == expected
  convert.convert(tmp_path / "run", tmp_path / "run_to_orbax", Options("orbax"))
  opened = open_checkpoint(tmp_path / "run_to_orbax")
  assert digest(opened.params) == expected and opened.step == 0 and opened.config == open_checkpoint(source).config
  for name in ("orbax", "hf", "again", "of_run", "run_to_orbax"):
    check_manifest(tmp_path / name)


def test_shards_index_and_what_lies_beside(tmp_path):
  source = random_folder(tmp_path / "source", dtype="bfloat16")
  (source / "tokenizer.json").write_text("{}")
  (source / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
  convert.convert(source, tmp_path / "0", Options("orbax"))
  convert.convert(tmp_path / "0", tmp_path / "hf", Options("hf", max_shard_bytes=20_000))
  assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 3
  index = json.loads((tmp_path / "hf" / INDEX).read_text())
  held = {}
  for file in sorted(set(index["weight_map"].values())):
    assert (tmp_path / "hf" / file).stat().st_size < 25_000
    with safe_open(tmp_path / "hf" / file, "np") as shard:
      assert shard.metadata() == {"format": "pt"}
    held |= {name: (array, file) for name, array in load_file(tmp_path / "hf" / file).items()}
  assert {name: file for name, (_, file) in held.items()} == index["weight_map"]
  assert index["metadata"]["total_size"] == sum(array.nbytes for array, _ in held.values())
  for name, array in hf_folder.random_tensors(hf_folder.fields(dtype="bfloat16")).items():
    wanted = array.astype(np.float32) if "mlp.gate." in name else array
    assert held[name][0].dtype == wanted.dtype and held[name][0].tobytes() == wanted.tobytes(), name


def test_dtype(tmp_path):
  source = random_folder(tmp_path / "source", dtype="float32")
  _, narrow = hf.load(source, dtype="bfloat16")
  for to in ("hf", "orbax"):
    convert.convert(source, tmp_path / to, Options(to, dtype="bfloat16"))
    assert bits_of(tmp_path / to) == digest(narrow)
    convert.convert(tmp_path / to, tmp_path / f"{to}_wide", Options("hf", dtype="float32"))
    assert bits_of(tmp_path / f"{to}_wide") == digest(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow))
  router = narrow["moe_layers"]["moe"]["router"]
  assert router["bias"].dtype == router["kernel"].dtype == jnp.float32


def quantised(tensors: dict[str, np.ndarray], block: tuple[int, int]) -> tuple[dict, dict]:
  """Projections as FP8 with scales, and what they mean, by a loop over blocks."""
  stored, meant = {}, {}
  for name, array in tensors.items():
    stored[name] = meant[name] = array
    if not name.endswith(("_proj.weight", "query_key_value.weight", "dense.weight")) or "eh_proj" in name:
      continue
    rows, columns = (-(-size // one) for size, one in zip(array.shape, block, strict=True))
    scales, small, back = np.empty((rows, columns), np.float32), np.empty(array.shape, ml_dtypes.float8_e4m3fn), {}
    back = np.empty(array.shape, np.float32)
    for i in range(rows):
      for j in range(columns):
        at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        part = array[at].astype(np.float32)
        scales[i, j] = np.abs(part).max() / 448
        small[at] = (part / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
        back[at] = small[at].astype(np.float32) * scales[i, j]
    stored[name], stored[name + "_scale_inv"], meant[name] = small, scales, back.astype(array.dtype)
  return stored, meant


def test_fp8_with_ragged_blocks(tmp_path, monkeypatch):
  small_chunks(monkeypatch)
  changes = {"hidden_size": 200, "intermediate_size": 150, "moe_intermediate_size": 136, "num_hidden_layers": 2}
  fields = hf_folder.fields(dtype="bfloat16", **changes)
  stored, meant = quantised(hf_folder.random_tensors(fields), (128, 128))
  quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
  source = hf_folder.write(tmp_path / "fp8", fields | {"quantization_config": quantization}, stored)
  expected = bits_of(hf_folder.write(tmp_path / "meant", fields, meant))
  assert bits_of(source) == expected
  assert convert.plan(source, Options("hf"))["tensors"] == len(meant)
  for to in ("orbax", "hf"):
    convert.convert(source, tmp_path / to, Options(to))
    assert bits_of(tmp_path / to) == expected
  assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
  name = "model.layers.1.mlp.experts.3.up_proj.weight"
  for number, (change, message) in enumerate([
    ({name + "_scale_inv": stored[name + "_scale_inv"][:1]}, rf"{name}_scale_inv is F32\[1, 2\], must be"),
    ({name + "_scale_inv": np.full((2, 2), np.nan, np.float32)}, f"{name} holds NaN"),
    ({name + "_scale_inv": None}, f"{name} is F8_E4M3, but its scales {name}_scale_inv are missing"),
  ]):  # fmt: skip
    tensors = {key: value for key, value in (stored | change).items() if value is not None}
    broken = hf_folder.write(tmp_path / str(number), fields | {"quantization_config": quantization}, tensors)
    with pytest.raises(CheckpointError, match=message):
      convert.convert(broken, tmp_path / "target", Options("orbax"))
  with pytest.raises(CheckpointError, match="holds F8_E4M3, must be one of"):
    hf.load(hf_folder.write(tmp_path / "undeclared", fields, {k: v for k, v in stored.items() if "scale_inv" not in k}))
  assert left_overs(tmp_path) == []


EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"


def edit(folder: pathlib.Path, change) -> None:
  index = json.loads((folder / INDEX).read_text())
  change(index["weight_map"])
  (folder / INDEX).write_text(json.dumps(index))


def broken_folder(folder: pathlib.Path, how: str) -> None:
  fields = hf_folder.fields()
  tensors = hf_folder.random_tensors(fields)
  if how == "shape":
    tensors[EXPERT] = tensors[EXPERT][:-1]
  elif how == "missing":
    del tensors[EXPERT]
  elif how == "extra":
    tensors["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
  elif how == "nan":
    tensors[EXPERT][1, 2] = np.nan
  elif how == "lie":
    fields["num_experts"] = 16
  hf_folder.write(folder, fields, tensors)
  if how == "truncated":
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
  elif how == "path":
    edit(folder, lambda files: files.update({EXPERT: "../secret.safetensors"}))
  elif how == "listed":
    edit(folder, lambda files: files.update({EXPERT: "model-00003-of-00003.safetensors"}))


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("truncated", r"model-00002-of-00002\.safetensors: is truncated"),
    ("shape", rf"tensor {EXPERT} has shape \[23, 12\], config\.json says \[24, 12\]"),
    ("missing", f"tensor {EXPERT} is missing"),
    ("extra", r"tensor model\.rotary_emb\.inv_freq is extra"),
    ("nan", f"tensor {EXPERT} holds NaN or infinity"),
    ("lie", r"tensor model\.layers\.1\.mlp\.experts\.8\.gate_proj\.weight is missing"),
    ("path", f"tensor {EXPERT} is said to lie in '../secret.safetensors'"),
    ("listed", f"(tensor {EXPERT} is extra|model-00003-of-00003.safetensors: does not exist)"),
  ],
)
def test_refused_input_leaves_nothing(tmp_path, how, message):
  broken_folder(tmp_path / "source", how)
  for to in ("hf", "orbax"):
    with pytest.raises(CheckpointError, match=message):
      convert.convert(tmp_path / "source", tmp_path / "target", Options(to, max_shard_bytes=20_000))
    assert left_overs(tmp_path) == []


def test_damaged_orbax_is_refused(tmp_path):
  source = random_folder(tmp_path / "source", dtype="bfloat16")
  convert.convert(source, tmp_path / "0", Options("orbax"))
  chunk = tmp_path / "0" / "params" / "moe_layers.moe.experts.down" / "0.0.0.0"
  good = chunk.read_bytes()
  flipped = bytearray(good)
  flipped[100] ^= 1
  nan = bytearray(good)
  nan[100:102] = b"\xc0\x7f"
  for data, message in (
    (flipped, "moe_layers.moe.experts.down does not have the bits that were saved"),
    (nan, "moe_layers.moe.experts.down holds NaN"),
    (good[:-1], f"0.0.0.0: has {len(good) - 1} bytes"),
    (None, "moe_layers.moe.experts.down is damaged"),
  ):
    chunk.unlink()
    if data is not None:
      chunk.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
      convert.convert(tmp_path / "0", tmp_path / "target", Options("hf"))
    chunk.write_bytes(good)
  save_run(tmp_path / "run", source)
  largest = max((tmp_path / "run" / "checkpoints" / "3" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  with pytest.raises(CheckpointError, match="is damaged"):
    convert.convert(tmp_path / "run", tmp_path / "target", Options("hf"))
  assert left_overs(tmp_path) == []


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_goes_on_after_a_kill(tmp_path, monkeypatch, to):
  small_chunks(monkeypatch)
  source = random_folder(tmp_path / "source", dtype="bfloat16")
  whole = bits_of(source)
  if to == "hf":
    convert.convert(source, tmp_path / "0", Options("orbax"))
    source = tmp_path / "0"
  options = Options(to, max_shard_bytes=8000)
  count = len(convert.plan(source, options)["files"])
  written = []
  write_one = convert._write_one

  def dies(*arguments):
    if len(written) == count // 2:
      raise KeyboardInterrupt
    written.append(None)
    return write_one(*arguments)

  monkeypatch.setattr(convert, "_write_one", dies)
  with pytest.raises(KeyboardInterrupt):
    convert.convert(source, tmp_path / "target", options)
  assert left_overs(tmp_path) == [".target.converting"] and not (tmp_path / "target").exists()
  work = tmp_path / ".target.converting"
  records = [json.loads(line) for line in (work / "progress.jsonl").read_text().splitlines()[1:]]
  assert len(records) >= count // 2 - 3
  spoilt = work / records[0]["file"]
  data = bytearray(spoilt.read_bytes())
  data[-1] ^= 1
  spoilt.write_bytes(data)
  monkeypatch.setattr(convert, "_write_one", write_one)
  done = convert.convert(source, tmp_path / "target", options)
  assert done["kept_shards"] == len(records) - 1 and done["shards"] == count
  assert bits_of(tmp_path / "target") == whole and left_overs(tmp_path) == ["target"]
  check_manifest(tmp_path / "target")
  with pytest.raises(CheckpointError, match="exists and is not empty"):
    convert.convert(source, tmp_path / "target", options)


def run_command(*arguments, **more) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "ring_jax.launch.convert", *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, **more)


def test_dry_run_needs_an_index_or_a_config_alone(tmp_path):
  source = random_folder(tmp_path / "source", dtype="bfloat16")
  for path in source.glob("*.safetensors"):
    path.unlink()
  done = run_command(f"--source={source}", "--to=hf", "--max_shard_bytes=20000", "--dry_run", "--json")
  assert done.returncode == 0 and done.stderr == "", done.stderr
  plan = json.loads(done.stdout)
  (source / INDEX).unlink()
  assert convert.plan(source, Options("hf", max_shard_bytes=20_000)) == plan
  tensors = hf_folder.random_tensors(hf_folder.fields(dtype="bfloat16"))
  assert plan["tensors"] == len(tensors) and plan["shards"] == len(plan["files"]) > 2
  real = random_folder(tmp_path / "real", dtype="bfloat16")
  convert.convert(real, tmp_path / "target", Options("hf", max_shard_bytes=20_000))
  for file in plan["files"]:
    assert (tmp_path / "target" / file["name"]).stat().st_size == file["bytes"]
  done = run_command(f"--source={tmp_path / 'no'}", f"--target={tmp_path / 'x'}", "--to=hf")
  assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_measured_peak_is_the_command_s_own_and_not_its_parent_s():
  parent = bytearray(400_000_000)
  parent[::4096] = b"x" * len(parent[::4096])  # every page is really there
  command = [sys.executable, "-c", bench._MEASURED, sys.executable, "-c", "pass"]
  assert int(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout) < 200_000_000
  assert len(parent) == 400_000_000


def test_a_large_model_needs_little_memory_and_survives_a_kill(tmp_path):
  """500 MB both ways as commands of their own: the part of memory that grows with the model would be seen.

  Three buffers of up to 64 MiB and what an allocator keeps beside them take 200 to 320 MB, whatever the model's size.
  """
  config = bench.model_of(500_000_000)
  planned = bench.write_model(tmp_path / "hf", config, max_shard_bytes=50_000_000)
  empty = random_folder(tmp_path / "small")
  _, base = bench.run_convert(f"--source={empty}", f"--target={tmp_path / 'base'}", "--to=orbax")
  report, peak = bench.run_convert(f"--source={tmp_path / 'hf'}", f"--target={tmp_path / '0'}", "--to=orbax")
  assert report["bytes"] == planned.bytes > 450_000_000
  largest = max(2 * int(np.prod(shape)) for shape in planned.shapes.values())
  assert peak <= 2 * largest + 2**30 and peak - base < 450_000_000, (peak, base)

  command = [sys.executable, "-m", "ring_jax.launch.convert", f"--source={tmp_path / '0'}"]
  command += [f"--target={tmp_path / 'back'}", "--to=hf", "--max_shard_bytes=20000000"]
  progress = tmp_path / ".back.converting" / "progress.jsonl"
  with subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
    while process.poll() is None and not (progress.is_file() and len(progress.read_text().splitlines()) > 2):
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL and not (tmp_path / "back").exists()
  report, peak = bench.run_convert(*command[3:])
  assert report["kept_shards"] >= 1 and peak <= 2 * largest + 2**30 and peak - base < 450_000_000, (peak, base)
  for file in (tmp_path / "hf").glob("*.safetensors"):
    for name, array in load_file(file).items():
      back = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"][name]
      with safe_open(tmp_path / "back" / back, "np") as shard:
        assert shard.get_tensor(name).tobytes() == array.tobytes(), name
    file.unlink()


def test_large_leaves_of_a_run_are_saved_in_chunks(tmp_path, monkeypatch):
  """What is read for one expert is then an expert, not the stack."""
  monkeypatch.setattr(store, "_CHUNK_BYTES", 600)
  monkeypatch.setattr(store, "_SMALLEST_CHUNK_BYTES", 400)
  source = random_folder(tmp_path / "source", dtype="bfloat16")
  save_run(tmp_path / "run", source)
  opened = orbax_files.OrbaxSource(tmp_path / "run" / "checkpoints" / "3")
  arrays = {".".join(path): array.chunk_layout.read_chunk.shape for path, array in opened._arrays.items()}
  assert arrays["moe_layers.moe.experts.down"][:2] == (1, 1)
  assert arrays["moe_layers.attention.wq"][0] == 1
  assert bits_of(tmp_path / "run") == bits_of(source)
  convert.convert(tmp_path / "run", tmp_path / "hf", Options("hf"))
  assert bits_of(tmp_path / "hf") == bits_of(source)
  assert jax.tree.structure(open_checkpoint(tmp_path / "hf").params) == jax.tree.structure(hf.load(source)[1])
