"""Reasoning Gym entries by seed and index, the same in every process.

A few tasks walk over sets of strings while they draw a problem, so that what they draw depends on Python's hash seed
(measured: all tasks, two processes).  Their entries come from a child process whose hash seed is fixed.
"""

import difflib
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import reasoning_gym
from reasoning_gym.factory import DATASETS

from configs.schema import ConfigError, TaskSource

_HASH_ORDERED = frozenset(
  {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)


class Entries(Protocol):
  """{"question", "answer", "metadata"} by index; each draw is a function of seed + index."""

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_entries(source: TaskSource, seed: int, size: int) -> Entries:
  """The entries 0 .. size - 1 of one task.

  Raises:
    ConfigError: Reasoning Gym does not know the task, or refuses its options.
  """
  if source.name not in DATASETS:
    close = difflib.get_close_matches(source.name, DATASETS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are {len(DATASETS)} tasks"
    raise ConfigError(f"task.mixture: Reasoning Gym has no task {source.name!r}{hint}")
  try:
    entries = _create(source.name, source.options, seed, size)
    return _Child(source.name, source.options, seed, size) if source.name in _HASH_ORDERED else entries
  except Exception as error:  # each task checks its options in its own way: assert, TypeError, ValueError
    reason = " ".join(str(error).split()) or type(error).__name__
    raise ConfigError(f"task.mixture: options of {source.name}: {reason}") from None


def _create(name: str, options: Mapping[str, Any], seed: int, size: int) -> Entries:
  return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)


class _Child:
  """Entries drawn by a process of their own; it ends with this object, or with the process that holds it."""

  def __init__(self, *arguments: Any):
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    self._process = subprocess.Popen(
      [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    weakref.finalize(self, _end, self._process)
    self._send(arguments)

  def _send(self, value: Any) -> None:
    pickle.dump(value, self._process.stdin)
    self._process.stdin.flush()

  def __getitem__(self, index: int) -> dict[str, Any]:
    self._send(index)
    return pickle.load(self._process.stdout)


def _end(process: subprocess.Popen) -> None:
  process.stdin.close()
  process.stdout.close()
  process.wait()


def _serve() -> None:
  requests, replies = sys.stdin.buffer, sys.stdout.buffer
  sys.stdout = sys.stderr  # what a task prints is no reply
  entries = _create(*pickle.load(requests))
  while True:
    try:
      index = pickle.load(requests)
    except EOFError:
      return
    pickle.dump(entries[index], replies)
    replies.flush()


if __name__ == "__main__":
  _serve()
