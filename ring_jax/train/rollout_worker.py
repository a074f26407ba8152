"""A rollout worker: the engine of a run's config in a process of its own, for whichever trainer of that run comes.

It has no weights until a trainer brings them, and needs none on its disk.  What its samples depend on comes from the same
config as the trainer's; how it is laid out (`rollout.parallel`, `.slots`, `.page_size`, `.pages`) is its own affair.
"""

import dataclasses
import fcntl
import pathlib
import signal
import socket
import tempfile
import threading

import jax

from configs.schema import RunConfig
from ring_jax.data.tasks import TaskSet
from ring_jax.data.tokenizer import FILE
from ring_jax.train.assets import prepare_tokenizer
from rollout import access
from rollout.engine import RingEngine
from rollout.remote import wire
from rollout.remote.server import check_host, serve
from rollout.service import EngineService
from rollout.worker import EngineWorker
from sharding.mesh import engine_mesh

_LOOK_SECONDS = 1.0
_EVERYWHERE = ("0.0.0.0", "::")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a worker is reached."""

  host: str = "127.0.0.1"
  port: int = 0  # 0: one that is free
  token: str = ""
  chunk_bytes: int = wire.CHUNK_BYTES
  checkpoint_root: str | None = None
  announce: str = ""  # a file to which the address is added
  advertise: str = ""  # the host by which others reach this one; empty: as `host` says

  def __post_init__(self):
    check_host(self.host, self.token)  # before the engine, which takes its time


def engine_of(config: RunConfig, workdir: pathlib.Path | None = None) -> RingEngine:
  """The engine of a run on this process' devices.

  Args:
    workdir: of the run, where it can be read.  A tokenizer that the run built and that is not there is built again from the
      same problems.
  """
  with tempfile.TemporaryDirectory() as folder:  # a trainer alone writes in its workdir
    place = workdir if workdir is not None and (workdir / FILE).is_file() else pathlib.Path(folder)
    tasks = TaskSet(config.task, config.tokenizer, config.seed)
    tokenizer = prepare_tokenizer(config.tokenizer, config.init, tasks, place)
  parallel = config.rollout.parallel or config.model.parallel
  return RingEngine(
    config.model, config.rollout, eos_ids=tokenizer.eos_ids,
    vocab_mask_V=tokenizer.sampleable_mask(config.model.vocab_size),
    seed=config.seed, mesh=engine_mesh(parallel.mesh, "rollout.parallel.mesh of this worker"),
  )  # fmt: skip


def run_worker(engine: RingEngine, settings: Settings) -> None:
  """Serves until SIGTERM or SIGINT.

  Raises:
    RuntimeError: the engine failed; a new process is needed.
  """
  stop = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.set())
  service = EngineService(EngineWorker(engine), None, -1, max_waiting=engine.config.slots)
  server, port = serve(
    service, host=settings.host, port=settings.port, token=settings.token, root=settings.checkpoint_root,
    chunk_bytes=settings.chunk_bytes,
  )  # fmt: skip
  address = access.address(settings.advertise or _reached_by(settings.host), port)
  if settings.announce:
    _announce(pathlib.Path(settings.announce), address)
  print(f"rollout worker on {address}: {engine.config.slots} slots on {jax.devices()[0].device_kind}", flush=True)
  while not stop.wait(_LOOK_SECONDS):
    if error := service.stats().error:
      server.stop(grace=None).wait()
      raise RuntimeError(error)
  server.stop(grace=None).wait()
  service.close()


def _reached_by(host: str) -> str:
  return socket.gethostname() if host in _EVERYWHERE else host


def _announce(path: pathlib.Path, address: str) -> None:
  """Adds a line, once; several hosts may do so at the same time."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)  # appending is not atomic on a network's file system
    file.seek(0)
    if address not in file.read().split("\n"):
      file.write(f"{address}\n")
