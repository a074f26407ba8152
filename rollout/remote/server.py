"""The worker's side: an RL service over one engine, on any gRPC server, beside whatever else that serves.

    Work      the session of one trainer: jobs and aborts in, tokens with log-probs and versions out
    Update    new weights as a stream of buckets (stream.py); versions grow within a session
    Load      new weights from a checkpoint below a folder that was named at the start
    Describe, Health

There is one session at a time, as there is one set of weights.  When its stream ends, by the trainer's wish or its death,
its jobs are aborted, their slots are free and the next trainer can come.  It has to bring weights before its first job:
those that an earlier one left are not its own.

What comes in is checked before anything is done or allocated: a message that does not hold is answered with
INVALID_ARGUMENT, which ends its call, and none of it happens.  What goes out waits in memory no longer than the client
reads slowly, and is at most the answers of the jobs that it may have: `_JOBS_PER_SLOT` times the slots.
"""

import contextlib
import logging
import math
import os
import pathlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import grpc
import jax

from configs.base import ConfigError, require
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.records import FinishReason
from rollout import access
from rollout.engine import Sampling
from rollout.remote import wire
from rollout.remote import worker_pb2 as pb
from rollout.remote.stream import BrokenStream, Receiver
from rollout.service import Busy, EngineService, Request, Unavailable, Update
from sharding.transfer.plan import named_leaves

_LOG = logging.getLogger(__name__)
_JOBS_PER_SLOT = 2  # of a session: an aborted one has its slot until the dispatch ends
_THREADS = 16  # a session takes one for as long as it lasts
_STATES = {
  None: pb.RUNNING, FinishReason.STOP: pb.STOP, FinishReason.LENGTH: pb.LENGTH, FinishReason.CACHE: pb.CACHE,
  FinishReason.ABORTED: pb.ABORTED,
}  # fmt: skip


class Refusal(Exception):
  """A call that is answered with a status and one line."""

  def __init__(self, code: grpc.StatusCode, text: str):
    super().__init__(text)
    self.code = code


def _invalid(text: str) -> Refusal:
  return Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)


def add_rl_service(
  server: Any,
  service: EngineService,
  *,
  token: str = "",
  root: str | os.PathLike | None = None,
  chunk_bytes: int = wire.CHUNK_BYTES,
) -> None:
  """Registers the RL service.

  Args:
    server: of `grpc.server` or `grpc.aio.server`, made with `wire.channel_options(chunk_bytes)`; the latter with a
      `migration_thread_pool` of a few threads, as the handlers are not coroutines.
    token: that every call must bring; empty: none.
    root: folder that checkpoints may be loaded from; None: from nowhere.
    chunk_bytes: of weights in one message.
  """
  rl = RLService(service, root, chunk_bytes)
  handlers = {
    method.name: method.of_server(_guarded(function, token, method))
    for method, function in (
      (wire.DESCRIBE, rl.describe), (wire.HEALTH, rl.health), (wire.WORK, rl.work), (wire.UPDATE, rl.update),
      (wire.LOAD, rl.load),
    )
  }  # fmt: skip
  server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, handlers),))


def serve(
  service: EngineService,
  *,
  host: str = "127.0.0.1",
  port: int = 0,
  token: str = "",
  root: str | os.PathLike | None = None,
  chunk_bytes: int = wire.CHUNK_BYTES,
) -> tuple[grpc.Server, int]:
  """A server of its own, started, and its port (0: one that is free).

  Raises:
    ConfigError: the address cannot be used, or would be open to others without a token.
  """
  check_host(host, token)
  # More calls than threads would wait in line without a word, health checks behind whatever came first.
  server = grpc.server(
    futures.ThreadPoolExecutor(_THREADS, "rl-service"), options=wire.channel_options(chunk_bytes),
    maximum_concurrent_rpcs=_THREADS,
  )  # fmt: skip
  add_rl_service(server, service, token=token, root=root, chunk_bytes=chunk_bytes)
  address = access.address(host, port)
  try:
    bound = server.add_insecure_port(address)
  except RuntimeError:
    bound = 0
  require(bound != 0, f"{address}: cannot be listened on (taken, or not an address of this host)")
  server.start()
  return server, bound


def check_host(host: str, token: str) -> None:
  """Raises ConfigError: it is open to others, and there is no token."""
  require(
    bool(token) or access.is_local(host),
    f"--host={host}: whoever can reach it could use this worker; set a token ({wire.TOKEN_VARIABLE} or --token_file)",
  )


def _guarded(function: Callable[..., Any], token: str, method: wire.Method) -> Callable[..., Any]:
  """Checks the token first; turns refusals into statuses."""

  @contextlib.contextmanager
  def guard(context: grpc.ServicerContext) -> Iterator[None]:
    if not wire.is_authorized(context.invocation_metadata(), token):
      context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
    try:
      yield
    except Refusal as refusal:
      context.abort(refusal.code, str(refusal))
    except BrokenStream as broken:
      context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(broken))
    except Unavailable as error:
      context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

  def one(request: Any, context: grpc.ServicerContext) -> Any:
    with guard(context):
      return function(request, context)

  def many(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    with guard(context):
      yield from function(request, context)

  return many if method is wire.WORK else one


class RLService:
  """The calls; args as of `add_rl_service`."""

  def __init__(self, service: EngineService, root: str | os.PathLike | None, chunk_bytes: int):
    self._service, self._chunk_bytes = service, chunk_bytes
    self._root = None if root is None else pathlib.Path(root).resolve()
    self._expected = service.engine.abstract_stored()
    self._settings = {name: wire.digest(value) for name, value in service.engine.settings().items()}
    self._lock = threading.Lock()
    self._session: _Session | None = None
    self._updating = threading.Lock()

  def describe(self, _: pb.Empty, context: grpc.ServicerContext) -> pb.Description:
    return pb.Description(
      protocol=wire.PROTOCOL, slots=self._service.stats().slots, max_chunk_bytes=self._chunk_bytes,
      settings=self._settings,
    )  # fmt: skip

  def health(self, _: pb.Empty, context: grpc.ServicerContext) -> pb.HealthReport:
    stats = self._service.stats()
    names = [field.name for field in pb.HealthReport.DESCRIPTOR.fields]
    return pb.HealthReport(**{name: getattr(stats, name) for name in names})

  # ---- the session

  def work(self, messages: Iterator[pb.ToWorker], context: grpc.ServicerContext) -> Iterator[pb.FromWorker]:
    opening = next(messages, None)
    if opening is None or opening.WhichOneof("what") != "open":
      raise _invalid("a session begins with open")
    if opening.open.protocol != wire.PROTOCOL:
      raise Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, f"protocol {opening.open.protocol}: this worker has {wire.PROTOCOL}"
      )
    session = self._seated(context)
    yield pb.FromWorker(session=session.name)
    threading.Thread(target=session.listen, args=(messages,), name="rl-session", daemon=True).start()
    yield from session.spoken()

  def _seated(self, context: grpc.ServicerContext) -> "_Session":
    session = _Session(self._service)
    with self._lock:
      if self._session is not None:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "another trainer has this worker")
      self._session = session

    def leave() -> None:
      session.end()
      with self._lock:
        if self._session is session:
          self._session = None

    # Of the call, not of the generator: one that waits for a client to read is never resumed when the client is gone.
    if context.add_callback(leave) is False:
      leave()
    return session

  # ---- weights

  def update(self, messages: Iterator[pb.WeightsPart], context: grpc.ServicerContext) -> pb.Empty:
    first = next(messages, None)
    if first is None or first.WhichOneof("what") != "begin":
      raise _invalid("new weights begin with begin")
    with self._renewing(first.begin.session, first.begin.version) as session:
      receiver = Receiver(self._expected)
      receiver.begin(first.begin.tensors)
      for part in messages:
        if part.WhichOneof("what") == "commit":
          self._commit(session, receiver.tree(), first.begin.version)
          return pb.Empty()
        if part.WhichOneof("what") != "bucket":
          raise _invalid("a second begin")
        for piece in part.bucket.pieces:
          receiver.take(piece)
        if session.ended:
          break
    raise Refusal(grpc.StatusCode.ABORTED, f"version {first.begin.version} ended before its commit")

  def load(self, request: pb.Checkpoint, context: grpc.ServicerContext) -> pb.Empty:
    with self._renewing(request.session, request.version) as session:
      folder, engine = self._below_root(request.path), self._service.engine
      wanted = engine.abstract_params()
      placed = jax.tree.map(lambda leaf: leaf.sharding, wanted)  # an empty tree, where there is no mesh
      shardings = (lambda _: placed) if jax.tree.leaves(placed) else None
      try:
        params = open_checkpoint(folder, dtype=engine.model.param_dtype, shardings=shardings).params
      except (CheckpointError, ConfigError, OSError) as error:
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
      describe = lambda tree: [(name, leaf.shape, leaf.dtype) for name, leaf in named_leaves(tree)]  # noqa: E731
      if describe(params) != describe(wanted):
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"{request.path}: holds another model")
      self._commit(session, engine.load_params(params, request.version), request.version)
    return pb.Empty()

  def _below_root(self, path: str) -> pathlib.Path:
    if self._root is None:
      raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "this worker was started without --checkpoint_root")
    folder = (self._root / path.replace("\0", "")).resolve()  # links and .. are followed
    if not folder.is_relative_to(self._root):
      raise Refusal(grpc.StatusCode.PERMISSION_DENIED, f"{path}: is not below this worker's --checkpoint_root")
    return folder

  @contextlib.contextmanager
  def _renewing(self, name: bytes, version: int) -> Iterator["_Session"]:
    """One at a time, by the one who has the session, to a version that is newer."""
    session = self._session
    if session is None or session.name != name:
      raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "weights are of the one who has the session")
    if not self._updating.acquire(blocking=False):
      raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "other weights are under way")
    try:
      if version <= session.version:
        raise Refusal(
          grpc.StatusCode.FAILED_PRECONDITION, f"version {version} after {session.version}: versions must grow"
        )
      yield session
    finally:
      self._updating.release()

  def _commit(self, session: "_Session", stored: Any, version: int) -> None:
    if session.ended:
      raise Refusal(grpc.StatusCode.ABORTED, "the session has ended")
    self._service.update(stored, version)
    session.version = version


class _Session:
  """One trainer's jobs."""

  def __init__(self, service: EngineService):
    self.name = os.urandom(16)  # only who has read the stream can give weights
    self.version = -1  # of the weights that it gave
    self.ended = False
    self._service = service
    self._lock = threading.Lock()
    self._numbers: dict[int, int] = {}  # the service's, by job
    self._newest = -1  # job
    self._outbox: queue.SimpleQueue[pb.Progress | None] = queue.SimpleQueue()
    self._refusal: Exception | None = None
    self._paused = False

  def listen(self, messages: Iterable[pb.ToWorker]) -> None:
    """Does what comes in, until nothing does."""
    try:
      for message in messages:
        self._take(message)
    except (Refusal, Unavailable) as refusal:
      self._refusal = refusal
    except Exception as error:  # most likely gRPC's word, of several types, that the client is gone
      _LOG.info("a session broke off: %r", error)
      self._refusal = Refusal(grpc.StatusCode.INTERNAL, "the session broke off")
    finally:
      self._outbox.put(None)

  def spoken(self) -> Iterator[pb.FromWorker]:
    """What the client hears; all that is there in one message, up to a size."""
    while True:
      found, size = [self._outbox.get()], 0
      while found[-1] is not None and not self._outbox.empty() and size < wire.MESSAGE_BYTES:
        size += found[-1].ByteSize()
        found.append(self._outbox.get())
      progress = [one for one in found if one is not None]
      with self._lock:
        for one in progress:
          if one.state != pb.RUNNING:
            self._numbers.pop(one.id, None)
      if progress:
        yield pb.FromWorker(progress=progress)
      if None in found:
        if self._refusal is not None:
          raise self._refusal
        return

  def end(self) -> None:
    """Gives everything up; may be called twice."""
    with self._lock:
      self.ended = True
      numbers, self._numbers = list(self._numbers.values()), {}
    for number in numbers:
      self._service.abort(number)
    if self._paused:
      self._service.resume()
    self._outbox.put(None)

  def _take(self, message: pb.ToWorker) -> None:
    match message.WhichOneof("what"):
      case "jobs":
        self._submit(list(message.jobs.jobs))
      case "aborts":
        with self._lock:
          numbers = [self._numbers[id] for id in message.aborts.ids if id in self._numbers]
        for number in numbers:
          self._service.abort(number)
      case "pause":
        with self._lock:
          if not self.ended:  # else nobody would end the pause
            self._paused = True
            self._service.pause()
      case "resume":
        self._paused = False
        self._service.resume()
      case _:
        raise _invalid("jobs, aborts, pause or resume was due")

  def _submit(self, jobs: list[pb.Job]) -> None:
    if self.version < 0:
      raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no weights yet: they come before the first job")
    limit = _JOBS_PER_SLOT * self._service.stats().slots
    with self._lock:
      if len(self._numbers) + len(jobs) > limit:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {limit} jobs at once")
    requests = [self._checked(job) for job in jobs]  # all of them before the first is taken in
    for job, request in zip(jobs, requests, strict=True):
      with self._lock:
        if self.ended:
          return
        try:
          self._numbers[job.id] = self._service.submit(request, self._listener(job))
        except Busy:
          self._outbox.put(pb.Progress(id=job.id, uid=job.uid, state=pb.REFUSED))

  def _checked(self, job: pb.Job) -> Request:
    engine = self._service.engine
    length, vocabulary = engine.max_prefill_length, engine.model.vocab_size
    if job.id <= self._newest:
      raise _invalid(f"job {job.id} after {self._newest}: ids must grow")
    if job.uid >= 1 << 32:
      raise _invalid(f"uid {job.uid}: below 2**32")
    if not 0 < len(job.tokens) <= length:
      raise _invalid(f"{len(job.tokens)} tokens: from 1 to {length} fit")
    if max(job.tokens) >= vocabulary:
      raise _invalid(f"token {max(job.tokens)}: the vocabulary has {vocabulary}")
    if not 0 < job.max_tokens < 1 << 31:
      raise _invalid(f"max_tokens {job.max_tokens}: from 1 to 2**31 - 1")
    self._newest = job.id
    sampling = _sampling(job.sampling) if job.HasField("sampling") else None
    return Request(list(job.tokens), job.max_tokens, job.uid, sampling)

  def _listener(self, job: pb.Job) -> Callable[[Update], None]:
    id, uid = job.id, job.uid

    def listener(update: Update) -> None:
      self._outbox.put(
        pb.Progress(
          id=id, uid=uid, tokens=update.tokens, logps=update.logps, version=update.version,
          state=_STATES[update.reason], error=update.error,
        )
      )  # fmt: skip

    return listener


def _sampling(given: pb.Sampling) -> Sampling:
  if not (given.temperature > 0 and math.isfinite(given.temperature)):
    raise _invalid(f"temperature {given.temperature}: above 0")
  if not 0 < given.top_p <= 1:
    raise _invalid(f"top_p {given.top_p}: from above 0 to 1")
  if given.top_k >= 1 << 31:
    raise _invalid(f"top_k {given.top_k}: below 2**31")
  return Sampling(given.temperature, given.top_p, given.top_k, given.seed)
