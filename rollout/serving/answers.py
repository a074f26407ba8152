"""Answers in OpenAI's forms: whole, and as the chunks of a stream.

Both are made of the same parts by the same code, so a stream adds up to what the whole answer says.  Beside OpenAI's
fields, where `return_token_ids` asks for them: `prompt_token_ids` and `token_ids` as in vLLM, and `weight_versions`, the
weights that drew each token.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from rollout.serving.generation import Choice, Part
from rollout.serving.schema import ChatRequest, CompletionRequest

Json = dict[str, Any]


class Answer:
  """One request's answer, in the form of its endpoint."""

  def __init__(
    self, request: CompletionRequest | ChatRequest, choices: Sequence[Choice], model: str, pieces: Sequence[bytes]
  ):
    self._request, self._choices, self._pieces = request, choices, pieces
    self._chat = isinstance(request, ChatRequest)
    self._head = {
      "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": model,
    }
    self._drawn = 0
    self._begun: set[int] = set()  # choices of which a chunk was made

  def whole(self, parts: Sequence[Part]) -> Json:
    """Of one part a choice."""
    self._drawn = sum(len(part.tokens) for part in parts)
    kind = "chat.completion" if self._chat else "text_completion"
    choices = [self._choice(part) for part in parts]
    return {**self._head, "object": kind, "choices": choices, "usage": self._usage(), **self._prompt(first=self._chat)}

  def chunk(self, part: Part) -> Json:
    """Of a stream."""
    self._drawn += len(part.tokens)
    first = part.index not in self._begun
    self._begun.add(part.index)
    choice = self._delta(part, first) if self._chat else self._choice(part, first)
    return self._chunk([choice]) | self._prompt(first and self._chat)

  def last(self) -> Json | None:
    """The chunk with the usage, where it was asked for."""
    return self._chunk([]) | {"usage": self._usage()} if self._counts else None

  @property
  def _counts(self) -> bool:
    options = self._request.stream_options
    return options is not None and options.include_usage

  def _chunk(self, choices: list[Json]) -> Json:
    kind = "chat.completion.chunk" if self._chat else "text_completion"
    return {**self._head, "object": kind, "choices": choices} | ({"usage": None} if self._counts else {})

  def _choice(self, part: Part, first: bool = True) -> Json:
    if self._chat:
      said = {"message": {"role": "assistant", "content": part.text, "refusal": None} | self._thought(part)}
    else:
      said = {"text": part.text}
    return {"index": part.index, **said, **self._tail(part, first)}

  def _delta(self, part: Part, first: bool) -> Json:
    said = {"role": "assistant", "content": part.text} if first else {"content": part.text} if part.text else {}
    return {"index": part.index, "delta": said | self._thought(part), **self._tail(part, first)}

  def _thought(self, part: Part) -> Json:
    return {"reasoning_content": part.thought} if part.thought else {}

  def _tail(self, part: Part, first: bool) -> Json:
    logprobs = None
    if self._request.wants_logprobs:
      logprobs = self._chat_logprobs(part) if self._chat else self._completion_logprobs(part)
    tail = {"logprobs": logprobs, "finish_reason": part.finish_reason}
    if self._request.return_token_ids:
      tail |= {"token_ids": part.tokens, "weight_versions": part.versions}
    return tail | self._prompt(first and not self._chat, part.index)

  def _prompt(self, first: bool, index: int = 0) -> Json:
    """Of the answer in a chat, which has one prompt; of each choice otherwise.  Told once."""
    wanted = first and self._request.return_token_ids
    return {"prompt_token_ids": list(self._choices[index].prompt)} if wanted else {}

  def _completion_logprobs(self, part: Part) -> Json:
    return {
      "tokens": [self._text(token) for token in part.tokens],
      "token_logprobs": part.logps,
      "top_logprobs": None,
      "text_offset": part.offsets,
    }

  def _chat_logprobs(self, part: Part) -> Json:
    content = [
      {"token": self._text(token), "logprob": logp, "bytes": list(self._pieces[token]), "top_logprobs": []}
      for token, logp in zip(part.tokens, part.logps, strict=True)
    ]
    return {"content": content, "refusal": None}

  def _text(self, token: int) -> str:
    return self._pieces[token].decode("utf-8", "replace")

  def _usage(self) -> Json:
    """A prompt counts once, however many answers it gets."""
    prompted = sum(len(choice.prompt) for choice in self._choices[:: self._request.n])
    return {
      "prompt_tokens": prompted,
      "completion_tokens": self._drawn,
      "total_tokens": prompted + self._drawn,
    }
