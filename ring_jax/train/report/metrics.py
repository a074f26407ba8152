"""The numbers of a run: metrics.jsonl, timings.jsonl and TensorBoard events.

One JSON object a line, keys sorted, with `phase` and `step`: the steps of all phases together, as in the checkpoint's
name.  metrics.jsonl holds only what the config and the seed decide, so that a run that was killed and resumed ends with
the same bytes as one that was not.  Wall-clock values of the same steps go to timings.jsonl.

    sft    loss, ...
    rl     reward, mismatch/masked, policy/entropy, ...
    eval   name (start, sft, rl), accuracy, ...

A resume cuts everything after the restored step.  What the run logs again at that very step (an evaluation between its
checkpoint and the next) is recognised and not written twice.
"""

import importlib
import json
import math
import numbers
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ring_jax.train.workdir import Workdir, write_atomic


class MetricsLog:
  """Appends to a workdir's logs; call `truncate` first where the workdir may hold an earlier run of itself."""

  def __init__(self, workdir: Workdir):
    self._metrics, self._timings = _Lines(workdir.metrics), _Lines(workdir.timings)
    self._folder = workdir.tensorboard
    self._purge_step: int | None = None
    self._writer: Any = None  # tensorboardX.SummaryWriter

  def truncate(self, step: int) -> None:
    """Forgets what is later than `step` (-1: everything), and a half-written last line."""
    self._close_writer()
    self._metrics.truncate(step)
    self._timings.truncate(step)
    self._purge_step = step + 1

  def log(self, phase: str, step: int, values: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
    """Writes one step.

    Args:
      phase: sft, rl or eval.
      step: steps of all phases that are finished.
      values: deterministic ones: numbers (also of numpy or JAX), strings, None, lists and mappings of these.  What is
        not finite becomes null.
      timings: wall-clock values: seconds, tokens per second.
    """
    keys = {"phase": phase, "step": step}
    if not self._metrics.append(keys | _plain(values)):
      return
    self._to_tensorboard(phase, step, values)
    if timings:
      self._timings.append(keys | _plain(timings) | ({"name": values["name"]} if "name" in values else {}))
      self._to_tensorboard(f"time/{phase}", step, timings)

  def flush(self) -> None:
    """Puts everything on the disk.  A checkpoint must not overtake its log: call this before saving one."""
    self._metrics.flush()
    self._timings.flush()
    if self._writer is not None:
      self._writer.flush()

  def close(self) -> None:
    self.flush()
    self._metrics.close()
    self._timings.close()
    self._close_writer()

  def _to_tensorboard(self, prefix: str, step: int, values: Mapping[str, Any]) -> None:
    if self._writer is None:
      self._writer = _tensorboard().SummaryWriter(str(self._folder), purge_step=self._purge_step)
    for name, value in values.items():
      value = _plain(value)
      if isinstance(value, (int, float)):
        self._writer.add_scalar(f"{prefix}/{name}", value, step)

  def _close_writer(self) -> None:
    if self._writer is not None:
      self._writer.close()
      self._writer = None


def _tensorboard() -> ModuleType:
  """tensorboardX, late, as most who read logs write none, and without the PyTorch that it would load where it finds one:
  seconds and a quarter of a gigabyte, for tensors that nobody gives it."""
  if "torch" in sys.modules:
    return importlib.import_module("tensorboardX")
  sys.modules["torch"] = None  # as if it were not installed
  try:
    return importlib.import_module("tensorboardX")
  finally:
    del sys.modules["torch"]


class _Lines:
  """A file of JSON lines that only grows, but for `truncate`."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file = None
    self._kept: set[tuple[Any, ...]] = set()  # what is there of the restored step

  def truncate(self, step: int) -> None:
    self.close()
    records = [record for record in read(self._path) if record["step"] <= step]
    content = "".join(_line(record) for record in records)
    if self._path.exists() and self._path.read_text() != content:
      write_atomic(self._path, content)
    self._kept = {_key(record) for record in records if record["step"] == step}

  def append(self, record: dict[str, Any]) -> bool:
    """Returns whether it was written: not when a resumed run repeats it."""
    if _key(record) in self._kept:
      return False
    if self._file is None:
      self._file = open(self._path, "a")  # noqa: SIM115 (it stays open from step to step)
    self._file.write(_line(record))
    self._file.flush()
    return True

  def flush(self) -> None:
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The complete lines of a log, a running one too; empty where there is none."""
  records = []
  for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
    try:
      record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
      continue  # cut by a full disk
    if isinstance(record, dict) and "step" in record:
      records.append(record)
  return records


def read_logs(workdir: pathlib.Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Records of a run's metrics.jsonl and of its timings.jsonl."""
  return read(workdir / "metrics.jsonl"), read(workdir / "timings.jsonl")


def smoothed(values: Sequence[float | None], window: int) -> list[float]:
  """Mean of the last `window` values that there are, fewer at the beginning; NaN where there is none."""
  found = []
  for end in range(1, len(values) + 1):
    own = [value for value in values[max(0, end - window) : end] if value is not None]
    found.append(sum(own) / len(own) if own else math.nan)
  return found


def _line(record: Mapping[str, Any]) -> str:
  return json.dumps(record, sort_keys=True, allow_nan=False) + "\n"


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
  return record["phase"], record["step"], record.get("name")


def _plain(value: Any) -> Any:
  """JSON data; a float keeps all its bits (repr), and is null where it is not finite."""
  if value is None or isinstance(value, (str, bool)):
    return value
  if isinstance(value, Mapping):
    return {str(name): _plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, numbers.Integral):
    return int(value)
  value = value.item() if hasattr(value, "item") else float(value)
  return value if not isinstance(value, float) or math.isfinite(value) else None
