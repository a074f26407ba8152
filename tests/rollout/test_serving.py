"""The HTTP front over an engine that the test can pause and break; what a real process does is in tests/launch."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import time
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.schema import ChatTemplate, ConfigError, MeshConfig, TokenizerConfig, to_dict
from ring_jax import model as ring_model
from ring_jax.checkpoint.errors import CheckpointError
from ring_jax.checkpoint.store import RunStore
from ring_jax.data.chat import render_prompt
from rollout.engine import RingEngine, bucket
from rollout.paged import CacheUse
from rollout.service import EngineService
from rollout.serving.http import Front, Limits, Model
from rollout.serving.metrics import Metrics
from rollout.serving.schema import ChatRequest, CompletionRequest, RequestError, parse
from rollout.serving.server import Loaded, load, serve, warm_up
from rollout.serving.settings import Settings, parse_mesh
from rollout.worker import EngineWorker, Job
from tests.checkpoint import hf_folder
from tests.configs import small_run
from tests.launch.certificates import write_certificate
from tests.rollout.serving_cases import CONFIG, ENGINE, GREEDY, MODEL, TOKENIZER

LIMITS = Limits(max_prompt_tokens=90, max_tokens=100, max_choices=5, max_body_bytes=20_000)
TEMPLATE = TokenizerConfig(template=ChatTemplate.CHAT)
PATHS = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}


@pytest.fixture(scope="module")
def params():
  return ENGINE.load_params(ring_model.init_params(MODEL, 0))


@pytest.fixture
def served(params):
  """(service, front)"""
  service = EngineService(EngineWorker(ENGINE), params, 5, max_waiting=3)
  yield service, Front(service, Model("tiny", TOKENIZER, 280, TEMPLATE, GREEDY), LIMITS)
  service.close()


@contextlib.asynccontextmanager
async def client_of(front):
  async with httpx2.AsyncClient(
    transport=httpx2.ASGITransport(app=front.app, raise_app_exceptions=False), base_url="http://server"
  ) as client:
    yield client


async def post(client, **body):
  (path,) = {PATHS[name] for name in body if name in PATHS}
  return await client.post(path, json=body, timeout=120)


def ask(front, **body):
  async def run():
    async with client_of(front) as client:
      return await post(client, **body)

  return asyncio.run(run())


def events(response):
  lines = [line for line in response.text.split("\n\n") if line]
  assert lines.pop() == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_full_queue_is_a_429_and_gives_back_what_it_took(served):
  service, front = served
  service.pause()

  async def run():
    async with client_of(front) as client:
      held = asyncio.ensure_future(post(client, prompt="a", n=4, max_tokens=2))
      while service.stats().waiting < 4:
        await asyncio.sleep(0.01)
      refused = await post(client, prompt="b", n=2, max_tokens=2)
      while service.stats().waiting > 4:  # its first choice is on its way out
        await asyncio.sleep(0.01)
      service.resume()
      return refused, await held

  refused, held = asyncio.run(run())
  assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
  assert refused.json()["error"]["type"] == "rate_limit_error"
  assert held.status_code == 200 and len(held.json()["choices"]) == 4
  assert service.stats().drawn_tokens == 8


def test_every_number_of_the_service_and_its_pages_is_a_metric(served):
  service, _ = served
  cache = CacheUse(**{field.name: 100 + i for i, field in enumerate(dataclasses.fields(CacheUse))})
  paged = SimpleNamespace(stats=lambda: dataclasses.replace(service.stats(), cache=cache))
  lines = Metrics(paged, lambda: False).text().decode().splitlines()
  for name, value in vars(cache).items():
    assert {f"ring_jax_cache_{name} {value}.0", f"ring_jax_cache_{name}_total {value}.0"} & set(lines), name
  for name in vars(service.stats()).keys() - {"cache", "error"}:
    assert any(line.startswith((f"ring_jax_{name} ", f"ring_jax_{name}_total ")) for line in lines), name
  assert b"cache" not in Metrics(service, lambda: False).text()  # this engine's slots are in one piece


def test_a_draining_server_ends_what_runs_and_takes_nothing_in(served):
  service, front = served
  service.pause()

  async def run():
    async with client_of(front) as client:
      held = asyncio.ensure_future(post(client, prompt="a", max_tokens=30))
      while not service.stats().requests:
        await asyncio.sleep(0.01)
      await asyncio.to_thread(front.drain)
      return await held, await post(client, prompt="a"), await client.get("/health"), await client.get("/metrics")

  held, refused, health, metrics = asyncio.run(run())
  assert held.json()["usage"]["completion_tokens"] == 30
  assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
  assert health.status_code == 503 and health.json() == {"status": "draining", "weight_version": 5}
  assert "ring_jax_healthy 0.0" in metrics.text and "ring_jax_drawn_tokens_total 30.0" in metrics.text


def test_an_engine_that_fails_is_a_503_or_an_event(served):
  service, front = served

  def advance(jobs):
    raise RuntimeError("out of memory")

  service._worker.advance = advance
  response = ask(front, prompt="a", stream=True)
  assert response.status_code == 200 and "out of memory" in events(response)[-1]["error"]["message"]
  refused = ask(front, prompt="a")
  assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"


def test_a_fault_of_the_server_tells_nothing_of_it(served, monkeypatch):
  _, front = served
  monkeypatch.setattr(front, "_check_model", lambda name: 1 / 0)
  response = ask(front, prompt="a")
  assert response.status_code == 500 and response.json()["error"]["message"] == "internal error"


def test_a_stop_string_ends_the_answer_and_frees_the_slot(served):
  service, front = served
  whole = ask(front, prompt="once", max_tokens=100, return_token_ids=True).json()["choices"][0]
  assert whole["finish_reason"] == "length" and whole["weight_versions"] == [5] * 100
  stop = whole["text"][7:10]
  for stream in (False, True):
    response = ask(front, prompt="once", max_tokens=100, stop=stop, stream=stream, return_token_ids=True)
    if stream:
      chunks = [chunk["choices"][0] for chunk in events(response)]
      text = "".join(chunk["text"] for chunk in chunks)
      tokens = [token for chunk in chunks for token in chunk["token_ids"]]
      reason = chunks[-1]["finish_reason"]
    else:
      choice = response.json()["choices"][0]
      text, tokens, reason = choice["text"], choice["token_ids"], choice["finish_reason"]
      assert response.json()["usage"]["completion_tokens"] == len(tokens)
    assert reason == "stop" and text == whole["text"][: whole["text"].index(stop)]
    assert tokens == whole["token_ids"][: len(tokens)] and len(tokens) < 15
  while service.stats().aborted < 2:
    time.sleep(0.01)
  assert service.stats().drawn_tokens < 160


@pytest.mark.parametrize("thinking", [False, True])
def test_a_thought_is_told_apart_in_chats(served, thinking):
  _, front = served
  messages = [{"role": "user", "content": "why?"}]
  body = {
    "messages": messages, "max_tokens": 40, "return_token_ids": True, "chat_template_kwargs": {"enable_thinking": thinking}
  }  # fmt: skip
  answer = ask(front, **body).json()
  message = answer["choices"][0]["message"]
  template = dataclasses.replace(TEMPLATE, thinking=thinking)
  assert answer["prompt_token_ids"] == TOKENIZER.encode(render_prompt(messages, template))
  text = TOKENIZER.decode(answer["choices"][0]["token_ids"])
  assert "</think>" not in text  # an untrained model does not end its thought
  assert (message.get("reasoning_content"), message["content"]) == ((text, "") if thinking else (None, text))
  chunks = events(ask(front, **body, stream=True))
  deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
  assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (text if thinking else "")
  assert "".join(delta.get("content", "") for delta in deltas) == ("" if thinking else text)
  assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
  assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])


def test_several_prompts_and_answers_come_in_order(served):
  _, front = served
  body = {"max_tokens": 6, "temperature": 1, "seed": 3, "return_token_ids": True, "logprobs": 0}
  answer = ask(front, prompt=["ab", "cde"], n=2, **body).json()
  choices = answer["choices"]
  assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
  assert [choice["prompt_token_ids"] for choice in choices] == [[97, 98], [97, 98], [99, 100, 101], [99, 100, 101]]
  assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29}
  assert choices[0]["token_ids"] != choices[1]["token_ids"]
  streamed = events(ask(front, prompt=[[97, 98], [99, 100, 101]], n=2, stream=True, **body))
  for choice in choices:
    chunks = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == choice["index"]]
    for name in ("tokens", "token_logprobs", "text_offset"):
      joined = [value for chunk in chunks for value in chunk["logprobs"][name]]
      assert joined == choice["logprobs"][name]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"] == "length"
  alone = ask(front, prompt="ab", **body).json()["choices"][0]
  assert alone["token_ids"] == choices[0]["token_ids"]
  assert ask(front, prompt="ab", **body | {"seed": 4}).json()["choices"][0]["token_ids"] != alone["token_ids"]


MISTAKES = [
  ({"prompt": ""}, "prompt", "prompt: has 0 tokens, must have from 1 to 90"),
  ({"prompt": "a" * 91}, "prompt", "prompt: has 91 tokens, must have from 1 to 90"),
  ({"prompt": [[3], []]}, "prompt", "prompt: a string, a list of strings"),
  ({"prompt": [3, 280]}, "prompt", "prompt: holds id 280, must be from 0 to 279"),
  ({"prompt": [3, -1]}, "prompt", "prompt: a string, a list of strings"),
  ({"prompt": [1.5]}, "prompt", "prompt: a string, a list of strings"),
  ({"prompt": "a", "max_tokens": 101}, "max_tokens", "max_tokens: is 101, must be at most 100"),
  ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens: Input should be greater than or equal to 1"),
  ({"prompt": "a", "max_tokens": "7"}, "max_tokens", "max_tokens: Input should be a valid integer"),
  ({"prompt": ["a", "b"], "n": 3}, "n", "n: 2 prompts x 3 answers, at most 5 fit"),
  ({"prompt": "a", "temperature": -0.1}, "temperature", "temperature: Input should be greater"),
  ({"prompt": "a", "temperature": 1e-40}, "temperature", "temperature: must be 0 (greedy), or from 0.01 to 2"),
  ({"prompt": "a", "top_p": 0}, "top_p", "top_p: Input should be greater than 0"),
  ({"prompt": "a", "stop": ["a"] * 5}, "stop", "stop: at most 4 strings of 1 to 256 characters"),
  ({"prompt": "a", "stop": ""}, "stop", "stop: at most 4 strings of 1 to 256 characters"),
  ({"prompt": "a", "logprobs": 2}, "logprobs", "logprobs: only 0 is supported"),
  ({"prompt": "a", "echo": True}, "echo", "echo: is not supported"),
  ({"prompt": "a", "best_of": 3}, "best_of", "best_of: must be n=1"),
  ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream_options: needs stream=true"),
  ({"messages": []}, "messages", "messages: List should have at least 1 item"),
  ({"messages": [{"role": "cat", "content": "a"}]}, "messages[0].role", "messages[0].role: Input should be"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "messages[0].content: only"),
  ({"messages": [{"role": "user", "content": "a"}, {"role": "system"}]}, "messages", "messages: message 1 has role 'system'"),
  ({"messages": [{"role": "user"}], "logprobs": True, "top_logprobs": 3}, "top_logprobs", "top_logprobs: only 0"),
  ({"messages": [{"role": "user"}], "tools": [{"type": "function"}]}, "tools", "tools: is not supported"),
  ({"messages": [{"role": "user"}], "response_format": {"type": "json_object"}}, "response_format", "response_format: is"),
]  # fmt: skip


def test_mistakes_are_named_and_cost_nothing(served):
  service, front = served

  async def run():
    async with client_of(front) as client:
      for body, param, message in MISTAKES:
        response = await post(client, **body)
        error = response.json()["error"]
        assert response.status_code == 400 and error["type"] == "invalid_request_error", body
        assert error["param"] == param and error["message"].startswith(message), (body, error)
      response = await post(client, prompt="a", model="other")
      assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"

  asyncio.run(run())
  assert service.stats().requests == 0 and service.stats().dispatches == 0


def test_fields_without_effect_are_taken(served):
  _, front = served
  plain = ask(front, prompt="ab", max_tokens=4).json()["choices"]
  idle = {
    "user": "me", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "echo": False, "best_of": 1, "suffix": None,
    "stop": None, "seed": None, "model": "tiny", "nobody_knows_this": {"a": [1]}, "top_k": -1, "n": 1,
  }  # fmt: skip
  assert ask(front, prompt="ab", max_tokens=4, **idle).json()["choices"] == plain


def test_the_body_is_looked_at_before_it_is_read(served):
  _, front = served

  async def endless():
    while True:
      yield b" " * 1000

  async def run():
    async with client_of(front) as client:
      url, of_json = PATHS["prompt"], {"content-type": "application/json"}
      assert (await client.post(url, content=endless(), headers=of_json)).status_code == 413
      told = await client.post(url, content=b" " * 20_001, headers=of_json)
      assert told.status_code == 413 and told.json()["error"]["message"] == "the body has more than 20000 bytes"
      assert (await client.post(url, content=b'{"prompt": "a"}')).status_code == 415
      assert (await client.post(url, data={"prompt": "a"})).status_code == 415  # a form, as any web page can send one
      assert (await client.get("/v1/nothing")).json()["error"]["type"] == "not_found_error"
      assert (await client.get(url)).status_code == 405
      assert (await client.get("/v1/models/other")).status_code == 404
      assert (await client.get("/v1/models/tiny")).json()["id"] == "tiny"

  asyncio.run(run())


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
  max_leaves=5,
)
NAMES = st.sampled_from([*CompletionRequest.model_fields, *ChatRequest.model_fields, "echo", "tools"])


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, VALUES, max_size=6) | VALUES, st.booleans(), st.booleans())
def test_no_body_is_too_strange(served, body, prompted, chat):
  if isinstance(body, dict) and prompted:
    body |= {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}
  with contextlib.suppress(RequestError):
    served[1]._choices(parse(ChatRequest if chat else CompletionRequest, json.dumps(body).encode()))


@pytest.mark.parametrize(
  "raw", [b"", b"{", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'"\xff"', b'{"prompt": "a", "seed": 1e999}']
)
def test_what_is_no_json_is_refused(raw):
  with pytest.raises(RequestError) as caught:
    parse(CompletionRequest, raw)
  assert caught.value.status == 400


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"port": 70_000}, "--port=70000: must be from 0 to 65535"),
    ({"slots": 0}, "--slots=0: must be from 1"),
    ({"top_p": 0.0}, "--top_p=0.0: must be from above 0 to 1"),
    ({"temperature": 0.001}, "--temperature=0.001: must be 0"),
    ({"port": 80, "grpc_port": 80}, "--grpc_port=80: is --port too"),
    ({"pages": 8}, "--pages=8: needs --page_size$"),
    ({"pages": 8, "page_size": 16, "grpc_port": 9000}, "--pages=8: JetStream has slots of full length"),
    ({"ssl_keyfile": "key"}, "--ssl_keyfile: needs --ssl_certfile$"),
    ({"ssl_certfile": "cert", "grpc_port": 9000}, "--grpc_port=9000: JetStream's gRPC service speaks plain text"),
    ({"api_key": "a b"}, "--api_key: must be printable ASCII without blanks$"),
  ],
)
def test_settings_are_checked(values, message):
  with pytest.raises(ConfigError, match=message):
    Settings("dir", **values)
  assert "secret" not in repr(Settings("dir", api_key="secret"))


@pytest.mark.parametrize("text", ["rows=2", "data", "tensor=-1", "tensor=2,", "data=a"])
def test_a_mesh_is_named_by_its_axes(text):
  with pytest.raises(ConfigError, match="sizes of data, fsdp, expert, tensor"):
    parse_mesh(text)
  assert parse_mesh("expert=2,data=3") == MeshConfig(data=3, expert=2) and parse_mesh("") == MeshConfig()


def test_a_mesh_serves_the_same(tmp_path):
  fields = hf_folder.fields(vocab_size=280, num_hidden_layers=2)
  hf_folder.write(tmp_path / "tiny", fields, hf_folder.random_tensors(fields, seed=4, bias=-1.0))
  TOKENIZER.save(tmp_path / "tiny")
  answers = {}
  for mesh in ("", "data=2,expert=2,tensor=2"):
    loaded = load(Settings(str(tmp_path / "tiny"), mesh=parse_mesh(mesh), slots=4, steps_per_dispatch=8))
    worker = EngineWorker(loaded.engine)
    worker.begin(loaded.params, loaded.version, [])
    jobs = [Job(slot, 0, [7 + slot, 30, 31], 8, GREEDY) for slot in range(3)]
    answers[mesh] = [(drawn.tokens, drawn.logps) for drawn in worker.advance(jobs).drawn]
  for (tokens, logps), (same, close) in zip(*answers.values(), strict=True):
    assert tokens == same and logps == pytest.approx(close, abs=1e-5)
  with pytest.raises(ConfigError, match="--slots=3: must be a multiple of 4"):
    Settings("dir", mesh=parse_mesh("data=2,expert=2"), slots=3)
  with pytest.raises(ConfigError, match="needs one device"):
    Settings("dir", mesh=parse_mesh("tensor=2"), grpc_port=9000)


def test_a_run_brings_its_own_template_and_tokenizer(tmp_path):
  run = dataclasses.replace(small_run.get_config(), tokenizer=TokenizerConfig(thinking=True))
  params = ring_model.init_params(run.model, 0)
  with RunStore(tmp_path / "think" / "checkpoints", keep=1) as store:
    store.save(7, params, {"n": np.zeros(())}, {}, to_dict(run))
  with pytest.raises(ConfigError, match=r"--tokenizer is needed: there is none at .*/think/tokenizer\.json$"):
    load(Settings(str(tmp_path / "think")))
  TOKENIZER.save(tmp_path / "think")
  for folder, name in (("think", "think"), ("think/checkpoints/7", "7")):
    loaded = load(Settings(str(tmp_path / folder), slots=2))
    assert loaded.version == 7 and loaded.model.name == name and loaded.model.template == run.tokenizer
    assert (loaded.engine.config.max_prompt_tokens, loaded.engine.config.max_tokens) == (256, 256)
  assert not load(Settings(str(tmp_path / "think"), thinking=False)).model.template.thinking
  with pytest.raises(ConfigError, match="--max_prompt_tokens \\+ --max_tokens = 756: more than"):
    load(Settings(str(tmp_path / "think"), max_tokens=500))


def test_whatever_a_prompt_needs_is_compiled_before_the_first_request(params, monkeypatch):
  """With pages a prompt is prefilled whole, or goes on from what is known of it; either way in every bucket."""
  config = dataclasses.replace(CONFIG, page_size=16)
  engine = RingEngine(MODEL, config, eos_ids=(), vocab_mask_V=TOKENIZER.sampleable_mask(280), seed=1)
  sizes = {"prefill": [], "extend": []}
  prefill, extend = engine.prefill_batch, engine.extend_batch
  monkeypatch.setattr(
    engine,
    "prefill_batch",
    lambda params, rows: (sizes["prefill"].append(bucket(len(rows[0]))), prefill(params, rows))[1],
  )
  monkeypatch.setattr(
    engine, "extend_batch",
    lambda params, state, rows: (sizes["extend"].append(bucket(rows[0].count())), extend(params, state, rows))[1],
  )  # fmt: skip
  worker = EngineWorker(engine)
  warm_up(worker, Loaded(engine, params, 0, None))
  assert set(sizes["prefill"]) == set(sizes["extend"]) == {16, 32, 64, 128}
  service = EngineService(worker, params, 0, max_waiting=1)
  assert b"\nring_jax_cache_pages 32.0\n" in Metrics(service, lambda: False).text()
  service.close()


def test_a_port_that_is_taken_is_told_before_anything_is_loaded():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    for flags in ({"port": port}, {"port": 0, "grpc_port": port}):
      with pytest.raises(ConfigError, match=rf"port={port}: cannot listen there \(Address already in use"):
        serve(Settings("nowhere", **flags))
  with pytest.raises(CheckpointError, match="no such folder"):
    serve(Settings("nowhere", port=0))


def test_a_certificate_that_cannot_be_used_is_told_before_anything_is_loaded(tmp_path):
  (tmp_path / "empty.pem").touch()
  for name, reason in (("missing.pem", "No such file or directory"), ("empty.pem", "no PEM, or not a pair")):
    with pytest.raises(ConfigError, match=rf"--ssl_certfile=.*{name}: no certificate with its key \({reason}\)$"):
      serve(Settings("nowhere", port=0, ssl_certfile=str(tmp_path / name)))
  certificate, key = write_certificate(tmp_path, passphrase=b"words")
  with pytest.raises(ConfigError, match=r"--ssl_keyfile=.*: no certificate with its key \(the key has a passphrase\)$"):
    serve(Settings("nowhere", port=0, ssl_certfile=certificate, ssl_keyfile=key))
