"""A Reasoning Gym task whose scorer does what the answer says: what a bad scorer, or a clever answer, could do."""

import ctypes
import dataclasses
import mmap
import os
import sys
import tempfile
import time

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import register_dataset


@dataclasses.dataclass
class HostileConfig:
  seed: int = 0
  size: int = 1


def _recurse(depth):
  return _recurse(depth + 1) + 1


def _spawn():
  for _ in range(4):
    if os.fork() == 0:
      time.sleep(600)
  time.sleep(600)


def _spin():
  while True:
    pass


def _leave_memory_full():
  """Comes back with the address space nearly full: the next item pays, if anyone lets it."""
  _spin.blocks = []
  for size in (1 << 26, 1 << 20, 1 << 12):
    try:
      while True:
        _spin.blocks.append(mmap.mmap(-1, size))  # address space without pages, so that it takes no time
    except OSError:
      pass
  return 1.0


def _write():
  with tempfile.NamedTemporaryFile() as file:
    return file.write(b"x" * 100)


ACTIONS = {
  "hang": _spin,
  "sleep": lambda: time.sleep(600),
  "exit": lambda: os._exit(0),
  "sysexit": lambda: sys.exit(0),
  "segfault": lambda: ctypes.string_at(0),
  "abort": os.abort,
  "memory": lambda: float(len(bytearray(1 << 34))),
  "leak": _leave_memory_full,
  "roomy": lambda: float(len(bytearray(1 << 24)) > 0),
  "recursion": lambda: _recurse(0),
  "raise": lambda: 1 / 0,
  "stdin": lambda: float(len(sys.stdin.read()) == 0),
  "print": lambda: float(bool(print("x" * 10_000_000)) or 1),
  "spawn": _spawn,
  "nan": lambda: float("nan"),
  "huge score": lambda: 1e300,
  "none": lambda: None,
  "write": _write,
  "jax?": lambda: float("jax" in sys.modules),
}


class Hostile(ProceduralDataset):
  def __init__(self, config):
    super().__init__(config, seed=config.seed, size=config.size)

  def __getitem__(self, index):
    raise NotImplementedError("this task has a scorer only")

  def score_answer(self, answer, entry):
    return ACTIONS[answer]() if answer in ACTIONS else float(answer)


register_dataset("hostile", Hostile, HostileConfig)
