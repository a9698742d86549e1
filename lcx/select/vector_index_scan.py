"""A scan of 4-bit codes, whose best are ranked by exact products.

A walk through a graph waits for memory at each step; codes stream. 16 levels of
an element, or 4 x 4 of two, multiplied with a query's, fit a register, where 32
keys at a time look their codes up (Andre et al., "Cache locality is not enough:
high-performance nearest neighbor search with product quantization fast scan",
VLDB 2015; faiss's IndexPQFastScan). The `effort` best of them are ranked by
their 16-bit keys.

Codes are of keys x A, to be multiplied with queries q B, A B^T = 1. Quantising
each of d elements to as many levels errs by sum_i E[(xA)_i^2] E[(qB)_i^2] times
a constant. Let l be the eigenvalues of cov(x) E[q q^T]. Where A makes both
matrices diagonal and equal, sqrt(l), and a rotation then spreads them evenly,
the error is (sum_i sqrt(l_i))^2 / d: no more than sum_i l_i, that of whitened
keys or queries, and far less than that of a rotation alone where a few elements
of keys are large and queries small there, as in the first layers of models.

With fewer than 4 bits an element, elements differ: before the rotation, an
element errs by l_i times a constant of its levels. Those of largest l_i get 4
bits, those that follow 2, the others none, so that the sum of errors is least
for as many bits in all; then those of 4 are rotated among each other, and those
of 2. An element of 4 bits is a code; so are two of 2.

The levels are those that quantise a normal variable best: elements of rotated
keys are about normal. Levels learnt by k-means reach further out, to where few
keys are; looked-up products, 8 bits from the least to the largest, become
coarser by that, and find less.
"""

from typing import Self

import numpy as np

from lcx.select.vector_index import line
from lcx.select.vector_index_native import faiss, give_room

# Positive levels by bits of an element: Max, "Quantizing for minimum
# distortion", 1960, table I, of 4 and of 16 levels.
_LEVELS = {
  2: (0.4528, 1.510),
  4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
# Mean squared errors of those levels, of a variance of 1; 0 bits: of none.
_ERROR = {0: 1.0, 2: 0.1175, 4: 0.009497}
_SEEN = 16384  # keys that tell the covariance
_AT_ONCE = 16384  # keys that are turned together
# Keys that join are few, and heads join side by side: of at most so many
# products of numbers OpenBLAS makes no threads, which waited for one another.
_JOINING, _ONE_THREAD = 1024, 2**18
# Shares of the mean that eigenvalues get: of keys, only what rounding takes
# (elements of keys differ by 10^4 in variance); of queries, for those to come
# that differ from those that were seen.
_LEAST_KEY, _LEAST_QUERY = 1e-6, 0.05


class ScanIndex:
  """Codes of all keys, and the keys.

  Attributes:
    index: the codes, behind what turns queries.
    store: the keys, flat.
    tokens: int64 [ntotal]; what is removed leaves at once.
  """

  parts = ()

  def __init__(self, index, store, tokens, mean: np.ndarray, turn: np.ndarray):
    self.index, self.store, self.graphs = index, store, 1
    self.tokens: np.ndarray = tokens
    self.start, self.step = line(tokens)
    self._mean, self._turn = mean, turn
    self._both, self._factor = faiss.IndexRefine(index, store), 0.0
    give_room(store.codes)

  def search(self, q, k, effort, graph=0):
    """As `Index.search`, in one native call."""
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
    self._both.search_c(
      len(q), pointer(q), k, pointer(score), pointer(found), factor
    )
    return score, self.tokens[found]

  def native(self, k, effort, graph=0):
    del graph
    n = len(self.tokens)
    if k > n:
      return None
    factor = (min(max(k, effort), n) + 0.5) / k
    if factor != self._factor:  # slow to set
      self._both.k_factor = self._factor = factor
    return self._both

  def add(self, keys, tokens):
    x = np.ascontiguousarray(keys, np.float32)
    self.store.add(x)
    _encode(self.index, x, self._mean, self._turn)
    self.tokens = np.concatenate([self.tokens, tokens])
    self.start, self.step = line(self.tokens)
    self._both.ntotal = len(self.tokens)

  def remove(self, tokens):
    gone = np.isin(self.tokens, tokens)
    if gone.any():
      numbers = faiss.IDSelectorBatch(np.flatnonzero(gone))
      for each in (self.index, self.store):
        each.remove_ids(numbers)
      self.tokens = self.tokens[~gone]
      self.start, self.step = line(self.tokens)
      self._both.ntotal = len(self.tokens)

  def dump(self):
    return {
      'codes': faiss.serialize_index(self.index),
      'store': faiss.serialize_index(self.store),
      'tokens': self.tokens,
      'mean': self._mean,
      'turn': self._turn,
    }

  @classmethod
  def load(cls, arrays) -> Self:
    index, store = (
      faiss.deserialize_index(arrays[name]) for name in ('codes', 'store')
    )
    return cls(index, store, *(arrays[x] for x in ('tokens', 'mean', 'turn')))

  @property
  def nbytes(self):
    codes = faiss.downcast_index(self.index.index).codes.size()
    return self.tokens.nbytes + codes + self.store.code_size * len(self.tokens)


def scan(numbers, store, x: np.ndarray, tokens, queries) -> ScanIndex:
  """An index of vectors x [n H] that `store` holds.

  Args:
    numbers: `lcx.select.vector_index.Numbers`.
    store: flat.
    x: float32.
    tokens: int64 [n].
    queries: those held out are like those that will ask; None: any may.
  """
  dim = x.shape[1]
  asked = np.zeros((0, dim), np.float32)
  if queries is not None:  # padding has no nearest keys
    asked = queries.held_out[queries.held_near[:, 0] >= 0]
  seen = x[:: -(-len(x) // _SEEN)]
  mean = seen.mean(0)
  turn, turn_q, fine = balanced(seen - mean, asked, numbers.seed, numbers.bits)
  spread = ((seen - mean) @ turn).std(0)
  spread = np.maximum(spread, max(1e-6 * float(spread.max()), 1e-30))
  # Columns of a code: one of 4 bits, and nothing beside it where others hold
  # two; two of 2 bits.
  count = turn.shape[1]
  wide = 2 if count > fine else 1
  pairs = -(-(count - fine) // 2)
  place = np.arange(fine) * wide
  place = np.append(place, wide * fine + np.arange(count - fine))
  width = wide * (fine + pairs)
  turn, turn_q, spread = (
    _placed(x, place, width) for x in (turn, turn_q, spread)
  )
  level = np.stack([_grid(4)] * fine + [_grid(2)] * pairs)[..., :wide]
  level = level * spread.reshape(-1, 1, wide)
  codes = faiss.IndexPQFastScan(
    width, width // wide, 4, faiss.METRIC_INNER_PRODUCT
  )
  faiss.copy_array_to_vector(
    np.ascontiguousarray(level, np.float32).ravel(), codes.pq.centroids
  )
  codes.is_trained = True
  ask = faiss.LinearTransform(dim, width, False)
  faiss.copy_array_to_vector(np.ascontiguousarray(turn_q.T).ravel(), ask.A)
  ask.is_trained = True
  index = faiss.IndexPreTransform(ask, codes)
  _encode(index, x, mean, turn)
  return ScanIndex(index, store, tokens, mean, turn)


def _placed(x: np.ndarray, place: np.ndarray, width: int) -> np.ndarray:
  """Columns of x [... n] at places in [... width]; zeros elsewhere."""
  out = np.zeros((*x.shape[:-1], width), np.float32)
  out[..., place] = x
  return out


def _grid(bits: int) -> np.ndarray:
  """Levels [16 2] of a code: of one element of 4 bits, or of two of 2."""
  half = np.array(_LEVELS[bits], np.float32)
  level = np.concatenate([-half[::-1], half])
  other = level if bits == 2 else np.zeros(1, np.float32)
  return np.stack(np.meshgrid(level, other), -1).reshape(16, 2)


def _encode(index, x: np.ndarray, mean, turn) -> None:
  """Adds the codes of x; what turns queries is passed by."""
  codes, few = index.index, max(1, _ONE_THREAD // turn.size)
  if len(x) > _JOINING:
    for first in range(0, len(x), _AT_ONCE):
      codes.add((x[first : first + _AT_ONCE] - mean) @ turn)
  elif len(x):
    parts = range(0, len(x), few)
    parts = [(x[first : first + few] - mean) @ turn for first in parts]
    codes.add(np.concatenate(parts))
  index.ntotal = codes.ntotal


def balanced(
  x: np.ndarray, q: np.ndarray, seed: int, bits: int = 4
) -> tuple[np.ndarray, np.ndarray, int]:
  """(A, B, n): see the module. The first n columns are coded by 4 bits.

  Columns that get none are left out; of all of them, A B^T = 1.

  Args:
    x: [n H] keys less their mean.
    q: [m H] queries; none: any direction is asked for alike.
    seed: of the rotation.
    bits: mean of all elements.
  """
  dim = x.shape[1]
  x, q = x.astype(np.float64), q.astype(np.float64)
  keys, axes = np.linalg.eigh(x.T @ x / len(x))
  keys = np.maximum(keys, 0) + _LEAST_KEY * max(keys.mean(), 1e-30)
  # Keys are white in x W; queries are there q W^-T.
  white, back = axes * keys**-0.5, axes * keys**0.5
  asked = back.T @ back if not len(q) else (q @ back).T @ (q @ back) / len(q)
  both, turn = np.linalg.eigh(asked)
  both, turn = np.maximum(both, 0)[::-1], turn[:, ::-1]
  both = both + _LEAST_QUERY * max(both.mean(), 1e-30)
  coded, fine = shared_out(both, bits)
  mix = np.zeros((dim, coded))
  draw = np.random.default_rng(seed)
  for some in (slice(0, fine), slice(fine, coded)):
    size = len(range(coded)[some])
    mix[some, some] = np.linalg.qr(draw.normal(size=(size, size)))[0]
  keys_by = white @ (turn * both**0.25) @ mix
  queries_by = back @ (turn * both**-0.25) @ mix
  return keys_by.astype(np.float32), queries_by.astype(np.float32), fine


def shared_out(size: np.ndarray, bits: int) -> tuple[int, int]:
  """How many of the largest elements are coded at all, and by 4 bits.

  Args:
    size: [d] mean squares of products, largest first.
    bits: mean of all elements.
  """
  # 2 bits, then 2 more, are given to whom they serve most: first the first.
  gain = [(_ERROR[0] - _ERROR[2]) * size, (_ERROR[2] - _ERROR[4]) * size]
  best = np.argsort(-np.concatenate(gain), kind='stable')
  fine = int((best[: bits * len(size) // 2] >= len(size)).sum())
  return bits * len(size) // 2 - fine, fine
