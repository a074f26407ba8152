"""A server from its beginning to its end.

    ports -> checkpoint -> engine -> a prefill of every length, for its compilation -> service -> HTTP (and JetStream's gRPC)

SIGTERM or Ctrl-C: nothing more is taken in, what runs ends, and so does the process, with status 0.  A second one ends it
at once.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import secrets
import socket
import ssl
import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import uvicorn

from configs import loading
from configs.schema import ChatTemplate, ConfigError, ModelConfig, RolloutConfig, RolloutDtype, TokenizerConfig, require
from configs.status import ExitStatus
from ring_jax.checkpoint.resolve import Opened, open_checkpoint
from ring_jax.data.tokenizer import FILE, Tokenizer, run_file
from ring_jax.model import param_shardings
from rollout.access import address, is_local
from rollout.engine import RingEngine, Sampling, bucket
from rollout.service import EngineService
from rollout.serving.http import Front, Limits, Model
from rollout.serving.settings import Settings
from rollout.worker import EngineWorker, Job
from sharding.mesh import engine_mesh

_LENGTH = 1024  # of prompt and of answer, where neither flag nor run says
_PREFILLS = 4  # prompts of one dispatch
_LAST_BYTES_SECONDS = 10  # for clients to read what was drawn


class Loaded(NamedTuple):
  """A model that can decode."""

  engine: RingEngine
  params: Any  # as the engine stores them
  version: int
  model: Model


def load(settings: Settings) -> Loaded:
  """
  Raises:
    CheckpointError: there is no checkpoint.
    ConfigError: a setting does not fit it.
  """
  stored = settings.dtype if settings.dtype in (RolloutDtype.FLOAT32, RolloutDtype.BFLOAT16) else None
  mesh = engine_mesh(settings.mesh, "--mesh")

  def placed(found: ModelConfig) -> Any:
    return param_shardings(dataclasses.replace(found, parallel=settings.parallel), mesh)

  opened = open_checkpoint(settings.checkpoint, stored and stored.value, placed if mesh is not None else None)
  model = dataclasses.replace(opened.config, parallel=settings.parallel)  # a run's own is its trainer's
  tokenizer, template = _text(opened, settings)
  engine = RingEngine(
    model,
    _rollout(settings, model),
    eos_ids=sorted(tokenizer.eos_ids),
    vocab_mask_V=tokenizer.sampleable_mask(model.vocab_size),
    seed=secrets.randbits(31),
    mesh=mesh,
  )
  told = Model(
    name=settings.model_name or pathlib.Path(settings.checkpoint).resolve().name,
    tokenizer=tokenizer,
    vocab_size=model.vocab_size,
    template=template,
    sampling=Sampling(settings.temperature, settings.top_p, settings.top_k, secrets.randbits(31)),
  )
  return Loaded(engine, engine.load_params(opened.params), opened.step or 0, told)


def _rollout(settings: Settings, model: ModelConfig) -> RolloutConfig:
  half = min(_LENGTH, model.max_position_embeddings // 2)
  prompt, answer = settings.max_prompt_tokens or half, settings.max_tokens or half
  parts = settings.parallel.batch_parts
  require(
    prompt + answer <= model.max_position_embeddings,
    f"--max_prompt_tokens + --max_tokens = {prompt + answer}: more than model.max_position_embeddings="
    f"{model.max_position_embeddings}",
  )
  default = RolloutDtype.BFLOAT16 if model.dtype == "bfloat16" else RolloutDtype.FLOAT32
  return RolloutConfig(
    token_budget=1,
    slots=settings.slots,
    group_size=1,
    max_prompt_tokens=prompt,
    max_tokens=answer,
    dtype=settings.dtype or default,
    page_size=settings.page_size,
    pages=settings.pages,
    steps_per_dispatch=settings.steps_per_dispatch,
    prefill_batch=min(settings.slots, parts * max(1, _PREFILLS // parts)),
  )


def _text(opened: Opened, settings: Settings) -> tuple[Tokenizer, TokenizerConfig]:
  """Tokenizer and template: a run's own, or those of a Hugging Face folder."""
  if "config" in opened.extras:
    config = loading.from_dict(opened.extras["config"])
    template, file = config.tokenizer, run_file(config.tokenizer, config.init, opened.workdir)
  else:
    template, file = TokenizerConfig(template=ChatTemplate.CHAT), opened.extras["folder"] / FILE
  file = pathlib.Path(settings.tokenizer or file)
  require(file.exists(), f"--tokenizer is needed: there is none at {file}")
  if settings.thinking is not None:
    template = dataclasses.replace(template, thinking=settings.thinking)
  return Tokenizer.load(file), template


def warm_up(worker: EngineWorker, loaded: Loaded) -> None:
  """Compiles what requests will need: a prefill of every length, from what pages hold too, and the decode step."""
  worker.begin(loaded.params, loaded.version, [])
  longest, page = loaded.engine.config.max_prompt_tokens, loaded.engine.page_size
  lengths = [min(2, longest)]  # in pages a lone token needs no prefill
  while bucket(lengths[-1]) < longest:
    lengths.append(min(2 * bucket(lengths[-1]), longest))
  prompts = [[token] * length for token, length in enumerate(lengths, 1)]
  if 0 < page < longest:  # and what goes on from one page
    prompts.append([0] * (page + 1))
    prompts += [[0] * page + [token] * min(length, longest - page) for token, length in enumerate(lengths, 1)]
  for prompt in prompts:
    worker.advance([Job(0, 0, prompt, 1)])
    worker.release([0])


def serve(settings: Settings) -> None:
  """Serves until it is told to end.

  Raises:
    ConfigError: a port is taken, a certificate cannot be used, or a setting does not fit the checkpoint.
  """
  _check_certificate(settings)
  logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that left while their answer was sent
  with _bind(settings.host, settings.port, "port") as listener:
    if settings.grpc_port:
      _bind(settings.host, settings.grpc_port, "grpc_port").close()  # gRPC itself shares a port that is taken
    loaded = load(settings)
    worker = EngineWorker(loaded.engine)
    warm_up(worker, loaded)
    service = EngineService(worker, loaded.params, loaded.version, max_waiting=settings.max_waiting)
    front = Front(service, loaded.model, _limits(settings, loaded), settings.api_key)
    jetstream = [_jetstream(loaded, settings)] if settings.grpc_port else []
    _announce(settings, loaded, listener.getsockname()[1])
    asyncio.run(_Server(_uvicorn(front, settings), [front, *jetstream]).serve([listener]))
    for each in jetstream:
      each.stop()
    service.close()


def _check_certificate(settings: Settings) -> None:
  if not settings.ssl_certfile:
    return
  asked: list[bool] = []  # for a passphrase, at a terminal that a server may not have
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  try:
    context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile or None, lambda: asked.append(True) or "")
  except (OSError, ValueError) as error:
    if asked:
      reason = "the key has a passphrase"
    else:
      reason = "no PEM, or not a pair" if isinstance(error, ssl.SSLError) else getattr(error, "strerror", error)
    key = f" --ssl_keyfile={settings.ssl_keyfile}" if settings.ssl_keyfile else ""
    raise ConfigError(f"--ssl_certfile={settings.ssl_certfile}{key}: no certificate with its key ({reason})") from None


def _limits(settings: Settings, loaded: Loaded) -> Limits:
  config = loaded.engine.config
  places = settings.slots + settings.max_waiting
  return Limits(config.max_prompt_tokens, config.max_tokens, places, settings.max_body_bytes)


def _bind(host: str, port: int, flag: str) -> socket.socket:
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, port), family=family)
  except OSError as error:
    raise ConfigError(f"--host={host} --{flag}={port}: cannot listen there ({error.strerror or error})") from None
  listener.setblocking(False)
  return listener


def _jetstream(loaded: Loaded, settings: Settings) -> Any:
  from rollout.serving import jetstream  # only here: JetStream's server is not for everyone

  model, config, engine = loaded.model, loaded.engine.config, loaded.engine
  engine.generate(loaded.params, engine.init_decode_state())  # compiles JetStream's single step
  driver = jetstream.Driver(engine, loaded.params, model.sampling, settings.max_waiting)
  door = jetstream.Door(
    model.tokenizer, model.vocab_size, config.max_prompt_tokens, config.max_tokens, settings.api_key
  )
  return jetstream.JetStream(driver, door, settings.host, settings.grpc_port)


def _announce(settings: Settings, loaded: Loaded, port: int) -> None:
  config = loaded.engine.config
  print(
    f"{loaded.model.name} (weights {loaded.version}): {config.slots} slots, prompts up to {config.max_prompt_tokens} and"
    f" answers up to {config.max_tokens} tokens, {config.dtype}"
  )
  if not (is_local(settings.host) or settings.api_key):
    print("warning: everyone who can reach this host may use the server; --api_key asks for a key", file=sys.stderr)
  if settings.grpc_port:
    print(f"JetStream gRPC at {address(settings.host, settings.grpc_port)}")
  where = f"{'https' if settings.ssl_certfile else 'http'}://{address(settings.host, port)}/v1"
  print(f"serving at {where}; Ctrl-C or SIGTERM lets requests end, a second one does not", flush=True)


def _uvicorn(front: Front, settings: Settings) -> uvicorn.Config:
  return uvicorn.Config(
    front.app,
    interface="asgi3",
    http="h11",
    ws="none",
    lifespan="off",
    log_config=None,
    access_log=False,
    log_level="error",  # what strangers send is not worth a line
    server_header=False,
    proxy_headers=False,
    limit_concurrency=settings.max_connections,
    ssl_certfile=settings.ssl_certfile or None,
    ssl_keyfile=settings.ssl_keyfile or None,
    timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
  )


class _Server(uvicorn.Server):
  """Ends as the module's docstring says."""

  def __init__(self, config: uvicorn.Config, fronts: list[Any]):
    super().__init__(config)
    self._fronts, self._ending = fronts, False

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """uvicorn's handler of SIGTERM and SIGINT."""
    if self._ending:
      with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), b"ended at once: requests were cut off\n")
      os._exit(ExitStatus.INTERRUPTED)
    self._ending = True
    threading.Thread(target=self._drain, name="drain", daemon=True).start()

  def _drain(self) -> None:
    draining = [threading.Thread(target=front.drain, daemon=True) for front in self._fronts]
    for thread in draining:
      thread.start()
    for thread in draining:
      thread.join()
    self.should_exit = True
