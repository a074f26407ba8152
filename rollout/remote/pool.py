"""Many rollout workers as one: what the driver sees are slots, which come and go with their workers.

    advance(jobs)     to the workers of their slots; then waits until something has come, with a bound
    begin, load       the weights to all workers at the same time
    a worker dies     (its stream breaks, it does not answer, it answers nonsense) one line says why, and its slots are gone:
                      the scheduler gives its rollouts to others, with the tokens that had come
    a worker joins    it has the current weights before it has slots

A thread for each address keeps it: connects, hands over the weights, asks for its health, and when it is lost tries
again, for as long as the pool lives.  Everything else, the slots above all, changes in the driver's thread alone.  A
slot's number is never used twice, so a worker that is lost and one that joins are never mistaken for one another.

Which message comes first is a matter of time, so a run with remote workers is not reproducible bit for bit.  The tokens
of a rollout still are a function of (seed, uid, position, weights).
"""

import dataclasses
import itertools
import logging
import pathlib
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from configs.rollout import check_address
from rollout.engine import RingEngine
from rollout.remote import wire
from rollout.remote import worker_pb2 as pb
from rollout.remote.client import RemoteWorker, WorkerLost
from rollout.remote.stream import HostWeights
from rollout.worker import Events, Job

_LOG = logging.getLogger(__name__)
_ALONE_SECONDS = 60.0  # between two lines that say that there is no worker


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long is waited for what, in seconds."""

  call: float = 10.0  # for an answer to a short call; a health check that goes without is the end of a worker
  health: float = 5.0  # between two health checks
  stall: float = 1800.0  # for tokens of the jobs that a worker has; its first compilation counts
  update: float = 1800.0  # for new weights to be in use
  retry: float = 5.0  # between two attempts to reach an address, and looks at the file of addresses
  turn: float = 0.5  # of one `advance` in which nothing comes


class _Joined(NamedTuple):
  worker: RemoteWorker
  answer: queue.SimpleQueue  # bool: it has slots; else it needs newer weights


class WorkerPool:
  """A `Worker` (rollout/worker.py).

  Args:
    addresses: HOST:PORT of workers, there already or not.
    engine: one such as the workers have; nothing runs on it, it says what they must agree on.
    token: shared; empty: none.
    file: with more addresses, one a line, read again and again; empty: none.
    chunk_bytes: of weights in one message.
  """

  def __init__(
    self,
    addresses: Sequence[str],
    engine: RingEngine,
    *,
    token: str = "",
    file: str = "",
    chunk_bytes: int = wire.CHUNK_BYTES,
    patience: Patience | None = None,
  ):
    self._vocab_size, self._token, self._chunk_bytes = engine.model.vocab_size, token, chunk_bytes
    self._settings = {name: wire.digest(value) for name, value in engine.settings().items()}
    self._patience = patience or Patience()
    self._inbox: queue.SimpleQueue[tuple[RemoteWorker, pb.FromWorker | WorkerLost | None]] = queue.SimpleQueue()
    self._joining: queue.SimpleQueue[_Joined] = queue.SimpleQueue()  # an entry without a message tells of it
    self._members: set[RemoteWorker] = set()
    self._worker_of: dict[int, RemoteWorker] = {}  # by slot
    self._numbers = itertools.count()  # of slots
    self._weights: HostWeights | None = None
    self._changed = threading.Condition()  # of the weights
    self._closing = threading.Event()
    self._told = time.monotonic()  # that there is no worker
    self._keepers: dict[str, threading.Thread] = {}
    self._connections: dict[str, RemoteWorker] = {}  # by address, with slots or without yet
    for address in addresses:
      self._add(address)
    if file:
      self._start(self._read, pathlib.Path(file))

  def close(self) -> None:
    """Ends all sessions: the workers are free for the next trainer."""
    self._closing.set()
    with self._changed:
      self._changed.notify_all()
    for worker in list(self._connections.values()):
      worker.close()
    for keeper in list(self._keepers.values()):
      keeper.join(self._patience.call)

  @property
  def workers(self) -> list[str]:
    """Addresses of those that have slots."""
    return sorted(worker.address for worker in self._members)

  # ---- Worker

  @property
  def slots(self) -> Collection[int]:
    return self._worker_of.keys()

  def begin(self, params: Any, version: int, running: Sequence[Job]) -> None:
    """Args:
    params: the engine's tree in host memory, which nobody changes: a worker that joins later gets it too.
    """
    kept = {job.slot: job.uid for job in running}
    self.release([slot for worker, slot, uid in self._in_use() if kept.get(slot) != uid])
    self.load(params, version)
    held = {slot for _, slot, _ in self._in_use()}
    self._submit([job for job in running if job.slot not in held])

  def load(self, params: Any, version: int) -> None:
    while not self._joining.empty():
      self._seat(self._joining.get())  # whatever weights it has, it gets these
    if self._weights is None or self._weights.version != version:
      with self._changed:
        self._weights = HostWeights.of(params, version)
        self._changed.notify_all()
    behind = [worker for worker in self._members if worker.version != version]
    with futures.ThreadPoolExecutor(max(len(behind), 1), "weights") as senders:
      sent = {worker: senders.submit(worker.update, self._weights, self._patience.update) for worker in behind}
    for worker, one in sent.items():
      try:
        one.result()
      except WorkerLost as lost:
        self._drop(worker, f"new weights: {lost}")

  def advance(self, jobs: Sequence[Job]) -> Events:
    events, started = Events(), time.perf_counter()
    self._submit(jobs)
    for worker, message in self._arrived():
      if worker not in self._members or message is None:
        continue  # it was dropped before
      try:
        if isinstance(message, WorkerLost):
          raise message
        heard = worker.take(message)
      except WorkerLost as lost:
        self._drop(worker, str(lost))
        continue
      events.drawn += heard.drawn
      events.evicted += heard.evicted
    while not self._joining.empty():
      joined = self._joining.get()
      if joined.worker.version == self._weights.version:
        self._seat(joined)
      else:
        joined.answer.put(False)
    events.decode_seconds = time.perf_counter() - started
    return events

  def release(self, slots: Collection[int]) -> None:
    for worker, own in self._by_worker(slots).items():
      worker.abort(own)

  def end(self) -> None:
    """The weights stay: a worker that joins before the next ones gets these."""

  # ---- for who wants them to stand still; a driver that is paused leaves them what they have

  def pause(self) -> None:
    for worker in list(self._members):
      worker.pause()

  def resume(self) -> None:
    for worker in list(self._members):
      worker.resume()

  # ---- of the driver's thread

  def _submit(self, jobs: Sequence[Job]) -> None:
    """Those whose slot is gone are left to the scheduler, which will be told."""
    jobs_of: dict[RemoteWorker, list[Job]] = {}
    for job in jobs:
      if job.slot in self._worker_of:
        jobs_of.setdefault(self._worker_of[job.slot], []).append(job)
    for worker, own in jobs_of.items():
      worker.submit(own)

  def _in_use(self) -> Iterator[tuple[RemoteWorker, int, int]]:
    """Worker, slot and uid of what runs."""
    for worker in list(self._members):
      for slot, uid in worker.running.items():
        yield worker, slot, uid

  def _by_worker(self, slots: Collection[int]) -> dict[RemoteWorker, list[int]]:
    found: dict[RemoteWorker, list[int]] = {}
    for slot in slots:
      if slot in self._worker_of:
        found.setdefault(self._worker_of[slot], []).append(slot)
    return found

  def _arrived(self) -> list[tuple[RemoteWorker, pb.FromWorker | WorkerLost | None]]:
    """All that has come; where nothing has, what comes first."""
    try:
      found = [self._inbox.get(timeout=self._patience.turn)]
    except queue.Empty:
      self._tell_if_alone()
      return []
    while not self._inbox.empty():
      found.append(self._inbox.get())
    return found

  def _seat(self, joined: _Joined) -> None:
    worker = joined.worker
    if worker.is_lost:  # while the driver was away; nobody would say so again
      joined.answer.put(False)
      return
    self._members.add(worker)
    self._worker_of |= {next(self._numbers): worker for _ in range(worker.slots)}
    _LOG.warning("rollout worker %s joined: %d slots more, %d now", worker.address, worker.slots, len(self._worker_of))
    joined.answer.put(True)

  def _drop(self, worker: RemoteWorker, reason: str) -> None:
    self._worker_of = {slot: owner for slot, owner in self._worker_of.items() if owner is not worker}
    self._members.discard(worker)
    worker.close()
    _LOG.warning("rollout worker %s is lost (%s): %d slots are left", worker.address, reason, len(self._worker_of))

  def _tell_if_alone(self) -> None:
    if not self._members and time.monotonic() - self._told > _ALONE_SECONDS:
      self._told = time.monotonic()
      _LOG.warning("there is no rollout worker: waiting for %s", ", ".join(self._keepers) or "the first address")

  # ---- of the keepers' threads

  def _add(self, address: str) -> None:
    if address not in self._keepers:
      self._keepers[address] = self._start(self._keep, address)

  def _start(self, function, *arguments) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, name=f"rollout {arguments[0]}", daemon=True)
    thread.start()
    return thread

  def _read(self, path: pathlib.Path) -> None:
    """Adds the addresses of the file, which may grow."""
    said = ""
    while not self._closing.is_set():
      try:
        for line in path.read_text().split("\n") if path.exists() else ():
          if line.strip() and not line.startswith("#"):
            check_address(line.strip(), str(path))
            self._add(line.strip())
      except (OSError, ValueError) as error:
        if str(error) != said:
          _LOG.warning("rollout.workers_file: %s", error)
        said = str(error)
      self._closing.wait(self._patience.retry)

  def _keep(self, address: str) -> None:
    said = ""
    while not self._closing.is_set():
      worker = self._connections[address] = RemoteWorker(
        address, self._token, self._vocab_size, chunk_bytes=self._chunk_bytes, seconds=self._patience.call,
        on_message=lambda *message: self._inbox.put(message),
      )  # fmt: skip
      joined = False
      try:
        worker.open(self._settings)
        joined = self._join(worker)
        self._watch(worker)
      except WorkerLost as lost:
        if joined:
          self._inbox.put((worker, lost))
        elif str(lost) != said and not self._closing.is_set():
          _LOG.warning("rollout worker %s does not join: %s", address, lost)
          said = str(lost)  # told once, tried on
      finally:
        worker.close()
      self._closing.wait(self._patience.retry)

  def _join(self, worker: RemoteWorker) -> bool:
    """Current weights first, then slots."""
    answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
    while not self._closing.is_set():
      weights = self._newer_than(worker.version)
      if weights is None:
        worker.health()  # a trainer may be long about its next weights
        continue
      worker.update(weights, self._patience.update)
      self._joining.put(_Joined(worker, answer))
      self._inbox.put((worker, None))
      if self._answered(worker, answer):
        return True
    raise WorkerLost("the pool is closing")

  def _newer_than(self, version: int) -> HostWeights | None:
    """Waits for them, with a bound."""
    newer = lambda: self._weights is not None and self._weights.version > version  # noqa: E731
    with self._changed:
      self._changed.wait_for(lambda: newer() or self._closing.is_set(), self._patience.health)
      return self._weights if newer() else None

  def _answered(self, worker: RemoteWorker, answer: queue.SimpleQueue) -> bool:
    while not self._closing.is_set():
      try:
        return answer.get(timeout=self._patience.health)
      except queue.Empty:
        worker.health()
    return False

  def _watch(self, worker: RemoteWorker) -> None:
    """Returns when it is lost."""
    while not self._closing.wait(self._patience.health):
      report = worker.health()
      if report.error:
        raise WorkerLost(report.error[:200])
      silence = time.monotonic() - worker.last_heard
      if worker.has_jobs and not report.paused and silence > self._patience.stall:
        raise WorkerLost(f"nothing came of its jobs for {silence:.0f} s")
