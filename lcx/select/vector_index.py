"""Indexes of key vectors in host memory: largest inner products of a query.

One interface, several kinds. `exact` is plain numpy; the others search with
faiss (extra `index`): `flat`, `ivf` and `hnsw` are its own, `graph` is the
attention-aware graph of `lcx.select.vector_index_graph`, `fastscan` reads 4-bit
codes of all keys and ranks the best of them by their products
(`lcx.select.vector_index_scan`).

An index numbers what it holds from 0; `tokens` says which token a number means,
-1: removed. Replacing is removing and adding. What is removed is never found;
its memory is given back when an eighth of what is held is such.
"""

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np

KINDS = ('exact', 'flat', 'ivf', 'hnsw', 'graph', 'fastscan')
# Share of its keys that an index gets room for: memory that is full moves, all
# of it, to twice as much; all heads and layers would move at the same token.
# `nbytes` does not count it, a row does.
ROOM = 1 / 32
_FORMAT = 4  # of saved indexes; another one when `build` makes another one


@dataclasses.dataclass(frozen=True)
class Numbers:
  """How indexes are built.

  Attributes:
    kind: one of KINDS.
    degree: links of a node at most, even.
    lists: of `ivf`; 0: 4 sqrt(n).
    half: keys are kept as 16-bit floats in the index.
    projection: of `graph`: 'pivot', 'clique', or 'auto': what finds more of
      the nearest keys of held-out queries.
    graphs: of `graph`: one a 'kv_head', made of what all its query heads'
      queries found, or one a 'query_head', over the same stored keys.
    bits: of an element in the codes of `fastscan`, in the mean: 2, 3 or 4.
    parts: of `fastscan`: of a head's keys, for as many threads; fewer where
      keys are few.
    seed: of what is drawn.
  """

  kind: str = 'graph'
  degree: int = 32
  lists: int = 0
  half: bool = True
  projection: str = 'auto'
  graphs: str = 'kv_head'
  bits: int = 4
  parts: int = 1
  seed: int = 0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'index kind={self.kind!r} must be one of {KINDS}')
    if not 4 <= self.degree <= 256 or self.degree % 2:
      raise ValueError(
        f'index degree={self.degree} must be even, from 4 to 256'
      )
    if self.projection not in ('auto', 'pivot', 'clique'):
      raise ValueError(
        f"index projection={self.projection!r} must be 'auto', 'pivot' or "
        "'clique'"
      )
    if self.graphs not in ('kv_head', 'query_head'):
      raise ValueError(
        f"index graphs={self.graphs!r} must be 'kv_head' or 'query_head'"
      )
    if self.graphs == 'query_head' and self.kind != 'graph':
      raise ValueError(
        f"index graphs='query_head' is of kind 'graph', not {self.kind!r}: "
        "leave it 'kv_head'"
      )
    if self.bits not in (2, 3, 4):
      raise ValueError(f'index bits={self.bits} must be 2, 3 or 4')
    if self.parts < 1 or (self.parts > 1 and self.kind != 'fastscan'):
      raise ValueError(
        f"index parts={self.parts} must be 1, or more of kind 'fastscan'"
      )

  def bytes_per_key(self, dim: int, group: int) -> int:
    """Bytes that an index takes for a key, about.

    Args:
      dim: elements of a key.
      group: query heads of a kv head.
    """
    if self.kind == 'exact':
      return 0  # the keys themselves
    links = 4 * self.degree + 12 if self.kind in ('hnsw', 'graph') else 0
    links *= group if self.graphs == 'query_head' else 1
    half = self.kind == 'ivf' or (self.half and self.kind != 'hnsw')
    codes = dim * self.bits // 8 if self.kind == 'fastscan' else 0
    return dim * (2 if half else 4) + codes + links + 8


class Queries(Protocol):
  """What the prompt's queries say of its keys, as numbers of keys.

  Attributes:
    near: int [Q c] keys of largest product for each sampled query, best first;
      -1: none. `graph` needs it.
    near_of: int [Q] query head of its group, of each of those queries.
    key_near: int [n d] the same for each key, or None.
    held_out: [h H] queries that are not in `near`; `fastscan` codes keys for
      them.
    held_near: int [h c] their nearest keys.
    held_of: int [h] as `near_of`.
  """

  @property
  def near(self) -> np.ndarray | None: ...
  @property
  def near_of(self) -> np.ndarray | None: ...
  @property
  def key_near(self) -> np.ndarray | None: ...
  @property
  def held_out(self) -> np.ndarray: ...
  @property
  def held_near(self) -> np.ndarray: ...
  @property
  def held_of(self) -> np.ndarray: ...


class Index(Protocol):
  """An index of one kv head's keys.

  Attributes:
    tokens: int64 [n] what its numbers mean.
    start, step: where step is not 0, number i means token start + i * step.
    graphs: 1, or as many as the kv head has query heads.
    parts: indexes of which it is made; of none, it has its own `native`.
  """

  @property
  def tokens(self) -> np.ndarray: ...

  start: int
  step: int
  graphs: int
  parts: tuple[Any, ...]

  def search(
    self, q: np.ndarray, k: int, effort: int, graph: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """(scores [n k], tokens int64 [n k], -1 where none), best first.

    Args:
      q: float32 [n H].
      k: how many are wanted; the index may hold fewer.
      effort: efSearch of a graph, nprobe of IVF, keys that `fastscan` ranks.
      graph: which of the index's graphs is searched.
    """
    ...

  def native(self, k: int, effort: int, graph: int = 0) -> Any | None:
    """An index of faiss that searches so, for `together`; None: there is none.

    It finds numbers, and is valid until the next call.
    """
    ...

  def add(self, keys: np.ndarray, tokens: np.ndarray) -> None:
    """Adds keys [m H] without building anew."""
    ...

  def remove(self, tokens: np.ndarray) -> None:
    """Removes those of tokens int [m] that it holds."""
    ...

  def dump(self) -> dict[str, np.ndarray]:
    """Arrays from which `load` makes it again, as it is now.

    What is found, and how it grows from there, is the same.
    """
    ...

  @property
  def nbytes(self) -> int: ...


class Exact:
  """All keys, scanned."""

  graphs, parts, start, step = 1, (), 0, 0

  def __init__(self, keys: np.ndarray, tokens: np.ndarray):
    self.keys, self.tokens = keys, tokens.astype(np.int64)

  def search(self, q, k, effort, graph=0):
    del effort, graph
    score = q @ self.keys.T.astype(np.float32)
    score[:, self.tokens < 0] = -np.inf
    k = min(k, score.shape[1])
    best = np.argpartition(-score, k - 1, axis=1)[:, :k]
    value = np.take_along_axis(score, best, 1)
    order = np.argsort(-value, axis=1)
    value = np.take_along_axis(value, order, 1)
    found = self.tokens[np.take_along_axis(best, order, 1)]
    return value, np.where(value > -np.inf, found, -1)

  def native(self, k, effort, graph=0):
    del k, effort, graph

  def add(self, keys, tokens):
    self.keys = np.concatenate([self.keys, keys])
    self.tokens = np.concatenate([self.tokens, tokens])

  def remove(self, tokens):
    kept = ~np.isin(self.tokens, tokens)
    self.keys, self.tokens = self.keys[kept], self.tokens[kept]

  def dump(self):
    return {'keys': self.keys, 'tokens': self.tokens}

  @classmethod
  def load(cls, arrays) -> Self:
    return cls(arrays['keys'], arrays['tokens'])

  @property
  def nbytes(self):
    return self.keys.nbytes + self.tokens.nbytes


def has_faiss() -> bool:
  """Whether the extra `index` is installed."""
  return importlib.util.find_spec('faiss') is not None


def require(kind: str) -> None:
  """Refuses a kind that cannot run here."""
  if kind != 'exact' and not has_faiss():
    raise ValueError(
      f"index kind {kind!r} needs faiss: pip install 'lcx[index]'; the method "
      'retrieval_cluster needs no package'
    )


def build(
  numbers: Numbers,
  keys: np.ndarray,
  first: int,
  queries: Queries | None = None,
) -> Index:
  """An index of keys [n H], which are tokens first, first + 1, ..."""
  tokens = np.arange(first, first + len(keys), dtype=np.int64)
  if numbers.kind == 'exact':
    return Exact(keys, tokens)
  require(numbers.kind)
  from lcx.select import vector_index_faiss

  return vector_index_faiss.build(numbers, keys, tokens, queries)


def together(
  asked: Sequence[tuple[Index, int, np.ndarray]], k: int, effort: int, jobs: int
) -> tuple[np.ndarray, np.ndarray] | None:
  """Searches of several indexes in one native call, by threads of faiss.

  Args:
    asked: an index, which of its graphs, and float32 [n H] queries, each.
    k: how many are wanted.
    effort: as in `Index.search`.
    jobs: threads, at least.

  Returns:
    What `Index.search` returns, of all queries, one index behind the other;
    None where faiss cannot do it at once.
  """
  parts = [index.parts or (index,) for index, _, _ in asked]
  split = len(parts[0])
  if any(len(x) != split for x in parts):
    return None
  if split > 1:
    effort = share(effort, split)
  # Number p of each in turn: then what parts find is merged for all at once.
  each = [x[p] for p in range(split) for x in parts]
  graphs = [graph for _, graph, _ in asked] * split
  natives = [
    x.native(k, effort, graph) for x, graph in zip(each, graphs, strict=True)
  ]
  if any(x is None for x in natives):
    return None
  from lcx.select import vector_index_native

  if not vector_index_native.available():
    return None
  score, tokens, first = vector_index_native.search(
    natives, [q for _, _, q in asked] * split, k, jobs
  )
  missing = tokens < 0 if tokens[:, -1].min() < 0 else None  # they are last
  if all(x.step for x in each):
    sizes = np.diff(first)
    step = np.repeat([x.step for x in each], sizes)[:, None]
    start = np.repeat([x.start for x in each], sizes)[:, None]
    tokens *= step
    tokens += start
  else:
    for index, (a, b) in zip(each, itertools.pairwise(first), strict=True):
      tokens[a:b] = index.tokens[tokens[a:b]]
  if missing is not None:
    score[missing], tokens[missing] = -np.inf, -1
  if split > 1:
    score, tokens = vector_index_native.merged(score, tokens, split)
  return score, tokens


def share(effort: int, parts: int) -> int:
  """Of an effort, that of each of a head's parts."""
  return -(-effort // max(1, parts))


def line(tokens: np.ndarray) -> tuple[int, int]:
  """(start, step) of tokens that are start + i * step; else step is 0."""
  start = int(tokens[0]) if len(tokens) else 0
  step = int(tokens[1] - tokens[0]) if len(tokens) > 1 else 1
  even = len(tokens) and step > 0 and (np.diff(tokens) == step).all()
  return start, step if even else 0


def fingerprint(
  numbers: Numbers, keys: np.ndarray, first: int, said: Sequence[Any] = ()
) -> str:
  """SHA-256 of everything that decides what `build` makes.

  Args:
    numbers: of the index.
    keys: [n H].
    first: token of the first key.
    said: arrays, or None, by which the queries' part was said; of a kind that
      is made of keys alone they do not count.
  """
  of_queries = numbers.kind in ('graph', 'fastscan')
  digest = hashlib.sha256(f'{_FORMAT} {numbers!r} {first}'.encode())
  for x in (keys, *(said if of_queries else ())):
    if x is None:
      digest.update(b'none')
      continue
    digest.update(f'{x.dtype}{x.shape}'.encode())
    digest.update(np.ascontiguousarray(x).view(np.uint8))
  return digest.hexdigest()


def to_bytes(index: Index, numbers: Numbers, of: str) -> bytes:
  """An index, with the `fingerprint` of what it was made of."""
  out = io.BytesIO()
  arrays: dict[str, Any] = {**index.dump(), 'of': of, 'numbers': repr(numbers)}
  np.savez(out, **arrays)
  body = out.getvalue()
  return body + hashlib.sha256(body).digest()


def from_bytes(data: bytes, numbers: Numbers, of: str) -> Index:
  """What `to_bytes` wrote.

  Raises:
    ValueError: it is cut or damaged, or another index: a file under a wrong
      name.
  """
  body, digest = data[:-32], data[-32:]
  if hashlib.sha256(body).digest() != digest:
    raise ValueError('the saved index is truncated or damaged: delete it')
  with np.load(io.BytesIO(body), allow_pickle=False) as file:
    arrays = dict(file)
  for name, want in (('of', of), ('numbers', repr(numbers))):
    if str(arrays[name]) != want:
      what = 'of another context' if name == 'of' else 'built otherwise'
      raise ValueError(f'the saved index is {what}: {arrays[name]}')
  if numbers.kind == 'exact':
    return Exact.load(arrays)
  require(numbers.kind)
  from lcx.select import vector_index_faiss

  return vector_index_faiss.load(arrays)


def save(path: str, data: bytes) -> None:
  """Puts a file there whole or not at all."""
  folder = os.path.dirname(path)
  os.makedirs(folder, exist_ok=True)
  part = f'{path}.{os.getpid()}.{threading.get_ident()}'
  try:
    with open(part, 'wb') as file:
      file.write(data)
    os.replace(part, path)
  finally:
    if os.path.exists(part):
      os.remove(part)
