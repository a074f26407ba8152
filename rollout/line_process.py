"""The parent's side of a process that answers: one JSON request a line in, one JSON reply a line out.

    first line out     a greeting, or {"error": ...}: it cannot do what it is there for
    each request       its reply, or {"error": ...}

Other engines live in such processes, for their threads, their memory and their failures are theirs.  Whatever goes wrong
becomes one line: what it said is an error of its own, and if it dies the last lines of its log stand in ours.
"""

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

_LOG_LINES = 3  # of its log in an error


class LineProcess:
  """
  Args:
    command: what to run; it is killed by `close`.
    name: in errors.
    error: what is raised.
    environment: of the process; None: this one's.
    timeout: seconds for a line; None: as long as it takes.

  Attributes:
    greeting: its first line.

  Raises:
    error: it cannot be started, or says that it is of no use.
  """

  def __init__(
    self,
    command: Sequence[str],
    *,
    name: str,
    error: type[Exception],
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
  ):
    self._name, self._error, self._timeout = name, error, timeout
    self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # closed by close()
    try:
      self._process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8",
        env=environment,
      )  # fmt: skip
    except OSError as reason:
      self._log.close()
      raise error(f"{name}'s interpreter {command[0]}: cannot be started ({reason.strerror})") from None
    self._lines: queue.Queue[str] = queue.Queue()  # a reader thread: pipes have no timeout of their own
    threading.Thread(target=self._read, daemon=True).start()
    try:
      self.greeting = self._receive("starting")
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  @property
  def pid(self) -> int:
    return self._process.pid

  def close(self) -> None:
    if self._process.poll() is None:
      self._process.kill()  # it holds nothing worth a graceful end
    self._process.wait()
    with contextlib.suppress(BrokenPipeError):  # of a request that nobody read
      self._process.stdin.close()
    self._log.close()

  def ask(self, request: Mapping[str, Any], doing: str) -> dict[str, Any]:
    """Args:
      doing: for errors: what the request is about.

    Raises:
      error: it failed, died, or did not answer in time.
    """
    try:
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
    except (BrokenPipeError, ValueError):
      raise self._error(f"{self._name}'s process has ended{self._tail()}") from None
    return self._receive(doing)

  def _receive(self, doing: str) -> dict[str, Any]:
    try:
      line = self._lines.get(timeout=self._timeout)
    except queue.Empty:
      self._process.kill()
      raise self._error(f"{self._name}: no answer within {self._timeout:g} s while {doing}{self._tail()}") from None
    if not line:
      self._lines.put("")  # for whoever asks again
      status = self._process.wait()
      raise self._error(f"{self._name}'s process ended with status {status} while {doing}{self._tail()}")
    reply = json.loads(line)
    if "error" in reply:
      raise self._error(f"{self._name} failed while {doing}: {reply['error']}")
    return reply

  def _read(self) -> None:
    with self._process.stdout as lines:
      for line in lines:
        self._lines.put(line)
    self._lines.put("")

  def _tail(self) -> str:
    """The last lines of its log, as one."""
    if self._log.closed:
      return ""
    self._log.seek(0)
    lines = self._log.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()][-_LOG_LINES:]
    return f"; it said: {' | '.join(said)}" if said else ""
