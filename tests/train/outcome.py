"""What a run leaves behind, to be compared with what another left."""

import pathlib

from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.checkpoint.store import steps
from ring_jax.launch.digest import digest
from rollout import events


def final_state(workdir: pathlib.Path) -> dict[str, object]:
  """Everything that a run promises to reproduce: metrics, rollouts, parameters, and where its scheduler stands."""
  newest = workdir / "checkpoints" / str(steps(workdir / "checkpoints")[-1])
  return {
    "step": newest.name,
    "parameters": digest(open_checkpoint(workdir).params),
    "metrics": (workdir / "metrics.jsonl").read_text(),
    "events": decisions(workdir / "events.jsonl"),
    "rollouts": {path.name: path.read_text() for path in sorted((workdir / "rollouts").iterdir())},
    "progress and optimizer": (newest / "run" / "metadata").read_text(),  # with a fingerprint of every array
  }


def decisions(path: pathlib.Path) -> list[tuple[str, dict[str, object]]]:
  """An event log without the time that things took."""
  return [
    (type(event).__name__, {name: value for name, value in vars(event).items() if not name.endswith("_seconds")})
    for _, event in events.read(path)
  ]


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
  for name in one:
    assert one[name] == other[name], f"{name} differ"
