"""Checkpoints of a run: Orbax folders, written in the background, committed atomically, read newest first.

    DIRECTORY/<step>/params       the parameter tree
    DIRECTORY/<step>/optimizer    the optimizer state
    DIRECTORY/<step>/extra        any other tree of arrays, where there is one
    DIRECTORY/<step>/run          JSON: step, resolved config, host state (scheduler, random counters, ...), and a
                                  fingerprint of every array

`save` copies the arrays to the host and returns; files are written to a temporary folder that gets its name when all is
on the disk.  Only after that are older checkpoints deleted, at the next call.  A process that dies while saving leaves
a temporary folder, which the next one clears away.

Files that are cut short cannot be read; a flipped bit can, as Orbax's files have no checksums over their arrays.  So
every array's fingerprint is stored and compared: the sum of its bits modulo 2^32, which is the same on any sharding and
costs a millisecond.  A damaged checkpoint is set aside once an older one could be read, so that the run can save that
step again.

Several processes save and restore together, into one folder that all of them see; each writes and reads what its own
devices hold.  What lies in the folder is decided by the first of them, and a step that one of them cannot read is
damaged for all.

One OCDBT database an item: about 200 leaves in 20 files.  With a file a leaf a save takes a third longer and leaves
several hundred files.
"""

import dataclasses
import functools
import logging as std_logging
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from ring_jax.checkpoint.errors import CheckpointError
from sharding import processes
from sharding.fingerprint import fingerprint

PyTree = Any
Wanted = PyTree | Callable[[dict[str, Any]], PyTree] | None
Trees = Callable[[dict[str, Any]], Mapping[str, PyTree]]  # from a step's JSON to the abstract trees to read

_RUN = "run"
_TREES = ("params", "optimizer", "extra")
_TEMPORARY = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
_SPARE_BYTES = 1 << 20  # for metadata
_CHUNK_BYTES = 64 << 20
_SMALLEST_CHUNK_BYTES = 1 << 20


class _Damaged(CheckpointError):
  """The files of a step cannot be read: an older step may do."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds."""

  step: int
  params: PyTree
  optimizer_state: PyTree
  extra: PyTree | None
  host: dict[str, Any]
  config: dict[str, Any]


class RunStore:
  """The checkpoints of one run.  One job, of one or several processes, may have it open at a time."""

  def __init__(self, directory: str | pathlib.Path, keep: int):
    """Opens or makes the folder and clears what a killed process left.

    Args:
      keep: how many of the newest checkpoints stay.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._directory.mkdir(parents=True, exist_ok=True)
    self._remove_temporary()
    _tell_errors_once()
    self._saver = ocp.AsyncCheckpointer(_handler())

  def __enter__(self) -> "RunStore":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def save(
    self,
    step: int,
    params: PyTree,
    optimizer_state: PyTree,
    host: Mapping[str, Any],
    config: Mapping[str, Any],
    extra: PyTree | None = None,
  ) -> None:
    """Starts to save; the arrays may be donated or changed as soon as this returns.

    Args:
      host: JSON data.
      config: the resolved `RunConfig` as JSON data (`configs.schema.to_dict`).

    Raises:
      CheckpointError: this save or the one before it failed (a full disk); earlier checkpoints are as they were.
    """
    self.wait()
    if processes.group().from_first("steps", lambda: step in steps(self._directory)):
      raise CheckpointError(f"{self._directory / str(step)}: exists; a step is saved once")
    trees = {"params": params, "optimizer": optimizer_state} | ({} if extra is None else {"extra": extra})
    self._check_space(step, trees)
    items: dict[str, Any] = {
      name: ocp.args.PyTreeSave(tree, save_args=jax.tree.map(_save_args, tree)) for name, tree in trees.items()
    }
    fingerprints = {name: _fingerprints(tree) for name, tree in trees.items()}
    run = {"step": step, "config": dict(config), "host": dict(host), "fingerprints": fingerprints}
    items[_RUN] = ocp.args.JsonSave(run)
    try:
      self._saver.save(self._directory / str(step), args=ocp.args.Composite(**items))
    except Exception as error:
      raise self._failed(error) from error

  def wait(self) -> None:
    """Returns when everything is on the disk and older checkpoints are deleted.

    Raises:
      CheckpointError: the save in the background failed.
    """
    try:
      self._saver.wait_until_finished()
    except Exception as error:
      raise self._failed(error) from error
    if processes.group().is_first:
      for step in steps(self._directory)[: -self._keep]:
        doomed = self._directory / f"{step}.orbax-checkpoint-tmp-old"  # never a half-deleted checkpoint
        shutil.rmtree((self._directory / str(step)).rename(doomed))

  def latest_step(self) -> int | None:
    """The newest step that is completely saved."""
    return processes.group().from_first("latest step", lambda: max(steps(self._directory), default=None))

  def restore(self, params: PyTree, optimizer_state: Wanted, extra: Wanted = None, step: int | None = None) -> Restored:
    """Reads a checkpoint onto the given shardings.

    Args:
      params, optimizer_state, extra: trees of `jax.ShapeDtypeStruct`; a leaf without a sharding goes to the first
        device.  Without `extra`, none is read.  The latter two may be functions of the step's JSON that give the tree,
        where it depends on what the run was doing.
      step: which one; default: the newest that can be read, with a warning for each that cannot.

    Raises:
      CheckpointError: there is none, none can be read, or a leaf's shape or dtype is not the expected one.
    """
    self.wait()
    given = {"params": params, "optimizer": optimizer_state, "extra": extra}

    def trees(run: dict[str, Any]) -> dict[str, PyTree]:
      asked = {name: tree(run) if callable(tree) else tree for name, tree in given.items()}
      return {name: tree for name, tree in asked.items() if tree is not None}

    data, damaged = read_newest(self._directory, trees, step)
    for number in damaged if processes.group().is_first else []:
      aside = self._directory / f"{number}.damaged"
      shutil.rmtree(aside, ignore_errors=True)
      (self._directory / str(number)).rename(aside)
    return Restored(
      data[_RUN]["step"], data["params"], data["optimizer"], data.get("extra"), data[_RUN]["host"], data[_RUN]["config"]
    )

  def close(self) -> None:
    """Waits and frees the background threads."""
    try:
      self.wait()
    finally:
      self._saver.close()

  def _remove_temporary(self) -> None:
    for path in self._directory.iterdir() if processes.group().is_first else []:
      if _TEMPORARY.fullmatch(path.name):
        shutil.rmtree(path, ignore_errors=True)

  def _check_space(self, step: int, trees: PyTree) -> None:
    """A full disk is better noticed before anything is written."""
    needed = _SPARE_BYTES + sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    free = processes.group().from_first("disk", lambda: shutil.disk_usage(self._directory).free)
    if needed > free:
      raise CheckpointError(
        f"{self._directory / str(step)}: checkpoint of {needed / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free"
      )

  def _failed(self, error: Exception) -> CheckpointError:
    self._remove_temporary()
    return CheckpointError(f"{self._directory}: saving a checkpoint failed: {_brief(error)}")


def steps(directory: str | pathlib.Path) -> list[int]:
  """The saved steps of a folder, oldest first."""
  directory = pathlib.Path(directory)
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def is_checkpoint(folder: str | pathlib.Path) -> bool:
  """Whether the folder is one saved step (whole or broken)."""
  return (pathlib.Path(folder) / "params").is_dir()


def read_newest(
  directory: str | pathlib.Path, trees: Trees, step: int | None = None
) -> tuple[dict[str, Any], list[int]]:
  """What `read` gives for the asked step, or for the newest that is not damaged, with a warning for each that is.

  Returns: the data, and the damaged steps that were passed over.
  """
  directory = pathlib.Path(directory)
  saved = processes.group().from_first("steps", lambda: steps(directory) if directory.is_dir() else [])
  if step is not None and step not in saved:
    held = ", ".join(map(str, saved)) or "none"
    raise CheckpointError(f"{directory}: has no checkpoint of step {step} (there: {held})")
  if not saved:
    raise CheckpointError(f"{directory}: has no checkpoint")
  *newer, oldest = reversed(saved if step is None else [step])
  damaged: list[int] = []
  for number in newer:
    try:
      return read(directory / str(number), trees), damaged
    except _Damaged as error:
      logging.warning("%s; going back to the checkpoint before it", error)
      damaged.append(number)
  return read(directory / str(oldest), trees), damaged


def read(folder: str | pathlib.Path, trees: Trees) -> dict[str, Any]:
  """Reads one saved step: its JSON under "run", and of its trees those that `trees` names, onto their shardings.

  Raises:
    CheckpointError: the folder is damaged, or a leaf is not as expected.
  """
  folder = pathlib.Path(folder).absolute()
  _tell_errors_once()
  try:
    run, restored, failed = *_read_own(folder, trees), None
  except _Damaged as error:
    run, restored, failed = None, {}, str(error)
  reasons = [reason for reason in processes.group().gather(f"read {folder.name}", failed) if reason is not None]
  if reasons:
    raise _Damaged(reasons[0])
  for name, tree in restored.items():
    _check_fingerprints(folder / name, tree, run["fingerprints"][name])
  return {_RUN: run, **restored}


def _read_own(folder: pathlib.Path, trees: Trees) -> tuple[dict[str, Any], dict[str, PyTree]]:
  """The JSON, and this process' parts of the arrays; waits for no other process, as that one may have failed."""
  index = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
  with ocp.Checkpointer(_handler(), multiprocessing_options=alone) as reader:
    try:
      saved = reader.metadata(folder).item_metadata
      run = reader.restore(folder, args=ocp.args.Composite(**{_RUN: ocp.args.JsonRestore()}))[_RUN]
    except Exception as error:
      raise _Damaged(f"{folder}: is damaged: {_brief(error)}") from error
    placed = {name: jax.tree.map(_placed, tree) for name, tree in trees(run).items()}
    for name, tree in placed.items():
      _check_leaves(folder / name, saved.get(name), tree)
    items = {
      name: ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
      for name, tree in placed.items()
    }
    try:
      restored = reader.restore(folder, args=ocp.args.Composite(**items)) if items else {}
    except Exception as error:
      raise _Damaged(f"{folder}: is damaged: {_brief(error)}") from error
  return run, {name: restored[name] for name in items}


def _handler() -> ocp.CompositeCheckpointHandler:
  items: dict[str, Any] = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=True) for name in _TREES}
  return ocp.CompositeCheckpointHandler(**items, **{_RUN: ocp.JsonCheckpointHandler()})


def _save_args(leaf: jax.Array) -> ocp.SaveArgs:
  """Large leaves are saved in chunks, so that conversion can read a layer or an expert and not a stack of all.

  The leading dimensions are split into single entries (layers, experts) until an entry is small enough; a dimension of
  which an entry would be tiny is none of these.
  """
  if leaf.nbytes <= _CHUNK_BYTES:
    return ocp.SaveArgs()
  axes, size = [], leaf.nbytes
  for axis, count in enumerate(leaf.shape):
    if size <= _CHUNK_BYTES or size // count < _SMALLEST_CHUNK_BYTES:
      break
    axes.append(axis)
    size //= count
  return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=tuple(axes))


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(folder: pathlib.Path, saved: Any, expected: PyTree) -> None:
  """Orbax would pad, cut and cast; here a leaf that is not as expected is another model."""
  if saved is None:
    raise _Damaged(f"{folder}: does not exist")
  held = {leaf.name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(saved.tree)}
  wanted = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in _named_leaves(expected)}
  for name in sorted(held.keys() ^ wanted.keys()):
    raise CheckpointError(f"{folder}: {name} is {'missing' if name in wanted else 'extra'}: another config wrote it")
  for name, (shape, dtype) in wanted.items():
    if held[name] != (shape, dtype):
      raise CheckpointError(
        f"{folder}: {name} is {held[name][1]}{list(held[name][0])}, the config says {dtype}{list(shape)}"
      )


def _fingerprints(tree: PyTree) -> dict[str, int]:
  """By leaf.  Leaves are taken one by one because those of one tree may lie on different devices.

  One is waited for before the next begins: several programs under way that each sum over all devices can starve each
  other of threads on the CPU backend, and hang.
  """
  return {name: int(processes.fetch(fingerprint(leaf))) for name, leaf in _named_leaves(tree)}


def _check_fingerprints(folder: pathlib.Path, tree: PyTree, saved: Mapping[str, int]) -> None:
  for name, value in _fingerprints(tree).items():
    if saved[name] != value:
      raise _Damaged(f"{folder}: is damaged: {name} does not have the bits that were saved")


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
  """Leaves under the names that Orbax gives them."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]


_ECHOES = ("Event loop is closed", "Encountered error while reading array index")  # of TensorStore
_LOGGED_ECHOES = (  # of Orbax
  "_SignalingThread.run() raised",
  "exception was never retrieved",
  "in background save thread",
  "Metadata file does not exist",
)


@functools.cache
def _tell_errors_once() -> None:
  """Keeps the echoes of an error off the console; the error itself is raised as always.

  After the first array that fails, Orbax closes its event loop.  TensorStore then prints a traceback for every other
  array that was under way, and Orbax logs what it is about to raise.
  """
  before = sys.unraisablehook

  def hook(unraisable) -> None:
    if not str(unraisable.exc_value).startswith(_ECHOES):
      before(unraisable)

  sys.unraisablehook = hook
  for name in ("absl", "asyncio"):
    std_logging.getLogger(name).addFilter(lambda record: not any(echo in str(record.msg) for echo in _LOGGED_ECHOES))


def _brief(error: Exception) -> str:
  """TensorStore's messages carry their whole specification; its first words say what happened."""
  text = " ".join(str(error).split())
  system = re.search(r"([A-Z][a-z ]+) \[.*os_error_code='\d+'", text)
  return system.group(1) if system else (text[:200] or type(error).__name__)
