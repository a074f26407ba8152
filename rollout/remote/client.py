"""The trainer's side of one rollout worker: a connection, a session, and a look at every answer.

What a worker says is not believed: a job that was never sent, another uid, a token outside of the vocabulary, numbers of
tokens and log-probs that differ, more tokens than were asked for, a version that goes back or was never given.  Each
is the end of the worker, in one line.
"""

import contextlib
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import grpc

from ring_jax.records import FinishReason
from rollout.remote import wire
from rollout.remote import worker_pb2 as pb
from rollout.remote.stream import HostWeights, parts
from rollout.worker import Drawn, Events, Job

_REASONS = {
  pb.RUNNING: None, pb.STOP: FinishReason.STOP, pb.LENGTH: FinishReason.LENGTH, pb.CACHE: FinishReason.CACHE,
}  # fmt: skip
_LOGP_ROUNDING = 1e-4  # a log-prob may come out above 0 by so much


class WorkerLost(Exception):
  """The worker is of no more use; one line says why."""


@dataclasses.dataclass
class _Sent:
  """A job that is with the worker."""

  job: Job
  version: int  # that its next token may have, at least
  drawn: int = 0


class RemoteWorker:
  """All but `on_message`'s calls happen in the caller's thread; jobs are the driver's alone.

  Args:
    address: HOST:PORT.
    token: shared; empty: none.
    vocab_size: of the model.
    chunk_bytes: of weights in one message, at most.
    seconds: that a short call may take.
    on_message: called in a thread of the connection, with the worker and a message or, at last, WorkerLost.
  """

  def __init__(
    self,
    address: str,
    token: str,
    vocab_size: int,
    *,
    chunk_bytes: int = wire.CHUNK_BYTES,
    seconds: float = 10.0,
    on_message: Callable[["RemoteWorker", pb.FromWorker | WorkerLost], None],
  ):
    self.address, self.slots = address, 0
    self.version = self._given = -1  # of the weights: in use there, and given, perhaps in use already
    self.last_heard = time.monotonic()
    self._broken: WorkerLost | None = None  # what ended the session
    self._vocab_size, self._chunk_bytes, self._seconds, self._on_message = vocab_size, chunk_bytes, seconds, on_message
    self._metadata = wire.credentials(token)
    self._channel = grpc.insecure_channel(address, options=wire.channel_options(chunk_bytes))
    self._outbox: queue.SimpleQueue[pb.ToWorker | None] = queue.SimpleQueue()
    self._session = b""
    self._sent: dict[int, _Sent] = {}  # by id
    self._id_of: dict[int, int] = {}  # by slot
    self._next_id = 0

  # ---- the connection

  def open(self, settings: dict[str, str]) -> None:
    """Begins the session.

    Args:
      settings: digests of what the worker must agree on (`RingEngine.settings`).

    Raises:
      WorkerLost: nobody is there, the token is wrong, another trainer has it, or it would draw other tokens.
    """
    found: pb.Description = self._call(wire.DESCRIBE, pb.Empty())
    if found.protocol != wire.PROTOCOL:
      raise WorkerLost(f"speaks protocol {found.protocol}, this trainer {wire.PROTOCOL}")
    differing = [name for name, value in settings.items() if found.settings.get(name) != value]
    if differing:
      raise WorkerLost(f"was started with another config: {', '.join(differing)} differ")
    if not 0 < found.slots < 1 << 20 or not found.max_chunk_bytes:
      raise WorkerLost(f"says that it has {found.slots} slots, and chunks of {found.max_chunk_bytes} bytes")
    self.slots, self._chunk_bytes = found.slots, min(self._chunk_bytes, found.max_chunk_bytes)
    self._outbox.put(pb.ToWorker(open=pb.Open(protocol=wire.PROTOCOL)))
    answers = wire.WORK.of_client(self._channel)(iter(self._outbox.get, None), metadata=self._metadata)
    # A worker that takes the call and says nothing would hold this thread for ever.
    late = threading.Timer(self._seconds, answers.cancel)
    late.start()
    with _lost():
      self._session = next(answers, pb.FromWorker()).session
    late.cancel()
    if not self._session:
      raise WorkerLost("began no session")
    threading.Thread(target=self._listen, args=(answers,), name=f"worker {self.address}", daemon=True).start()

  def close(self) -> None:
    self._outbox.put(None)
    self._channel.close()

  @property
  def is_lost(self) -> bool:
    """Whether the session is over: all that it will ever say has been given to `on_message`, or is about to be."""
    return self._broken is not None

  def health(self) -> pb.HealthReport:
    """Raises WorkerLost: no answer, or the session is over."""
    if self._broken is not None:
      raise self._broken
    return self._call(wire.HEALTH, pb.Empty())

  def _call(self, method: wire.Method, request: Any) -> Any:
    with _lost():
      return method.of_client(self._channel)(request, metadata=self._metadata, timeout=self._seconds)

  def _listen(self, answers: Iterator[pb.FromWorker]) -> None:
    try:
      with _lost():
        for message in answers:
          self.last_heard = time.monotonic()
          self._on_message(self, message)
      self._broken = WorkerLost("ended the session")
    except WorkerLost as lost:
      self._broken = lost
    self._on_message(self, self._broken)

  # ---- weights

  def update(self, weights: HostWeights, seconds: float) -> None:
    """Gives it new weights; when this returns, its next tokens are drawn from them.

    Raises:
      WorkerLost: it did not take them, or not within `seconds`.
    """
    self._given = weights.version
    with _lost():
      messages = parts(weights, self._session, self._chunk_bytes)
      wire.UPDATE.of_client(self._channel)(messages, metadata=self._metadata, timeout=seconds)
    self.version = weights.version

  def load(self, path: str, version: int, seconds: float) -> None:
    """The same, from a checkpoint that the worker sees, below the folder that it was started with."""
    request = pb.Checkpoint(session=self._session, version=version, path=path)
    self._given = version
    with _lost():
      wire.LOAD.of_client(self._channel)(request, metadata=self._metadata, timeout=seconds)
    self.version = version

  @property
  def has_jobs(self) -> bool:
    return bool(self._sent)

  # ---- jobs, of the driver's thread

  @property
  def running(self) -> dict[int, int]:
    """The uid in each slot that is in use."""
    return {slot: self._sent[id].job.uid for slot, id in self._id_of.items()}

  def submit(self, jobs: Sequence[Job]) -> None:
    """Slots are names that the caller gives."""
    messages, size = [], 0
    for job in jobs:
      id, self._next_id = self._next_id, self._next_id + 1
      self._sent[id], self._id_of[job.slot] = _Sent(job, self.version), id
      sampling = None if job.sampling is None else pb.Sampling(**job.sampling._asdict())
      messages.append(pb.Job(id=id, uid=job.uid, tokens=job.tokens, max_tokens=job.max_tokens, sampling=sampling))
      size += messages[-1].ByteSize()
      if size >= wire.MESSAGE_BYTES:
        self._outbox.put(pb.ToWorker(jobs=pb.Jobs(jobs=messages)))
        messages, size = [], 0
    if messages:
      self._outbox.put(pb.ToWorker(jobs=pb.Jobs(jobs=messages)))
    self.last_heard = time.monotonic()

  def abort(self, slots: Collection[int]) -> None:
    """What still comes of them is not listened to."""
    ids = [self._id_of.pop(slot) for slot in slots if slot in self._id_of]
    for id in ids:
      del self._sent[id]
    if ids:
      self._outbox.put(pb.ToWorker(aborts=pb.Aborts(ids=ids)))

  def pause(self) -> None:
    self._outbox.put(pb.ToWorker(pause=pb.Empty()))

  def resume(self) -> None:
    self.last_heard = time.monotonic()
    self._outbox.put(pb.ToWorker(resume=pb.Empty()))

  def take(self, message: pb.FromWorker) -> Events:
    """What one message comes to; a job that was refused gives its slot back.

    Raises:
      WorkerLost: it answers nonsense.
    """
    events = Events()
    for progress in message.progress:
      if progress.id >= self._next_id:
        raise WorkerLost(f"answers job {progress.id}, which was never sent")
      sent = self._sent.get(progress.id)
      if sent is None:
        continue  # given up here, before the worker knew
      if progress.state == pb.REFUSED:
        events.evicted.append(sent.job.slot)
      else:
        self._check(progress, sent)
        reason = _REASONS[progress.state]
        events.drawn.append(
          Drawn(sent.job.slot, sent.job.uid, list(progress.tokens), list(progress.logps), progress.version, reason)
        )
      if progress.state != pb.RUNNING:
        del self._sent[progress.id], self._id_of[sent.job.slot]
    return events

  def _check(self, progress: pb.Progress, sent: _Sent) -> None:
    job, tokens, where = sent.job, progress.tokens, f"job {progress.id}"
    if progress.state == pb.ABORTED:
      raise WorkerLost(f"gave up: {progress.error[:200] or where}")
    if progress.uid != job.uid:
      raise WorkerLost(f"{where}: answers for uid {progress.uid}, not {job.uid}")
    if progress.state not in _REASONS:
      raise WorkerLost(f"{where}: state {progress.state} is none")
    if len(tokens) != len(progress.logps):
      raise WorkerLost(f"{where}: {len(tokens)} tokens, but {len(progress.logps)} log-probs")
    sent.drawn += len(tokens)
    if sent.drawn > job.max_tokens or (progress.state == pb.LENGTH and sent.drawn != job.max_tokens):
      raise WorkerLost(f"{where}: {sent.drawn} tokens, {job.max_tokens} were asked for")
    if progress.state != pb.RUNNING and not sent.drawn:
      raise WorkerLost(f"{where}: ended without a token")
    if tokens and max(tokens) >= self._vocab_size:
      raise WorkerLost(f"{where}: token {max(tokens)}, the vocabulary has {self._vocab_size}")
    if not all(math.isfinite(logp) and logp <= _LOGP_ROUNDING for logp in progress.logps):
      raise WorkerLost(f"{where}: a log-prob that is none")
    if tokens and not sent.version <= progress.version <= self._given:
      raise WorkerLost(f"{where}: version {progress.version}, from {sent.version} to {self._given} can be")
    sent.version = max(sent.version, progress.version)


@contextlib.contextmanager
def _lost() -> Iterator[None]:
  """gRPC's errors as one line."""
  try:
    yield
  except grpc.RpcError as error:
    raise WorkerLost(f"{error.code().name}: {' '.join((error.details() or '').split())[:200]}") from None
  except ValueError as error:  # a channel that was closed meanwhile
    raise WorkerLost(str(error)) from None
