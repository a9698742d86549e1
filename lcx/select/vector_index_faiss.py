"""Indexes that faiss searches: flat, IVF, HNSW, and two of our own.

faiss 1.15: a graph is put into level 0 of an HNSW index; what that needs is
said at `inject`.
"""

import dataclasses
from typing import Any, Self

import numpy as np

from lcx.select import vector_index_graph as graphs
from lcx.select import vector_index_scan as scans
from lcx.select import vector_index_split as splits
from lcx.select.vector_index import line
from lcx.select.vector_index_native import faiss, give_room

# Distinct first neighbours over queries below which a head is taken to be
# concentrated: 96 and 173 of 20000 in two synthetic sets where cliques win by a
# wide margin (recall .99 against .85 of a pivot graph at an equal scan).
_FEW = 0.02
# By which cliques must win: for an equal recall they compute more products.
_MARGIN = 0.02
# Of all vectors, removed ones at which the others are numbered anew: that is a
# pass over all links, less than it took to add so many.
_HOLES = 1 / 8


class FaissIndex:
  """A faiss index, and which token each of its vectors is.

  Attributes:
    index: the faiss index, inner product.
    tokens: int64 [ntotal]; -1: removed.
  """

  parts = ()

  def __init__(self, index, tokens: np.ndarray):
    self.index, self.tokens, self.graphs = index, tokens, 1
    give_room(*_vectors(index))
    self._mark()

  def _mark(self) -> None:
    """Notes what is removed, for searches to pass over."""
    there = self.tokens >= 0
    self.start, self.step = line(self.tokens)
    self._gone = int(np.sum(~there))
    self._there = None
    if self._gone:
      bits = np.packbits(there, bitorder='little')
      self._there = faiss.IDSelectorBitmap(bits)

  def search(self, q, k, effort, graph=0):
    """As `Index.search`."""
    index = self._searched(graph)
    k = min(k, index.ntotal - self._gone)
    if not k:
      return np.zeros((len(q), 0), np.float32), np.zeros((len(q), 0), np.int64)
    q = np.ascontiguousarray(q, np.float32)
    score, found = index.search(q, k, params=self._params(index, effort, k))
    tokens = self.tokens[found]
    if found[:, -1].min(initial=0) >= 0:  # best first: those at the end
      return score, tokens
    return np.where(found >= 0, score, -np.inf), np.where(
      found >= 0, tokens, -1
    )

  def native(self, k, effort, graph=0):
    index = self._searched(graph)
    if self._gone or k > index.ntotal:
      return None  # what is removed can be said to a search alone
    if isinstance(index, faiss.IndexHNSW):
      index.hnsw.efSearch = max(effort, k)
    elif isinstance(index, faiss.IndexIVF):
      index.nprobe = effort
    return index

  def _searched(self, graph: int):
    del graph
    return self.index

  def _params(self, index, effort: int, k: int):
    there: dict[str, Any] = {'sel': self._there} if self._gone else {}
    if isinstance(index, faiss.IndexHNSW):
      effort = max(effort, k)
      # Removed nodes are ways to others, and take places among the best.
      effort += min(self._gone, effort)
      return faiss.SearchParametersHNSW(efSearch=effort, **there)
    if isinstance(index, faiss.IndexIVF):
      return faiss.SearchParametersIVF(nprobe=effort, **there)
    return faiss.SearchParameters(**there) if there else None

  def add(self, keys, tokens):
    _grow(self.index, np.ascontiguousarray(keys, np.float32))
    self.tokens = np.concatenate([self.tokens, tokens])
    self._mark()

  def remove(self, tokens):
    self.tokens = np.where(np.isin(self.tokens, tokens), -1, self.tokens)
    self._mark()
    if self._gone > _HOLES * len(self.tokens):
      self._shrink(self.tokens >= 0)
      self.tokens = self.tokens[self.tokens >= 0]
      self._mark()

  def _shrink(self, kept: np.ndarray) -> None:
    """Drops vectors; those that are kept, bool [n], are numbered anew."""
    index = self.index
    dropped = faiss.IDSelectorBatch(np.flatnonzero(~kept))
    if isinstance(index, faiss.IndexHNSW):
      index.storage.remove_ids(dropped)
      _keep_nodes(index, kept)
      return
    index.remove_ids(dropped)
    if isinstance(index, faiss.IndexIVF):
      number, lists = np.cumsum(kept) - 1, index.invlists
      for i in range(index.nlist):
        if size := lists.list_size(i):
          ids = faiss.rev_swig_ptr(lists.get_ids(i), size)
          ids[:] = number[ids]

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


class GraphIndex(FaissIndex):
  """Graphs of our own over one store of keys.

  Attributes:
    index: the store, flat.
    hnsw: an HNSW index a graph, which all search that store.
  """

  def __init__(self, index, tokens: np.ndarray, hnsw: list):
    super().__init__(index, tokens)
    self.hnsw, self.graphs = hnsw, len(hnsw)
    give_room(*(x.hnsw.neighbors for x in hnsw))

  def _searched(self, graph):
    return self.hnsw[graph]

  def add(self, keys, tokens):
    x = np.ascontiguousarray(keys, np.float32)
    n = self.index.ntotal
    for i, hnsw in enumerate(self.hnsw):
      if i:  # each adds to the store, too: the same codes again
        self.index.remove_ids(faiss.IDSelectorRange(n, n + len(x)))
      _grow(hnsw, x)
    self.tokens = np.concatenate([self.tokens, tokens])
    self._mark()

  def _shrink(self, kept):
    self.index.remove_ids(faiss.IDSelectorBatch(np.flatnonzero(~kept)))
    for hnsw in self.hnsw:
      _keep_nodes(hnsw, kept)

  def dump(self):
    arrays = {'store': faiss.serialize_index(self.index), 'tokens': self.tokens}
    for i, hnsw in enumerate(self.hnsw):
      graph = hnsw.hnsw
      arrays[f'links{i}'] = _links(hnsw).copy()
      arrays[f'levels{i}'] = faiss.vector_to_array(graph.levels)
      arrays[f'top{i}'] = np.array(
        [graph.entry_point, graph.max_level, graph.nb_neighbors(0)]
      )
    return arrays

  @classmethod
  def load(cls, arrays):
    store = faiss.deserialize_index(arrays['store'])
    hnsw = []
    while (top := arrays.get(f'top{len(hnsw)}')) is not None:
      links, levels = (arrays[f'{x}{len(hnsw)}'] for x in ('links', 'levels'))
      hnsw.append(_over(store, links, levels, *map(int, top)))
    return cls(store, arrays['tokens'], hnsw)

  @property
  def nbytes(self):
    links = sum(_links(h).nbytes + 12 * h.ntotal for h in self.hnsw)
    return super().nbytes + links


def load(arrays) -> FaissIndex | scans.ScanIndex | splits.SplitIndex:
  """What `dump` wrote."""
  if 'codes/0' in arrays:
    return splits.SplitIndex.load(arrays, load)
  if 'codes' in arrays:
    return scans.ScanIndex.load(arrays)
  return (GraphIndex if 'store' in arrays else FaissIndex).load(arrays)


def build(
  numbers, keys, tokens, queries
) -> FaissIndex | scans.ScanIndex | splits.SplitIndex:
  """See `lcx.select.vector_index.build`."""
  parts = min(numbers.parts, max(1, len(keys) // splits.LEAST))
  if parts > 1:
    one = dataclasses.replace(numbers, parts=1)
    mine = [tokens % parts == i for i in range(parts)]
    return splits.SplitIndex(
      [build(one, keys[some], tokens[some], queries) for some in mine]
    )
  x = np.ascontiguousarray(keys, np.float32)
  n, dim = x.shape
  if numbers.kind == 'flat':
    index = _storage(numbers, x)
  elif numbers.kind == 'fastscan':
    return scans.scan(numbers, _storage(numbers, x), x, tokens, queries)
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


def _graph(numbers, x, tokens, queries) -> GraphIndex:
  """A graph of the kv head, or one of each of its query heads."""
  store = _storage(numbers, x)
  if numbers.graphs == 'kv_head':
    heads = [(queries.near, queries.held_out, queries.held_near)]
  else:
    heads = [
      (
        queries.near[queries.near_of == head],
        queries.held_out[queries.held_of == head],
        queries.held_near[queries.held_of == head],
      )
      for head in range(1 + int(queries.held_of.max()))
    ]
  by_key = None
  if queries.key_near is not None:
    by_key = graphs.between_keys(queries.key_near, len(x), numbers.degree // 2)
  hnsw = [_projected(numbers, store, *h, by_key) for h in heads]
  return GraphIndex(store, tokens, hnsw)


def _projected(numbers, store, near, held_out, held_near, by_key):
  """The projection that fits the queries.

  Where the first neighbours of queries are few keys, cliques; else pivots,
  unless cliques find clearly more of the keys of held-out queries.
  """
  kinds = ('pivot', 'clique')
  if numbers.projection != 'auto':
    kinds = (numbers.projection,)
  elif graphs.hubs(near) < _FEW:
    kinds = ('clique',)
  best, most = None, -1.0 - _MARGIN
  for kind in kinds:
    links, entry = graphs.graph(
      near,
      by_key,
      store.ntotal,
      degree=numbers.degree,
      projection=kind,
      seed=numbers.seed,
    )
    hnsw = inject(store, links, entry)
    recall = 1.0
    if len(kinds) > 1 and len(held_out):
      k = held_near.shape[1]
      params = faiss.SearchParametersHNSW(efSearch=2 * k)
      q = np.ascontiguousarray(held_out, np.float32)
      recall = recall_of(hnsw.search(q, k, params=params)[1], held_near)
    if recall > most + _MARGIN:
      best, most = hnsw, recall
  return best


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


def inject(store, links: np.ndarray, entry: int):
  """An HNSW index over stored vectors, whose level 0 is our graph.

  Args:
    store: a flat index of n vectors, which several graphs may share.
    links: int32 [n R], R even; -1 at the end of a row.
    entry: where searches start.
  """
  levels = np.ones(len(links), np.int32)
  return _over(store, links, levels, entry, 0, links.shape[1])


def _over(store, links, levels, entry: int, top: int, degree: int):
  """An HNSW index of given links [all slots] and levels [n]."""
  index = faiss.IndexHNSW(store, degree // 2)  # level 0 holds 2 M links
  index.own_fields = False
  index.referenced_objects = [store]
  index.is_trained = True
  _put(index, links, levels, entry, top)
  return index


def _put(index, links, levels, entry: int, top: int) -> None:
  """Gives an HNSW index its nodes, those of its store, in place of any."""
  index.ntotal = len(levels)
  index.hnsw.reset()
  faiss.copy_array_to_vector(np.ascontiguousarray(levels), index.hnsw.levels)
  index.hnsw.prepare_level_tab(len(levels), True)  # True: levels are given
  _links(index)[:] = links.reshape(-1)
  index.hnsw.entry_point, index.hnsw.max_level = entry, top


def _grow(index, x: np.ndarray) -> None:
  """Adds vectors; the levels of nodes depend on how many there are alone."""
  if isinstance(index, faiss.IndexHNSW):
    index.hnsw.rng = faiss.RandomGenerator(index.ntotal)
  index.add(x)


def _keep_nodes(index, kept: np.ndarray) -> None:
  """Drops nodes of an HNSW index whose store has lost them already."""
  levels = faiss.vector_to_array(index.hnsw.levels)
  width, upper = index.hnsw.nb_neighbors(0), index.hnsw.nb_neighbors(1)
  flat, ground = _links(index).copy(), _ground(levels, width, upper)
  rows = flat[ground].reshape(-1, width)
  entry, left = index.hnsw.entry_point, levels[kept]
  if not len(left):
    _put(index, flat[:0], left, -1, -1)
    return
  number = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
  if not kept[entry]:  # one of the highest left, near by if there is a choice
    near = rows[entry][rows[entry] >= 0]
    near = near[kept[near]][:1]
    highest = np.flatnonzero(kept & (levels == left.max()))[:1]
    entry = near[0] if len(near) and left.max() == 1 else highest[0]
  entry = int(number[entry])
  high = flat[~ground].reshape(-1, upper)
  high = high[np.repeat(kept, levels - 1)]
  high = np.where(high >= 0, number[high], -1)
  high = np.take_along_axis(high, np.argsort(high < 0, 1, 'stable'), 1)
  rows = graphs.reachable(
    graphs.without(rows, kept), entry, np.random.default_rng(len(left))
  )
  ground = _ground(left, width, upper)
  links = np.empty(len(ground), np.int32)
  links[ground], links[~ground] = rows.ravel(), high.ravel()
  _put(index, links, left, entry, int(left.max()) - 1)


def _ground(levels: np.ndarray, width: int, upper: int) -> np.ndarray:
  """Which of all slots are of level 0: the first of each node."""
  size = width + (levels - 1) * upper
  begin = np.cumsum(size) - size
  ground = np.zeros(int(size.sum()), bool)
  ground[begin[:, None] + np.arange(width)] = True
  return ground


def _vectors(index) -> tuple:
  """What grows by a key's bytes at each that joins; none of IVF."""
  if isinstance(index, faiss.IndexHNSW):
    return *_vectors(faiss.downcast_index(index.storage)), index.hnsw.neighbors
  return (index.codes,) if hasattr(index, 'codes') else ()


def _links(index) -> np.ndarray:
  """All levels' links, flat; what is written there is the index's."""
  flat = index.hnsw.neighbors
  return faiss.rev_swig_ptr(flat.data(), flat.size())


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
