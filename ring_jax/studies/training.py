"""Training runs as points: one cold start a seed, and runs of RL from its weights.

The runs of one seed share the checkpoint, the tokenizer and the order of the problems, and differ in what the arm says.  They
are ordinary runs of ring_jax.train.job in an ordinary workdir, to be looked at like any other.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from configs.schema import RunConfig
from ring_jax.studies.study import Place, Point, Result, Settings
from ring_jax.train.job import run_job
from ring_jax.train.report import metrics

COLD = "cold_start"
_RUN = "run"  # the workdir, in the point's folder


def quick(config: RunConfig, steps: int = 4) -> RunConfig:
  """The programs of RL for a few steps from random weights; partial scores count, so that there is something to learn from."""
  return dataclasses.replace(
    config,
    task=dataclasses.replace(config.task, exact=False),
    sft=dataclasses.replace(config.sft, steps=0),
    rl=dataclasses.replace(config.rl, steps=steps, eval_every=0),
    eval=dataclasses.replace(config.eval, problems=16, samples=2, slots=32),
  )


def from_cold_starts(settings: Settings, arms: Iterable[str]) -> list[Point]:
  """A cold start a seed, and every arm from it; arm by arm, so that what all seeds say of the first ones is known early."""
  cold = [Point(COLD, seed) for seed in settings.all_seeds]
  return cold + [Point(arm, one.seed, needs=(one.name,)) for arm in arms for one in cold]


def cold_start(config: RunConfig, seed: int, place: Place) -> Result:
  """SFT until the config's accuracy; random weights where the config has none."""
  config = dataclasses.replace(config, seed=seed, rl=dataclasses.replace(config.rl, steps=0))
  progress = run_job(config, str(place.folder / _RUN), watchdog=0)
  accuracy = progress.evaluations["sft" if config.sft.steps else "start"]["accuracy"]
  return {"accuracy": accuracy, "steps": progress.step}


def train(config: RunConfig, seed: int, place: Place, names: Sequence[str]) -> Result:
  """RL from the cold start of the seed; `names` are the metrics to keep, step by step."""
  cold = place.of(f"{COLD}_seed{seed}") / _RUN
  config = dataclasses.replace(config, seed=seed, init=str(cold), sft=dataclasses.replace(config.sft, steps=0))
  workdir = place.folder / _RUN
  progress = run_job(config, str(workdir), watchdog=0)
  return {
    "before": progress.evaluations["start"]["accuracy"],
    "after": progress.evaluations["rl"]["accuracy"],
    **history(workdir, names),
  }


def timed(config: RunConfig, phase: str, warm_up: int, place: Place) -> pathlib.Path:
  """Runs a job that has its turn from the step after the first `warm_up` ones of `phase`, which compile, to the last.

  Returns:
    Its workdir.
  """
  last, taken = config.phase(phase).steps, False

  def on_step(name: str, finished: int) -> None:
    nonlocal taken
    if name == phase and finished == last and taken:
      place.turn.end()
    elif name == phase and finished >= warm_up and not taken:  # later than that in a run that was stopped there
      place.turn.begin()
      taken = True

  workdir = place.folder / _RUN
  run_job(config, str(workdir), watchdog=0, on_step=on_step)
  return workdir


def history(workdir: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
  """What a run of RL logged: `series` by metric and `seconds` by stage, a value a step; `probes` of held-out problems."""
  logged, timed = ([record for record in log if record["phase"] == "rl"] for log in metrics.read_logs(workdir))
  stages = sorted({name for record in timed for name in record if name.startswith("seconds/")})
  return {
    "series": {name: [record.get(name) for record in logged] for name in names},
    "seconds": {name.removeprefix("seconds/"): [record.get(name, 0.0) for record in timed] for name in stages},
    "probes": [
      [step, record["held_out_accuracy"]] for step, record in enumerate(logged, 1) if "held_out_accuracy" in record
    ],
  }


def accuracies(result: Result) -> tuple[list[int], list[float]]:
  """Steps and held-out accuracies, from the first measurement to the last."""
  steps = len(next(iter(result["series"].values())))
  points = [(0, result["before"]), *((step, value) for step, value in result["probes"]), (steps, result["after"])]
  return [step for step, _ in points], [value for _, value in points]
