"""One run in several processes: start, agree, share, and end together.

Every host gives the same command. Process 0 reads and writes the workdir; the
others learn from it what is done already. What one process finds wrong, all
say; a process that dies ends the others after the heartbeat's limit, with its
name (experiments/witness.py). Texts travel through the key-value store of
JAX's coordination service, so that nobody waits in a collective for a process
that never enters it.
"""

import atexit
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from experiments import witness
from experiments.errors import Failure

_FAILED, _HEARD = 'lcx/failed/', 'lcx/heard/'
_POLL = 0.3  # seconds
_GRACE = 10.0  # seconds to hear of a failure
_LONG = 30 * 24 * 3600 * 1000  # ms: others may work for days
_LOST = re.compile(r'Gloo|UNAVAILABLE|coordination service|NCCL|Socket closed')


class _State:
  client: Any = None
  heartbeat = 0
  names: tuple[str, ...] = ()
  ending = threading.Event()
  shared = 0


_STATE = _State()


def count() -> int:
  """Processes of this run."""
  return max(1, len(_STATE.names))


def index() -> int:
  """Number of this process; 0 writes."""
  if count() == 1:
    return 0
  import jax

  return jax.process_index()


def start(
  coordinator: str,
  processes: int,
  process: int,
  *,
  heartbeat: int = 30,
  patience: int = 120,
) -> None:
  """Joins the others; call before anything else asks JAX for devices.

  Args:
    coordinator: HOST:PORT of process 0; '': the cluster is detected (Slurm,
      Open MPI, GKE, Cloud TPU).
    processes: how many; 0: detected.
    process: number of this one; -1: detected.
    heartbeat: seconds of silence after which a process counts as dead.
    patience: seconds to wait for all to come.

  Raises:
    ValueError: the numbers do not fit, or there is no cluster to detect.
    Failure: not all came.
  """
  if coordinator and not (0 <= process < processes):
    raise ValueError(
      f'--process={process} must be 0 or more, below --processes={processes}'
    )
  if coordinator and not re.fullmatch(r'\S+:\d+', coordinator):
    raise ValueError(f'--coordinator={coordinator!r} must be HOST:PORT')
  if heartbeat < 2:
    raise ValueError(f'--heartbeat={heartbeat} must be at least 2 seconds')
  import jax

  _put_witness_behind(heartbeat)
  _STATE.heartbeat = heartbeat
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      process if process >= 0 else None,
      initialization_timeout=patience,
      heartbeat_timeout_seconds=heartbeat,
      shutdown_timeout_seconds=60,
    )
  except ValueError as error:
    raise ValueError(
      f'the cluster is not known ({error}): give --coordinator=HOST:PORT, '
      '--processes and --process'
    ) from error
  except RuntimeError as error:
    raise Failure(
      f'not all {processes or ""} processes came within {patience} s: '
      f'{" ".join(str(error).split())[:200]}'
    ) from error
  from jax._src import distributed  # the store has no public name

  _STATE.client = distributed.global_state.client
  here = jax.process_index()
  total = jax.process_count()
  _STATE.client.key_value_set(f'lcx/name/{here}', socket.gethostname())
  _STATE.names = tuple(
    _STATE.client.blocking_key_value_get(f'lcx/name/{i}', 1000 * patience)
    for i in range(total)
  )
  sys.stderr.write(witness.NAMES + json.dumps(_STATE.names) + '\n')
  sys.stderr.flush()
  listener = threading.Thread(target=_listen, name='listener', daemon=True)
  listener.start()
  atexit.register(_end_listening, listener)


def _put_witness_behind(heartbeat: int) -> None:
  read, write = os.pipe()
  subprocess.Popen(
    [sys.executable, '-I', str(pathlib.Path(witness.__file__)), str(heartbeat)],
    stdin=read,
    stdout=subprocess.DEVNULL,
  )
  os.close(read)
  sys.stderr.flush()
  os.dup2(write, 2)
  os.close(write)


def agree(what: dict[str, Any]) -> None:
  """Compares what must be the same everywhere.

  Raises:
    ValueError: on every process, with the first field that differs.
  """
  if count() == 1:
    return
  mine = json.dumps(what, sort_keys=True, default=str)
  _STATE.client.key_value_set(f'lcx/agree/{index()}', mine)
  texts = [
    _STATE.client.blocking_key_value_get(f'lcx/agree/{i}', 120_000)
    for i in range(count())
  ]
  first = json.loads(texts[0])
  for i, text in enumerate(texts):
    other = json.loads(text)
    for name in sorted({*first, *other}):
      if first.get(name) != other.get(name):
        raise ValueError(
          f'the processes disagree on {name}: process 0 '
          f'({_STATE.names[0]}) has {_short(first.get(name))}, process {i} '
          f'({_STATE.names[i]}) has {_short(other.get(name))}: give the same '
          'command on every host'
        )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) < 60 else text[:57] + '...'


def share(value: Any) -> Any:
  """What process 0 gives, on every process; JSON's own types.

  Calls must come in the same order everywhere.
  """
  if count() == 1:
    return value
  name = f'lcx/share/{_STATE.shared}'
  _STATE.shared += 1
  if index() == 0:
    _STATE.client.key_value_set(name, json.dumps(value))
  return json.loads(_STATE.client.blocking_key_value_get(name, _LONG))


def finish() -> None:
  """Waits until process 0 is done; call at the end of a good run."""
  share('end')


def fail(line: str, code: int) -> None:
  """Says why this process ends, tells the others, and does not return.

  An error that another process' death caused waits for the witness, who knows
  its name. Returns where there is one process.
  """
  if count() == 1:
    return
  if _LOST.search(line):
    time.sleep(_STATE.heartbeat + _GRACE)  # JAX ends this process meanwhile
  _STATE.ending.set()
  print(f'error: {line}', file=sys.stderr)
  with contextlib.suppress(RuntimeError, ValueError):  # nobody is left to tell
    _STATE.client.key_value_set(f'{_FAILED}{index()}', line)
  _end(code)


def _end(code: int) -> None:
  """Leaves without JAX's last barrier; process 0, the store, goes last."""
  until = time.monotonic() + _GRACE
  while index() == 0 and time.monotonic() < until:
    if len({*_numbers(_FAILED), *_numbers(_HEARD)} - {0}) == count() - 1:
      break
    time.sleep(_POLL)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _numbers(folder: str) -> dict[int, str]:
  try:
    found = _STATE.client.key_value_dir_get(folder)
  except (RuntimeError, ValueError):
    return {}
  return {int(key.rpartition('/')[2]): value for key, value in found}


def _end_listening(listener: threading.Thread) -> None:
  """Before the interpreter ends: a thread that it finds in C++ aborts it."""
  _STATE.ending.set()
  listener.join(_GRACE)


def _listen() -> None:
  """A thread: ends this process when another says that it failed."""
  while not _STATE.ending.wait(_POLL):
    failed = _numbers(_FAILED)
    if failed and index() not in failed and not _STATE.ending.is_set():
      _STATE.ending.set()
      first = min(failed)
      print(
        f'error: process {first} ({_STATE.names[first]}): {failed[first]}',
        file=sys.stderr,
      )
      _STATE.client.key_value_set(f'{_HEARD}{index()}', '')
      _end(1)
