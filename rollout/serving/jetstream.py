"""google-jetstream's own orchestrator and gRPC service over a `RingEngine` (reference notes, jetstream.md 1, 2 and 6).

    Decode      -> prefill thread -> transfer thread -> generate thread (one step for all slots) -> detokenize thread -> stream
    HealthCheck -> whether the threads live

The threads, queues and the wire are JetStream's.  What is mended here, and why:

* A request travels with its prompt through prefill and insert, so that the engine knows its limit, and so that a
  client that leaves frees its slot: before the next step the slot falls silent, on which JetStream takes it back.
* Whatever would end one of JetStream's threads is refused at the door, and if one fails all the same, its requests and
  the health check say so; JetStream itself would kill the process.
* No start-of-text token is put before a prompt, no padding is needed, and too long a prompt is an error.
* Text is written from the token ids, whole characters at a time.
"""

import asyncio
import dataclasses
import itertools
import logging
import queue
import time
import types
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from ring_jax.data.tokenizer import Tokenizer
from rollout import access, jetstream_compat
from rollout.engine import DecodeState, Insertion, Prefix, RingEngine, Sampling
from rollout.serving.text import Writer

_LOG = logging.getLogger(__name__)
_THREADS = 64  # JetStream's own least number
orchestrator, server_lib, jetstream_pb2 = jetstream_compat.server_modules()


class EngineFailed(RuntimeError):
  """A thread of the driver ended."""


@dataclasses.dataclass
class _Prompt:
  """What goes through JetStream as the padded tokens, and then as the prefix; no pytree, so it is left as it is."""

  request: Any  # JetStream's ActiveRequest
  prefix: Prefix | None = None  # None: not prefilled, or in its slot already


class _Slots:
  """The engine as JetStream's driver sees it; what is not here is the engine's own."""

  def __init__(self, engine: RingEngine, sampling: Sampling):
    self._engine, self._sampling = engine, sampling
    self._uids = itertools.count()
    self._request_in: dict[int, Any] = {}  # by slot; of the generate thread

  def __getattr__(self, name: str) -> Any:
    return getattr(self._engine, name)

  def build_tokenizer(self, _) -> types.SimpleNamespace:
    """JetStream sees ids only, and must know which of them end an answer."""
    return types.SimpleNamespace(stop_tokens=set(self._engine.eos_ids))

  def prefill(self, *, params: Any, padded_tokens: _Prompt, true_length: int) -> _Prompt:
    request = padded_tokens.request
    if request.return_channel.cancelled():
      return padded_tokens
    return _Prompt(request, self._engine.prefill_batch(params, [request.prefill_content]))

  def insert(self, prompt: _Prompt, decode_state: DecodeState, slot: int) -> DecodeState:
    if prompt.prefix is None:  # its client has left; the slot stays silent
      return decode_state
    request, self._request_in[slot] = prompt.request, prompt.request
    insertion = Insertion(0, slot, next(self._uids), request.max_tokens, self._sampling)
    state = self._engine.insert_batch(prompt.prefix, decode_state, [insertion])
    prompt.prefix = None  # JetStream keeps the request until its end, and need not keep this
    return state

  def generate(self, params: Any, decode_state: DecodeState) -> tuple[DecodeState, Any]:
    left = [slot for slot, request in self._request_in.items() if request.return_channel.cancelled()]
    for slot in left:
      del self._request_in[slot]
    if left:
      decode_state = self._engine.release(decode_state, self._request_in)
    return self._engine.generate(params, decode_state)


class Driver(orchestrator.Driver):
  """JetStream's driver, with an end to its queue; a thread that fails ends its requests and nothing else."""

  def __init__(self, engine: RingEngine, params: Any, sampling: Sampling, max_waiting: int):
    self._most = engine.config.slots + max_waiting
    self._asked: list[Any] = []  # requests that have not ended
    slots = _Slots(engine, sampling)
    super().__init__([slots], [slots], [params], [params], interleaved_mode=True)

  def place_request_on_prefill_queue(self, request: Any) -> None:
    self._asked = self._unfinished()
    if len(self._asked) >= self._most:
      raise queue.Full
    self._asked.append(request)
    super().place_request_on_prefill_queue(request)

  def wait(self) -> None:
    """Until all that was asked has ended."""
    while self.live and self._unfinished():
      time.sleep(0.02)

  def _unfinished(self) -> list[Any]:
    return [request for request in self._asked if not request.return_channel.done()]

  def _process_prefill_content(self, request: Any, tokenizer: Any, is_bos: bool, max_prefill_length: int):
    return _Prompt(request), len(request.prefill_content)

  def _watched(self, loop, idx: int) -> None:
    try:
      loop(idx)
    except Exception as error:  # whatever an engine may raise
      _LOG.exception("a thread of JetStream's driver failed")
      self.live = False
      for request in self._unfinished():
        request.return_channel.set_exception(EngineFailed(f"the engine failed: {error}"))

  def _prefill_thread(self, idx: int) -> None:
    self._watched(super()._prefill_thread, idx)

  def _transfer_thread(self, idx: int) -> None:
    self._watched(super()._transfer_thread, idx)

  def _generate_thread(self, idx: int) -> None:
    self._watched(super()._generate_thread, idx)

  def _detokenize_thread(self, idx: int) -> None:
    self._watched(super()._detokenize_thread, idx)


@dataclasses.dataclass(frozen=True)
class Door:
  """What a request must keep to."""

  tokenizer: Tokenizer
  vocab_size: int
  max_prompt_tokens: int
  max_tokens: int
  key: str = ""  # in the metadata, as "authorization: Bearer KEY"; empty: open


class Servicer(orchestrator.LLMOrchestrator):
  """JetStream's service, behind a door."""

  def __init__(self, driver: Driver, door: Door):
    super().__init__(driver)
    self._door, self._pieces = door, door.tokenizer.pieces()
    self.draining = False

  async def Decode(self, request, context=None) -> AsyncIterator[Any]:
    await self._admit(context)
    is_text = request.WhichOneof("content") == "text_content"
    encode = self._door.tokenizer.encode
    tokens = await asyncio.to_thread(encode, request.text_content.text) if is_text else request.token_content.token_ids
    if mistake := self._mistake(tokens, request.max_tokens):
      await context.abort(grpc.StatusCode.INVALID_ARGUMENT, mistake)
    content = jetstream_pb2.DecodeRequest.TokenContent(token_ids=tokens)
    asked = jetstream_pb2.DecodeRequest(token_content=content, max_tokens=request.max_tokens)
    writer = Writer(self._pieces)
    try:
      async for response in super().Decode(asked, context):
        if is_text:
          for sample in response.stream_content.samples:
            sample.text = "".join(writer.push(token).text for token in sample.token_ids)
        yield response
    except EngineFailed as error:
      await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    if is_text and (rest := writer.end().text):
      content = jetstream_pb2.DecodeResponse.StreamContent
      yield jetstream_pb2.DecodeResponse(stream_content=content(samples=[content.Sample(text=rest)]))

  async def _admit(self, context) -> None:
    given = dict(context.invocation_metadata()).get("authorization", "")
    if not access.is_authorized(given, self._door.key):
      await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid key is needed: authorization: Bearer KEY")
    if self.draining or not self._driver.live:
      await context.abort(grpc.StatusCode.UNAVAILABLE, "the server drains, or its engine failed")

  def _mistake(self, tokens: Sequence[int], max_tokens: int) -> str | None:
    door = self._door
    if not 0 < len(tokens) <= door.max_prompt_tokens:
      return f"content: has {len(tokens)} tokens, must have from 1 to {door.max_prompt_tokens}"
    if not 0 <= min(tokens) <= max(tokens) < door.vocab_size:
      return f"token_content: ids must be from 0 to {door.vocab_size - 1} (the vocabulary)"
    if not 0 < max_tokens <= door.max_tokens:
      return f"max_tokens: is {max_tokens}, must be from 1 to {door.max_tokens}"
    return None


class JetStream:
  """JetStream's gRPC server, running.  Its driver has slots of its own, on the same weights."""

  def __init__(self, driver: Driver, door: Door, host: str, port: int):
    self._driver = driver
    self._servicer: Servicer | None = None

    def servicer(driver: Driver) -> Servicer:
      self._servicer = Servicer(driver, door)
      return self._servicer

    with jetstream_compat.served_at(host, servicer):
      credentials = grpc.insecure_server_credentials()
      self._server = server_lib.JetStreamServer(
        driver, max(driver.get_total_concurrent_requests(), _THREADS), port, credentials
      )
    self._server.start()

  def drain(self) -> None:
    """Takes nothing in any more; waits until all has ended."""
    self._servicer.draining = True
    self._driver.wait()

  def stop(self) -> None:
    self._server.stop()
