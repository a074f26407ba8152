"""What a scoring process may use, set by the process itself before it looks at an answer."""

import ctypes
import os
import resource
import signal
import sys

MEMORY = 1 << 29  # bytes of address space beyond what the process starts with
_PR_SET_PDEATHSIG = 1


def confine() -> None:
  """No core files, no file output, no further processes (root is exempt from that one), bounded memory, no terminal."""
  null = os.open(os.devnull, os.O_RDWR)
  for stream in range(3):
    os.dup2(null, stream)
  for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    resource.setrlimit(kind, (0, 0))
  if sys.platform == "linux":
    with open("/proc/self/statm") as statm:
      used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (_allowed(resource.RLIMIT_AS, used + MEMORY),) * 2)


def _allowed(kind: int, value: int) -> int:
  """`value`, or the hard limit if that is lower already."""
  hard = resource.getrlimit(kind)[1]
  return value if hard == resource.RLIM_INFINITY else min(value, hard)


def die_with_parent(parent: int) -> None:
  """SIGKILL to this process when `parent` ends, however it ends.  Elsewhere than on Linux a closed socket has to do."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # it ended before the call
    os._exit(1)


def allow_seconds(seconds: float) -> None:
  """Processor time from now on, in whole seconds, rounded up by at most two: counts even while the parent stalls."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  limit = _allowed(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 2)
  resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
