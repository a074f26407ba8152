"""Choosing one implementation of an op by name."""

from typing import TypeVar

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
