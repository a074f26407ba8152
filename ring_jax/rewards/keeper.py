"""The scoring processes' side of the pool: one keeper that has everything imported, and the workers it forks.

The keeper is a fresh interpreter without JAX and without threads, so that forking it is safe and takes milliseconds;
a lost worker is replaced at that price, not at that of importing SymPy.  It does nothing but fork on request.

Keeper:  reads a `Setup` from stdin, imports, sends a byte; then for each socket received, forks a worker that serves
         it and sends the worker's process id.  Ends when its control socket closes, that is, when the parent ends.
Worker:  reads pickled (ticket, source, entry, answer), writes `REPLY` (ticket, kind, score) after each one.
         It never sends pickles: what comes out of a process that saw a model's text is numbers only.
"""

import contextlib
import dataclasses
import gc
import importlib
import os
import pickle
import socket
import struct
import sys

import reasoning_gym

from configs.schema import AnswerFormat, TaskConfig
from ring_jax.rewards import limits, verifiers

REPLY = struct.Struct("<QBd")
PID = struct.Struct("<i")
READY = b"R"
FORK = b"F"
KINDS = ("ok", "memory", "error")  # that a worker can report itself, by their code in a reply


@dataclasses.dataclass(frozen=True)
class Setup:
  """What the keeper needs to know."""

  config: TaskConfig
  modules: tuple[str, ...]  # imported first; they may register more tasks with Reasoning Gym


class Grader:
  """Scores answers to the tasks of a mixture."""

  def __init__(self, config: TaskConfig):
    self._config = config
    self._datasets = [
      reasoning_gym.create_dataset(source.name, seed=0, size=1, **source.options) for source in config.mixture
    ]

  def warm_up(self) -> None:
    """Loads what scorers load late, so that no worker has to."""
    if self._config.answer is AnswerFormat.BOXED:
      verifiers.equal_in_value("1/2", "\\frac{1}{2}")

  def grade(self, source: int, entry: dict, answer: str) -> tuple[int, float]:
    """(code of the kind, score)."""
    try:
      score = verifiers.score(self._datasets[source], entry, answer, self._config.answer, self._config.exact)
    except MemoryError:
      return KINDS.index("memory"), 0.0
    except BaseException:  # a scorer that exits or interrupts has failed too
      return KINDS.index("error"), 0.0
    return KINDS.index("ok"), score


def serve(connection: socket.socket, grader: Grader, deadline: float) -> None:
  """The worker: answers until the connection closes."""
  requests = connection.makefile("rb")
  while True:
    try:
      ticket, source, entry, answer = pickle.load(requests)
    except EOFError:
      return
    limits.allow_seconds(deadline)
    connection.sendall(REPLY.pack(ticket, *grader.grade(source, entry, answer)))


def _fork(connection: socket.socket, control: socket.socket, grader: Grader, deadline: float) -> int:
  keeper = os.getpid()
  pid = os.fork()
  if pid:
    with contextlib.suppress(OSError):  # the child was first, or is gone already
      os.setpgid(pid, pid)  # so that it is killed with all that it starts
    return pid
  try:
    os.setpgid(0, 0)
    limits.die_with_parent(keeper)
    control.close()
    limits.confine()
    serve(connection, grader, deadline)
  finally:
    os._exit(0)


def main() -> None:
  control = socket.socket(fileno=int(sys.argv[1]))
  setup: Setup = pickle.load(sys.stdin.buffer)
  for module in setup.modules:
    importlib.import_module(module)
  grader = Grader(setup.config)
  grader.warm_up()
  gc.freeze()  # pages that the workers share stay shared
  control.sendall(READY)
  while True:
    message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if message != FORK:
      return
    with contextlib.suppress(ChildProcessError):  # only now: until here the pool may still kill them by their id
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass
    with socket.socket(fileno=descriptors[0]) as connection:
      control.sendall(PID.pack(_fork(connection, control, grader, setup.config.deadline)))


if __name__ == "__main__":
  with contextlib.suppress(ConnectionError):  # the parent ended meanwhile
    main()
