"""Batches made ahead of time by other processes, in the order of steps."""

import collections
import concurrent.futures
import multiprocessing
from collections.abc import Iterator

from lcx.train.mixture import Batch, Mixture

_mixture: Mixture | None = None  # of a worker process


def _start(mixture: Mixture) -> None:
  global _mixture
  _mixture = mixture


def _make(step: int) -> Batch:
  assert _mixture is not None
  return _mixture.batch(step)


def batches(
  mixture: Mixture, start: int, stop: int, workers: int = 0
) -> Iterator[Batch]:
  """Batches of steps start to stop - 1.

  Args:
    mixture: makes them.
    start: first step.
    stop: one after the last.
    workers: processes that make them; 0: this one. The batches are the same.
  """
  if workers == 0:
    yield from (mixture.batch(step) for step in range(start, stop))
    return
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=context, initializer=_start, initargs=(mixture,)
  ) as pool:
    ahead: collections.deque = collections.deque()
    following = start
    try:
      for _ in range(start, stop):
        while following < min(stop, start + 2 * workers + 2):
          ahead.append(pool.submit(_make, following))
          following += 1
        yield ahead.popleft().result()
        start += 1
    finally:
      for future in ahead:
        future.cancel()
