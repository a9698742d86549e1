"""How many cores this process may use."""

import os


def available() -> int:
  """Cores that the process is bound to (`taskset`, a container's set).

  `os.cpu_count` counts the machine's: as many threads on fewer cores wait for
  one another. Where the platform knows no binding, the machine's. A binding of
  the calling thread alone does not count: callbacks of a runtime ask, too.
  """
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(os.getpid()))
  return os.cpu_count() or 1
