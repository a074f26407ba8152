"""What a client may ask for: the fields of OpenAI's API, as far as this server has them.

Field names and defaults are OpenAI's (`/v1/completions`, `/v1/chat/completions`); `top_k`, `return_token_ids` and
`chat_template_kwargs` are vLLM's.  A field that is not known is ignored, as vLLM does and as its clients expect.  One
that is known and would change the answer, but is not implemented, is refused unless it has the value that changes
nothing.  A null is a field that was left out.
"""

from typing import Any, Literal, TypeVar

import pydantic
from pydantic_core import PydanticCustomError

LEAST_TEMPERATURE = 0.01  # of those above 0: with less, the logits are no longer finite
MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters: what is compared with every token

# Fields that would change an answer, and the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "echo": (False,),
  "suffix": ("",),
  "presence_penalty": (0,),
  "frequency_penalty": (0,),
  "repetition_penalty": (1,),
  "logit_bias": ({},),
  "min_p": (0,),
  "min_tokens": (0,),
  "ignore_eos": (False,),
  "stop_token_ids": ([],),
  "use_beam_search": (False,),
  "prompt_logprobs": (),
  "tools": ([],),
  "functions": ([],),
  "tool_choice": ("none", "auto"),
  "function_call": ("none", "auto"),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "audio": (),
  "prediction": (),
}


class RequestError(Exception):
  """An answer in OpenAI's form of an error."""

  def __init__(
    self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = headers or {}

  def body(self) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Part(pydantic.BaseModel):
  """No coercion: "5" is no number; NaN and infinity are none either."""

  model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", protected_namespaces=())

  @pydantic.model_validator(mode="before")
  @classmethod
  def _without_nulls(cls, fields: Any) -> Any:
    return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class StreamOptions(_Part):
  include_usage: bool = False


class _Common(_Part):
  """Fields of both endpoints."""

  model: str = ""  # empty: the one that is served
  temperature: float | None = pydantic.Field(None, ge=0, le=2)
  top_p: float | None = pydantic.Field(None, gt=0, le=1)
  top_k: int | None = pydantic.Field(None, ge=-1, lt=2**31)  # vLLM: 0 and -1 mean all
  n: int = pydantic.Field(1, ge=1)
  best_of: int | None = None
  seed: int | None = pydantic.Field(None, ge=-(2**63), lt=2**63)
  stop: list[str] = []
  stream: bool = False
  stream_options: StreamOptions | None = None
  max_tokens: int | None = pydantic.Field(None, ge=1)
  return_token_ids: bool = False

  @pydantic.model_validator(mode="before")
  @classmethod
  def _refuse_what_is_missing(cls, fields: Any) -> Any:
    for name, neutral in _NEUTRAL.items():
      if isinstance(fields, dict) and fields.get(name) is not None and fields[name] not in neutral:
        raise _error(name, "is not supported by this server")
    return fields

  @pydantic.field_validator("temperature")
  @classmethod
  def _finite_logits(cls, temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
      raise ValueError(f"must be 0 (greedy), or from {LEAST_TEMPERATURE} to 2")
    return temperature

  @pydantic.field_validator("stop", mode="before")
  @classmethod
  def _one_or_many(cls, stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop

  @pydantic.field_validator("stop")
  @classmethod
  def _short(cls, stop: list[str]) -> list[str]:
    if len(stop) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_LENGTH for text in stop):
      raise ValueError(f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return stop

  @pydantic.model_validator(mode="after")
  def _fits_together(self) -> "_Common":
    if self.best_of is not None and self.best_of != self.n:
      raise _error("best_of", f"must be n={self.n}: answers are not ranked by this server")
    if self.stream_options is not None and not self.stream:
      raise _error("stream_options", "needs stream=true")
    return self


class CompletionRequest(_Common):
  """Of /v1/completions."""

  prompt: list[str] | list[list[int]]  # one prompt may come without the outer list
  logprobs: int | None = None

  @pydantic.field_validator("prompt", mode="before")
  @classmethod
  def _one_or_many_prompts(cls, prompt: Any) -> Any:
    many = [prompt] if isinstance(prompt, str) or (isinstance(prompt, list) and _are_ids(prompt)) else prompt
    texts = isinstance(many, list) and all(isinstance(one, str) for one in many)
    ids = isinstance(many, list) and all(isinstance(one, list) and _are_ids(one) for one in many)
    if not many or not (texts or ids):
      raise ValueError("a string, a list of strings, a list of token ids, or a list of such lists; not an empty list")
    return many

  @pydantic.field_validator("logprobs")
  @classmethod
  def _only_the_drawn(cls, logprobs: int) -> int:
    if logprobs != 0:
      raise ValueError("only 0 is supported: the log-probability of each drawn token, without alternatives")
    return logprobs

  @property
  def wants_logprobs(self) -> bool:
    return self.logprobs is not None


class Message(_Part):
  role: Literal["system", "developer", "user", "assistant", "tool"]
  content: str = ""

  @pydantic.field_validator("content", mode="before")
  @classmethod
  def _join_parts(cls, content: Any) -> Any:
    if not isinstance(content, list):
      return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
      raise ValueError('only parts of type "text" are supported')
    if not all(isinstance(part.get("text"), str) for part in content):
      raise ValueError("a part's text must be a string")
    return "".join(part["text"] for part in content)

  def plain(self) -> dict[str, str]:
    """As the chat template knows it."""
    return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class TemplateOptions(_Part):
  enable_thinking: bool | None = None  # None: as the server was started


class ChatRequest(_Common):
  """Of /v1/chat/completions."""

  messages: list[Message] = pydantic.Field(min_length=1)
  max_completion_tokens: int | None = pydantic.Field(None, ge=1)
  logprobs: bool = False
  top_logprobs: int | None = None
  chat_template_kwargs: TemplateOptions = TemplateOptions()

  @pydantic.field_validator("top_logprobs")
  @classmethod
  def _only_the_drawn(cls, top_logprobs: int) -> int:
    if top_logprobs != 0:
      raise ValueError("only 0 is supported: the log-probability of each drawn token, without alternatives")
    return top_logprobs

  @property
  def wants_logprobs(self) -> bool:
    return self.logprobs


T = TypeVar("T", bound=_Common)


def parse(kind: type[T], body: bytes) -> T:
  """Reads a request.

  Raises:
    RequestError: 400; it names the field.
  """
  try:
    return kind.model_validate_json(body)
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False, include_input=False)[0]
    param = first.get("ctx", {}).get("param") or "".join(
      f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
    ).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    raise RequestError(400, f"{param}: {message}" if param else message, param or None) from None


def _are_ids(values: list[Any]) -> bool:
  return bool(values) and all(type(value) is int and 0 <= value < 2**31 for value in values)


def _error(param: str, message: str) -> PydanticCustomError:
  """Of a field, where several are looked at together."""
  return PydanticCustomError("request", message, {"param": param})
