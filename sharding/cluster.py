"""Which processes a job consists of: what the flags say, or what the machine knows.

JAX can tell from its surroundings (TPU VMs of a slice or of several, GKE, Slurm, Open MPI) who the coordinator is and
which process this one is.  It is asked for these numbers before anything is started, so that one process stays one
process, and so that the roll call of `sharding.processes` comes first: it says in one line what JAX would end on.
"""

import dataclasses

import jax
from jax._src import clusters  # `jax.distributed.initialize` asks the same function; there is no public name for it

from configs.base import ConfigError, require

_ELSEWHERE = ("cpu", "proxy")  # JAX_PLATFORMS: not on the accelerators of this machine; `proxy` is Pathways


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Where process 0 listens, how many processes there are, which one this is."""

  coordinator: str
  count: int
  index: int
  local_device_ids: list[int] | None = None  # where several processes share a machine's accelerators


def from_flags(coordinator: str | None, count: int | None, index: int | None) -> Cluster | None:
  """None: no flag is given.  Raises ConfigError for half of them, or for numbers that cannot be."""
  given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  require(not missing, f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id go together")
  _, colon, port = coordinator.rpartition(":")
  require(
    bool(colon) and port.isdecimal() and 0 < int(port) < 1 << 16, f"--coordinator={coordinator}: must be HOST:PORT"
  )
  require(count > 0, f"--num_processes={count}: must be at least 1")
  require(0 <= index < count, f"--process_id={index}: from 0 to {count - 1}, as --num_processes={count}")
  return Cluster(coordinator, count, index)


def detect(seconds: float) -> Cluster | None:
  """What JAX finds in the surroundings; None: nothing, or this process is to stay by itself.

  Raises:
    ConfigError: the coordinator that they name is not to be found within that time.
  """
  if (jax.config.jax_platforms or "").split(",")[0] in _ELSEWHERE:
    return None
  try:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(seconds))
  except RuntimeError as error:
    raise ConfigError(f"the other hosts of this slice cannot be found: {error}") from None
  return None if None in found[:3] else Cluster(*found)


def connect_jax(cluster: Cluster, seconds: float) -> None:
  """Starts `jax.distributed`, after the roll call: from here on `jax.devices()` are those of all processes."""
  # A stop is agreed on between steps (ring_jax.train.job); JAX's own handler of SIGTERM would be in the way.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    cluster.coordinator, cluster.count, cluster.index, cluster.local_device_ids,
    cluster_detection_method="deactivate", initialization_timeout=int(seconds),
  )  # fmt: skip
