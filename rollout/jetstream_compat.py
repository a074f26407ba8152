"""google-jetstream 0.2.2 on today's JAX: every workaround in one place (reference notes, jetstream.md section 1).

Import JetStream only through this module.  What is mended, by the number in the notes' table:

* 1: `delete_pytree` calls a function that JAX removed.
* 2: `engine_api` imports `seqio`, which drags TensorFlow in; two empty classes are all it needs of it.
* 4: importing JetStream may set the root logger to DEBUG and add a handler; both are put back.
* 9: under Pathways its package looks for modules that JAX removed; a stand-in answers.
* 10: its server listens on all addresses; here on the one that it is given.

What needs a subclass (1's SIGKILL, 5, 6, 7, 11, and requests that go on after their client has left) is mended in
rollout/serving/jetstream.py.  The server's part of the package is imported by `server_modules` only, as most have no use for it.

The package is archived upstream, so no fix will come from there; its Engine API is small and stable.
"""

import contextlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


def _stub_seqio() -> None:
  if importlib.util.find_spec("seqio") is not None:
    return
  vocabularies = types.ModuleType("seqio.vocabularies")
  vocabularies.Vocabulary = type("Vocabulary", (), {})
  vocabularies.SentencePieceVocabulary = type("SentencePieceVocabulary", (vocabularies.Vocabulary,), {})
  seqio = types.ModuleType("seqio")
  seqio.vocabularies = vocabularies
  sys.modules.setdefault("seqio", seqio)
  sys.modules.setdefault("seqio.vocabularies", vocabularies)


def _stub_xla_bridge() -> None:
  if not hasattr(jax.lib, "xla_bridge"):
    jax.lib.xla_bridge = types.SimpleNamespace(get_backend=lambda *_: None)


@contextlib.contextmanager
def _root_logger_kept():
  root = logging.getLogger()
  level, handlers = root.level, list(root.handlers)
  try:
    yield
  finally:
    root.setLevel(level)
    root.handlers[:] = handlers


class ServerModules(NamedTuple):
  """Modules of JetStream's server."""

  orchestrator: types.ModuleType
  server_lib: types.ModuleType
  jetstream_pb2: types.ModuleType


def server_modules() -> ServerModules:
  with _root_logger_kept():
    from jetstream.core import orchestrator, server_lib
    from jetstream.core.proto import jetstream_pb2
  orchestrator.delete_pytree = _delete
  return ServerModules(orchestrator, server_lib, jetstream_pb2)


def _delete(tree: Any) -> None:
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array):
      leaf.delete()


@contextlib.contextmanager
def served_at(host: str, servicer: Callable[..., Any]):
  """A `JetStreamServer` made inside listens at `host` and serves `servicer(driver=...)`."""
  _, server_lib, *_ = server_modules()
  orchestrator = server_lib.orchestrator
  kept = server_lib._HOST, orchestrator.LLMOrchestrator
  server_lib._HOST, orchestrator.LLMOrchestrator = f"[{host}]" if ":" in host else host, servicer
  try:
    yield
  finally:
    server_lib._HOST, orchestrator.LLMOrchestrator = kept


_stub_seqio()
_stub_xla_bridge()
with _root_logger_kept():
  try:
    from jetstream.engine import engine_api, tokenizer_pb2
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{error.name} is missing: pip install --no-deps google-jetstream==0.2.2 (not 'jetstream', an unrelated package)"
    ) from error

__all__ = ["ServerModules", "engine_api", "served_at", "server_modules", "tokenizer_pb2"]
