"""From a checked request to the answers' parts, over the engine's thread.

    plan       choices: prompt tokens, limits, sampling, a writer         (no engine: what is wrong is found here)
    start      all of them into the service's queue, or none               (full: 429, draining: 503)
    parts      what each dispatch added to each choice, as it comes
    leaving    for whatever reason: what still runs is aborted, and its slot is free for the next dispatch

Choice i of prompt j draws as uid j n + i under the request's seed, so a seed gives the same answers again.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

from ring_jax.records import FinishReason
from rollout.engine import Sampling
from rollout.service import Busy, EngineService, Request, Unavailable, Update
from rollout.serving.schema import RequestError
from rollout.serving.text import Writer

_RETRY_SECONDS = 1


@dataclasses.dataclass
class Choice:
  """One answer that was asked for, as it grows."""

  prompt: Sequence[int]
  max_tokens: int
  sampling: Sampling
  writer: Writer
  done: bool = False


@dataclasses.dataclass
class Part:
  """What was added to one choice; several in a row add up to one."""

  index: int  # of the choice
  thought: str = ""
  text: str = ""
  tokens: list[int] = dataclasses.field(default_factory=list)
  logps: list[float] = dataclasses.field(default_factory=list)
  versions: list[int] = dataclasses.field(default_factory=list)
  offsets: list[int] = dataclasses.field(default_factory=list)  # of the tokens' text in the answer
  finish_reason: str | None = None  # stop or length

  def add(self, other: "Part") -> None:
    self.thought += other.thought
    self.text += other.text
    self.tokens += other.tokens
    self.logps += other.logps
    self.versions += other.versions
    self.offsets += other.offsets
    self.finish_reason = other.finish_reason


class Generation:
  """A request's choices in the service.  Must be made, used and left in one event loop.

  Raises:
    RequestError: 429 where the queue is full, 503 where the service takes nothing in.
  """

  def __init__(self, service: EngineService, choices: Sequence[Choice]):
    self._service, self._choices = service, choices
    self._loop = asyncio.get_running_loop()
    self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
    self._numbers: list[int] = []
    try:
      for uid, choice in enumerate(choices):
        request = Request(choice.prompt, choice.max_tokens, uid, choice.sampling)
        self._numbers.append(service.submit(request, self._listener(uid)))
    except Busy as error:
      self.leave()
      raise RequestError(429, str(error), code="queue_full", headers={"retry-after": str(_RETRY_SECONDS)}) from None
    except Unavailable as error:
      self.leave()
      raise RequestError(503, str(error), code="unavailable") from None

  def leave(self) -> None:
    """Gives up what still runs."""
    for number, choice in zip(self._numbers, self._choices, strict=False):  # fewer, where not all were taken in
      if not choice.done:
        choice.done = True
        self._service.abort(number)

  async def parts(self) -> AsyncIterator[Part]:
    """
    Raises:
      RequestError: the engine failed, or the service was closed.
    """
    while not all(choice.done for choice in self._choices):
      index, update = await self._updates.get()
      choice = self._choices[index]
      if choice.done:
        continue
      if update.reason is FinishReason.ABORTED:
        raise RequestError(503, update.error, code="engine_failed")
      part = _written(index, choice, update)
      if choice.writer.stopped and update.reason is None:
        self._service.abort(self._numbers[index])
      choice.done = part.finish_reason is not None
      yield part

  def _listener(self, index: int):
    put = self._updates.put_nowait
    return lambda update: self._loop.call_soon_threadsafe(put, (index, update))


def _written(index: int, choice: Choice, update: Update) -> Part:
  """What an update adds: the tokens up to the one that completes a stop string, and their text."""
  part, writer = Part(index), choice.writer
  spoken = []
  for token, logp in zip(update.tokens, update.logps, strict=True):
    part.tokens.append(token)
    part.logps.append(logp)
    part.versions.append(update.version)
    part.offsets.append(writer.length)
    spoken.append(writer.push(token))
    if writer.stopped:
      break
  if update.reason is not None and not writer.stopped:
    spoken.append(writer.end())
  part.thought = "".join(one.thought for one in spoken)
  part.text = "".join(one.text for one in spoken)
  if writer.stopped or update.reason is FinishReason.STOP:
    part.finish_reason = "stop"
  elif update.reason is not None:
    part.finish_reason = "length"
  return part
