"""faiss, and one native call for searches of several indexes.

Python runs in one thread at a time. A search a thread of Python's costs all of
them for each; faiss's `IndexReplicas` splits a batch of queries among threads
of its own, one an index, and needs no Python between them. Here its indexes are
places, into which each call puts those that it searches.
"""

import functools
import importlib
import itertools
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


@functools.lru_cache(maxsize=64)
def _shared_out(sizes: tuple[int, ...], jobs: int) -> tuple[int, list[int]]:
  """Queries of a place, and the places of each index."""
  at_once = 1
  while sum(-(-n // at_once) for n in sizes) > jobs:
    at_once += 1
  return at_once, [-(-n // at_once) for n in sizes]


def search(
  indexes: Sequence[Any], q: Sequence[np.ndarray], k: int, jobs: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
  """What each index finds for its queries, in one native call.

  Args:
    indexes: of faiss, with whatever says how they are searched.
    q: float32 [n H] queries of each index, at least one.
    k: how many are wanted.
    jobs: threads among which all queries are split; as many as indexes, at
      least.

  Returns:
    (scores [R k], numbers int64 [R k], where the rows of each index begin and,
    last, R): its own queries, one index behind the other.
  """
  dim = q[0].shape[1]
  jobs = max(jobs, len(indexes))
  sizes = tuple(len(x) for x in q)
  at_once, places = _shared_out(sizes, jobs)
  first = [0, *itertools.accumulate(sizes)]
  flat = np.empty((jobs * at_once, dim), np.float32)
  stop = at_once * sum(places)
  rows = None  # where the queries are
  if stop == first[-1]:
    np.concatenate(q, out=flat[:stop])
  else:
    begin = [0, *itertools.accumulate(at_once * n for n in places)]
    for at, end, some in zip(begin, begin[1:], q, strict=False):
      flat[at : at + len(some)] = some
      flat[at + len(some) : end] = some[-1]  # where the last place has fewer
    rows = np.concatenate(
      [np.arange(a, a + n) for a, n in zip(begin, sizes, strict=False)]
    )
  flat[stop:] = 0.0
  score = np.empty((len(flat), k), np.float32)
  found = np.empty((len(flat), k), np.int64)
  used = list(
    itertools.chain.from_iterable(map(itertools.repeat, indexes, places))
  )
  pointer, here = faiss.swig_ptr, _places(jobs, dim)
  with here.lock:
    used += [here.empty] * (jobs - len(used))
    for place, index in zip(here.places, used, strict=True):
      _put(place, index)
    here.all.search_c(
      len(flat), pointer(flat), k, pointer(score), pointer(found)
    )
  if rows is None:
    return score[:stop], found[:stop], first
  return score[rows], found[rows], first


def merged(
  score: np.ndarray, tokens: np.ndarray, parts: int
) -> tuple[np.ndarray, np.ndarray]:
  """The best k of what all parts found, [parts * n k], best first."""
  n, k = len(score) // parts, score.shape[1]
  best, which = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
  pointer = faiss.swig_ptr
  faiss.merge_knn_results_CMax(
    n,
    k,
    parts,
    pointer(score),
    pointer(tokens),
    pointer(best),
    pointer(which),
  )
  if which[:, -1].min() < 0:
    best[which < 0] = -np.inf
  return best, which
