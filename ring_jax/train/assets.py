"""What a run needs before its first step: the tokenizer, the problems, and weights to start from."""

import dataclasses
import pathlib

from jax.sharding import Mesh

from configs.schema import ModelConfig, RolloutConfig, TaskConfig, TokenizerConfig, require
from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.data.tasks import TaskSet, token_limits
from ring_jax.data.tokenizer import Tokenizer, run_file
from ring_jax.model import Params, init_params, param_shardings
from sharding import processes

# Fields of the model config that say how it is computed, not what: a checkpoint may differ in them.
_COMPUTED_HOW = ("dtype", "param_dtype", "remat", "initializer_range", "max_position_embeddings", "parallel")


def prepare_tokenizer(config: TokenizerConfig, init: str, tasks: TaskSet, workdir: pathlib.Path) -> Tokenizer:
  """A run's tokenizer, built first where there is none to be found.

  Args:
    init: the run's initial checkpoint; may be empty.
    workdir: where a run keeps the tokenizer that it built.
  """
  file = run_file(config, init, workdir)

  def build() -> None:
    if not file.exists():
      Tokenizer.build(tasks.corpus(), config.merges).save(file)

  if not (config.path or init):
    processes.group().from_first("tokenizer", build)
  require(config.path or file.exists(), f"tokenizer.path: {init} brings no {file.name}, so this must name one")
  return Tokenizer.load(file)


def require_built(config: TokenizerConfig, init: str, workdir: pathlib.Path) -> None:
  """Raises ConfigError: the run built its tokenizer, and it is gone.  What is read with another one is not what was written."""
  file = run_file(config, init, workdir)
  require(config.path or init or file.exists(), f"{file}: the run's tokenizer is missing; it lies in the run's workdir")


def prepare_tasks(
  task: TaskConfig, template: TokenizerConfig, rollout: RolloutConfig, seed: int, init: str, workdir: pathlib.Path
) -> tuple[Tokenizer, TaskSet]:
  """Tokenizer and problems, those left out that do not fit the rollout's lengths."""
  tasks = TaskSet(task, template, seed)
  tokenizer = prepare_tokenizer(template, init, tasks, workdir)
  return tokenizer, tasks.filtered(token_limits(tokenizer, rollout.max_prompt_tokens, rollout.max_tokens))


def initial_params(model: ModelConfig, init: str, seed: int, mesh: Mesh | None = None) -> Params:
  """Weights of the initial checkpoint in the model's `param_dtype`; random ones where there is none.

  On a mesh every device gets its own parts, and no other.
  """
  if not init:
    return init_params(model, seed, mesh)

  def placed(found: ModelConfig) -> Params:
    return param_shardings(dataclasses.replace(found, parallel=model.parallel), mesh)

  opened = open_checkpoint(init, dtype=model.param_dtype, shardings=None if mesh is None else placed)
  differing = [
    f"{field.name} ({getattr(opened.config, field.name)} there, {getattr(model, field.name)} in the config)"
    for field in dataclasses.fields(ModelConfig)
    if field.name not in _COMPUTED_HOW and getattr(opened.config, field.name) != getattr(model, field.name)
  ]
  require(not differing, f"init={init}: its model is another one: {', '.join(differing)}")
  return opened.params
