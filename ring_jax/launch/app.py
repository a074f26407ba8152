"""The front of every command: flags in, one clear line out when a user got something wrong.

    if __name__ == "__main__":
      define_flags()                    # absl's DEFINE_...; here, so that two commands can be imported together
      app.run(main)                     # main()
      app.run(main, config_flag=True)   # main(config: RunConfig), from --config=FILE and --config.a.b=VALUE

`--config` and its overrides are taken out of the command line before absl sees
it, because the overrides' names are not flags: they are paths into the config tree (`configs.loading.override`).

Exit status: 0 when done, 2 for a mistake of the user, 130 after Ctrl-C; what is left is a bug and shows its traceback.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pathwaysutils
from absl import app, flags, logging

from configs import loading
from configs.schema import ConfigError, RunConfig

_PACKAGES = ("configs", "kernels", "sharding", "ring_jax", "rollout", "parity")


def run(main: Callable[..., Any], config_flag: bool = False) -> NoReturn:
  """Parses the command line, calls `main` and exits.

  Args:
    main: takes the resolved `RunConfig` where `config_flag` is set, nothing otherwise.
    config_flag: whether the command has `--config`.
  """
  argv = sys.argv
  overrides: list[tuple[str, str]] = []
  # Flags of the command itself, so that --help lists them.
  flags.DEFINE_bool("debug", False, "Show the whole traceback of every error.", module_name=argv[0])
  if config_flag:
    flags.DEFINE_string(
      "config",
      None,
      "The run: a Python file with get_config(), as in configs/. Single values: --config.rollout.token_budget=4096.",
      module_name=argv[0],
    )
    argv, overrides = _take_overrides(argv)

  def guarded(_: list[str]) -> None:
    try:
      pathwaysutils.initialize()
      main(*([_resolve(overrides)] if config_flag else []))
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(130)
    except (ValueError, OSError) as error:
      if flags.FLAGS.debug or not _is_users(error):
        raise
      _fail(str(error))

  app.run(guarded, argv=argv, flags_parser=_parse)


def _take_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Splits `--config.a.b=value` and `--config.a.b value` from the other arguments."""
  rest, overrides = [], []
  arguments = iter(argv)
  for argument in arguments:
    name, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name.startswith("config."):
      if not equals:
        value = next(arguments, None)
        if value is None or value.startswith("--"):
          _fail(f"--{name}: needs a value, as in --{name}=VALUE")
      overrides.append((name.removeprefix("config."), value))
    else:
      rest.append(argument)
  return rest, overrides


def _parse(argv: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    _fail(str(error))
  except SystemExit:  # --help and its like, which absl ends with status 1
    sys.exit(0)
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = logging.WARNING  # absl's app would say INFO, at which Orbax tells of every step
  if len(rest) > 1:
    _fail(f"unexpected argument {rest[1]!r}: everything is given by flags, see --help")
  return rest


def _resolve(overrides: list[tuple[str, str]]) -> RunConfig:
  path = flags.FLAGS.config
  if not path:
    raise ConfigError("--config is missing: a Python file with get_config(), such as configs/ring_tiny.py")
  return loading.override(loading.load(path), dict(overrides))


def _is_users(error: Exception) -> bool:
  """Errors of the operating system, and the ValueError subclasses that this project raises for mistakes."""
  return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _PACKAGES


def _fail(message: str) -> NoReturn:
  print("error: " + " ".join(message.split()), file=sys.stderr)
  sys.exit(2)
