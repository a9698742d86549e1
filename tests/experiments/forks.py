"""Runs command lines of experiments.run, each in a fork of this process.

What all runs import is imported once, which takes 2 s of CPU. JAX starts no
backend before the fork, so a run begins as in a process of its own.

A line of stdin is a run: JSON of its arguments, the file for what it writes,
and the seconds after which it is killed. A line of stdout is its exit code,
negative for a signal.
"""

import gc
import importlib
import importlib.util
import json
import os
import signal
import sys

from experiments import errors, run
from lcx import methods


def _import() -> None:
  for kind in run.KINDS:
    name = f'experiments.{kind}'
    if importlib.util.find_spec(name) is not None:
      importlib.import_module(name)
  for name in methods.names():
    methods.get_method(name)
  gc.freeze()


def _run(args: list[str], log: str, seconds: int) -> None:
  """The end of experiments/run.py, in a fork."""
  signal.alarm(seconds)
  with open(log, 'wb') as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  os.close(0)
  sys.argv = [run.__file__, *args]
  sys.unraisablehook = errors.unraisable
  sys.exit(run.main(sys.argv))


def main() -> None:
  """Serves until stdin is closed."""
  _import()
  for line in sys.stdin:
    child = os.fork()
    if child == 0:
      _run(*json.loads(line))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == '__main__':
  main()
