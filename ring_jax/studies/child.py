"""The process of one point: measures it and leaves result.json in its folder.

    python -m ring_jax.studies.child MODULE CLASS POINT FOLDER SETTINGS SOCKET

The runner starts it with the cores and the devices of the point, and sends its output to a file.  SOCKET is the number of an
open one to the runner, through which the point asks for its turn.
"""

import importlib
import json
import os
import pathlib
import socket
import sys
import time

from ring_jax.studies.study import Place, Settings, Turn
from ring_jax.train.job import Stopped
from ring_jax.train.workdir import write_atomic

RESULT = "result.json"
BEGIN, END, GRANTED = b"b", b"e", b"g"


class _Asked(Turn):
  """The runner is asked, and stops the other points meanwhile."""

  def __init__(self, runner: socket.socket):
    self._runner = runner

  def begin(self) -> None:
    self._runner.sendall(BEGIN)
    self._runner.recv(1)  # GRANTED, or nothing from a runner that ends: then there are no others

  def end(self) -> None:
    self._runner.sendall(END)


def main(module: str, kind: str, name: str, folder: str, settings: str, runner: str) -> int:
  """Returns the exit status."""
  study, given = getattr(importlib.import_module(module), kind)(), Settings(**json.loads(settings))
  point, home = next(one for one in study.points(given) if one.name == name), pathlib.Path(folder)
  own = home / point.name
  own.mkdir(parents=True, exist_ok=True)
  started, spent = time.time(), _cpu_seconds()
  try:
    result = study.measure(point, given, Place(own, home.joinpath, _Asked(socket.socket(fileno=int(runner)))))
  except Stopped as stopped:
    return stopped.status
  cost = {"seconds": time.time() - started, "cpu_seconds": _cpu_seconds() - spent}
  write_atomic(own / RESULT, json.dumps({"result": result, "cost": cost}, indent=1) + "\n")
  return 0


def _cpu_seconds() -> float:
  """Of this process and of those that it started and that have ended."""
  return sum(os.times()[:4])


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
