"""What both ends of the wire agree on: methods, the token, limits of messages, and what makes two engines the same one.

The messages are worker.proto's.  Methods are registered by name, without generated stubs, which would tie the code to one
version of gRPC.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from configs.base import require
from rollout import access
from rollout.remote import worker_pb2 as pb

PROTOCOL = 1
SERVICE = pb.DESCRIPTOR.services_by_name["RolloutWorker"].full_name
TOKEN_VARIABLE = "RING_JAX_WORKER_TOKEN"
# Of weights in one message: at 64 MiB gRPC and protobuf take four times the processor time a byte.
CHUNK_BYTES = 4 << 20
LARGEST_CHUNK_BYTES = 64 << 20
MESSAGE_BYTES = 1 << 20  # at which messages with jobs or tokens are cut
_OVERHEAD_BYTES = 4 << 20  # a message beside its chunk; one job with what was cut before it
_HEADER = "authorization"
_PING_MS, _PONG_MS = 10_000, 10_000  # a host that lost its power closes nothing: it is gone after 20 s


@dataclasses.dataclass(frozen=True)
class Method:
  """One call of the service."""

  name: str
  request: type
  response: type
  handler: Callable[..., grpc.RpcMethodHandler]
  caller: Callable[[grpc.Channel], Callable[..., Any]]

  def of_server(self, function: Callable[..., Any]) -> grpc.RpcMethodHandler:
    return self.handler(
      function, request_deserializer=self.request.FromString, response_serializer=self.response.SerializeToString
    )

  def of_client(self, channel: grpc.Channel) -> Any:
    return self.caller(channel)(
      f"/{SERVICE}/{self.name}",
      request_serializer=self.request.SerializeToString,
      response_deserializer=self.response.FromString,
    )


def _method(name: str, request: type, response: type, requests: str = "unary", responses: str = "unary") -> Method:
  shape = f"{requests}_{responses}"
  handler = getattr(grpc, f"{shape}_rpc_method_handler")
  return Method(name, request, response, handler, lambda channel: getattr(channel, shape))


DESCRIBE = _method("Describe", pb.Empty, pb.Description)
HEALTH = _method("Health", pb.Empty, pb.HealthReport)
WORK = _method("Work", pb.ToWorker, pb.FromWorker, "stream", "stream")
UPDATE = _method("Update", pb.WeightsPart, pb.Empty, "stream")
LOAD = _method("Load", pb.Checkpoint, pb.Empty)


def channel_options(chunk_bytes: int) -> list[tuple[str, int]]:
  """Of both ends: how large a message may be, and when silence is death."""
  size = chunk_bytes + _OVERHEAD_BYTES
  return [
    ("grpc.max_send_message_length", size),
    ("grpc.max_receive_message_length", size),
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PONG_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_MS // 2),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a second server on it
  ]


# ---------------------------------------------------------------------------------------------------------------------
# The token


def read_token(path: str = "") -> str:
  """The shared secret: of a file, else of the environment; empty: none.

  Raises:
    ConfigError: the file holds none, or what it holds cannot be sent.
  """
  token = (pathlib.Path(path).read_text() if path else os.environ.get(TOKEN_VARIABLE, "")).strip()
  source = path or TOKEN_VARIABLE
  require(bool(token) or not path, f"{source}: is empty")
  require(token.isascii() and token.isprintable(), f"{source}: a token is printable ASCII in one line")
  return token


def credentials(token: str) -> list[tuple[str, str]]:
  """What a caller sends along."""
  return [(_HEADER, f"Bearer {token}")] if token else []


def is_authorized(metadata: Sequence[tuple[str, str | bytes]], token: str) -> bool:
  """Whether a call brings the token."""
  return access.is_authorized(next((value for key, value in metadata if key == _HEADER), ""), token)


def digest(value: Any) -> str:
  """Short, of plain JSON data."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
