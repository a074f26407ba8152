"""JetStream's own driver and gRPC server on an engine that the test can break; a real process is in tests/launch."""

import logging
import socket
import threading
import time

import grpc
import pytest
from jetstream.core.proto import jetstream_pb2_grpc

from ring_jax import model as ring_model
from rollout.serving.jetstream import Door, Driver, JetStream, jetstream_pb2, orchestrator
from tests.rollout.serving_cases import ENGINE, GREEDY, MODEL, TOKENIZER

Request = jetstream_pb2.DecodeRequest


class Served:
  def __init__(self, driver, max_waiting=2):
    with socket.create_server(("127.0.0.1", 0)) as listener:
      port = listener.getsockname()[1]
    self.driver = driver
    self.server = JetStream(driver, Door(TOKENIZER, MODEL.vocab_size, 90, 100), "127.0.0.1", port)
    self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    self.stub = jetstream_pb2_grpc.OrchestratorStub(self.channel)

  def ask(self, text="once", max_tokens=100):
    return self.stub.Decode(Request(text_content=Request.TextContent(text=text), max_tokens=max_tokens), timeout=120)

  def live(self):
    return self.stub.HealthCheck(jetstream_pb2.HealthCheckRequest()).is_live


@pytest.fixture
def served():
  params = ENGINE.load_params(ring_model.init_params(MODEL, 0))
  running = Served(Driver(ENGINE, params, GREEDY, max_waiting=2))
  yield running
  running.channel.close()
  running.server.stop()


def code_of(stream):
  with pytest.raises(grpc.RpcError) as caught:
    list(stream)
  return caught.value.code()


def test_importing_it_leaves_logging_alone():
  assert logging.getLogger().level > logging.DEBUG
  assert not [handler for handler in logging.getLogger().handlers if handler is orchestrator.handler]


def test_a_failing_engine_ends_its_requests_and_not_the_process(served, monkeypatch):
  assert served.live()
  waiting = [served.ask() for _ in range(3)]  # of two slots
  next(waiting[0])

  def generate(params, state):
    raise RuntimeError("out of memory")

  monkeypatch.setattr(ENGINE, "generate", generate)
  for stream in waiting:
    assert code_of(stream) is grpc.StatusCode.UNAVAILABLE
  assert "out of memory" in waiting[0].details()
  assert not served.live() and code_of(served.ask()) is grpc.StatusCode.UNAVAILABLE


def test_the_queue_has_an_end_and_a_drain_lets_requests_end(served, monkeypatch):
  go, real = threading.Event(), ENGINE.generate

  def generate(params, state):
    go.wait(60)
    return real(params, state)

  monkeypatch.setattr(ENGINE, "generate", generate)
  held = [served.ask(max_tokens=5) for _ in range(4)]
  while len(served.driver._unfinished()) < 4:
    time.sleep(0.01)
  assert code_of(served.ask()) is grpc.StatusCode.RESOURCE_EXHAUSTED
  draining = threading.Thread(target=served.server.drain)
  draining.start()
  while not served.server._servicer.draining:
    time.sleep(0.01)
  assert code_of(served.ask()) is grpc.StatusCode.UNAVAILABLE
  go.set()
  for stream in held:
    assert sum(len(s.token_ids) for part in stream for s in part.stream_content.samples) == 5
  draining.join(timeout=60)
  assert not draining.is_alive()
