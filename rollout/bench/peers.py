"""The other engines: each in a process of its own that stays alive, asked by JSON lines (parity/bench_peer.py).

They are processes because PyTorch and JAX each keep their threads, and because `rollout` may import neither PyTorch nor
vLLM.
"""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

from rollout.line_process import LineProcess

_ROOT = pathlib.Path(__file__).parents[2]


class PeerError(RuntimeError):
  """The engine is not there, or failed; one line."""


class Peer(LineProcess):
  """Raises:
  PeerError: the engine cannot be imported.
  """

  def __init__(
    self, engine: str, threads: int, clock: str = "wall", interpreter: str | None = None, device: str = "cpu"
  ):
    command = [interpreter or sys.executable, "-m", "parity.bench_peer"]
    command += [f"--engine={engine}", f"--threads={threads}", f"--clock={clock}", f"--device={device}"]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    if device == "cpu":
      environment["CUDA_VISIBLE_DEVICES"] = ""
    super().__init__(command, name=engine, error=PeerError, environment=environment)
    self.versions: Mapping[str, str] = self.greeting["versions"]

  def open(self, folder: pathlib.Path, dtype: str, slots: int, length: int) -> None:
    """Opens a checkpoint for `slots` sequences of at most `length` tokens."""
    self.ask({"open": {"folder": str(folder), "dtype": dtype, "slots": slots, "length": length}}, "opening")

  def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds to draw so many tokens for every prompt."""
    return self.ask({"generate": {"prompts": prompts, "tokens": tokens}}, "generating")["seconds"]

  def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probs of each sequence's tokens from the second on."""
    return self.ask({"score": {"sequences": sequences}}, "scoring")["logps"]
