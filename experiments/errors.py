"""What a run says when it ends badly: one line, and an exit code."""

import errno

BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Failure(RuntimeError):
  """The input was good, but the run did not do all of its work."""


def describe(error: BaseException) -> tuple[str, int]:
  """One line that says what went wrong, and the exit code that goes with it.

  `ValueError` and `OSError` are bad input (2): the library raises them with a
  text made for the user. A full disk, a `Failure`, an error of the device and
  everything unforeseen are failures (1).
  """
  text = ' '.join(str(error).split())
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted; the same command goes on from here', INTERRUPTED
  if isinstance(error, Failure):
    return text, FAILURE
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text:
    return (
      f'out of memory: {text[:200]}: lower config.batch or config.lengths',
      FAILURE,
    )
  if isinstance(error, OSError):
    place = f'{error.filename}: ' if error.filename else ''
    reason = error.strerror or text
    if error.errno in _FULL:
      return (
        f'{place}{reason}: rows already written are kept; free some space and '
        'give the same command again',
        FAILURE,
      )
    return f'{place}{reason}', BAD_INPUT
  if isinstance(error, ValueError):
    return text, BAD_INPUT
  return (
    f'{type(error).__name__}: {text[:400]} (not foreseen: --debug shows where)',
    FAILURE,
  )
