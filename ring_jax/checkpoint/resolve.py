"""One door to every kind of checkpoint: a Hugging Face folder, an Orbax step folder, or the workdir of a run."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from configs import loading
from configs.schema import ModelConfig
from ring_jax.checkpoint import hf, shards, store
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.hf_source import HFSource
from ring_jax.model import Params, abstract_params

CHECKPOINTS = "checkpoints"  # of a workdir


class Opened(NamedTuple):
  """A model, read from the disk."""

  config: ModelConfig
  params: Params
  step: int | None  # None for a Hugging Face folder
  extras: dict[str, Any]  # "folder": what was read; of a run also "config" (its RunConfig) and "host", as JSON data

  @property
  def workdir(self) -> pathlib.Path:
    """Of the run whose step this is."""
    return self.extras["folder"].absolute().parents[1]


def open_checkpoint(
  path: str | os.PathLike, dtype: str | None = None, shardings: Callable[[ModelConfig], Params] | None = None
) -> Opened:
  """Reads the model of a Hugging Face folder, an Orbax step folder, or a workdir (its newest readable step).

  Args:
    dtype: of parameters (the router stays float32) and activations; default: as stored.
    shardings: from the model that is found to a tree of shardings, onto which it is read part by part; default: all on
      the first device.

  Raises:
    CheckpointError: the path is none of the three, or what lies there is damaged.
  """
  folder = pathlib.Path(path)

  def trees(run: dict[str, Any]) -> dict[str, Params]:
    config = loading.model_from_dict(run["config"]["model"])
    params = abstract_params(config)
    if shardings is not None:
      params = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), params, shardings(config))
    return {"params": params}

  if store.is_checkpoint(folder):
    return _from_run(store.read(folder, trees), folder, dtype)
  if (folder / CHECKPOINTS).is_dir():
    data, _ = store.read_newest(folder / CHECKPOINTS, trees)
    return _from_run(data, folder / CHECKPOINTS / str(data["run"]["step"]), dtype)
  if _is_hf(folder):
    placed = None if shardings is None else shardings(HFSource(folder, dtype).config)
    config, params = hf.load(folder, shardings=placed, dtype=dtype)
    return Opened(config, params, None, {"folder": folder})
  raise _none(folder)


def is_run(path: str | os.PathLike) -> bool:
  """Whether the path is an Orbax step folder or a workdir."""
  folder = pathlib.Path(path)
  return store.is_checkpoint(folder) or (folder / CHECKPOINTS).is_dir()


def step_folder(path: str | os.PathLike) -> pathlib.Path:
  """The folder with the weights: a workdir's newest step, else the path itself.

  Raises:
    CheckpointError: the path is no checkpoint.
  """
  folder = pathlib.Path(path)
  if store.is_checkpoint(folder) or (not (folder / CHECKPOINTS).is_dir() and _is_hf(folder)):
    return folder
  if not (folder / CHECKPOINTS).is_dir():
    raise _none(folder)
  saved = store.steps(folder / CHECKPOINTS)
  if not saved:
    raise CheckpointError(f"{folder / CHECKPOINTS}: has no checkpoint")
  return folder / CHECKPOINTS / str(saved[-1])


def _is_hf(folder: pathlib.Path) -> bool:
  return any((folder / name).is_file() for name in (shards.INDEX, shards.SINGLE))


def _none(folder: pathlib.Path) -> CheckpointError:
  found = "nothing of the kind in it" if folder.is_dir() else "no such folder"
  return CheckpointError(
    f"{folder}: is no checkpoint ({found}); give a Hugging Face folder (config.json and {shards.SINGLE} or"
    f" {shards.INDEX}), an Orbax step folder (with params/ in it), or a workdir (with {CHECKPOINTS}/<step>/ in it)"
  )


def _from_run(data: dict[str, Any], folder: pathlib.Path, dtype: str | None) -> Opened:
  run = data["run"]
  config, params = loading.model_from_dict(run["config"]["model"]), data["params"]
  if dtype is not None:
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), params, abstract_params(config))
  extras = {"folder": folder}
  if run["config"].keys() != {"model"}:  # what conversion writes has no run behind it: no task, no host state
    extras |= {"config": run["config"], "host": run["host"]}
  return Opened(config, params, run["step"], extras)
