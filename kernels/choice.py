"""Choosing one implementation of an op: by name, or by the platform that a program is compiled for."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from configs.schema import ConfigError, Enum

Kind = TypeVar("Kind", bound=Enum)


def choose(implementation: Kind | str | None, default: Kind, op: str) -> Kind:
  """The member of default's enum that is meant; None is the default.  Raises ConfigError for a name it has not."""
  if implementation is None:
    return default
  kind = type(default)
  try:
    return kind(implementation)
  except ValueError:
    choices = ", ".join(member.value for member in kind)
    raise ConfigError(f"{op}: implementation={str(implementation)!r}: one of {choices}") from None


@functools.cache
def compiles_for_gpus() -> bool:
  """Whether JAX's plugin for NVIDIA's GPUs is installed.

  Without it no program is compiled for one, and tracing what only a GPU would run is a fifth of the time that a gradient's
  program takes to be traced.
  """
  return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def passes(
  chosen: Kind | None, name: str, kernels: Mapping[Kind, tuple[str, Any]], **elsewhere: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
  """The forms of one pass of an op, for `jax.lax.platform_dependent`.

  Args:
    chosen: what was asked for; None: what is best on each platform.
    name: of the pass: a function of each module of kernels, which takes `interpret`.
    kernels: the platform of each implementation that is kernels, and its module.
    elsewhere: the pass in plain XLA, by platform, `default` among them.
  """
  if chosen in kernels:
    platform, module = kernels[chosen]
    kernel = getattr(module, name)
    return {platform: kernel, "default": functools.partial(kernel, interpret=True)}  # interpreting is for tests
  if chosen is not None:
    return dict(elsewhere)
  known = [(platform, module) for platform, module in kernels.values() if platform != "cuda" or compiles_for_gpus()]
  return elsewhere | {platform: getattr(module, name) for platform, module in known}
