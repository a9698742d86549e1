"""One row's tokens of one layer in host memory, and attention over them.

Plain numpy and an index per kv head; nothing here knows of a device. Tokens are
numbered by arrival. What the device does not hold, [first, until), is attended:

  index    tokens that were there when the index was built, or joined since
  fresh    tokens since: scanned, until a block of them joins

A search that is seen to miss keys is widened: twice the effort, twice the keys,
all keys.
"""

import concurrent.futures
import dataclasses
import os
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from lcx.select import vector_index as vi

_GROW = 1024  # tokens by which a row grows at least
_SAMPLE = 256  # keys whose scores tell what a search left out
_JOIN = 512  # fresh tokens that join an index together
COUNTERS = ('scored', 'attended', 'more_effort', 'more_keys', 'exact')


@dataclasses.dataclass(frozen=True)
class Search:
  """How a row is searched.

  Attributes:
    top: tokens attended per query head.
    effort: efSearch of a graph, nprobe of IVF.
    first: tokens at the start that the device holds.
    recent: last tokens that the device holds, at least.
    page: tokens leave the device by pages.
    mass: a found share of the host's softmax below which more keys are taken.
  """

  top: int
  effort: int
  first: int
  recent: int
  page: int
  mass: float = 0.0

  def until(self, used: int) -> int:
    """End of what the host attends when a row holds `used` tokens."""
    return max(self.first, (used - self.recent) // self.page * self.page)


class Near(NamedTuple):
  """`lcx.select.vector_index.Queries` of one head."""

  near: np.ndarray
  key_near: np.ndarray | None
  held_out: np.ndarray
  held_near: np.ndarray


class Part(NamedTuple):
  """Attention of M queries over the host's tokens of one kv head.

  Attributes:
    out: float32 [M H].
    lse: float32 [M].
    rest: float32 [M] log of the estimated exp sum of all other tokens.
    counts: float [len(COUNTERS)].
    search_s: seconds in the index.
  """

  out: np.ndarray
  lse: np.ndarray
  rest: np.ndarray
  counts: np.ndarray
  search_s: float


class Row:
  """Keys and values [K S H] of one row, and its indexes.

  Attributes:
    used: tokens held.
    indexed: (first, stop) of the tokens in the indexes; equal: no index.
    indexes: one a kv head.
    build_s: seconds that the build took.
  """

  def __init__(self, n_kv_heads: int, dim: int, dtype: Any):
    self.k = np.zeros((n_kv_heads, 0, dim), dtype)
    self.v = np.zeros((n_kv_heads, 0, dim), dtype)
    self.at = np.zeros((0,), np.int32)
    self.used, self.indexed, self.build_s = 0, (0, 0), 0.0
    self.indexes: list[vi.Index] = []
    self.lock = threading.Lock()
    self._build: concurrent.futures.Future | None = None

  @property
  def nbytes(self) -> int:
    own = self.k.nbytes + self.v.nbytes + self.at.nbytes
    return own + sum(i.nbytes for i in self.indexes)

  def bytes_to_grow(self, tokens: int) -> int:
    """Bytes that an append of so many tokens would allocate."""
    short = self.used + tokens - self.k.shape[1]
    if short <= 0:
      return 0
    return (
      self._more(short)
      * 2
      * self.k.shape[0]
      * (self.k.shape[2] * self.k.itemsize)
    )

  def _more(self, short: int) -> int:
    return max(short, _GROW, self.k.shape[1] // 4)

  def write(self, used: int, k, v, positions) -> None:
    """Appends k, v [T K H] after the first `used` tokens."""
    self.truncate(used)
    stop = used + len(positions)
    if stop > self.k.shape[1]:
      more = self._more(stop - self.k.shape[1])
      wider = ((0, 0), (0, more), (0, 0))
      self.k, self.v = np.pad(self.k, wider), np.pad(self.v, wider)
      self.at = np.pad(self.at, (0, more))
    self.k[:, used:stop] = np.swapaxes(k, 0, 1)
    self.v[:, used:stop] = np.swapaxes(v, 0, 1)
    self.at[used:stop] = positions
    self.used = stop

  def truncate(self, used: int) -> None:
    """Keeps the first `used` tokens, in the indexes too."""
    if used > self.used:
      raise ValueError(f'a row of {self.used} tokens cannot go on at {used}')
    if used < self.used and used < self.indexed[1]:
      self.wait()
      for index in self.indexes:
        index.remove(used)
      self.indexed = (self.indexed[0], max(self.indexed[0], used))
    self.used = used

  def clone(self) -> 'Row':
    """A copy without an index: its tokens are scanned."""
    row = Row(self.k.shape[0], self.k.shape[2], self.k.dtype)
    row.k, row.v, row.at = self.k.copy(), self.v.copy(), self.at.copy()
    row.used = self.used
    return row

  # Index.

  def build(
    self, numbers: vi.Numbers, first: int, stop: int, near, pool, folder: str
  ) -> None:
    """Starts to index tokens [first, stop); the first search waits for it.

    Args:
      numbers: of the indexes.
      first: first token.
      stop: behind the last one.
      near: a `Near` a kv head, in positions; None: no sampled queries.
      pool: where the heads are built.
      folder: where indexes are kept by the fingerprint of their keys; '':
        nowhere.
    """
    self._build = None
    self.indexes, self.indexed = [], (first, first)
    if stop > first:
      self._build = pool.submit(self._built, numbers, first, stop, near, folder)

  def _built(self, numbers, first, stop, near, folder):
    start = time.perf_counter()
    keys = self.k[:, first:stop]
    path = of = ''
    if folder:
      of = vi.fingerprint(keys)
      path = os.path.join(folder, f'{of[:32]}.index')
      if os.path.exists(path):
        with open(path, 'rb') as file:
          indexes = vi.from_bytes(file.read(), numbers, of)
        return indexes, (first, stop), time.perf_counter() - start
    indexes = []
    for h in range(len(keys)):
      queries = near and self._numbered(near[h], first, stop)
      indexes.append(vi.build(numbers, keys[h], first, queries))
    if folder:
      vi.save(path, vi.to_bytes(indexes, numbers, of))
    return indexes, (first, stop), time.perf_counter() - start

  def _numbered(self, near: Near, first: int, stop: int) -> Near:
    """Positions as numbers in the index; -1 where they are not in it."""
    at = self.at[first:stop]

    def number(x):
      place = np.minimum(np.searchsorted(at, x), len(at) - 1)
      place = np.where(at[place] == x, place, -1)
      order = np.argsort(place < 0, axis=1, kind='stable')
      return np.take_along_axis(place, order, 1)

    asked = number(near.near)
    key_near = near.key_near
    if key_near is not None:
      # By position of the key; a row that no key stands for is padding.
      key_near = number(key_near[at])
    return Near(
      asked[asked[:, 0] >= 0], key_near, near.held_out, number(near.held_near)
    )

  def wait(self) -> None:
    """Takes the index over when it is built; a failed build raises here."""
    if self._build is not None:
      build, self._build = self._build, None
      self.indexes, self.indexed, self.build_s = build.result()

  def join(self, until: int) -> None:
    """Fresh tokens join the index, a block at a time."""
    first, stop = self.indexed
    n = (until - stop) // _JOIN * _JOIN
    if self.indexes and n > 0:
      tokens = np.arange(stop, stop + n)
      for index, k in zip(self.indexes, self.k, strict=True):
        index.add(k[stop : stop + n], tokens)
      self.indexed = (first, stop + n)

  # Attention.

  def attend(self, head: int, q: np.ndarray, search: Search) -> Part:
    """Attention of scaled float32 queries [M H] over tokens of one kv head."""
    first, until = search.first, search.until(self.used)
    n, counts = until - first, np.zeros(len(COUNTERS))
    if n <= 0:
      m, h = q.shape
      empty = np.full((m,), -np.inf, np.float32)
      return Part(np.zeros((m, h), np.float32), empty, empty, counts, 0.0)
    if search.top >= n or not self.indexes:
      return self._exact(head, q, first, until, counts, search.top)
    k, effort, spent = search.top, search.effort, 0.0
    sample = np.random.default_rng(0).integers(first, until, min(_SAMPLE, n))
    aside = q @ self.k[head, sample].T.astype(np.float32)
    for step in ('', 'more_effort', 'more_keys'):
      if step:
        effort *= 2
        k *= 2 if step == 'more_keys' else 1
        counts[COUNTERS.index(step)] += 1
      start = time.perf_counter()
      score, tokens = self._candidates(head, q, k, effort, until)
      spent += time.perf_counter() - start
      counts[0] += score.size
      part = self._over(head, score, tokens)
      out = (sample[:, None] == tokens[:, None, :]).any(2)  # [M sample]
      left = np.where(out, -np.inf, aside)
      rest = _lse(left) + np.log(n / len(sample))
      # A key outside that beats the last one found: the search missed it.
      worst = np.where(tokens[:, -1] >= 0, score[:, -1], np.inf)
      missed = np.any(left > worst[:, None] + 1e-3 * np.abs(worst[:, None]))
      share = 1 / (1 + np.exp(np.minimum(rest - part[1], 80)))
      if not missed and np.all(share >= search.mass):
        counts[1] += (tokens >= 0).sum()
        return Part(*part, rest.astype(np.float32), counts, spent)
    return self._exact(head, q, first, until, counts, n)

  def _candidates(self, head, q, k, effort, until):
    """(scores, tokens) [M k], best first, of index and fresh tokens."""
    score, tokens = self.indexes[head].search(q, k, effort)
    score = np.where(tokens < until, score, -np.inf)
    stop = self.indexed[1]
    if until > stop:
      fresh = q @ self.k[head, stop:until].T.astype(np.float32)
      number = np.broadcast_to(np.arange(stop, until), fresh.shape)
      score = np.concatenate([score, fresh], 1)
      tokens = np.concatenate([tokens, number], 1)
    order = np.argsort(-score, axis=1)[:, :k]
    score = np.take_along_axis(score, order, 1)
    tokens = np.take_along_axis(tokens, order, 1)
    return score, np.where(score > -np.inf, tokens, -1)

  def _over(self, head, score, tokens):
    """(out, lse) over listed tokens, scored from the keys as they are kept."""
    peak = np.max(score, axis=1, keepdims=True)
    peak = np.where(peak > -np.inf, peak, 0.0)
    weight = np.where(tokens >= 0, np.exp(score - peak), 0.0)
    total = weight.sum(1)
    value = self.v[head, np.maximum(tokens, 0)].astype(np.float32)
    out = np.einsum('mk,mkh->mh', weight, value)
    with np.errstate(divide='ignore'):
      lse = np.log(total) + peak[:, 0]
    out /= np.maximum(total, 1e-30)[:, None]
    return out.astype(np.float32), lse.astype(np.float32)

  def _exact(self, head, q, first, until, counts, top) -> Part:
    """Attention over all tokens, or over the exact `top` best ones."""
    score = q @ self.k[head, first:until].T.astype(np.float32)
    counts[0] += score.size
    counts[4] += 1
    rest = np.full((len(q),), -np.inf, np.float32)
    if top < until - first:
      best = np.argpartition(-score, top - 1, axis=1)
      found = np.take_along_axis(score, best[:, :top], 1)
      rest = _lse(np.take_along_axis(score, best[:, top:], 1))
      counts[1] += found.size
      out, lse = self._over(head, found, best[:, :top] + first)
      return Part(out, lse, rest, counts, 0.0)
    counts[1] += score.size
    peak = score.max(1, keepdims=True)
    weight = np.exp(score - peak)
    total = weight.sum(1)
    out = weight @ self.v[head, first:until].astype(np.float32)
    lse = np.log(total) + peak[:, 0]
    return Part(
      (out / total[:, None]).astype(np.float32),
      lse.astype(np.float32),
      rest,
      counts,
      0.0,
    )


def _lse(x: np.ndarray) -> np.ndarray:
  """Logsumexp over the last axis; -inf of nothing."""
  peak = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
  peak = np.where(peak > -np.inf, peak, 0.0)
  with np.errstate(divide='ignore'):
    return np.log(np.exp(x - peak).sum(-1)) + peak[..., 0]
