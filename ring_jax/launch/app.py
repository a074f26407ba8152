"""The front of every command: flags in, processes joined, one clear line out when a user got something wrong.

    if __name__ == "__main__":
      define_flags()                    # absl's DEFINE_...; here, so that two commands can be imported together
      app.run(main)                     # main()
      app.run(main, config_flag=True)   # main(config: RunConfig), from --config=FILE and --config.a.b=VALUE

`--config` and its overrides are taken out of the command line before absl sees
it, because the overrides' names are not flags: they are paths into the config tree (`configs.loading.override`).

A command that can run in several processes is started once on every host.  On the hosts of a TPU slice, and where a
cluster's manager tells, they find each other; elsewhere --coordinator, --num_processes and --process_id say it.

The exit status is one of `configs.status.ExitStatus`: what `main` returns, 2 for a mistake of the user, 130 after
Ctrl-C; what is left is a bug and shows its traceback.
"""

import faulthandler
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from configs import loading
from configs.schema import ConfigError, RunConfig
from configs.status import ExitStatus
from ring_jax.train import startup
from sharding import cluster, pathways, processes

_PACKAGES = ("configs", "kernels", "sharding", "ring_jax", "rollout", "parity")
_NEWS_SECONDS = 5.0  # a collective that breaks is often news of a lost process, which says so itself a moment later


def _no_config() -> NoReturn:
  raise ConfigError("--config is missing: a Python file with get_config(), such as configs/ring_tiny.py")


def run(
  main: Callable[..., ExitStatus | None],
  config_flag: bool = False,
  several: bool = False,
  default_config: Callable[[], RunConfig] = _no_config,
) -> NoReturn:
  """Parses the command line, calls `main` and exits.

  Args:
    main: takes the resolved `RunConfig` where `config_flag` is set, nothing otherwise; returns the exit status, None
      for 0.
    config_flag: whether the command has `--config`.
    several: whether the command can run in several processes.
    default_config: what overrides apply to where --config is not given.
  """
  argv = sys.argv
  overrides: list[tuple[str, str]] = []
  _define_flags(argv[0], config_flag)
  if config_flag:
    argv, overrides = _take_overrides(argv)

  def guarded(_: list[str]) -> ExitStatus | None:
    faulthandler.enable()  # what native code ends on shows Python's side too
    try:
      pathways.initialize()
      startup.check_versions()
      config = _resolve(overrides, default_config) if config_flag else None
      _join(startup.facts(pathlib.Path(argv[0]).stem, config), several)
      status = main(*([config] if config_flag else []))
      processes.group().leave()
      return status
    except KeyboardInterrupt:
      _end(ExitStatus.INTERRUPTED, "interrupted")
    except Exception as error:
      if isinstance(error, (ValueError, OSError)) and _is_users(error) and not flags.FLAGS.debug:
        _fail(str(error))
      if processes.group().count == 1:
        raise
      _bug(error)

  app.run(guarded, argv=argv, flags_parser=_parse)


def _define_flags(module: str, config_flag: bool) -> None:
  """Flags of the command itself, so that --help lists them."""
  flags.DEFINE_bool("debug", False, "Show the whole traceback of every error.", module_name=module)
  for name, text in (
    ("coordinator", "HOST:PORT at which process 0 can be reached by all; not needed on TPU slices and under Slurm."),
    ("num_processes", "How many processes run this command together."),
    ("process_id", "Which of them this is, from 0."),
  ):
    define = flags.DEFINE_string if name == "coordinator" else flags.DEFINE_integer
    define(name, None, text, module_name=module)
  flags.DEFINE_float("join_seconds", 300.0, "How long processes wait for each other at the start.", module_name=module)
  if config_flag:
    flags.DEFINE_string(
      "config",
      None,
      "The run: a Python file with get_config(), as in configs/. Single values: --config.rollout.token_budget=4096.",
      module_name=module,
    )


def _join(facts: dict[str, Any], several: bool) -> None:
  """Brings the processes of the command together, where there are several."""
  given = flags.FLAGS
  found = cluster.from_flags(given.coordinator, given.num_processes, given.process_id)
  if not several:
    if found is not None:
      raise ConfigError("this command runs in one process: leave out --coordinator, --num_processes and --process_id")
    return
  found = found or cluster.detect(given.join_seconds)
  if found is None or found.count == 1:
    return
  print(f"process {found.index} of {found.count}, coordinator {found.coordinator}", flush=True)
  startup.check_members(processes.join(found.coordinator, found.count, found.index, facts, given.join_seconds).members)
  cluster.connect_jax(found, given.join_seconds)


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


def _resolve(overrides: list[tuple[str, str]], default: Callable[[], RunConfig]) -> RunConfig:
  path = flags.FLAGS.config
  return loading.override(loading.load(path) if path else default(), dict(overrides))


def _is_users(error: Exception) -> bool:
  """Errors of the operating system, and the ValueError subclasses that this project raises for mistakes."""
  return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _PACKAGES


def _fail(message: str) -> NoReturn:
  _end(ExitStatus.USER_ERROR, "error: " + " ".join(message.split()))


def _bug(error: Exception) -> NoReturn:
  """Shows it, and takes the other processes along."""
  time.sleep(_NEWS_SECONDS)
  traceback.print_exception(error)
  _end(ExitStatus.BUG, f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _end(status: ExitStatus, line: str) -> NoReturn:
  if processes.group().count > 1:
    processes.group().end(status, line)
  print(line, file=sys.stderr)
  sys.exit(status)
