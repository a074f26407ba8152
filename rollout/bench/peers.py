"""The other engines: each in a process of its own that stays alive, asked by JSON lines (parity/bench_peer.py).

They are processes because PyTorch and JAX each keep their threads, and because `rollout` may import neither PyTorch nor
vLLM.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Self

_ROOT = pathlib.Path(__file__).parents[2]
_LOG_LINES = 2  # of the process's log in an error


class PeerError(RuntimeError):
  """The engine is not there, or failed; one line."""


class Peer:
  """Raises:
  PeerError: the engine cannot be imported.
  """

  def __init__(self, engine: str, threads: int, clock: str = "wall", interpreter: str | None = None):
    self._engine = engine
    self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # closed by close()
    command = [interpreter or sys.executable, "-m", "parity.bench_peer"]
    command += [f"--engine={engine}", f"--threads={threads}", f"--clock={clock}"]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
      env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
      self.versions: Mapping[str, str] = self._receive()["versions"]
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def close(self) -> None:
    if self._process.poll() is None:
      self._process.kill()  # it holds nothing worth a graceful end
    self._process.wait()
    self._log.close()

  def open(self, folder: pathlib.Path, dtype: str, slots: int, length: int) -> None:
    """Opens a checkpoint for `slots` sequences of at most `length` tokens."""
    self._ask("open", folder=str(folder), dtype=dtype, slots=slots, length=length)

  def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds to draw so many tokens for every prompt."""
    return self._ask("generate", prompts=prompts, tokens=tokens)["seconds"]

  def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probs of each sequence's tokens from the second on."""
    return self._ask("score", sequences=sequences)["logps"]

  def _ask(self, kind: str, **arguments: Any) -> dict[str, Any]:
    try:
      self._process.stdin.write(json.dumps({kind: arguments}) + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      raise PeerError(f"{self._engine}: its process has ended{self._tail()}") from None
    return self._receive()

  def _receive(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise PeerError(f"{self._engine}: its process ended with status {self._process.wait()}{self._tail()}")
    reply = json.loads(line)
    if "error" in reply:
      raise PeerError(f"{self._engine}: {reply['error']}")
    return reply

  def _tail(self) -> str:
    self._log.seek(0)
    said = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
    return f"; it said: {' | '.join(said[-_LOG_LINES:])}" if said else ""
