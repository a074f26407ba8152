"""From files and command lines to a `RunConfig`, and back from stored JSON.

A run is a Python file with `get_config()`, plus overrides such as `rollout.token_budget=4096`.  All overrides are put
into the tree first and every dataclass is rebuilt bottom-up afterwards, so that its `__post_init__` judges the final
values: two overrides that are only valid together work.

Some fields are filled in on construction when they are left at their default (`rollout.pool` becomes `rollout.slots`).
A built config no longer tells whether such a value was written or derived, so a field whose value is just what its
default gives counts as not written, and is derived again from the overridden ones.
"""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from configs.schema import OBJECTIVES, ConfigError, Enum, IcePopConfig, ModelConfig, RunConfig, to_dict

# Configs that the command line may call by name.
_NAMED: Mapping[type, Mapping[str, Any]] = {IcePopConfig: OBJECTIVES}


def load(path: str | pathlib.Path) -> RunConfig:
  """Runs the file's `get_config()`.

  Raises:
    ConfigError: no such file, no `get_config`, not a `RunConfig`, or what went wrong inside, with its line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f"config file {path}: " + ("is a folder" if path.is_dir() else "does not exist"))
  spec = importlib.util.spec_from_file_location("run_config", path)
  if spec is None:
    raise ConfigError(f"config file {path}: must be a Python file (.py) with a function get_config()")
  module = importlib.util.module_from_spec(spec)
  _guarded(path, spec.loader.exec_module, module)
  if not callable(getattr(module, "get_config", None)):
    raise ConfigError(f"config file {path}: has no function get_config()")
  config = _guarded(path, module.get_config)
  if not isinstance(config, RunConfig):
    raise ConfigError(f"config file {path}: get_config() returned a {type(config).__name__}, not a RunConfig")
  return config


def override(config: RunConfig, overrides: Mapping[str, str]) -> RunConfig:
  """The config with values from the command line.

  Args:
    overrides: dotted path (tuples by index, mappings by key) -> text.  A path that ends at a tuple, a mapping or a
      dataclass takes JSON, or a name where such configs have names (`OBJECTIVES`).

  Raises:
    ConfigError: an unknown field (with the nearest names), text that the field's type refuses, or an invalid result.
  """
  patch: dict[str, Any] = {}
  for path, text in overrides.items():
    _insert(patch, path, text)
  return _patched(RunConfig, config, patch, "")


def differences(before: RunConfig, after: RunConfig) -> dict[str, str]:
  """The overrides that make the one config of the other."""
  return _differences(to_dict(before), to_dict(after), "")


def from_dict(data: Mapping[str, Any]) -> RunConfig:
  """The inverse of `schema.to_dict`."""
  return _from_json(RunConfig, data, "")


def of_run(workdir: pathlib.Path, where: str) -> RunConfig:
  """The config that a run has stored in its workdir.

  Args:
    where: how an error begins: the flag with its value, or the folder.

  Raises:
    ConfigError: there is no run.
  """
  try:
    return from_dict(json.loads((workdir / "config.json").read_text()))
  except OSError as error:
    raise ConfigError(f"{where}: config.json cannot be read ({error.strerror})") from None
  except ValueError as error:
    raise ConfigError(f"{where}: config.json is not a run's ({error})") from None


def model_from_dict(data: Mapping[str, Any]) -> ModelConfig:
  """The inverse of `schema.to_dict` for the model alone."""
  return _from_json(ModelConfig, data, "model")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _guarded(path: pathlib.Path, function: Callable, *args: Any) -> Any:
  """Calls code of the config file; what it raises becomes one line that says where."""
  try:
    return function(*args)
  except Exception as error:
    raise ConfigError(f"{path}:{_line_of(error, path)}: {_reason(error)}") from error


def _line_of(error: Exception, path: pathlib.Path) -> int:
  """The last line of the config file that the error went through."""
  if isinstance(error, SyntaxError) and error.lineno:
    return error.lineno
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
  return lines[-1] if lines else 1


def _reason(error: Exception) -> str:
  text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
  return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------------------------------------------------------------
# Overrides: a nested dict of texts, laid over the tree


def _insert(patch: dict[str, Any], path: str, text: str) -> None:
  *parents, last = path.split(".")
  for name in parents:
    patch = patch.setdefault(name, {})
    if not isinstance(patch, dict):
      raise ConfigError(f"{path}: a part of {name!r}, which another override replaces as a whole")
  if last in patch:
    raise ConfigError(f"{path}: overridden twice, or as a whole and in part")
  patch[last] = text


def _differences(before: Any, after: Any, path: str) -> dict[str, str]:
  if before == after:
    return {}
  if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
    changes: dict[str, str] = {}
    for name in after:
      changes |= _differences(before[name], after[name], f"{path}.{name}".lstrip("."))
    return changes
  return {path: after if isinstance(after, str) else json.dumps(after)}


def _patched(kind: Any, old: Any, patch: Any, path: str) -> Any:
  """`old`, of the declared type `kind`, with the patch applied."""
  if isinstance(patch, str):
    return _from_text(kind, patch, path)
  kind = _without_none(kind)
  if dataclasses.is_dataclass(kind):
    return _patched_dataclass(kind, old, patch, path)
  if typing.get_origin(kind) is tuple:
    return _patched_tuple(kind, old, patch, path)
  if typing.get_origin(kind) is Mapping:
    new = dict(old or {})
    for key, value in patch.items():
      if isinstance(value, dict):
        raise ConfigError(f"{path}.{key}: give what lies below this key as JSON")
      new[key] = _json_or_text(value)
    return new
  raise ConfigError(f"{path}.{next(iter(patch))}: unknown field; {path} is {_wants(kind)}")


def _patched_dataclass(kind: type, old: Any, patch: Mapping[str, Any], path: str) -> Any:
  types_of = typing.get_type_hints(kind)
  _check_names(patch, types_of, path)
  values = {}
  if old is not None:
    values = {name: getattr(old, name) for name in types_of if name not in _derived(old)}
  for name, part in patch.items():
    values[name] = _patched(types_of[name], values.get(name), part, _join(path, name))
  return _build(kind, values, path)


def _patched_tuple(kind: Any, old: tuple, patch: Mapping[str, Any], path: str) -> tuple:
  items = list(old or ())
  for index, part in patch.items():
    if not index.isdecimal() or int(index) >= len(items):
      raise ConfigError(
        f"{path}.{index}: no such entry; {path} has {len(items)}, counted from 0 (to change how many, give JSON)"
      )
    items[int(index)] = _patched(typing.get_args(kind)[0], items[int(index)], part, f"{path}.{index}")
  return tuple(items)


def _derived(config: Any) -> set[str]:
  """Fields that construction fills in: reset to their default, they come out as they are."""
  found = set()
  for field in dataclasses.fields(config):
    if field.default is dataclasses.MISSING or getattr(config, field.name) == field.default:
      continue
    try:
      if dataclasses.replace(config, **{field.name: field.default}) == config:
        found.add(field.name)
    except ConfigError:
      pass  # the default does not fit here: the value was written
  return found


# ---------------------------------------------------------------------------------------------------------------------
# Values by declared type


def _from_text(kind: Any, text: str, path: str) -> Any:
  """The value that a command line means for a field of this type."""
  if _without_none(kind) is not kind and text.lower() in ("none", "null"):
    return None
  kind = _without_none(kind)
  if kind is Any:
    return _json_or_text(text)
  if kind is str or (isinstance(kind, type) and issubclass(kind, Enum)):
    return _from_json(kind, text, path)
  if text in _NAMED.get(kind, {}):
    return _NAMED[kind][text]
  try:
    if kind is int or kind is float:
      return kind(text)
    value = json.loads(text.lower() if kind is bool else text)
  except ValueError as error:
    detail = f" ({error})" if isinstance(error, json.JSONDecodeError) and kind is not bool else ""
    raise ConfigError(f"{path}={text!r}: must be {_wants(kind)}{detail}") from None
  return _from_json(kind, value, path)


def _from_json(kind: Any, value: Any, path: str) -> Any:
  """The value that plain JSON data means for a field of this type."""
  if value is None and _without_none(kind) is not kind:
    return None
  kind = _without_none(kind)
  origin = typing.get_origin(kind)
  if kind is Any:
    return value
  if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
    types_of = typing.get_type_hints(kind)
    _check_names(value, types_of, path)
    return _build(kind, {name: _from_json(types_of[name], value[name], _join(path, name)) for name in value}, path)
  if origin is tuple and isinstance(value, (list, tuple)):
    item = typing.get_args(kind)[0]
    return tuple(_from_json(item, one, f"{path}.{index}") for index, one in enumerate(value))
  if origin is Mapping and isinstance(value, Mapping):
    return dict(value)
  if isinstance(kind, type) and issubclass(kind, Enum):
    if value in [member.value for member in kind]:
      return kind(value)
  elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  elif kind in (int, bool, str) and type(value) is kind:
    return value
  raise ConfigError(f"{path}={value!r}: must be {_wants(kind)}")


def _build(kind: type, values: Mapping[str, Any], path: str) -> Any:
  for field in dataclasses.fields(kind):
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    if needed and field.name not in values:
      raise ConfigError(f"{_join(path, field.name)}: is missing")
  return kind(**values)


def _check_names(given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> None:
  for name in given:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
      hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(known)}"
      raise ConfigError(f"{_join(path, name)}: unknown field; {hint}")


def _without_none(kind: Any) -> Any:
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    rest = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return rest[0]
  return kind


def _json_or_text(text: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return text


def _wants(kind: Any) -> str:
  if isinstance(kind, type) and issubclass(kind, Enum):
    return "one of " + ", ".join(member.value for member in kind)
  if kind in _NAMED:
    return f"one of {', '.join(_NAMED[kind])}, or a JSON object of {kind.__name__}'s fields"
  if dataclasses.is_dataclass(kind):
    return f"a JSON object of {kind.__name__}'s fields"
  if typing.get_origin(kind) is tuple:
    return "a JSON list"
  if typing.get_origin(kind) is Mapping:
    return "a JSON object"
  return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]


def _join(path: str, name: str) -> str:
  return f"{path}.{name}" if path else name
