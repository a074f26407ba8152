"""What is checked before anything is loaded: versions here, and that all processes are of one mind.

Each check ends the command within seconds, with one line and exit status 2.  `ring_jax.train.preflight` goes on with
what needs the config: devices and disk.
"""

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from configs.schema import ConfigError, RunConfig, require, to_dict
from sharding.processes import Member

_PACKAGE = "ring-jax"
_DECISIVE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu")  # equal in all processes
_MAX_SKEW = 5.0  # seconds between two clocks: logs of several hosts are read side by side


def check_versions() -> None:
  """Python and packages are in the ranges of setup.py, and libtpu is the one that this jax was made with.

  Where the package runs from a folder without being installed, its ranges are not known, and not checked.
  """
  try:
    own = importlib.metadata.metadata(_PACKAGE)
  except importlib.metadata.PackageNotFoundError:
    own = None
  if own is not None:
    check_python(".".join(map(str, sys.version_info[:3])), own["Requires-Python"])
    for text in importlib.metadata.requires(_PACKAGE) or []:
      requirement = Requirement(text)
      if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        check_package(requirement, _version(requirement.name))
  libtpu, wanted = _version("libtpu"), [Requirement(text) for text in importlib.metadata.requires("jax") or []]
  if libtpu is not None and "tpu" in (jax.config.jax_platforms or "tpu"):
    check_libtpu(libtpu, next((one for one in wanted if one.name == "libtpu"), None), jax.__version__)


def check_python(version: str, window: str | None) -> None:
  require(window is None or version in SpecifierSet(window), f"Python {version} runs, but {_PACKAGE} needs {window}")


def check_package(requirement: Requirement, version: str | None) -> None:
  name, window = requirement.name, requirement.specifier
  require(version is not None, f"{name} is not installed, but {_PACKAGE} needs {name}{window}")
  require(
    window.contains(version, prereleases=True),
    f"{name} {version} is installed, but {_PACKAGE} needs {name}{window}: pip install '{name}{window}'",
  )


def check_libtpu(version: str, wanted: Requirement | None, jax_version: str) -> None:
  require(
    wanted is None or wanted.specifier.contains(version, prereleases=True),
    f"libtpu {version} is installed, but jax {jax_version} was made with libtpu{wanted and wanted.specifier}:"
    f" pip install 'jax[tpu]=={jax_version}'",
  )


def facts(command: str, config: RunConfig | None) -> dict[str, Any]:
  """What this process tells the others of itself."""
  versions = {name: version for name in _DECISIVE if (version := _version(name)) is not None}
  return {
    "command": command,
    "config": None if config is None else digest(config),
    "versions": {"python": ".".join(map(str, sys.version_info[:2]))} | versions,
  }


def digest(config: RunConfig) -> str:
  return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def check_members(members: Sequence[Member]) -> None:
  """All processes run the same command on the same config, with the same versions and by the same clock.

  Every process has the same list, so that all end with the same line.
  """
  first = members[0]
  for member in members[1:]:
    for name, what in (("command", "runs another command"), ("config", "has another config")):
      if member.facts[name] != first.facts[name]:
        raise ConfigError(f"{member} {what} than {first} ({member.facts[name]}, {first.facts[name]})")
    theirs, ours = member.facts["versions"], first.facts["versions"]
    for name in sorted(theirs.keys() | ours.keys()):
      if theirs.get(name) != ours.get(name):
        raise ConfigError(
          f"{member} has {name} {theirs.get(name, 'not installed')}, {first} has {ours.get(name, 'not installed')}"
        )
    require(
      abs(member.skew) <= _MAX_SKEW,
      f"the clock of {member} is {abs(member.skew):.1f} s {'ahead of' if member.skew > 0 else 'behind'} that of {first}"
      f" (at most {_MAX_SKEW:g} s): start a time service (chrony, ntpd) on both",
    )


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None
