"""The OpenAI-compatible HTTP front: an ASGI app over one `EngineService`.

    POST /v1/completions, /v1/chat/completions      an answer, whole or as server-sent events
    GET  /v1/models, /v1/models/{name}              the model that is served
    GET  /health, /metrics                          for a load balancer and for Prometheus; without a key, as in vLLM

A request is checked from the cheap to the dear: key, media type, size, fields, model, lengths, place in the queue.  What
fails costs no decode step.  Every error is OpenAI's error object.
"""

import asyncio
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from configs.schema import TokenizerConfig
from ring_jax.data.chat import render_prompt
from ring_jax.data.tokenizer import THINK_CLOSE, Tokenizer
from rollout import access
from rollout.engine import Sampling
from rollout.service import EngineService
from rollout.serving.answers import Answer
from rollout.serving.generation import Choice, Generation, Part
from rollout.serving.metrics import Metrics
from rollout.serving.schema import ChatRequest, CompletionRequest, RequestError, parse
from rollout.serving.text import Writer

_BODY_SECONDS = 60.0  # for a request's body to arrive
_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one request; beyond them it is refused."""

  max_prompt_tokens: int
  max_tokens: int  # of an answer
  max_choices: int  # answers: what slots and queue hold together
  max_body_bytes: int


@dataclasses.dataclass(frozen=True)
class Model:
  """What the front must know of the model."""

  name: str
  tokenizer: Tokenizer
  vocab_size: int
  template: TokenizerConfig
  sampling: Sampling  # where a request does not say, but for the seed


class Front:
  """Args:
  key: that /v1 asks for; empty: it is open.
  """

  def __init__(self, service: EngineService, model: Model, limits: Limits, key: str = ""):
    self._service, self._model, self._limits = service, model, limits
    self._key = key
    self._pieces = model.tokenizer.pieces()
    self._created = int(time.time())
    self._draining = False
    self.metrics = Metrics(service, lambda: self._draining)
    starlette = Starlette(
      routes=[
        Route("/v1/completions", functools.partial(self._generate, CompletionRequest), methods=["POST"]),
        Route("/v1/chat/completions", functools.partial(self._generate, ChatRequest), methods=["POST"]),
        Route("/v1/models", self._models),
        Route("/v1/models/{name:path}", self._one_model),
        Route("/health", self._health),
        Route("/metrics", self._metrics),
      ],
      exception_handlers={
        RequestError: _refused,
        HTTPException: _no_route,
        ClientDisconnect: _gone,
        Exception: _fault,  # uvicorn logs it
      },
    )
    self.app: ASGIApp = functools.partial(_guarded, starlette, self)

  def drain(self) -> None:
    """Takes nothing in any more; waits until all has ended.  Blocks: not for the event loop."""
    self._draining = True
    self._service.drain()

  def authorise(self, scope: Scope) -> None:
    """
    Raises:
      RequestError: 401.
    """
    given = dict(scope["headers"]).get(b"authorization", b"")
    if scope["path"].startswith("/v1") and not access.is_authorized(given, self._key):
      message = "a valid key is needed: Authorization: Bearer KEY"
      raise RequestError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

  # ---- routes

  async def _models(self, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._model_entry()]})

  async def _one_model(self, request: Request) -> Response:
    self._check_model(request.path_params["name"])
    return JSONResponse(self._model_entry())

  async def _health(self, _: Request) -> Response:
    stats = self._service.stats()
    status = "failed" if stats.error else "draining" if self._draining else "ok"
    body = {"status": status, "weight_version": stats.version}
    return JSONResponse(body, 200 if status == "ok" else 503)

  async def _metrics(self, _: Request) -> Response:
    return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

  async def _generate(self, kind: type[CompletionRequest | ChatRequest], request: Request) -> Response:
    started = time.perf_counter()
    asked = parse(kind, await _body(request, self._limits.max_body_bytes))
    self._check_model(asked.model)
    choices = await asyncio.to_thread(self._choices, asked)
    answer = Answer(asked, choices, self._model.name, self._pieces)
    generation = Generation(self._service, choices)
    parts = self._timed(generation.parts(), started)
    if asked.stream:
      return _Stream(_events(answer, parts), generation)
    return JSONResponse(answer.whole(await _unless_gone(request, generation, _gathered(parts, len(choices)))))

  async def _timed(self, parts: AsyncIterator[Part], started: float) -> AsyncIterator[Part]:
    first = True
    async for part in parts:
      if first:
        self.metrics.first_token.observe(time.perf_counter() - started)
        first = False
      yield part
    self.metrics.request.observe(time.perf_counter() - started)

  # ---- what was asked

  def _check_model(self, name: str) -> None:
    if name not in ("", self._model.name):
      message = f"the model {name!r} does not exist: this server has {self._model.name!r}"
      raise RequestError(404, message, "model", "model_not_found")

  def _model_entry(self) -> dict[str, Any]:
    return {
      "id": self._model.name,
      "object": "model",
      "created": self._created,
      "owned_by": "ring-jax",
      "max_model_len": self._limits.max_prompt_tokens + self._limits.max_tokens,
    }

  def _choices(self, asked: CompletionRequest | ChatRequest) -> list[Choice]:
    """All answers that are asked for, prompt by prompt."""
    tokenizer, limits = self._model.tokenizer, self._limits
    thought_end = ""
    if isinstance(asked, ChatRequest):
      wanted = asked.chat_template_kwargs.enable_thinking
      template = self._model.template if wanted is None else dataclasses.replace(self._model.template, thinking=wanted)
      prompts = [self._chat_prompt(asked, template)]
      thought_end = THINK_CLOSE if template.thinking else ""
      max_tokens = asked.max_completion_tokens or asked.max_tokens or limits.max_tokens
    else:
      prompts = [tokenizer.encode(one) if isinstance(one, str) else one for one in asked.prompt]
      max_tokens = asked.max_tokens or min(_COMPLETION_TOKENS, limits.max_tokens)
    self._check_lengths(prompts, max_tokens, asked)
    sampling = self._sampling(asked)
    return [
      Choice(prompt, max_tokens, sampling, Writer(self._pieces, asked.stop, thought_end))
      for prompt in prompts
      for _ in range(asked.n)
    ]

  def _chat_prompt(self, asked: ChatRequest, template: TokenizerConfig) -> list[int]:
    try:
      return self._model.tokenizer.encode(render_prompt([message.plain() for message in asked.messages], template))
    except ValueError as error:
      raise RequestError(400, f"messages: {error}", "messages") from None

  def _check_lengths(
    self, prompts: Sequence[Sequence[int]], max_tokens: int, asked: CompletionRequest | ChatRequest
  ) -> None:
    limits, field = self._limits, "messages" if isinstance(asked, ChatRequest) else "prompt"
    if len(prompts) * asked.n > limits.max_choices:
      raise RequestError(400, f"n: {len(prompts)} prompts x {asked.n} answers, at most {limits.max_choices} fit", "n")
    if max_tokens > limits.max_tokens:
      raise RequestError(400, f"max_tokens: is {max_tokens}, must be at most {limits.max_tokens}", "max_tokens")
    for prompt in prompts:
      if not 0 < len(prompt) <= limits.max_prompt_tokens:
        message = f"{field}: has {len(prompt)} tokens, must have from 1 to {limits.max_prompt_tokens}"
        raise RequestError(400, message, field, "context_length_exceeded" if prompt else None)
      if max(prompt) >= self._model.vocab_size:
        message = f"{field}: holds id {max(prompt)}, must be from 0 to {self._model.vocab_size - 1} (the vocabulary)"
        raise RequestError(400, message, field)

  def _sampling(self, asked: CompletionRequest | ChatRequest) -> Sampling:
    default = self._model.sampling
    return Sampling(
      temperature=default.temperature if asked.temperature is None else asked.temperature,
      top_p=default.top_p if asked.top_p is None else asked.top_p,
      top_k=default.top_k if asked.top_k is None else max(asked.top_k, 0),
      seed=secrets.randbits(32) if asked.seed is None else asked.seed % 2**32,
    )


# ---- the way in and out


async def _guarded(app: ASGIApp, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
  """The key and the count of answers, around all routes."""
  if scope["type"] != "http":
    return
  path = scope["path"] if scope["path"] in _PATHS else "other"

  async def counted(message: Message) -> None:
    if message["type"] == "http.response.start":
      front.metrics.answers.labels(path, message["status"]).inc()
    await send(message)

  try:
    front.authorise(scope)
    await app(scope, receive, counted)
  except RequestError as error:
    await _error_response(error)(scope, receive, counted)


def _error_response(error: RequestError) -> Response:
  return JSONResponse(error.body(), error.status, headers=error.headers)


async def _refused(request: Request, error: RequestError) -> Response:
  return _error_response(error)


async def _no_route(request: Request, error: HTTPException) -> Response:
  message = f"{request.method} {request.url.path}: {error.detail}"
  return _error_response(RequestError(error.status_code, message, headers=dict(error.headers or {})))


async def _gone(request: Request, error: ClientDisconnect) -> Response:
  return Response(status_code=499)  # nobody reads it; the metrics count it, by the number that nginx gives it


async def _fault(request: Request, error: Exception) -> Response:
  return _error_response(RequestError(500, "internal error", code="internal"))


async def _body(request: Request, limit: int) -> bytes:
  """
  Raises:
    RequestError: it is not JSON (a browser's form sent from another site is not), too large, or too slow.
  """
  media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if media_type != "application/json":
    raise RequestError(415, f"content-type: is {media_type!r}, must be application/json")
  too_large = RequestError(413, f"the body has more than {limit} bytes", code="request_too_large", headers=_CLOSE)
  if int(request.headers.get("content-length", 0)) > limit:
    raise too_large
  parts, size = [], 0
  try:
    async with asyncio.timeout(_BODY_SECONDS):
      async for part in request.stream():
        size += len(part)
        if size > limit:
          raise too_large
        parts.append(part)
  except TimeoutError:
    raise RequestError(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s", headers=_CLOSE) from None
  return b"".join(parts)


_CLOSE = {"connection": "close"}


async def _gathered(parts: AsyncIterator[Part], choices: int) -> list[Part]:
  """One part a choice."""
  whole = [Part(index) for index in range(choices)]
  async for part in parts:
    whole[part.index].add(part)
  return whole


async def _unless_gone(request: Request, generation: Generation, answer: Awaitable[list[Part]]) -> list[Part]:
  """Waits for the answer; a client that leaves takes its choices along.

  Raises:
    ClientDisconnect: it left.
  """
  working = asyncio.ensure_future(answer)
  leaving = asyncio.ensure_future(request.receive())  # the body was read: what comes now is the end
  try:
    await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      raise ClientDisconnect
    return working.result()
  finally:
    working.cancel()
    leaving.cancel()
    generation.leave()


async def _events(answer: Answer, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
  """Server-sent events, as OpenAI's clients read them."""
  try:
    async for part in parts:
      yield _event(answer.chunk(part))
    if last := answer.last():
      yield _event(last)
  except RequestError as error:  # too late for a status
    yield _event(error.body())
  yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
  """ASCII: some clients break lines at U+2028 and its like, which a model may write."""
  return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class _Stream(StreamingResponse):
  """Starlette cancels it when the client leaves."""

  def __init__(self, events: AsyncIterator[str], generation: Generation):
    super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
    self._generation = generation

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._generation.leave()
