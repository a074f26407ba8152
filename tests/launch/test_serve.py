"""A real server process: the official openai client, curl, a JetStream gRPC client, and signals."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import sys
import time

import grpc
import httpx2
import jax
import numpy as np
import openai
import pytest

from ring_jax.checkpoint.resolve import open_checkpoint
from ring_jax.data.tokenizer import Tokenizer
from ring_jax.launch.score import score
from rollout.jetstream_compat import server_modules
from tests.checkpoint import hf_folder
from tests.launch.certificates import write_certificate

ROOT = pathlib.Path(__file__).parents[2]
KEY = "a-key-of-the-tests"
LIMIT = 15_000  # tokens of an answer: seconds, where nobody cuts it short
FLAGS = ("--slots=2", "--max_waiting=6", "--max_prompt_tokens=60", f"--max_tokens={LIMIT}", "--max_body_bytes=10000")
SHORT = ("--max_prompt_tokens=16", "--max_tokens=4000", "--temperature=0")  # little to compile, and quick steps
TOKENIZER = Tokenizer.build()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
  """Random norms and selection biases; of its 280 ids some are never drawn."""
  folder = tmp_path_factory.mktemp("serve") / "tiny-ring"
  fields = hf_folder.fields(vocab_size=280, num_hidden_layers=2, max_position_embeddings=16_384)
  hf_folder.write(folder, fields, hf_folder.random_tensors(fields, seed=4, bias=-1.0))
  TOKENIZER.save(folder)
  return folder


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as listener:
    return listener.getsockname()[1]


class Server:
  """The command, running."""

  def __init__(self, checkpoint, *flags, key=KEY):
    environment = os.environ | {"RING_JAX_API_KEY": key}
    command = [sys.executable, "-m", "ring_jax.launch.serve", f"--checkpoint={checkpoint}", "--port=0", *flags]
    self.process = subprocess.Popen(
      command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = iter(self.process.stdout.readline, "")
    self.told = []
    for line in lines:
      self.told.append(line)
      if line.startswith("serving at "):
        self.url = line.split()[2].removesuffix("/v1;")
        return
    raise AssertionError(self.process.stderr.read())

  def client(self, key=KEY):
    return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

  def end(self, sig=signal.SIGTERM):
    """(status, stderr)"""
    self.process.send_signal(sig)
    with contextlib.closing(self.process.stderr):
      return self.process.wait(timeout=120), self.process.stderr.read()


@pytest.fixture(scope="session")
def server(checkpoint):
  port = free_port()
  running = Server(checkpoint, *FLAGS, f"--grpc_port={port}", "--temperature=0")
  running.grpc_port = port
  yield running
  status, errors = running.end()
  assert status == 0 and not errors, errors
  assert KEY not in "".join(running.told)


@pytest.fixture(scope="session")
def client(server):
  return server.client()


def curl(server, path, *arguments, key=KEY):
  """(status, body)"""
  command = ["curl", "-sS", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {key}", *arguments, server.url + path]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  body, _, status = done.stdout.rpartition("\n")
  return int(status), body


def metric(server, name):
  lines = curl(server, "/metrics")[1].splitlines()
  return next(float(line.split()[1]) for line in lines if line.startswith(f"ring_jax_{name} "))


def wait_for(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, "did not come true"
    time.sleep(0.02)


def logp_of(checkpoint, prompt, tokens, temperature):
  """What launch.score says of the drawn tokens, over the ids that may be drawn."""
  config, params, _, _ = open_checkpoint(checkpoint)
  logits_TxV = score(config, params, np.asarray([[*prompt, *tokens]]))["logits"][0].astype(np.float64) / temperature
  logits_TxV[:, ~TOKENIZER.sampleable_mask(config.vocab_size)] = -np.inf
  logp_TxV = np.asarray(jax.nn.log_softmax(logits_TxV))
  return logp_TxV[np.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1), tokens], logits_TxV


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_those_of_launch_score(checkpoint, client, temperature):
  answer = client.completions.create(
    model="tiny-ring", prompt="What is it?", max_tokens=20, temperature=temperature, seed=11, logprobs=0,
    extra_body={"return_token_ids": True},
  )  # fmt: skip
  choice = answer.choices[0]
  assert choice.prompt_token_ids == TOKENIZER.encode("What is it?") and set(choice.weight_versions) == {0}
  wanted, logits_TxV = logp_of(checkpoint, choice.prompt_token_ids, choice.token_ids, temperature or 1.0)
  assert np.abs(np.asarray(choice.logprobs.token_logprobs) - wanted).max() < 1e-5
  if temperature == 0:
    start = len(choice.prompt_token_ids) - 1
    assert choice.token_ids == logits_TxV[start : start + len(choice.token_ids)].argmax(axis=-1).tolist()


def test_a_streamed_chat_adds_up_to_the_whole_one(client):
  asked = {
    "model": "tiny-ring", "messages": [{"role": "user", "content": "Hello 👋"}], "max_completion_tokens": 60, "n": 2, "seed": 5,
    "temperature": 1.2, "logprobs": True,
  }  # fmt: skip
  whole = client.chat.completions.create(**asked)
  text, logps, reasons, usage = {0: "", 1: ""}, {0: [], 1: []}, {}, None
  for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage
    for choice in chunk.choices:
      text[choice.index] += choice.delta.content or ""
      logps[choice.index] += choice.logprobs.content
      reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
  for choice in whole.choices:
    assert text[choice.index] == choice.message.content and reasons[choice.index] == choice.finish_reason
    assert logps[choice.index] == choice.logprobs.content
    assert (
      b"".join(bytes(token.bytes) for token in logps[choice.index]).decode("utf-8", "replace") == text[choice.index]
    )
  assert usage == whole.usage and usage.completion_tokens == len(logps[0]) + len(logps[1])
  assert whole.choices[0].message.content != whole.choices[1].message.content


def test_curl_streams_server_sent_events(server):
  body = json.dumps({"prompt": "ab", "max_tokens": 6, "stream": True})
  status, text = curl(server, "/v1/completions", "-N", "-H", "Content-Type: application/json", "-d", body)
  lines = [line for line in text.splitlines() if line]
  assert status == 200 and lines[-1] == "data: [DONE]" and len(lines) > 2
  assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"
  assert curl(server, "/health")[0] == 200
  status, models = curl(server, "/v1/models")
  assert status == 200 and [model["id"] for model in json.loads(models)["data"]] == ["tiny-ring"]


def test_more_requests_than_slots_each_get_their_own_answer(client):
  ask = lambda i: client.completions.create(model="tiny-ring", prompt=f"number {i}", max_tokens=30).choices[0].text  # noqa: E731
  alone = [ask(i) for i in range(8)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(ask, range(8))) == alone
  assert len(set(alone)) > 4


def test_clients_that_leave_free_their_slots_at_once(server, client):
  aborted, drawn = metric(server, "aborted_total"), metric(server, "drawn_tokens_total")
  asked = {"model": "tiny-ring", "prompt": "on and on", "max_tokens": LIMIT}
  streams = [client.completions.create(**asked, stream=True) for _ in range(2)]
  for stream in streams:
    next(iter(stream))
  assert metric(server, "running") == 2
  for stream in streams:
    stream.close()
  wait_for(lambda: metric(server, "aborted_total") == aborted + 2)
  assert metric(server, "running") == 0
  # And one that waits for whole answers: both slots of it, and what is in the queue.
  leaving = http.client.HTTPConnection(server.url.removeprefix("http://"))
  headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
  leaving.request("POST", "/v1/completions", json.dumps(asked | {"n": 4}), headers)
  wait_for(lambda: metric(server, "running") == metric(server, "waiting") == 2)
  leaving.close()
  wait_for(lambda: metric(server, "aborted_total") == aborted + 6)
  assert metric(server, "running") == metric(server, "waiting") == 0
  assert client.completions.create(model="tiny-ring", prompt="next", max_tokens=3).usage.completion_tokens == 3
  assert metric(server, "drawn_tokens_total") - drawn < 4 * LIMIT  # of 6


def test_the_key_is_asked_for_before_anything_else(server):
  with pytest.raises(openai.AuthenticationError, match="a valid key is needed"):
    server.client(key="wrong").models.list()
  for arguments in (("-d", "{"), ("-d", "x" * 20_000), ()):
    status, body = curl(server, "/v1/completions", *arguments, key="")
    assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
  assert curl(server, "/health", key="")[0] == curl(server, "/metrics", key="")[0] == 200


def test_the_client_knows_every_refusal(server, client):
  model = "tiny-ring"
  with pytest.raises(openai.NotFoundError, match="this server has 'tiny-ring'"):
    client.completions.create(model="gpt-4", prompt="a")
  with pytest.raises(openai.BadRequestError, match="has 61 tokens, must have from 1 to 60"):
    client.completions.create(model=model, prompt="a" * 61)
  with pytest.raises(openai.BadRequestError, match="logprobs: only 0 is supported"):
    client.completions.create(model=model, prompt="a", logprobs=5)
  with pytest.raises(openai.APIStatusError) as caught:
    client.completions.create(model=model, prompt="a" * 10_001)
  assert caught.value.status_code == 413
  json_type = ("-H", "Content-Type: application/json")
  for body in ("", "{", "[]", '{"prompt": "\\ud800"}', "null", '{"prompt": {}}', "[" * 5000):
    status, text = curl(server, "/v1/completions", *json_type, "--data-binary", body)
    assert status == 400 and json.loads(text)["error"]["message"], body
  with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
    raw.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
    assert raw.recv(100).startswith(b"HTTP/1.1 400")
  assert metric(server, "running") == metric(server, "waiting") == 0


def test_a_jetstream_client_is_served_by_the_same_weights(server, client):
  from jetstream.core.proto import jetstream_pb2_grpc

  messages = server_modules().jetstream_pb2
  Request = messages.DecodeRequest
  with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
    stub = jetstream_pb2_grpc.OrchestratorStub(channel)
    metadata = (("authorization", f"Bearer {KEY}"),)

    def decode(**fields):
      return stub.Decode(Request(**fields), metadata=metadata, timeout=120)

    assert stub.HealthCheck(messages.HealthCheckRequest()).is_live
    wanted = client.completions.create(
      model="tiny-ring", prompt="Größe", max_tokens=12, extra_body={"return_token_ids": True}
    ).choices[0]
    for content in (
      {"text_content": Request.TextContent(text="Größe")},
      {"token_content": Request.TokenContent(token_ids=TOKENIZER.encode("Größe"))},
    ):
      samples = [s for part in decode(max_tokens=12, **content) for s in part.stream_content.samples]
      assert [token for sample in samples for token in sample.token_ids] == wanted.token_ids
      assert "".join(sample.text for sample in samples) == (wanted.text if "text_content" in content else "")

    text = Request.TextContent(text="on and on")
    streams = [decode(max_tokens=LIMIT, text_content=text) for _ in range(3)]  # of two slots
    for stream in streams[:2]:
      next(stream)
    for stream in streams:
      stream.cancel()
    following = [part for part in decode(max_tokens=3, text_content=text)]
    assert sum(len(s.token_ids) for part in following for s in part.stream_content.samples) == 3

    for fields in (
      {}, {"max_tokens": 4}, {"text_content": text}, {"max_tokens": LIMIT + 1, "text_content": text},
      {"max_tokens": 4, "token_content": Request.TokenContent(token_ids=[280])},
      {"max_tokens": 4, "text_content": Request.TextContent(text="a" * 61)},
    ):  # fmt: skip
      with pytest.raises(grpc.RpcError) as caught:
        list(decode(**fields))
      assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, fields
    with pytest.raises(grpc.RpcError) as caught:
      list(stub.Decode(Request(max_tokens=4, text_content=text)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert stub.HealthCheck(messages.HealthCheckRequest()).is_live


def begun(server):
  """A long answer, of which the first part was read."""
  stream = server.client().completions.create(model="tiny-ring", prompt="on and on", max_tokens=4000, stream=True)
  next(iter(stream))
  return stream


def test_sigterm_lets_requests_end(checkpoint):
  server = Server(checkpoint, *FLAGS, *SHORT)
  stream = begun(server)
  server.process.send_signal(signal.SIGTERM)
  wait_for(lambda: curl(server, "/health")[0] == 503)
  with pytest.raises(openai.InternalServerError, match="closing"):
    server.client().completions.create(model="tiny-ring", prompt="a")
  *_, last = stream
  assert last.choices[0].finish_reason == "length"
  assert server.process.wait(timeout=60) == 0


def test_https(checkpoint, tmp_path):
  certificate, key = write_certificate(tmp_path)
  server = Server(checkpoint, *FLAGS, *SHORT, f"--ssl_certfile={certificate}", f"--ssl_keyfile={key}")
  assert server.url.startswith("https://127.0.0.1:")
  trusting = httpx2.Client(verify=ssl.create_default_context(cafile=certificate))
  client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=trusting)
  assert client.completions.create(model="tiny-ring", prompt="a", max_tokens=3).usage.completion_tokens == 3
  with pytest.raises(openai.APIConnectionError):  # signed by nobody whom others know
    server.client().models.list()
  plain = server.url.replace("https", "http")
  with pytest.raises(httpx2.HTTPError):
    httpx2.get(f"{plain}/health")
  client.close()
  assert server.end() == (0, "")


def test_a_second_signal_ends_at_once(checkpoint):
  server = Server(checkpoint, *FLAGS, *SHORT)
  stream = begun(server)
  server.process.send_signal(signal.SIGTERM)
  wait_for(lambda: curl(server, "/health")[0] == 503)
  assert server.end() == (130, "ended at once: requests were cut off\n")
  with pytest.raises(openai.APIConnectionError):
    list(stream)


def test_a_mistake_is_one_line():
  """An empty key must not open the server."""
  command = [sys.executable, "-m", "ring_jax.launch.serve", "--checkpoint=nowhere"]
  environment = os.environ | {"RING_JAX_API_KEY": ""}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == "error: --api_key or RING_JAX_API_KEY is empty: leave it out, or give a key\n"
