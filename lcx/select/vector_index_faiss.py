"""Indexes that faiss searches: flat, IVF, HNSW, and a graph of our own.

faiss 1.15: a graph is put into level 0 of an HNSW index; what that needs is
said at `inject`.
"""

import importlib
from typing import Any, Self

import numpy as np

from lcx.select import vector_index_graph as graphs

faiss: Any = importlib.import_module('faiss')  # its types are generated

# Distinct first neighbours over queries below which a head is taken to be
# concentrated: 96 and 173 of 20000 in two synthetic sets where cliques win by a
# wide margin (recall .99 against .85 of a pivot graph at an equal scan).
_FEW = 0.02


class FaissIndex:
  """A faiss index, and which token each of its vectors is.

  Attributes:
    index: the faiss index, inner product.
    tokens: int64 [ntotal]; -1: removed.
  """

  def __init__(self, index, tokens: np.ndarray):
    self.index, self.tokens = index, tokens

  def search(self, q, k, effort):
    """As `Index.search`; effort: efSearch of a graph, nprobe of IVF."""
    gone = int(np.sum(self.tokens < 0))
    more = min(k + gone, 2 * k, self.index.ntotal)
    q = np.ascontiguousarray(q, np.float32)
    score, found = self.index.search(q, more, params=self._params(effort, more))
    tokens = np.where(found >= 0, self.tokens[np.maximum(found, 0)], -1)
    if gone:
      order = np.argsort(tokens < 0, axis=1, kind='stable')[:, :k]
      tokens = np.take_along_axis(tokens, order, 1)
      score = np.take_along_axis(score, order, 1)
    return np.where(tokens >= 0, score, -np.inf), tokens

  def _params(self, effort: int, k: int):
    if isinstance(self.index, faiss.IndexHNSW):
      return faiss.SearchParametersHNSW(efSearch=max(effort, k))
    if isinstance(self.index, faiss.IndexIVF):
      return faiss.SearchParametersIVF(nprobe=effort)
    return None

  def add(self, keys, tokens):
    self.index.add(np.ascontiguousarray(keys, np.float32))
    self.tokens = np.concatenate([self.tokens, tokens])

  def remove(self, since):
    # A graph cannot lose nodes: they stay as ways to others.
    self.tokens = np.where(self.tokens < since, self.tokens, -1)

  def dump(self):
    return {
      'faiss': faiss.serialize_index(self.index),
      'tokens': self.tokens,
    }

  @classmethod
  def load(cls, arrays) -> Self:
    return cls(faiss.deserialize_index(arrays['faiss']), arrays['tokens'])

  @property
  def nbytes(self):
    size = self.tokens.nbytes
    index = self.index
    if isinstance(index, faiss.IndexHNSW):
      size += 4 * index.hnsw.neighbors.size() + 12 * index.ntotal
      index = index.storage
    code = getattr(index, 'code_size', 4 * index.d)
    return size + code * index.ntotal


def build(numbers, keys, tokens, queries) -> FaissIndex:
  """See `lcx.select.vector_index.build`."""
  x = np.ascontiguousarray(keys, np.float32)
  n, dim = x.shape
  if numbers.kind == 'flat':
    index = _storage(numbers, x)
  elif numbers.kind == 'ivf':
    lists = numbers.lists or max(1, min(int(4 * n**0.5), n // 39 or 1))
    kind = faiss.ScalarQuantizer.QT_fp16
    coarse = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFScalarQuantizer(
      coarse, dim, lists, kind, faiss.METRIC_INNER_PRODUCT, False
    )
    coarse.this.disown()
    index.own_fields = True
    index.cp.seed = numbers.seed + 1
    index.train(x)
    index.add(x)
  elif numbers.kind == 'hnsw':
    index = faiss.IndexHNSWFlat(
      dim, numbers.degree // 2, faiss.METRIC_INNER_PRODUCT
    )
    index.hnsw.efConstruction = 200
    index.add(x)
  elif queries is None or queries.near is None:
    raise ValueError("index kind 'graph' needs sampled queries")
  else:
    return _graph(numbers, x, tokens, queries)
  return FaissIndex(index, tokens)


def _graph(numbers, x, tokens, queries) -> FaissIndex:
  """The projection that fits the queries.

  Where the first neighbours of queries are few keys, cliques; where they are
  many, pivots; between, what finds more of the keys of held-out queries.
  """
  kinds = ('pivot', 'clique')
  if numbers.projection != 'auto':
    kinds = (numbers.projection,)
  elif graphs.hubs(queries.near) < _FEW:
    kinds = ('clique',)
  best: tuple[float, FaissIndex | None] = (-1.0, None)
  for kind in kinds:
    links, entry = graphs.graph(
      queries.near,
      queries.key_near,
      len(x),
      degree=numbers.degree,
      projection=kind,
      seed=numbers.seed,
    )
    index = FaissIndex(inject(x, links, entry, numbers.half), np.arange(len(x)))
    recall = 1.0
    if len(kinds) > 1 and len(queries.held_out):
      k = queries.held_near.shape[1]
      _, found = index.search(queries.held_out, k, 2 * k)
      recall = recall_of(found, queries.held_near)
    if recall > best[0]:
      best = (recall, index)
  assert best[1] is not None
  return FaissIndex(best[1].index, tokens)


def recall_of(found: np.ndarray, wanted: np.ndarray) -> float:
  """Share of the wanted numbers [n c] (-1: none) among the found."""
  hit = (wanted[:, :, None] == found[:, None, :]).any(2) & (wanted >= 0)
  return float(hit.sum() / max(1, (wanted >= 0).sum()))


def _storage(numbers, x: np.ndarray):
  """Vectors as they are, or as 16-bit floats."""
  if numbers.half:
    index = faiss.IndexScalarQuantizer(
      x.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
  else:
    index = faiss.IndexFlatIP(x.shape[1])
  index.add(x)
  return index


def inject(x: np.ndarray, links: np.ndarray, entry: int, half: bool):
  """An HNSW index whose level 0 is our graph.

  Args:
    x: float32 [n H].
    links: int32 [n R], R even; -1 at the end of a row.
    entry: where searches start.
    half: vectors are stored as 16-bit floats.
  """
  n, degree = links.shape
  metric = faiss.METRIC_INNER_PRODUCT
  kind = faiss.ScalarQuantizer.QT_fp16
  m = degree // 2  # level 0 holds 2 M links
  if half:
    index = faiss.IndexHNSWSQ(x.shape[1], kind, m, metric)
  else:
    index = faiss.IndexHNSWFlat(x.shape[1], m, metric)
  index.storage.add(x)
  index.is_trained = True
  index.ntotal = n
  faiss.copy_array_to_vector(np.ones(n, np.int32), index.hnsw.levels)
  index.hnsw.prepare_level_tab(n, True)  # True: levels are given
  flat = index.hnsw.neighbors
  view = faiss.rev_swig_ptr(flat.data(), flat.size()).reshape(n, degree)
  view[:] = links
  index.hnsw.entry_point = entry
  index.hnsw.max_level = 0
  return index


def scanned(reset: bool = False) -> int:
  """Products computed by all searches since the last reset.

  Centroids of IVF are not among them.
  """
  hnsw, ivf = faiss.cvar.hnsw_stats, faiss.cvar.indexIVF_stats
  count = hnsw.ndis + ivf.ndis
  if reset:
    hnsw.reset()
    ivf.reset()
  return count
