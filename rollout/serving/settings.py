"""What a server is started with; each value is checked on construction."""

import dataclasses

from configs.base import require
from configs.parallel import AXES, ExpertParallel, MeshConfig, ParallelConfig
from configs.schema import RolloutDtype
from rollout.serving.schema import LEAST_TEMPERATURE


@dataclasses.dataclass(frozen=True)
class Settings:
  """One field a flag of `launch.serve`; None: from the checkpoint."""

  checkpoint: str
  tokenizer: str = ""  # a tokenizer.json or its folder; empty: what lies beside the checkpoint
  host: str = "127.0.0.1"
  port: int = 8000  # of HTTP; 0: any that is free
  grpc_port: int = 0  # of JetStream's service; 0: none
  api_key: str = dataclasses.field(default="", repr=False)
  ssl_certfile: str = ""  # PEM, the chain too; empty: plain HTTP
  ssl_keyfile: str = ""  # PEM, without a passphrase; empty: in the certificate's file
  model_name: str = ""  # empty: the checkpoint's folder
  dtype: RolloutDtype | None = None  # of the weights
  mesh: MeshConfig = MeshConfig()  # devices along each axis
  slots: int = 16
  page_size: int = 0  # positions of a page of keys and values; 0: a slot's in one piece
  pages: int = 0  # for all slots; 0: as many as they need at full length
  steps_per_dispatch: int = 4
  max_prompt_tokens: int | None = None
  max_tokens: int | None = None  # of an answer
  max_waiting: int = 256
  max_body_bytes: int = 4 << 20
  max_connections: int = 1024
  temperature: float = 1.0  # of requests that do not say; 0: greedy
  top_p: float = 1.0
  top_k: int = 0
  thinking: bool | None = None  # whether a chat's answer begins with a thought

  def __post_init__(self):
    for name, least, most in (
      ("port", 0, 65_535), ("grpc_port", 0, 65_535), ("slots", 1, 2**20), ("page_size", 0, 2**20), ("pages", 0, 2**30),
      ("steps_per_dispatch", 1, 2**10), ("max_prompt_tokens", 1, 2**24), ("max_tokens", 1, 2**24),
      ("max_waiting", 0, 2**20), ("max_body_bytes", 1, 2**31), ("max_connections", 1, 2**20), ("temperature", 0, 2),
      ("top_k", 0, 2**31 - 1),
    ):  # fmt: skip
      value = getattr(self, name)
      require(value is None or least <= value <= most, f"--{name}={value}: must be from {least} to {most}")
    require(
      self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE,
      f"--temperature={self.temperature}: must be 0 (greedy), or from {LEAST_TEMPERATURE} to 2",
    )
    require(0 < self.top_p <= 1, f"--top_p={self.top_p}: must be from above 0 to 1")
    require(self.grpc_port == 0 or self.grpc_port != self.port, f"--grpc_port={self.grpc_port}: is --port too")
    require(
      self.grpc_port == 0 or self.mesh.num_devices == 1,
      f"--grpc_port={self.grpc_port} needs one device, not --mesh: JetStream's threads and the HTTP front's would each"
      " start programs that wait for all devices",
    )
    require(not self.ssl_keyfile or self.ssl_certfile, "--ssl_keyfile: needs --ssl_certfile")
    require(
      not (self.ssl_certfile and self.grpc_port),
      f"--grpc_port={self.grpc_port}: JetStream's gRPC service speaks plain text, so not with --ssl_certfile",
    )
    require(not self.pages or self.page_size, f"--pages={self.pages}: needs --page_size")
    require(
      not (self.pages and self.grpc_port),
      f"--pages={self.pages}: JetStream has slots of full length, so not with --grpc_port",
    )
    parts = self.parallel.batch_parts
    require(
      self.slots % parts == 0, f"--slots={self.slots}: must be a multiple of {parts}, the devices that share them"
    )
    require(
      all(33 <= ord(letter) < 127 for letter in self.api_key), "--api_key: must be printable ASCII without blanks"
    )

  @property
  def parallel(self) -> ParallelConfig:
    # A decode step has few tokens: all of them travel to all experts.
    exchange = ExpertParallel.RING if self.mesh.expert > 1 else ExpertParallel.LOCAL
    return ParallelConfig(self.mesh, expert_parallel=exchange)


def parse_mesh(text: str) -> MeshConfig:
  """From data=2,tensor=4; empty: one device."""
  sizes = dict(part.partition("=")[::2] for part in text.split(",") if text)
  require(
    all(name in AXES and size.isdecimal() for name, size in sizes.items()),
    f"--mesh={text}: sizes of {', '.join(AXES)}, as in data=2,tensor=4",
  )
  return MeshConfig(**{name: int(size) for name, size in sizes.items()})
