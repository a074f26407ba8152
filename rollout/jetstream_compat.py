"""google-jetstream 0.2.2 on today's JAX: every workaround in one place (reference notes, jetstream.md section 1).

Import JetStream only through this module.  What is mended, by the number in the notes' table:

* 2: `engine_api` imports `seqio`, which drags TensorFlow in; two empty classes are all it needs of it.
* 4: importing JetStream may set the root logger to DEBUG and add a handler; both are put back.
* 9: under Pathways its package looks for modules that JAX removed; a stand-in answers.

The package is archived upstream, so no fix will come from there; its Engine API is small and stable.
"""

import contextlib
import importlib.util
import logging
import sys
import types

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


_stub_seqio()
_stub_xla_bridge()
with _root_logger_kept():
  try:
    from jetstream.engine import engine_api, tokenizer_pb2
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"{error.name} is missing: pip install --no-deps google-jetstream==0.2.2 (not 'jetstream', an unrelated package)"
    ) from error

__all__ = ["engine_api", "tokenizer_pb2"]
