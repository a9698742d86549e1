"""What a run says when it ends badly: one line, and an exit code."""

import errno
import logging
import os
import re
import sys
from typing import Any

BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130

_FAULTS = {
  'nan': 'NaN or infinity in the logits',
  'out_of_pages': "the cache ran out of pages (raise the method's "
  'cache.pool_pages)',
  'over_capacity': 'the cache is full (raise --config.capacity)',
  'ring_lost': 'streaming heads cannot go back to the context (raise the '
  "method's cache.slack to the tokens of a question and its answer)",
  'position_gap': 'positions jump within a page (a bug: please report it)',
  'host_full': 'host memory is spent (lower config.batch or config.lengths, '
  "or raise the method's cache.gigabytes)",
  'host_gone': 'the host tier gave the row up while it was in use (a bug: '
  'please report it)',
  'host_failed': 'the host tier failed',
}
# How tensorstore, which writes checkpoints, names an error of the system.
_SYSTEM = re.compile(r"os_error_code='(\d+)'")
_FILE = re.compile(r'(?:[Ww]riting|[Rr]eading|[Oo]pen\w*): "([^"]+)"')
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Failure(RuntimeError):
  """The input was good, but the run did not do all of its work."""


class CannotWrite(OSError):
  """A file of the run, or its folder, cannot be made or written."""


def no_traceback(record: logging.LogRecord) -> bool:
  """A filter: no traceback of an error that a library logs and raises too."""
  return record.exc_info is None


def unraisable(what: Any) -> None:
  """`sys.unraisablehook`: as ever, but for what follows a failed checkpoint."""
  if str(what.exc_value) != 'Event loop is closed':  # tensorstore's callbacks
    sys.__unraisablehook__(what)


def fault(status: str, dtype: str) -> str:
  """Why a row ended without an answer, and what to do about it.

  Args:
    status: of the row; see `lcx.engine`.
    dtype: of the weights.
  """
  from lcx.cache import host_calls

  said = _FAULTS.get(status, status)
  if status == 'nan' and dtype == 'float32':
    said += ' (the weights may be damaged: download the model again)'
  elif status == 'nan':
    said += ' (try --config.dtype=float32)'
  elif status in ('host_full', 'host_failed') and host_calls.last_error:
    said += f': {host_calls.last_error[:300]}'
  return said


def describe(error: BaseException) -> tuple[str, int]:
  """One line that says what went wrong, and the exit code that goes with it.

  `ValueError` and `OSError` are bad input (2): the library raises them with a
  text made for the user. A full disk, a `Failure`, an error of the device and
  everything unforeseen are failures (1).
  """
  text = ' '.join(str(error).split())
  if found := _SYSTEM.search(text):
    file, number = _FILE.search(text), int(found[1])
    error = CannotWrite(number, os.strerror(number), file and file[1])
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted; the same command goes on from here', INTERRUPTED
  if isinstance(error, Failure):
    return text, FAILURE
  if isinstance(error, MemoryError) or (
    'RESOURCE_EXHAUSTED' in text and not isinstance(error, OSError)
  ):
    return (
      f'out of memory: {text[:200]}: lower config.batch or config.lengths',
      FAILURE,
    )
  if isinstance(error, OSError):
    place = f'{error.filename}: ' if error.filename else ''
    reason = error.strerror or text
    if error.errno in _FULL:
      return (
        f'{place}{reason}: what was written before is kept; free some space '
        'and give the same command again',
        FAILURE,
      )
    if isinstance(error, CannotWrite):
      reason += ': give a --workdir that can be written'
    return f'{place}{reason}', BAD_INPUT
  if isinstance(error, ValueError):
    return text, BAD_INPUT
  return (
    f'{type(error).__name__}: {text[:400]} (not foreseen: --debug shows where)',
    FAILURE,
  )
