"""From any kind of checkpoint to a Hugging Face folder or an Orbax step folder, in pieces of a few megabytes.

One thread reads, turns and checks pieces; another hashes and writes them; a third waits for the disk.  Memory does not
depend on the model: a few buffers, TensorStore's cache, and for a leaf that was saved as one chunk, that chunk.

Everything is written to `.TARGET.converting` beside the target.  Every file that is on the disk is entered in its
`progress.jsonl` with its SHA-256; after a kill the same command verifies those files and goes on behind them.  When all
are there, the folder gets `manifest.json` (size and SHA-256 of every file) and the target's name.  Input that is refused
leaves nothing.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ring_jax.checkpoint import hf_config, hf_source, names, resolve, shards, store, targets
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.hf import DEFAULT_SHARD_BYTES
from ring_jax.checkpoint.hf_source import HFSource
from ring_jax.checkpoint.orbax_files import OrbaxSource
from ring_jax.model import abstract_params

MANIFEST = "manifest.json"
FORMATS = ("hf", "orbax")
_PROGRESS = "progress.jsonl"
_SIDECARS = (  # copied where they lie beside the source
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "generation_config.json",
  "configuration_bailing_moe_v2.py",
  "modeling_bailing_moe_v2.py",
  "LICENSE",
)
_KEPT_FIELDS = ("auto_map", "bos_token_id", "eos_token_id", "pad_token_id")  # of a source's config.json
_AHEAD = 2  # pieces that are read before they are needed
_TELL_SECONDS = 5.0
_SPARE_BYTES = 8 << 20
_SYNC_BYTES = 64 << 20


class _NoSpaceError(CheckpointError):
  """Nothing is wrong with the input: what is written stays for the next try."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What to convert to."""

  to: str  # "hf" or "orbax"
  dtype: str | None = None  # of parameters; None: as they are
  max_shard_bytes: int = DEFAULT_SHARD_BYTES


def plan(source: str | os.PathLike, options: Options) -> dict[str, Any]:
  """What `convert` would write: tensors, bytes and files, from config and index alone.

  Raises:
    CheckpointError: the source is no checkpoint, or its index does not fit its config.
  """
  _check(options)
  folder = pathlib.Path(source)
  if resolve.is_run(folder):
    opened = OrbaxSource(resolve.step_folder(folder), options.dtype)
    config, leaves = opened.config, opened.leaves
  else:
    config, data = hf_config.read(folder)
    if options.dtype:
      config = dataclasses.replace(config, dtype=options.dtype, param_dtype=options.dtype)
    leaves = names.leaves_of(abstract_params(config))
    if (folder / shards.INDEX).is_file():
      listed = shards.read_index(folder)
      if hf_config.fp8_block(data) is not None:
        listed = shards.without_scales(listed)
      shapes = names.tensor_shapes(config, {path: leaf.shape for path, leaf in leaves.items()})
      hf_source.check_names(folder, config, listed, shapes)
  target = _target(config, leaves, options)
  files = [{"name": file.name, "tensors": file.tensors, "bytes": file.size} for file in target.files]
  total = {"tensors": target.tensors, "bytes": target.bytes, "shards": len(files)}
  return {"source": str(folder), "to": options.to, "dtype": config.param_dtype, **total, "files": files}


def convert(source: str | os.PathLike, target: str | os.PathLike, options: Options) -> dict[str, Any]:
  """Writes the target folder; returns what was done.

  Raises:
    CheckpointError: the source is damaged or not what its config says, or the target exists.
  """
  _check(options)
  begun = time.monotonic()
  target = pathlib.Path(target).absolute()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise CheckpointError(f"{target}: exists and is not empty; give a new folder")
  folder = resolve.step_folder(pathlib.Path(source))
  opened: Any = OrbaxSource(folder, options.dtype) if store.is_checkpoint(folder) else HFSource(folder, options.dtype)
  planned = _target(opened.config, opened.leaves, options, _kept_fields(folder))
  with _workplace(target, _job(folder, options)) as work:
    done = _finished(work)
    _check_space(target, sum(file.size for file in planned.files if file.name not in done))
    records = _write_files(work, planned, opened, done)
    if isinstance(opened, OrbaxSource):
      opened.check_sums(_total(record["read"] for record in records.values()))
    _finish(work, target, planned, folder, options, records)
  seconds = time.monotonic() - begun
  return {
    "source": str(folder),
    "target": str(target),
    "to": options.to,
    "dtype": opened.config.param_dtype,
    "tensors": planned.tensors,
    "bytes": planned.bytes,
    "shards": len(planned.files),
    "kept_shards": len(done),
    "seconds": round(seconds, 3),
    "bytes_per_second": round(planned.bytes / seconds),
  }


def _check(options: Options) -> None:
  if options.to not in FORMATS:
    raise CheckpointError(f"to={options.to!r}: must be one of {', '.join(FORMATS)}")
  if options.max_shard_bytes <= 0:
    raise CheckpointError(f"max_shard_bytes={options.max_shard_bytes}: must be at least 1")


def _target(config, leaves, options: Options, fields: dict[str, Any] | None = None):
  if options.to == "hf":
    return targets.HFTarget(config, leaves, options.max_shard_bytes, fields)
  return targets.OrbaxTarget(config, leaves)


def _kept_fields(folder: pathlib.Path) -> dict[str, Any]:
  if not (folder / "config.json").is_file() or store.is_checkpoint(folder):
    return {}
  data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  return {name: data[name] for name in _KEPT_FIELDS if name in data}


# ---------------------------------------------------------------------------------------------------------------------
# The folder in which a conversion works, and going on after a kill


def _job(folder: pathlib.Path, options: Options) -> dict[str, Any]:
  """What makes a conversion this one: source files as they are, and options."""
  found = hashlib.sha256()
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      state = path.stat()
      found.update(f"{path.relative_to(folder)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
  return {"version": 1, "source": str(folder.absolute()), "files": found.hexdigest(), **dataclasses.asdict(options)}


@contextlib.contextmanager
def _workplace(target: pathlib.Path, job: dict[str, Any]) -> Iterator[pathlib.Path]:
  """The folder beside the target; emptied where another job left it, removed where the input is refused."""
  work = target.parent / f".{target.name}.converting"
  work.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(work, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise CheckpointError(f"{target}: another process is converting to it") from None
    if _lines(work / _PROGRESS)[:1] != [job]:
      for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
      (work / _PROGRESS).write_text(json.dumps(job) + "\n", encoding="utf-8")
    try:
      yield work
    except _NoSpaceError:
      raise
    except CheckpointError:
      shutil.rmtree(work, ignore_errors=True)
      raise
  finally:
    os.close(descriptor)


def _lines(path: pathlib.Path) -> list[Any]:
  """The JSON lines of a file up to the first that is not whole."""
  found = []
  for line in path.read_bytes().split(b"\n") if path.is_file() else []:
    try:
      found.append(json.loads(line))
    except ValueError:
      break
  return found


def _finished(work: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The files that an earlier process finished and that still have the bytes it wrote."""
  job, *records = _lines(work / _PROGRESS)
  good = {}
  for record in records:
    path = work / record["file"]
    if path.is_file() and path.stat().st_size == record["bytes"] and _sha256(path) == record["sha256"]:
      good[record["file"]] = record
  lines = [json.dumps(line) + "\n" for line in (job, *good.values())]
  rewritten = work / f"{_PROGRESS}.new"
  rewritten.write_text("".join(lines), encoding="utf-8")
  rewritten.replace(work / _PROGRESS)
  return good


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _check_space(target: pathlib.Path, needed: int) -> None:
  free = shutil.disk_usage(target.parent).free
  if needed + _SPARE_BYTES > free:
    raise CheckpointError(f"{target}: {needed / 1e6:,.1f} MB are to be written, but only {free / 1e6:,.1f} MB are free")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write_files(work: pathlib.Path, planned, source, done: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Writes the files that are not done; returns the records of all."""
  records = dict(done)
  todo = [file for file in planned.files if file.name not in done]
  tell = _Teller(sum(file.size for file in todo))
  ring = [shards.Scratch() for _ in range(_AHEAD + 1)]
  with (
    open(work / _PROGRESS, "a", encoding="utf-8") as progress,
    concurrent.futures.ThreadPoolExecutor(1) as reader,
    concurrent.futures.ThreadPoolExecutor(1) as syncer,
  ):
    syncing: collections.deque[tuple[concurrent.futures.Future, dict[str, Any]]] = collections.deque()

    def enter_one() -> None:
      future, record = syncing.popleft()
      future.result()  # after it all flushes of that file are done too: they have one thread
      while flushing and flushing[0].done():
        flushing.pop(0).result()
      progress.write(json.dumps(record) + "\n")
      progress.flush()
      records[record["file"]] = record

    unsynced = [0]
    flushing: list[concurrent.futures.Future] = []  # an error of the disk is told once, perhaps to one of these
    items = _ahead(reader, _all_pieces(todo, source, ring))
    for file in todo:
      path = work / file.name
      path.parent.mkdir(parents=True, exist_ok=True)
      stream = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by _sync)

      def written(count: int, stream=stream) -> None:
        tell(count)
        unsynced[0] += count
        if unsynced[0] >= _SYNC_BYTES:  # the disk works while the rest is made, not only at the end
          unsynced[0] = 0
          flushing.append(syncer.submit(os.fdatasync, stream.fileno()))

      record = {"file": file.name} | _write_one(stream, items, written)
      syncing.append((syncer.submit(_sync, stream), record))
      while len(syncing) > _AHEAD:
        enter_one()
    while syncing:
      enter_one()
  return {file.name: records[file.name] for file in planned.files}


def _write_one(
  stream: io.RawIOBase, items: Iterator[targets.Piece | dict[str, int]], tell: Callable[[int], None]
) -> dict[str, Any]:
  """Writes the pieces up to the end of the file; returns its record."""
  found, sums, written = hashlib.sha256(), {}, 0
  for item in items:
    if isinstance(item, dict):
      return {"bytes": written, "sha256": found.hexdigest(), "sums": sums, "read": item}
    data = memoryview(item.values.reshape(-1).view(np.uint8))
    found.update(data)
    while data:
      count = stream.write(data)
      written, data = written + count, data[count:]
    if item.leaf is not None:
      sums[item.leaf] = (sums.get(item.leaf, 0) + item.fingerprint) % 2**32
    tell(item.values.nbytes)
  raise RuntimeError("the pieces ended inside of a file")


def _all_pieces(files, source, ring: list[shards.Scratch]) -> Iterator[targets.Piece | dict[str, int]]:
  """The pieces of all files; a file ends with the fingerprints of what was read for it."""
  turn = 0

  def buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nonlocal turn
    turn += 1
    return ring[turn % len(ring)].array(shape, dtype)

  for file in files:
    yield from file.pieces(source, buffer)
    yield source.take_sums() if isinstance(source, OrbaxSource) else {}


def _ahead(executor: concurrent.futures.Executor, items: Iterator) -> Iterator:
  """The items, `_AHEAD` of them made in the background while one is used."""
  end = object()
  pending = collections.deque(executor.submit(next, items, end) for _ in range(_AHEAD))
  while True:
    item = pending.popleft().result()
    if item is end:
      return
    pending.append(executor.submit(next, items, end))
    yield item


def _sync(stream) -> None:
  with stream:
    os.fsync(stream.fileno())


def _finish(work, target, planned, folder, options: Options, records: dict[str, dict[str, Any]]) -> None:
  """Small files, the manifest, and the name."""
  files = {name: {"bytes": record["bytes"], "sha256": record["sha256"]} for name, record in records.items()}
  small = _copy_sidecars(folder, work)
  small += planned.finish(work, _total(record["sums"] for record in records.values()))
  for name in dict.fromkeys(small):
    files[name] = {"bytes": (work / name).stat().st_size, "sha256": _sha256(work / name)}
  about = {"source": str(folder.absolute()), **dataclasses.asdict(options), "tensors": planned.tensors}
  shards.write_json(work / MANIFEST, {"version": 1, **about, "bytes": planned.bytes, "files": files})
  (work / _PROGRESS).unlink()
  for name in [*small, MANIFEST]:
    shards.sync_path(work / name)
  for path in {work, *(parent for name in files for parent in (work / name).parents if parent.is_relative_to(work))}:
    shards.sync_path(path)
  work.rename(target)
  shards.sync_path(target.parent)


def _copy_sidecars(folder: pathlib.Path, work: pathlib.Path) -> list[str]:
  """Tokenizer and the like, from beside the weights; a run keeps its tokenizer in the workdir."""
  places = [folder]
  if folder.absolute().parent.name == resolve.CHECKPOINTS:
    places.append(folder.absolute().parents[1])
  copied = []
  for name in _SIDECARS:
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is not None:
      shutil.copyfile(found, work / name)
      copied.append(name)
  return copied


def _total(parts) -> dict[str, int]:
  """Fingerprints of leaves from those of their parts."""
  sums: dict[str, int] = {}
  for part in parts:
    for name, value in part.items():
      sums[name] = (sums.get(name, 0) + value) % 2**32
  return sums


class _Teller:
  """A line on stderr every few seconds."""

  def __init__(self, total: int):
    self._total, self._done = total, 0
    self._begun = self._told = time.monotonic()

  def __call__(self, count: int) -> None:
    self._done += count
    now = time.monotonic()
    if now - self._told >= _TELL_SECONDS:
      self._told = now
      rate = self._done / (now - self._begun)
      left = (self._total - self._done) / rate
      print(
        f"converted {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {rate / 1e6:,.0f} MB/s, {left:,.0f} s left",
        file=sys.stderr,
        flush=True,
      )
