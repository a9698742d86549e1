"""faiss, and one native call for searches of several indexes.

Python runs in one thread at a time. A search a thread of Python's costs all of
them for each; faiss's `IndexReplicas` splits a batch of queries among threads
of its own, one an index, and needs no Python between them. Here its indexes are
places, into which each call puts those that it searches.
"""

import functools
import importlib
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcx.select.vector_index import ROOM


def _load() -> Any:
  """faiss, whose threads search alone: they are side by side already.

  Its OpenMP asks the environment when it is loaded, and never again.
  """
  name = 'OMP_NUM_THREADS'
  before = os.environ.get(name)
  os.environ[name] = '1'
  try:
    return importlib.import_module('faiss')  # its types are generated
  finally:
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before


faiss = _load()


@functools.cache
def available() -> bool:
  """Whether threads of faiss search alone: not if another loaded it before."""
  seen: list[int] = []
  asking = threading.Thread(
    target=lambda: seen.append(faiss.omp_get_max_threads())
  )
  asking.start()
  asking.join()
  return seen == [1]


def give_room(*vectors: Any) -> None:
  """Gives vectors of C++ room for keys that join; none becomes longer.

  It is never taken back. ROOM of them is written, and so takes memory; where a
  library doubles what is full (GNU's), addresses for as much again come with
  it, which take memory as keys join.
  """
  for vector in vectors:
    size = vector.size()
    vector.resize(size + int(ROOM * size))
    vector.resize(size)


class _Places:
  """Threads that search, each in the index that is in its place.

  What is left there is never searched again: a call fills all places.
  """

  def __init__(self, count: int, dim: int):
    self.lock = threading.Lock()
    self.empty = faiss.IndexFlatIP(dim)
    self.places = [faiss.IndexPreTransform(self.empty) for _ in range(count)]
    self.all = faiss.IndexReplicas(dim, True)
    for place in self.places:
      self.all.addIndex(place)


# Of a property; by its name, faiss looks for misspelled ones first.
_put = faiss.IndexPreTransform.index.fset
_places = functools.lru_cache(maxsize=8)(_Places)


def search(
  indexes: Sequence[Any], q: Sequence[np.ndarray], k: int, jobs: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """(scores, numbers) [n k] of each index for its queries, in one native call.

  Args:
    indexes: of faiss, with whatever says how they are searched.
    q: float32 [n H] queries of each index, at least one.
    k: how many are wanted.
    jobs: threads among which all queries are split; as many as indexes, at
      least.
  """
  dim = q[0].shape[1]
  jobs = max(jobs, len(indexes))
  sizes = [len(x) for x in q]
  at_once = 1  # queries of a place
  while sum(-(-n // at_once) for n in sizes) > jobs:
    at_once += 1
  flat = np.zeros((jobs * at_once, dim), np.float32)
  used, first = [], 0
  for index, some in zip(indexes, q, strict=True):
    used += [index] * -(-len(some) // at_once)
    stop = len(used) * at_once
    flat[first:stop] = some[-1]  # where the last place has fewer
    flat[first : first + len(some)] = some
    first = stop
  score = np.empty((jobs * at_once, k), np.float32)
  found = np.empty((jobs * at_once, k), np.int64)
  pointer, here = faiss.swig_ptr, _places(jobs, dim)
  with here.lock:
    used += [here.empty] * (jobs - len(used))
    for place, index in zip(here.places, used, strict=True):
      _put(place, index)
    here.all.search_c(
      len(flat), pointer(flat), k, pointer(score), pointer(found)
    )
  scores, numbers, first = [], [], 0
  for n in sizes:
    scores.append(score[first : first + n])
    numbers.append(found[first : first + n])
    first += -(-n // at_once) * at_once
  return scores, numbers
