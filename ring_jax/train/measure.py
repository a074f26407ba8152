"""Measuring a checkpoint: which task, which tokenizer and which lengths to use, from what lies beside the weights.

A run's checkpoint brings its own config: task, template, lengths, tokenizer.  A Hugging Face folder brings a
tokenizer.json; the task must be named, and its answers are looked for in \\boxed{} after the chat template's prompt.
"""

import dataclasses
import pathlib
from typing import Any

from configs import loading
from configs.schema import (
  AnswerFormat,
  ChatTemplate,
  RolloutConfig,
  TaskConfig,
  TaskSource,
  TokenizerConfig,
  require,
)
from ring_jax.checkpoint.resolve import Opened, open_checkpoint
from ring_jax.data.tokenizer import FILE
from ring_jax.rewards.pool import ScoringPool
from ring_jax.train.assets import prepare_tasks, require_built
from ring_jax.train.evaluation import Evaluation, Evaluator
from ring_jax.train.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to measure with; None: what the checkpoint's run used."""

  task: str | None = None
  samples: int = 8
  problems: int = 512
  slots: int | None = None
  max_prompt_tokens: int | None = None
  max_tokens: int | None = None
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0


def measure(path: str, settings: Settings) -> tuple[Opened, Evaluation]:
  """Evaluates the checkpoint at `path`.

  Raises:
    ConfigError: the task, the tokenizer or a setting does not fit.
    CheckpointError: there is no checkpoint there.
  """
  opened = open_checkpoint(path)
  require(
    settings.task is not None or "config" in opened.extras,
    "--task is missing: a Hugging Face folder does not say what to measure it on",
  )
  task, template, rollout, init, workdir = _of_run(opened) if "config" in opened.extras else _of_folder(opened)
  task = dataclasses.replace(task, mixture=_mixture(task, settings.task), held_out_size=settings.problems)
  given = {
    name: value
    for name in ("max_prompt_tokens", "max_tokens", "temperature", "top_p", "top_k")
    if (value := getattr(settings, name)) is not None
  }
  slots = settings.slots or rollout.slots
  rollout = dataclasses.replace(rollout, slots=slots, pool=max(slots, rollout.group_size), **given)
  require(settings.samples > 0, f"--samples={settings.samples}: must be at least 1")
  tokenizer, tasks = prepare_tasks(task, template, rollout, 0, init, workdir)
  with ScoringPool(task, thinking=template.thinking) as pool:
    evaluator = Evaluator(opened.config, rollout, slots=slots, samples=settings.samples, scorer=Scorer(pool, tokenizer))
    return opened, evaluator(opened.params, tasks.held_out())


def _of_run(opened: Opened) -> tuple[TaskConfig, TokenizerConfig, RolloutConfig, str, pathlib.Path]:
  """The run's own settings."""
  config = loading.from_dict(opened.extras["config"])
  require_built(config.tokenizer, config.init, opened.workdir)
  return config.task, config.tokenizer, config.rollout, config.init, opened.workdir


def _of_folder(opened: Opened) -> tuple[TaskConfig, TokenizerConfig, RolloutConfig, str, pathlib.Path]:
  folder = pathlib.Path(opened.extras["folder"])
  require((folder / FILE).is_file(), f"{folder}: has no {FILE}, which an evaluation needs")
  task = TaskConfig(mixture=(TaskSource("chain_sum"),), answer=AnswerFormat.BOXED)  # the mixture is replaced
  template = TokenizerConfig(path=str(folder), template=ChatTemplate.CHAT)
  return task, template, RolloutConfig(token_budget=1, slots=64), "", folder


def _mixture(task: TaskConfig, name: str | None) -> tuple[TaskSource, ...]:
  """The named task as the run phrases it, or, if the run does not have it, as Reasoning Gym does."""
  if name is None:
    return task.mixture
  own = tuple(source for source in task.mixture if source.name == name)
  return own or (TaskSource(name),)


def as_json(opened: Opened, settings: Settings, result: Evaluation) -> dict[str, Any]:
  own = [source["name"] for source in opened.extras["config"]["task"]["mixture"]] if "config" in opened.extras else []
  return {"step": opened.step, "task": settings.task or ",".join(own)} | result.metrics()
