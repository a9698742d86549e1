"""A scan of 4-bit codes, whose best are ranked by exact products.

A walk through a graph waits for memory at each step; codes stream. Keys are
rotated at random, so that every element is about normal, and each is kept as
one of the 16 levels that quantise a normal variable best (Lloyd and Max). A
query's products with the levels, 16 for each element, fit a register and are
looked up 32 keys at a time (Andre et al., "Cache locality is not enough:
high-performance nearest neighbor search with product quantization fast scan",
VLDB 2015; faiss's IndexPQFastScan with sub-quantisers of one element). The
`effort` best by codes are ranked by their 16-bit keys.

Nothing is trained: levels need each element's mean and deviation alone. Levels
learnt by k-means reach further out, to where few keys are; the looked-up
products, 8 bits from the least to the largest, become coarser by that.
"""

import importlib
from typing import Any, Self

import numpy as np

faiss: Any = importlib.import_module('faiss')  # its types are generated

# Max, "Quantizing for minimum distortion" (1960), table I, N = 16.
_LEVELS = (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733)


class ScanIndex:
  """Codes of all keys, and the keys.

  Attributes:
    index: the codes, behind the rotation.
    store: the keys, flat.
    both: the former's best, ranked by the latter.
    tokens: int64 [ntotal]; what is removed leaves at once.
  """

  def __init__(self, index, store, tokens: np.ndarray):
    self.index, self.store = index, store
    self.both = faiss.IndexRefine(index, store)
    self.tokens, self.graphs = tokens, 1

  def search(self, q, k, effort, graph=0):
    """As `Index.search`: one native call, of all queries."""
    del graph
    n = len(self.tokens)
    k, effort = min(k, n), min(max(k, effort), n)
    score = np.empty((len(q), k), np.float32)
    found = np.empty((len(q), k), np.int64)
    if not k:
      return score, found
    q = np.ascontiguousarray(q, np.float32)
    # The half: the product of the two is cut to a whole number.
    factor = faiss.IndexRefineSearchParameters(k_factor=(effort + 0.5) / k)
    pointer = faiss.swig_ptr
    self.both.search_c(
      len(q), pointer(q), k, pointer(score), pointer(found), factor
    )
    return score, self.tokens[found]

  def add(self, keys, tokens):
    self.both.add(np.ascontiguousarray(keys, np.float32))
    self.tokens = np.concatenate([self.tokens, tokens])

  def remove(self, tokens):
    gone = np.isin(self.tokens, tokens)
    if gone.any():
      numbers = faiss.IDSelectorBatch(np.flatnonzero(gone))
      for each in (self.index, self.store):
        each.remove_ids(numbers)
      self.tokens = self.tokens[~gone]
      self.both.ntotal = len(self.tokens)

  def dump(self):
    return {
      'codes': faiss.serialize_index(self.index),
      'store': faiss.serialize_index(self.store),
      'tokens': self.tokens,
    }

  @classmethod
  def load(cls, arrays) -> Self:
    index, store = (
      faiss.deserialize_index(arrays[name]) for name in ('codes', 'store')
    )
    return cls(index, store, arrays['tokens'])

  @property
  def nbytes(self):
    codes = faiss.downcast_index(self.index.index).codes.size()
    return self.tokens.nbytes + codes + self.store.code_size * len(self.tokens)


def scan(store, x: np.ndarray, tokens: np.ndarray, seed: int) -> ScanIndex:
  """An index of vectors x [n H] that `store` holds."""
  dim = x.shape[1]
  rotation = faiss.RandomRotationMatrix(dim, dim)
  rotation.init(seed + 1)
  turned = rotation.apply(x)
  spread = turned.std(0)
  spread = np.maximum(spread, max(1e-6 * spread.max(), 1e-30))
  normal = np.array(_LEVELS, np.float32)
  normal = np.concatenate([-normal[::-1], normal])
  levels = turned.mean(0)[:, None] + spread[:, None] * normal
  codes = faiss.IndexPQFastScan(dim, dim, 4, faiss.METRIC_INNER_PRODUCT)
  faiss.copy_array_to_vector(levels.ravel(), codes.pq.centroids)
  codes.is_trained = True
  codes.add(turned)
  index = faiss.IndexPreTransform(rotation, codes)
  return ScanIndex(index, store, tokens)
