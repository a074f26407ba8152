"""What a process ends with, as the one who started it sees it: a shell, a job manager, a pod's policy."""

import enum


class ExitStatus(enum.IntEnum):
  """Everything but DONE, USER_ERROR and INTERRUPTED is to be started again with the same command."""

  DONE = 0
  BUG = 1  # its traceback was printed
  USER_ERROR = 2  # one line said what; starting it again would not help
  PREEMPTED = 75  # SIGTERM: the step was finished and saved
  HUNG = 76  # the watchdog saw no progress, and wrote where every thread stood
  LOST = 77  # another process of the job is gone
  INTERRUPTED = 130  # Ctrl-C: saved after the step, or at the second one at once
