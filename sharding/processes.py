"""The processes that run one job together: roll call, exchange of small values, and the news that one of them is gone.

    join      process 0 listens where JAX's coordinator will; the others come to it and say who they are.  When all are
              there, each gets the list of all; if something is wrong, each gets the same one line.
    gather    every process gives a value and gets everyone's.  What only process 0 knows (scores, a stop, what lies
              in a folder) reaches the others this way, so that all take the same decisions.
    end       a process that fails says so to the others, who end with its status.  One that dies says nothing, but
              the kernel closes its connections: the others end at once instead of waiting in a collective forever.

Every process has one TCP connection, to process 0, for as long as the job runs.  This is for control only (kilobytes a
step); arrays travel by collectives.  JAX's own coordinator does the same for arrays, but ends the process from native
code, with a stack dump and no way to say what happened: wrong numbers, a missing process and a taken port must be one
line.  Its heartbeats stay on behind this, for a process that is frozen and not dead.

A process that was not joined to others is a group of one, for which all of this is free.
"""

import contextlib
import dataclasses
import json
import os
import queue
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from configs.base import ConfigError
from configs.status import ExitStatus

_HEADER = struct.Struct(">4sI")
_MAGIC = b"RJx1"
_MAX_FRAME = 1 << 28
_HELLO_SECONDS = 2.0  # for a connection to say who it is
_BIND_SECONDS = 10.0  # for an earlier run to let go of the port
_RETRY_SECONDS = 0.2
_LINGER_SECONDS = 3.0  # that process 0 outlives its last word, so that it is heard
# A host that lost its power closes nothing: silence of about 30 s is death.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class JoinError(ConfigError):
  """The processes of a job did not come together; the message is one line for the user."""


class _Closed(Exception):
  """The other side of a connection is gone, or does not speak our language."""


@dataclasses.dataclass(frozen=True)
class Member:
  """A process of the job, as all of them know it."""

  index: int
  host: str
  pid: int
  skew: float  # seconds that its clock is ahead of process 0's, travel time included
  facts: dict[str, Any]  # what it said of itself

  def __str__(self) -> str:
    return f"process {self.index} on {self.host}"


class _Link:
  """One connection; frames of JSON."""

  def __init__(self, connection: socket.socket):
    self.socket = connection
    self._sending = threading.Lock()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in _KEEPALIVE.items():
      if hasattr(socket, name):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def send(self, **message: Any) -> None:
    data = json.dumps(message).encode()
    try:
      with self._sending:
        self.socket.sendall(_HEADER.pack(_MAGIC, len(data)) + data)
    except OSError as error:
      raise _Closed(str(error)) from None

  def receive(self) -> dict[str, Any]:
    magic, size = _HEADER.unpack(self._exactly(_HEADER.size))
    if magic != _MAGIC or size > _MAX_FRAME:
      raise _Closed("another program answers there")
    return json.loads(self._exactly(size))

  def _exactly(self, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
      try:
        part = self.socket.recv(size - len(data))
      except OSError as error:
        raise _Closed(str(error)) from None
      if not part:
        raise _Closed("connection closed")
      data += part
    return bytes(data)


class Group:
  """This process among the others.

  Attributes:
    index, count: of this process, and how many there are.
    members: all of them, by index.
  """

  def __init__(self, index: int, members: list[Member], links: dict[int, _Link]):
    self.index, self.members, self.count = index, members, len(members)
    self._links = links
    self._values: dict[int, queue.Queue] = {peer: queue.Queue() for peer in links}
    self._leaving = False
    self._last_word = threading.Lock()
    if links:
      threading.Thread(target=self._listen, name="processes", daemon=True).start()

  @property
  def is_first(self) -> bool:
    """Whether this is the process that writes, prints and scores."""
    return self.index == 0

  def gather(self, name: str, value: Any) -> list[Any]:
    """Everyone's `value` (JSON data) under the same `name`, by index; returns when all have given theirs."""
    if self.count == 1:
      return [value]
    if self.is_first:
      said = {0: (name, value)} | {peer: self._next(peer) for peer in self._links}
      apart = [f"{self.members[peer]} at {said[peer][0]!r}" for peer in self._links if said[peer][0] != name]
      if apart:
        raise RuntimeError(f"processes are out of step: process 0 is at {name!r}, {', '.join(apart)}")
      values = [said[index][1] for index in range(self.count)]
      for link in self._links.values():
        self._tell(link, kind="value", name=name, value=values)
      return values
    self._tell(self._links[0], kind="value", name=name, value=value)
    return self._next(0)[1]

  def from_first(self, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0 (JSON data); it is called there only."""
    return self.gather(name, make() if self.is_first else None)[0]

  def leave(self) -> None:
    """Waits until all are done; from then on no one is missed."""
    self._leaving = True
    self.gather("the end", None)
    for link in self._links.values():
      link.socket.close()
    self._links = {}

  def end(self, status: int, line: str) -> NoReturn:
    """Ends this process and with it all others: `line` on stderr, here and there, and the same exit status."""
    if not self._last_word.acquire(blocking=False):
      threading.Event().wait()  # another thread is at it
    # The others' end breaks the collective that this process' main thread may be in: that error is no news, must not be the
    # last thing that is read, and must not end the process with a status of its own.
    sys.excepthook = lambda *_: threading.Event().wait()
    print(line, file=sys.stderr, flush=True)
    for link in self._links.values():
      link.socket.settimeout(_LINGER_SECONDS)
      self._tell(link, kind="end", status=int(status), line=f"{self.members[self.index]}: {line}")
    if self.is_first:
      # JAX's coordinator lives in this process: if it went first, the others would be aborted before they have read.
      deadline = time.monotonic() + _LINGER_SECONDS
      for link in self._links.values():
        _wait_closed(link.socket, deadline)
    sys.stdout.flush()
    os._exit(status)

  def _tell(self, link: _Link, **message: Any) -> None:
    with contextlib.suppress(_Closed):  # the listener has the news too, and acts on it
      link.send(**message)

  def _next(self, peer: int) -> tuple[str, Any]:
    said = self._values[peer].get()
    if said is None:
      self._lost(peer)
    return said

  def _listen(self) -> None:
    """Sorts what comes in; notices who is gone."""
    with selectors.DefaultSelector() as selector:
      for peer, link in self._links.items():
        selector.register(link.socket, selectors.EVENT_READ, (peer, link))
      while selector.get_map():
        for key, _ in selector.select():
          peer, link = key.data
          try:
            message = link.receive()
          except _Closed:
            selector.unregister(key.fileobj)
            self._closed(peer)
            continue
          if message["kind"] == "end":
            self.end(message["status"], message["line"])
          self._values[peer].put((message["name"], message["value"]))

  def _closed(self, peer: int) -> None:
    if self._leaving:
      self._values[peer].put(None)
    else:
      self._lost(peer)

  def _lost(self, peer: int) -> NoReturn:
    self.end(ExitStatus.LOST, f"error: {self.members[peer]} is gone; the same command goes on from the last checkpoint")


_alone = Member(0, socket.gethostname(), os.getpid(), 0.0, {})
_group = Group(0, [_alone], {})


def group() -> Group:
  """The group of this process; of one, where it was not joined to others."""
  return _group


def join(coordinator: str, count: int, index: int, facts: Mapping[str, Any], seconds: float) -> Group:
  """`meet`, once and for all: from then on `group()` is this one."""
  global _group
  _group = meet(coordinator, count, index, facts, seconds)
  return _group


def meet(coordinator: str, count: int, index: int, facts: Mapping[str, Any], seconds: float) -> Group:
  """Waits for all `count` processes.

  Args:
    coordinator: HOST:PORT of process 0; JAX's coordinator may take the port afterwards.
    facts: JSON data that every process will find in `Member.facts`.
    seconds: how long to wait.

  Raises:
    JoinError: a process is missing after that time, came twice or expects another number of processes, or the port is
      taken.  All processes that came get the same error.
  """
  host, _, port = coordinator.rpartition(":")
  me = {"index": index, "count": count, "host": socket.gethostname(), "pid": os.getpid(), "facts": dict(facts)}
  if index == 0:
    members, links = _receive_all(int(port), me, time.monotonic() + seconds, seconds)
  else:
    members, links = _report(host.strip("[]"), int(port), me, time.monotonic() + seconds, seconds)
  return Group(index, members, links)


def _receive_all(port: int, me: dict, deadline: float, seconds: float) -> tuple[list[Member], dict[int, _Link]]:
  """Process 0's side."""
  members = {0: Member(0, me["host"], me["pid"], 0.0, me["facts"])}
  links: dict[int, _Link] = {}

  def refuse(reason: str) -> NoReturn:
    for link in links.values():
      with contextlib.suppress(_Closed):
        link.send(kind="refused", reason=reason)
    raise JoinError(reason)

  with _listener(port) as listener:
    while len(members) < me["count"]:
      listener.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        connection, _ = listener.accept()
      except TimeoutError:
        missing = ", ".join(str(index) for index in range(me["count"]) if index not in members)
        refuse(
          f"{len(members)} of {me['count']} processes came to port {port} within {seconds:g} s; missing: {missing}"
        )
      found = _hello(connection)
      if found is None:
        continue
      link, hello = found
      index, known = hello["index"], members.get(hello["index"])
      member = Member(index, hello["host"], hello["pid"], hello["time"] - time.time(), hello["facts"])
      if hello["count"] != me["count"] or not 0 < index < me["count"]:
        links[-1] = link
        refuse(f"{member} expects {hello['count']} processes, process 0 expects {me['count']} (--num_processes)")
      if known is not None:
        links[-1] = link
        refuse(f"process {index} came twice: from {known.host} ({known.pid}) and {member.host} ({member.pid})")
      members[index], links[index] = member, link
  ordered = [members[index] for index in range(me["count"])]
  for link in links.values():
    link.send(kind="welcome", members=[dataclasses.asdict(member) for member in ordered])
  return ordered, links


def _listener(port: int) -> socket.socket:
  deadline = time.monotonic() + _BIND_SECONDS
  while True:
    try:
      if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
      return socket.create_server(("", port), backlog=512)
    except OSError as error:
      if time.monotonic() > deadline:
        raise JoinError(
          f"port {port} of process 0 cannot be used ({os.strerror(error.errno)}): give another in --coordinator"
        ) from None
    time.sleep(_RETRY_SECONDS)


def _hello(connection: socket.socket) -> tuple[_Link, dict[str, Any]] | None:
  """None: whoever that was, it is none of ours."""
  connection.settimeout(_HELLO_SECONDS)
  link = _Link(connection)
  try:
    hello = link.receive()
    if isinstance(hello, dict) and hello.get("kind") == "hello":
      connection.settimeout(None)
      return link, hello
  except (_Closed, ValueError):
    pass
  connection.close()
  return None


def _report(host: str, port: int, me: dict, deadline: float, seconds: float) -> tuple[list[Member], dict[int, _Link]]:
  """The side of every other process: tries until process 0 is there."""
  reason = "no answer"
  while time.monotonic() < deadline:
    try:
      connection = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
    except OSError as error:
      reason = error.strerror or str(error)
      time.sleep(_RETRY_SECONDS)
      continue
    link = _Link(connection)
    # Process 0 began to wait after us, and will say itself who is missing.
    connection.settimeout(deadline - time.monotonic() + seconds)
    try:
      link.send(kind="hello", time=time.time(), **me)
      answer = link.receive()
    except (_Closed, ValueError) as error:
      reason = str(error)  # perhaps the coordinator of an earlier run, about to end
      connection.close()
      time.sleep(_RETRY_SECONDS)
      continue
    if answer["kind"] == "refused":
      raise JoinError(answer["reason"])
    connection.settimeout(None)
    return [Member(**member) for member in answer["members"]], {0: link}
  raise JoinError(f"process 0 cannot be reached at {host}:{port} within {seconds:g} s ({reason}): does it run there?")


def _wait_closed(connection: socket.socket, deadline: float) -> None:
  """Reads until the other side has closed."""
  try:
    while (left := deadline - time.monotonic()) > 0:
      connection.settimeout(left)
      if not connection.recv(1 << 16):
        return
  except OSError:
    pass


def fetch(tree: Any) -> Any:
  """Arrays on the host, whole, whatever devices hold their parts; every process must call this for the same arrays."""

  def whole(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)

  return jax.tree.map(whole, tree)
