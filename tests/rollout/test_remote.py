"""What a worker takes: sessions, jobs, weights; and everything that may be wrong with them."""

import contextlib
import dataclasses
import queue
import threading
import time
from concurrent import futures

import grpc
import jax
import numpy as np
import pytest

from configs.base import ConfigError
from configs.ring_tiny import get_config
from configs.schema import PlacementConfig, RolloutDtype, Strategy, Switching
from ring_jax import model as ring_model
from ring_jax.checkpoint import hf
from rollout.engine import RingEngine
from rollout.remote import wire
from rollout.remote import worker_pb2 as pb
from rollout.remote.server import _Session, serve
from rollout.remote.stream import HostWeights, Receiver, parts
from rollout.worker import EngineWorker, Job
from sharding.transfer.plan import named_leaves
from tests.rollout.remote_cases import (
  CONFIG,
  ENGINE,
  EOS,
  MASK,
  MODEL,
  TOKEN,
  packed_versions,
  pool_of,
  started,
  wait_until,
)


@pytest.fixture(scope="module")
def versions():
  return packed_versions()


@pytest.fixture
def worker():
  with started() as found:
    yield found


class Client:
  """Speaks the wire by hand."""

  def __init__(self, port, token=TOKEN):
    self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=wire.channel_options(wire.CHUNK_BYTES))
    self.metadata, self.outbox = wire.credentials(token), queue.SimpleQueue()

  def call(self, method, request):
    return method.of_client(self.channel)(request, metadata=self.metadata, timeout=60)

  def open(self):
    self.answers = self.call(wire.WORK, iter(self.outbox.get, None))
    self.say(open=pb.Open(protocol=wire.PROTOCOL))
    self.session = next(self.answers).session
    return self

  def say(self, **what):
    self.outbox.put(pb.ToWorker(**what))

  def close(self):
    self.outbox.put(None)
    self.channel.close()


@contextlib.contextmanager
def client_of(port, **options):
  client = Client(port, **options)
  try:
    yield client
  finally:
    client.close()


def refused(code, call, text=""):
  with pytest.raises(grpc.RpcError, match=text or None) as found:
    call()
  assert found.value.code() is code, found.value


def when_free(port):
  """A client of the worker's next session: the last one ends a moment after its rollouts have."""
  deadline = time.monotonic() + 30
  while True:
    client = Client(port)
    try:
      return client.open()
    except grpc.RpcError as error:
      client.close()
      if error.code() is not CODE.RESOURCE_EXHAUSTED or time.monotonic() > deadline:
        raise
      time.sleep(0.05)


CODE = grpc.StatusCode


@pytest.mark.parametrize("token", ["", "a token of the test", "ein Wort"])
def test_no_call_without_the_token(worker, token, versions):
  service, port = worker
  with client_of(port, token=token) as client:
    for method in (wire.DESCRIBE, wire.HEALTH):
      refused(CODE.UNAUTHENTICATED, lambda method=method: client.call(method, pb.Empty()))
    refused(CODE.UNAUTHENTICATED, lambda: client.call(wire.LOAD, pb.Checkpoint(path="x")))
    refused(CODE.UNAUTHENTICATED, client.open)
    weights = HostWeights.of(versions[0], 0)
    refused(CODE.UNAUTHENTICATED, lambda: client.call(wire.UPDATE, parts(weights, b"", 1 << 20)))
  assert service.version == -1
  with pool_of(port, token=token) as pool:
    time.sleep(0.5)
    assert not pool.slots


def test_one_session_at_a_time_and_its_end_frees_everything(worker, versions):
  service, port = worker
  with client_of(port) as first, client_of(port) as second:
    first.open()
    refused(CODE.RESOURCE_EXHAUSTED, second.open, "another trainer")
    first.call(wire.UPDATE, parts(HostWeights.of(versions[0], 5), first.session, 1 << 20))
    first.say(pause=pb.Empty())
    first.say(jobs=pb.Jobs(jobs=[pb.Job(id=i, uid=i, tokens=[11, 12], max_tokens=30) for i in range(6)]))
    wait_until(lambda: service.stats().requests == 6)
    assert first.call(wire.HEALTH, pb.Empty()).paused
    first.close()
    wait_until(lambda: service.stats().running == service.stats().waiting == 0)
    assert service.stats().aborted == 6 and not service.stats().paused
  with contextlib.closing(when_free(port)) as third:
    third.say(jobs=pb.Jobs(jobs=[pb.Job(id=0, uid=0, tokens=[11], max_tokens=3)]))
    refused(CODE.FAILED_PRECONDITION, lambda: next(third.answers), "no weights yet")
  with contextlib.closing(when_free(port)) as fourth:  # an earlier trainer's version does not bind this one
    fourth.call(wire.UPDATE, parts(HostWeights.of(versions[0], 0), fourth.session, 1 << 20))
    assert service.version == 0


def test_a_pause_that_is_read_after_the_end_of_its_session_holds_nobody(worker):
  service, _ = worker
  session = _Session(service)
  session.end()
  session.listen([pb.ToWorker(pause=pb.Empty())])
  assert not service.stats().paused


@pytest.mark.parametrize(
  ("message", "code"),
  [
    (pb.ToWorker(), CODE.INVALID_ARGUMENT),
    (pb.ToWorker(jobs=pb.Jobs()), CODE.INVALID_ARGUMENT),
    (pb.ToWorker(open=pb.Open(protocol=99)), CODE.FAILED_PRECONDITION),
  ],
)
def test_a_session_begins_as_it_should(worker, message, code):
  with client_of(worker[1]) as client:
    answers = client.call(wire.WORK, iter([message]))
    refused(code, lambda: next(answers))


GOOD = {"id": 1, "uid": 3, "tokens": [11, 12], "max_tokens": 5}
DRAW = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}


@pytest.mark.parametrize(
  "wrong",
  [
    {"tokens": []}, {"tokens": [11] * 65}, {"tokens": [11, MODEL.vocab_size]}, {"tokens": [2**32 - 1]}, {"max_tokens": 0},
    {"max_tokens": 2**31}, {"uid": 2**32}, {"uid": 2**64 - 1}, {"id": 0}, {"sampling": DRAW | {"temperature": 0.0}},
    {"sampling": DRAW | {"temperature": float("nan")}}, {"sampling": DRAW | {"temperature": float("inf")}},
    {"sampling": DRAW | {"top_p": 0.0}}, {"sampling": DRAW | {"top_p": 1.5}}, {"sampling": DRAW | {"top_k": 2**31}},
  ],
  ids=str,
)  # fmt: skip
def test_a_job_that_does_not_hold_costs_nothing(shared, wrong):
  service, client = shared
  before = service.stats().requests
  client.open()
  client.call(wire.UPDATE, parts(HostWeights.of(client.weights, 0), client.session, 1 << 20))
  client.say(jobs=pb.Jobs(jobs=[pb.Job(**GOOD | {"id": 0}), pb.Job(**GOOD | wrong)]))
  refused(CODE.INVALID_ARGUMENT, lambda: next(client.answers))
  assert service.stats().requests == before  # the good one beside it neither
  wait_until(lambda: not service.stats().running)


@pytest.fixture(scope="module")
def shared_server():
  with started() as found:
    yield found


@pytest.fixture
def shared(shared_server, versions):
  service, port = shared_server
  with client_of(port) as client:
    client.weights = versions[0]
    yield service, client
  wait_until(lambda: free(port))  # when the server knows that the client is gone


def free(port):
  with client_of(port) as client:
    try:
      client.open()
    except grpc.RpcError:
      return False
  return True


def test_more_jobs_than_slots_can_use_are_refused(shared):
  service, client = shared
  client.open()
  client.call(wire.UPDATE, parts(HostWeights.of(client.weights, 0), client.session, 1 << 20))
  before = service.stats().requests
  client.say(jobs=pb.Jobs(jobs=[pb.Job(**GOOD | {"id": i}) for i in range(2 * CONFIG.slots + 1)]))
  refused(CODE.RESOURCE_EXHAUSTED, lambda: next(client.answers), "more than 8 jobs")
  assert service.stats().requests == before


def test_a_message_that_is_too_large_is_not_read(versions):
  with started(chunk_bytes=1 << 12) as (service, port), client_of(port) as client:
    client.open()
    too_large = parts(HostWeights.of(versions[0], 0), client.session, 1 << 26)
    huge = pb.WeightsPart(bucket=pb.Bucket(pieces=[pb.Piece(data=bytes(6 << 20))]))
    refused(CODE.RESOURCE_EXHAUSTED, lambda: client.call(wire.UPDATE, iter([next(too_large), huge])))
    assert service.version == -1


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("dtype", list(RolloutDtype))
@pytest.mark.parametrize("chunk_bytes", [999, 1 << 26])
def test_weights_arrive_bit_for_bit_in_any_pieces(dtype, chunk_bytes):
  config = dataclasses.replace(CONFIG, dtype=dtype)
  engine = RingEngine(MODEL, config, eos_ids=EOS, vocab_mask_V=MASK, seed=1)
  sent = engine.load_params(ring_model.init_params(MODEL, 3))
  receiver = Receiver(engine.abstract_stored())
  begin, *buckets, commit = parts(HostWeights.of(sent, 4), b"me", chunk_bytes)
  assert begin.begin.version == 4 and commit.WhichOneof("what") == "commit"
  receiver.begin(begin.begin.tensors)
  for part in buckets:
    assert sum(len(piece.data) for piece in part.bucket.pieces) <= chunk_bytes
    for piece in part.bucket.pieces:
      receiver.take(pb.Piece.FromString(piece.SerializeToString()))
  arrived = receiver.tree()
  assert jax.tree.structure(arrived) == jax.tree.structure(sent)
  for (name, one), (_, other) in zip(named_leaves(sent), named_leaves(arrived), strict=True):
    assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes(), name


def with_begin(change):
  def broken(messages):
    change(messages[0].begin.tensors)
    return messages

  return broken


def with_pieces(change):
  def broken(messages):
    pieces = [piece for part in messages[1:-1] for piece in part.bucket.pieces]
    pieces = change(pieces) or pieces
    return [messages[0], pb.WeightsPart(bucket=pb.Bucket(pieces=pieces)), messages[-1]]

  return broken


def flipped(pieces):
  data = bytearray(pieces[3].data)
  data[len(data) // 2] ^= 4
  pieces[3].data = bytes(data)


def moved(pieces):
  pieces[1].offset += 4


@pytest.mark.parametrize(
  ("broken", "text"),
  [
    (with_begin(lambda tensors: tensors.pop()), "tensors are announced"),
    (with_begin(lambda tensors: tensors.add(name="more", dtype="float32", shape=[2])), "tensors are announced"),
    (with_begin(lambda tensors: tensors[0].shape.__setitem__(0, 2**60)), "is announced where the engine has"),
    (with_begin(lambda tensors: setattr(tensors[2], "dtype", "bfloat16")), "is announced where the engine has"),
    (with_begin(lambda tensors: setattr(tensors[1], "name", "another")), "is announced where the engine has"),
    (with_pieces(lambda pieces: pieces[:-1]), "committed after"),
    (with_pieces(lambda pieces: pieces[1:]), "came at|is due"),
    (with_pieces(lambda pieces: [*pieces, pieces[-1]]), "is due"),
    (with_pieces(lambda pieces: [pieces[0], *pieces]), "came at|is due"),
    (with_pieces(lambda pieces: [pieces[1], pieces[0], *pieces[2:]]), "came at|is due"),
    (with_pieces(moved), "came at"),
    (with_pieces(flipped), "does not have the bits that were sent"),
    (with_pieces(lambda pieces: setattr(pieces[0], "data", pieces[0].data[:-1])), "bits|came at|bytes"),
    (with_pieces(lambda pieces: setattr(pieces[0], "data", b"")), "0 bytes came"),
    (lambda messages: [messages[0], *messages], "a second begin"),
    (lambda messages: messages[1:], "begin with begin"),
    (lambda messages: messages[-1:], "begin with begin"),
    (lambda messages: [], "begin with begin"),
  ],
)
def test_a_broken_stream_leaves_the_old_weights_serving(shared, versions, broken, text):
  service, client = shared
  client.open()
  client.call(wire.UPDATE, parts(HostWeights.of(versions[0], 3), client.session, 4000))
  messages = list(parts(HostWeights.of(versions[1], 4), client.session, 4000))
  refused(CODE.INVALID_ARGUMENT, lambda: client.call(wire.UPDATE, iter(broken(messages))), text)
  assert service.version == 3
  assert drawn_by(client) == expected_of(versions[0])
  client.call(wire.UPDATE, parts(HostWeights.of(versions[1], 4), client.session, 4000))
  assert service.version == 4 and drawn_by(client, 1) == expected_of(versions[1])


def drawn_by(client, id=0):
  client.say(jobs=pb.Jobs(jobs=[pb.Job(id=id, uid=5, tokens=[11, 12, 13], max_tokens=8)]))
  tokens, state = [], pb.RUNNING
  while state == pb.RUNNING:
    for progress in next(client.answers).progress:
      tokens += progress.tokens
      state = progress.state
  return tokens


def expected_of(stored):
  local, drawn = EngineWorker(ENGINE), []
  local.begin(stored, 0, [])
  while not drawn or drawn[-1].reason is None:
    drawn += local.advance([] if drawn else [Job(0, 5, [11, 12, 13], 8)]).drawn
  return [token for one in drawn for token in one.tokens]


def test_whose_weights_and_which_version(shared, versions):
  service, client = shared
  client.open()
  update = lambda version, session: client.call(  # noqa: E731
    wire.UPDATE, parts(HostWeights.of(versions[0], version), session, 1 << 20)
  )
  refused(CODE.FAILED_PRECONDITION, lambda: update(1, b"someone else's"), "of the one who has the session")
  update(7, client.session)
  for version in (7, 6, -1):
    refused(CODE.FAILED_PRECONDITION, lambda version=version: update(version, client.session), "versions must grow")
  update(8, client.session)
  half, go = list(parts(HostWeights.of(versions[1], 9), client.session, 4000)), threading.Event()

  def slow():
    yield from half[:2]
    go.wait()
    yield from half[2:]

  with futures.ThreadPoolExecutor(1) as beside:
    first = beside.submit(lambda: client.call(wire.UPDATE, slow()))
    wait_until(lambda: in_the_way(update, client.session))
    go.set()
    first.result()
  assert service.version == 9
  cut = (message for message in half[:3])  # ends without its commit
  half[0].begin.version = 10
  refused(CODE.ABORTED, lambda: client.call(wire.UPDATE, cut), "ended before its commit")
  assert service.version == 9


def in_the_way(update, session):
  """An update of an old version says whether another is under way."""
  with pytest.raises(grpc.RpcError) as found:
    update(1, session)
  return "under way" in found.value.details()


def test_checkpoints_below_the_root_and_nowhere_else(tmp_path, versions):
  root, outside = tmp_path / "root", tmp_path / "outside"
  params = ring_model.init_params(MODEL, 1)
  hf.save(root / "step", MODEL, params)
  hf.save(outside, MODEL, params)
  other = dataclasses.replace(MODEL, intermediate_size=32)
  hf.save(root / "other", other, ring_model.init_params(other, 0))
  (root / "link").symlink_to(outside)
  with started(root=root) as (service, port), client_of(port) as client:
    client.open()
    load = lambda path, version=0: client.call(  # noqa: E731
      wire.LOAD, pb.Checkpoint(session=client.session, version=version, path=path)
    )
    for path in ("../outside", str(outside), "link", "step/../../outside", "/", "~", ""):
      with pytest.raises(grpc.RpcError) as found:
        load(path)
      assert found.value.code() in (CODE.PERMISSION_DENIED, CODE.FAILED_PRECONDITION) and service.version == -1
    refused(CODE.PERMISSION_DENIED, lambda: load("link"))
    refused(CODE.FAILED_PRECONDITION, lambda: load("nothing"), "no such folder")
    refused(CODE.FAILED_PRECONDITION, lambda: load("other"), "another model")
    load("step", 2)
    assert service.version == 2 and drawn_by(client) == expected_of(versions[1])
    refused(CODE.FAILED_PRECONDITION, lambda: load("step", 2), "must grow")
  with started() as (_, port), client_of(port) as client:
    client.open()
    request = pb.Checkpoint(session=client.session, version=0, path="step")
    refused(CODE.FAILED_PRECONDITION, lambda: client.call(wire.LOAD, request), "without --checkpoint_root")


# ---------------------------------------------------------------------------------------------------------------------
# Who may come


def test_who_listens_beyond_loopback_has_a_token_and_a_port_has_one_server(worker):
  service, port = worker
  for host in ("0.0.0.0", "10.0.0.5", "worker.example"):
    with pytest.raises(ConfigError, match="set a token"):
      serve(service, host=host)
  with pytest.raises(ConfigError, match="cannot be listened on"):
    serve(service, port=port)


def test_where_a_token_comes_from(tmp_path, monkeypatch):
  monkeypatch.delenv(wire.TOKEN_VARIABLE, raising=False)
  assert wire.read_token() == ""
  monkeypatch.setenv(wire.TOKEN_VARIABLE, "of the environment")
  assert wire.read_token() == "of the environment"
  (tmp_path / "token").write_text("of a file\n")
  assert wire.read_token(str(tmp_path / "token")) == "of a file"
  for text in ("", "two\nlines", "ü"):
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match="token"):
      wire.read_token(str(tmp_path / "token"))


@pytest.mark.parametrize(
  ("field", "value"),
  [("workers", ("10.0.0.7",)), ("workers", ("10.0.0.7:0",)), ("workers", (":8470",)), ("workers", ("a:1", "b c:2"))],
)
def test_an_address_is_a_host_and_a_port(field, value):
  with pytest.raises(ConfigError, match=r"rollout\.workers\.\d=.*HOST:PORT"):
    dataclasses.replace(CONFIG, **{field: value})


def test_what_contradicts_workers_is_said():
  run = get_config()
  remote = dataclasses.replace(run.rollout, workers=("10.0.0.7:8470",))
  host = dataclasses.replace(run.placement, switching=Switching.HOST)
  with pytest.raises(ConfigError, match=r"placement\.switching=host"):
    dataclasses.replace(run, rollout=remote, placement=host)
  apart = PlacementConfig(strategy=Strategy.EXPLICIT, devices={"actor": "0:1", "rollout": "1:2"})
  dataclasses.replace(run, placement=apart)
  with pytest.raises(ConfigError, match=r"would be idle"):
    dataclasses.replace(run, rollout=remote, placement=apart)
