"""Scores answers in processes that can be lost.

A scorer looks at text that a model wrote, and such text may make it hang, crash, or fill the memory.  A time limit
inside the process cannot stop that (MathVerify's alarm waits for `5**(5**(5**5))`; rl_practice.md (f)), so every worker
is a process of its own, killed with its process group at a deadline, and replaced.

Many answers are on their way to a worker at a time, and it replies after each one.  When a worker is lost, its oldest
unanswered item is to blame: that one is settled and the others go to the next worker.  Where an earlier item might
have left the damage (crash and memory, in a worker that is not fresh), the item is tried once more in a fresh worker.

No reply can reach another item: a worker's socket dies with it, and every item sent has a ticket of its own.

Workers come from a keeper process (`keeper.py`).  The pool itself uses no threads, no signals and no fork, so that it
works beside JAX's threads, and ends with its parent even if that is killed.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from configs.schema import Enum, TaskConfig
from ring_jax.rewards import keeper
from ring_jax.rewards.verifiers import extract

MAX_ANSWER = 1 << 16  # characters
_MAX_COMPLETION = 1 << 22  # characters that are searched for an answer
_WINDOW_ITEMS = 64  # on their way to one worker at a time
_WINDOW_BYTES = 1 << 16  # less than a socket's buffer holds: sending them never waits for the worker
_START_SECONDS = 120.0  # for the keeper to import everything on a busy machine


class ScoringError(RuntimeError):
  """The scoring processes cannot be started at all."""


class Kind(Enum):
  """What became of an item."""

  OK = "ok"  # the scorer gave a score
  NO_ANSWER = "no_answer"  # the completion did not end, or no answer stands in it; not sent
  TOO_LARGE = "too_large"  # the answer is longer than MAX_ANSWER; not sent
  TIMEOUT = "timeout"  # killed at the deadline
  CRASH = "crash"  # the process ended
  MEMORY = "memory"  # more than the worker may use
  ERROR = "error"  # the scorer raised, or gave no number


class Scorable(Protocol):
  """What the pool needs to know of a problem."""

  source: int  # position in task.mixture
  entry: Mapping[str, Any]  # Reasoning Gym's


@dataclasses.dataclass(frozen=True)
class ScoreItem:
  """One completion to score."""

  problem: Scorable
  completion: str  # what the model wrote, without its end-of-turn token
  finished: bool = True  # whether it ended its turn; if not, it scores 0 in exact mode


@dataclasses.dataclass(frozen=True)
class ScoreResult:
  score: float  # 0 for every kind but OK
  kind: Kind


@dataclasses.dataclass
class _Task:
  """An item on its way."""

  item: int  # its place in the caller's list
  frame: bytes  # pickled request
  ticket: int
  retried: bool = False


class _Worker:
  """A connection to one worker process."""

  def __init__(self, connection: socket.socket, pid: int):
    self.connection, self.pid = connection, pid
    self.waiting: collections.deque[_Task] = collections.deque()  # sent, unanswered; the worker is at the first
    self.waiting_bytes = 0
    self.since = 0.0  # when the first one's time began
    self.fresh = True  # has answered nothing yet
    self.deaf = False  # a request did not reach it
    self.received = b""

  def kill(self) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(self.pid, signal.SIGKILL)
    self.connection.close()


class ScoringPool:
  """Worker processes that score answers; a context manager.

  Args:
    config: the mixture, how answers are found, the deadline, the number of workers.
    thinking: whether prompts open a thought, which completions must close.
    modules: imported by the workers first, by name; they may register more tasks with Reasoning Gym.

  Attributes:
    counts: results so far, by kind.
    replaced: workers lost so far.
  """

  def __init__(self, config: TaskConfig, thinking: bool = False, modules: Sequence[str] = ()):
    self._config, self._thinking = config, thinking
    self._setup = keeper.Setup(config, tuple(modules))
    self.counts: collections.Counter[Kind] = collections.Counter()
    self.replaced = 0
    self._tickets = itertools.count(1)
    self._lock = threading.Lock()
    self._keeper: subprocess.Popen | None = None
    self._control: socket.socket | None = None
    self._ready = False  # the keeper has imported everything
    self._workers: list[_Worker] = []

  def __enter__(self) -> "ScoringPool":
    """Starts the keeper and returns; its imports (a second or two) go on beside the caller's own start."""
    self._start_keeper()
    return self

  def __exit__(self, *_: Any) -> None:
    with self._lock:
      self._stop()

  def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
    """Scores items, in their order.  Always returns: what cannot be scored is 0 and says why.

    Raises:
      ScoringError: no worker can be started.
    """
    with self._lock:
      if self._keeper is None:
        raise ScoringError("the scoring pool is closed: use it inside its with statement")
      results: list[ScoreResult | None] = [None] * len(items)
      queue: collections.deque[_Task] = collections.deque()
      for position, item in enumerate(items):
        answer = self._answer(item)
        if isinstance(answer, Kind):
          results[position] = ScoreResult(0.0, answer)
        else:
          queue.append(self._task(position, item.problem, answer))
      try:
        self._run(queue, results)
      except BaseException:
        self._stop_workers()  # what they still have to say belongs to nobody
        raise
      self.counts.update(result.kind for result in results)
      return results

  def _answer(self, item: ScoreItem) -> str | Kind:
    if self._config.exact and not item.finished:
      return Kind.NO_ANSWER
    if len(item.completion) > _MAX_COMPLETION:
      return Kind.TOO_LARGE
    answer = extract(item.completion, self._config.answer, self._thinking)
    if answer is None:
      return Kind.NO_ANSWER
    return answer if len(answer) <= MAX_ANSWER else Kind.TOO_LARGE

  def _task(self, position: int, problem: Scorable, answer: str) -> _Task:
    ticket = next(self._tickets)
    request = (ticket, problem.source, dict(problem.entry), answer)
    return _Task(position, pickle.dumps(request, pickle.HIGHEST_PROTOCOL), ticket)

  def _run(self, queue: collections.deque[_Task], results: list[ScoreResult | None]) -> None:
    """Feeds the workers and listens to them until every item is settled."""
    while queue or any(worker.waiting for worker in self._workers):
      self._staff(queue)
      for worker in self._workers:
        self._feed(worker, queue)
      busy = [worker for worker in self._workers if worker.waiting]
      # Late is who had no time left before the ear was put to its door, and was silent then: a stalled parent, who
      # looks at the clock long after, does not take its own delay for a worker's.
      asked = time.monotonic()
      heard = self._listen(busy, asked)
      for worker in busy:
        late = asked - worker.since > self._config.deadline
        if worker in heard:
          lost = self._receive(worker, results)
          if lost is not None:
            self._lose(worker, lost, queue, results)
        elif late:
          self._lose(worker, Kind.TIMEOUT, queue, results)

  def _staff(self, queue: collections.deque[_Task]) -> None:
    """Sees to it that there are enough workers, and a fresh one for an item that is tried again."""
    if queue and queue[0].retried:
      for worker in [worker for worker in self._workers if not worker.waiting and not worker.fresh]:
        worker.kill()
        self._workers.remove(worker)
    busy = sum(bool(worker.waiting) for worker in self._workers)
    while len(self._workers) < min(self._config.workers, busy + len(queue)):
      self._workers.append(self._start_worker())

  def _listen(self, workers: Sequence[_Worker], now: float) -> list[_Worker]:
    """Workers with something to say, waiting no longer than until the first of them is late."""
    if not workers:
      return []
    patience = min(worker.since for worker in workers) + self._config.deadline - now
    with selectors.DefaultSelector() as selector:
      for worker in workers:
        selector.register(worker.connection, selectors.EVENT_READ, worker)
      return [key.data for key, _ in selector.select(max(0.0, patience))]

  def _feed(self, worker: _Worker, queue: collections.deque[_Task]) -> None:
    """Sends what fits into the worker's window."""
    if worker.deaf or len(worker.waiting) > _WINDOW_ITEMS // 2 or not queue:
      return
    share = -(-len(queue) // len(self._workers))  # the last items go to all workers
    frames = []
    while queue and len(worker.waiting) < min(_WINDOW_ITEMS, max(1, share)):
      size = len(queue[0].frame)
      if worker.waiting and worker.waiting_bytes + size > _WINDOW_BYTES:
        break
      if queue[0].retried and not (worker.fresh and not worker.waiting):
        break  # wants a worker that nothing else has used
      if not worker.waiting:
        worker.since = time.monotonic()
      worker.waiting.append(queue.popleft())
      worker.waiting_bytes += size
      frames.append(worker.waiting[-1].frame)
    try:
      worker.connection.sendall(b"".join(frames))
    except OSError:
      # It died, or has taken nothing for as long as the deadline: its last replies will tell where it was.
      worker.deaf = True
      with contextlib.suppress(OSError):
        worker.connection.shutdown(socket.SHUT_WR)

  def _receive(self, worker: _Worker, results: list[ScoreResult | None]) -> Kind | None:
    """Takes the replies that have arrived; why the worker is lost, if it is."""
    try:
      data = worker.connection.recv(1 << 16)
    except OSError:
      return Kind.CRASH
    received, size = worker.received + data, keeper.REPLY.size
    whole = len(received) // size * size
    worker.received = received[whole:]
    for ticket, code, value in keeper.REPLY.iter_unpack(received[:whole]):
      if not worker.waiting or worker.waiting[0].ticket != ticket or code >= len(keeper.KINDS):
        return Kind.CRASH  # it does not keep to the protocol
      kind = Kind(keeper.KINDS[code])
      if kind is Kind.MEMORY:
        return kind  # nothing is certain in a process that ran out of memory
      task = worker.waiting.popleft()
      worker.waiting_bytes -= len(task.frame)
      results[task.item] = ScoreResult(value if kind is Kind.OK else 0.0, kind)
      worker.fresh, worker.since = False, time.monotonic()
    return None if data else Kind.CRASH

  def _lose(
    self, worker: _Worker, kind: Kind, queue: collections.deque[_Task], results: list[ScoreResult | None]
  ) -> None:
    """Kills a worker, settles the item it was at, and puts the others back in front of the queue."""
    worker.kill()
    self._workers.remove(worker)
    self.replaced += 1
    waiting = worker.waiting
    if waiting and (worker.fresh or kind is Kind.TIMEOUT):
      results[waiting.popleft().item] = ScoreResult(0.0, kind)
    elif waiting:
      waiting[0].retried = True
    queue.extendleft(reversed(waiting))

  def _start_worker(self) -> _Worker:
    for _ in range(2):
      with contextlib.suppress(OSError):
        return self._fork_worker()
      self._stop_keeper()  # it is gone: killed from outside, or it could not start
      self._start_keeper()
    raise ScoringError("no scoring process can be started; what the last one printed stands above")

  def _fork_worker(self) -> _Worker:
    """Has the keeper fork a worker; OSError if the keeper is gone."""
    if not self._ready:
      if self._control.recv(len(keeper.READY)) != keeper.READY:
        raise ConnectionError
      self._ready = True
    ours, theirs = socket.socketpair()
    with theirs:
      socket.send_fds(self._control, [keeper.FORK], [theirs.fileno()])
      reply = self._control.recv(keeper.PID.size)
    if len(reply) != keeper.PID.size:
      ours.close()
      raise ConnectionError
    ours.settimeout(self._config.deadline)
    return _Worker(ours, *keeper.PID.unpack(reply))

  def _start_keeper(self) -> None:
    self._control, theirs = socket.socketpair()
    self._control.settimeout(_START_SECONDS)
    self._ready = False
    # Settings for the trainer's big arrays would eat a worker's memory limit; threads would hinder forking.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    with theirs:
      self._keeper = subprocess.Popen(
        [sys.executable, "-m", keeper.__name__, str(theirs.fileno())],
        stdin=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # an interrupt from the terminal is the parent's to handle
        env=environment,
      )
    with contextlib.suppress(BrokenPipeError), self._keeper.stdin as stdin:
      pickle.dump(self._setup, stdin)

  def _stop_workers(self) -> None:
    for worker in self._workers:
      worker.kill()
    self._workers.clear()

  def _stop_keeper(self) -> None:
    self._control.close()
    self._keeper.kill()
    self._keeper.wait()
    self._keeper = None

  def _stop(self) -> None:
    self._stop_workers()
    self._stop_keeper()
