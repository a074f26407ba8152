"""What the configuration classes share: one kind of error, enums that read like their values, plain data out."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
  """A configuration that cannot be run; the message is one line for the user."""


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


class Enum(str, enum.Enum):
  """An enum whose members are written as their values in files and on the command line."""

  def __str__(self) -> str:
    return self.value


def coerce_enum(config: Any, name: str, kind: type[Enum], where: str) -> None:
  value = getattr(config, name)
  try:
    object.__setattr__(config, name, kind(value))
  except ValueError:
    choices = ", ".join(member.value for member in kind)
    raise ConfigError(f"{where}.{name}={value!r}: one of {choices}") from None


def to_dict(config: Any) -> Any:
  """The config as plain JSON data: dicts, lists, numbers, strings."""
  if dataclasses.is_dataclass(config):
    return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
  if isinstance(config, Enum):
    return config.value
  if isinstance(config, Mapping):
    return {str(key): to_dict(value) for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return [to_dict(value) for value in config]
  return config
