"""The one folder that holds a run (architecture decision 14): its paths, its lock, its config, and atomic writes.

    config.json             the resolved configuration
    checkpoints/            Orbax
    metrics.jsonl           one JSON object a step, the same bits for an interrupted and an uninterrupted run
    timings.jsonl           the wall-clock values of the same steps
    tensorboard/            both, as TensorBoard events
    trace.json              Perfetto trace of the phases
    events.jsonl            what the scheduler of the rollouts was told and decided, in order
    rollouts/               what was generated, rewarded and trained on
    plots/                  PNGs
    tokenizer.json          where the run built one
    hang_process_0.txt      where every thread stood when the watchdog ended a process
    lock                    held by the process that writes here

Of several processes that run one job, the first alone writes here (checkpoints apart) and holds the lock.

A file is replaced as a whole (`write_atomic`) or only appended to by lines, so that a kill at any moment leaves either
the old content, the new one, or one half-written last line.  docs/workdir.md tells the reader's side.
"""

import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Self, TextIO

from configs.schema import ConfigError, RunConfig, to_dict

# What may change between two calls for one run: it does not alter a step that has been taken.
_FREE = (
  "name", "sft.steps", "rl.steps", "rlhf.steps", "checkpoint", "task.workers", "model.parallel", "rollout.parallel", "placement",
  "rollout.workers", "rollout.workers_file",
)  # fmt: skip
_SHOWN = 6  # differing fields that an error spells out

# Locks of this process: POSIX locks do not exclude their own process, closing any handle of the file drops them, and so
# must not happen because someone let go of a Workdir.
_held: dict[pathlib.Path, TextIO] = {}


class WorkdirError(ConfigError):
  """A workdir that cannot be used; the message is one line for the user."""


class Workdir:
  """A run's folder; created, with its parents, on construction.

  Raises:
    WorkdirError: the path is a file, lies below one, or cannot be written to.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path).expanduser().absolute()
    self._lock_path = self.path / "lock"
    try:
      for folder in (self.path, self.rollouts, self.plots):
        folder.mkdir(parents=True, exist_ok=True)
      self._lock_path.touch()
    except (FileExistsError, NotADirectoryError):
      in_the_way = next(parent for parent in (self.path, *self.path.parents, self.rollouts) if _is_file(parent))
      raise WorkdirError(f"workdir {path}: {in_the_way} is a file; a folder is needed") from None
    except OSError as error:
      raise WorkdirError(f"workdir {path}: cannot be written to ({error.strerror})") from None

  # -------------------------------------------------------------------------------------------------------------------
  # Paths

  @property
  def config(self) -> pathlib.Path:
    return self.path / "config.json"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.path / "checkpoints"

  @property
  def metrics(self) -> pathlib.Path:
    return self.path / "metrics.jsonl"

  @property
  def timings(self) -> pathlib.Path:
    return self.path / "timings.jsonl"

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.path / "tensorboard"

  @property
  def trace(self) -> pathlib.Path:
    return self.path / "trace.json"

  @property
  def events(self) -> pathlib.Path:
    return self.path / "events.jsonl"

  @property
  def rollouts(self) -> pathlib.Path:
    return self.path / "rollouts"

  @property
  def plots(self) -> pathlib.Path:
    return self.path / "plots"

  # -------------------------------------------------------------------------------------------------------------------
  # Lock

  def lock(self) -> Self:
    """Makes this process the only writer until `unlock`, the end of a `with` block, or its death, SIGKILL included.

    A POSIX record lock: unlike flock's it is not inherited by forked children, so scoring workers that outlive a killed
    trainer do not keep the folder locked.

    Raises:
      WorkdirError: another process, or another `Workdir` of this one, holds it; names its process id and host.
    """
    if self._lock_path in _held:
      raise WorkdirError(f"workdir {self.path}: already in use by this process ({os.getpid()})")
    file = open(self._lock_path, "r+")  # noqa: SIM115 (it stays open as long as the lock is held)
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      holder = file.read().strip() or "another process"
      file.close()
      if error.errno not in (errno.EACCES, errno.EAGAIN):  # a network share without a lock service
        raise WorkdirError(f"workdir {self.path}: its file system has no locks ({error.strerror})") from None
      raise WorkdirError(f"workdir {self.path}: in use by {holder}; stop it, or give another --workdir") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
    file.flush()
    _held[self._lock_path] = file
    return self

  def unlock(self) -> None:
    """Gives the lock back; does nothing where this process does not hold it."""
    file = _held.pop(self._lock_path, None)
    if file is not None:
      file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.unlock()

  # -------------------------------------------------------------------------------------------------------------------
  # Config

  def store_config(self, config: RunConfig) -> bool:
    """Writes config.json, or checks the one that is there and then updates what may change.

    Returns:
      Whether there was one: the run resumes.

    Raises:
      WorkdirError: the stored one is another run's, or not readable.
    """
    stored = self.load_config()
    if stored is not None:
      try:
        self.check_config(stored, config)
      except WorkdirError as error:
        raise WorkdirError(f"workdir {self.path}: {error}") from None
    new = to_dict(config)
    if stored != new:
      write_atomic(self.config, json.dumps(new, indent=2) + "\n")
    return stored is not None

  def load_config(self) -> dict[str, Any] | None:
    """The stored config as plain data; None where there is none."""
    if not self.config.exists():
      return None
    try:
      return json.loads(self.config.read_text())
    except (OSError, ValueError) as error:
      raise WorkdirError(f"workdir {self.path}: config.json cannot be read ({error})") from None

  @staticmethod
  def check_config(old: RunConfig | Mapping[str, Any], new: RunConfig | Mapping[str, Any]) -> None:
    """Raises a `WorkdirError` that lists the fields in which two configs differ and may not, if there are any."""
    before, now = dict(_leaves(to_dict(old))), dict(_leaves(to_dict(new)))
    differing = [
      f"{name} ({_show(before, name)} there, {_show(now, name)} now)"
      for name in dict.fromkeys([*before, *now])
      if not any(name == free or name.startswith(f"{free}.") for free in _FREE)
      and (name not in before or name not in now or before[name] != now[name])
    ]
    if differing:
      more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
      raise WorkdirError(
        f"holds a run with another config: {', '.join(differing[:_SHOWN])}{more};"
        " give another --workdir, or the values it was started with"
      )


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Dotted path and value of everything below, lists by index; an empty list or mapping is a value."""
  if isinstance(data, (Mapping, list)) and data:
    for name, value in data.items() if isinstance(data, Mapping) else enumerate(data):
      yield from _leaves(value, f"{path}.{name}" if path else str(name))
  else:
    yield path, data


def _show(leaves: Mapping[str, Any], name: str) -> str:
  return json.dumps(leaves[name]) if name in leaves else "absent"


def _is_file(path: pathlib.Path) -> bool:
  try:
    return path.exists() and not path.is_dir()
  except NotADirectoryError:
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_atomic(path: pathlib.Path, content: str | bytes) -> None:
  """Puts `content` at `path` so that a reader, or a kill or full disk at any moment, sees the old or the new content.

  The temporary name is always the same, so a leftover is overwritten by the next try.

  Raises:
    OSError: the disk is full, the folder is not writable...; what was there is untouched.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)  # else the rename itself may be lost with the machine's power
  finally:
    os.close(folder)
