"""One row's tokens of one layer in host memory, and attention over them.

Plain numpy and an index per kv head; nothing here knows of a device. Tokens are
numbered by arrival. What the device does not hold, [first, until), is attended:

  index    tokens that were there when the index was built, or joined since
  fresh    tokens since: scanned, until a block of them joins

A search is widened where it may have failed, for the queries concerned alone:

  far      a query unlike those that were seen while the prompt was read starts
           with twice the effort and twice the keys
  missed   a sampled key beats the middle one of those found: twice the effort,
           then twice the effort and the keys, then all keys
  poor     what was found, with what the device holds, has less than `mass` of
           the softmax: four times the keys, up to `most`
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
_BLOCK = 16384  # keys of an exact scan that are widened to float32 at a time
_FAR = 1.25  # over the farthest held-out query's distance: a far one
# Of query heads: keys scored beside the index, keys attended; queries that
# were far, of which more effort or more keys were asked, or all keys.
COUNTERS = ('scored', 'attended', 'far', 'more_effort', 'more_keys', 'exact')


@dataclasses.dataclass(frozen=True)
class Search:
  """How a row is searched.

  Attributes:
    top: tokens attended per query head.
    effort: efSearch of a graph, nprobe of IVF.
    first: tokens at the start that the device holds.
    recent: last tokens that the device holds, at least.
    page: tokens leave the device by pages.
    mass: share of a query's softmax below which more keys are taken.
    most: keys that are taken for the sake of `mass`, at most.
  """

  top: int
  effort: int
  first: int
  recent: int
  page: int
  mass: float = 0.0
  most: int = 2000

  def until(self, used: int) -> int:
    """End of what the host attends when a row holds `used` tokens."""
    return max(self.first, (used - self.recent) // self.page * self.page)


class Near(NamedTuple):
  """What the prompt's queries say of its keys, of one kv head.

  `lcx.select.vector_index.Queries`, in positions until `Row.build` turns them
  into numbers. `near`, `key_near` and `key_at` are None where no index of a
  kind that uses them is built.

  Attributes:
    near: int [Q c] nearest keys of sampled queries.
    key_near: int [T d] nearest keys of each key.
    key_at: int [T] position of each key; -1: padding.
    held_out: float [h H] queries that are not in `near`.
    held_near: int [h c] their nearest keys.
    centre: float [H] mean of the sampled queries.
    spread: float [H] their standard deviation.
  """

  near: Any
  key_near: Any
  key_at: Any
  held_out: Any
  held_near: Any
  centre: Any
  spread: Any


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


class Calibration(NamedTuple):
  """Which scaled queries are like those of the prompt, a kv head."""

  centre: np.ndarray
  spread: np.ndarray
  limit: float

  @classmethod
  def of(cls, near: Near) -> 'Calibration':
    scale = near.held_out.shape[1] ** -0.5
    spread = np.maximum(near.spread * scale, 1e-6)
    found = cls(near.centre * scale, spread, np.inf)
    held = near.held_out[near.held_near[:, 0] >= 0] * scale
    if not len(held):
      return found
    return found._replace(limit=_FAR * float(found.distance(held).max()))

  def distance(self, q: np.ndarray) -> np.ndarray:
    """Mean squared deviation of q [M H] in standard deviations."""
    return np.mean(((q - self.centre) / self.spread) ** 2, axis=1)


class Row:
  """Keys and values [K S H] of one row, and its indexes.

  Attributes:
    used: tokens held.
    indexed: (first, stop) of the tokens in the indexes; equal: no index.
    indexes: one a kv head.
    build_s: seconds that the build took.
    reserved: bytes that an index under way will take.
  """

  def __init__(self, n_kv_heads: int, dim: int, dtype: Any):
    self.k = np.zeros((n_kv_heads, 0, dim), dtype)
    self.v = np.zeros((n_kv_heads, 0, dim), dtype)
    self.at = np.zeros((0,), np.int32)
    self.used, self.indexed, self.build_s = 0, (0, 0), 0.0
    self.reserved = 0
    self.indexes: list[vi.Index] = []
    self.calibrations: list[Calibration] = []
    self.lock = threading.Lock()
    self._sample = np.zeros((0,), np.int64)
    self._aside = np.zeros((n_kv_heads, 0, dim), np.float32)
    self._build: concurrent.futures.Future | None = None

  @property
  def nbytes(self) -> int:
    own = self.k.nbytes + self.v.nbytes + self.at.nbytes + self._aside.nbytes
    return own + self.reserved + sum(i.nbytes for i in self.indexes)

  def bytes_to_grow(self, tokens: int) -> int:
    """Bytes that an append of so many tokens would allocate."""
    short = self.used + tokens - self.k.shape[1]
    if short <= 0:
      return 0
    per_token = 2 * self.k.shape[0] * self.k.shape[2] * self.k.itemsize
    return self._more(short) * (per_token + self.at.itemsize)

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
    if used < self.used:
      self.wait()
      if used < self.indexed[1]:
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
      near: a `Near` a kv head, in positions.
      pool: where the row is built.
      folder: where indexes are kept by the fingerprint of their keys; '':
        nowhere.
    """
    self._build, self.indexes, self.indexed = None, [], (first, first)
    self.calibrations = [Calibration.of(x) for x in near]
    if stop > first:
      self._build = pool.submit(self._built, numbers, first, stop, near, folder)

  def _built(self, numbers, first, stop, near, folder):
    start = time.perf_counter()
    keys, path, of = self.k[:, first:stop], '', ''
    if folder:
      of = vi.fingerprint(keys)
      path = os.path.join(folder, f'{of[:32]}.index')
    if folder and os.path.exists(path):
      with open(path, 'rb') as file:
        saved = file.read()
      try:
        indexes = vi.from_bytes(saved, numbers, of)
      except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    else:
      indexes = [
        vi.build(numbers, k, first, self._numbered(x, first, stop))
        for k, x in zip(keys, near, strict=True)
      ]
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

    asked, key_near = near.near, near.key_near
    if asked is not None:
      asked = number(asked)
      asked = asked[asked[:, 0] >= 0]
    if key_near is not None and near.key_at is not None:
      order = np.argsort(near.key_at, kind='stable')
      place = np.searchsorted(near.key_at[order], at)
      key_near = number(key_near[order[place]])
    return near._replace(
      near=asked, key_near=key_near, held_near=number(near.held_near)
    )

  def wait(self) -> None:
    """Takes the index over when it is built; a failed build raises here.

    It raises at every call: a row whose index failed never answers without.
    """
    if self._build is not None:
      self.indexes, self.indexed, self.build_s = self._build.result()
      self._build, self.reserved = None, 0
      first, stop = self.indexed
      draw = np.random.default_rng(0)
      size = min(_SAMPLE, stop - first)
      self._sample = draw.choice(stop - first, size, replace=False) + first
      self._aside = self.k[:, self._sample].astype(np.float32)

  def join(self, until: int, pool) -> None:
    """Fresh tokens join the indexes, a block at a time, heads side by side."""
    first, stop = self.indexed
    n = (until - stop) // _JOIN * _JOIN
    if self.indexes and n > 0:
      tokens = np.arange(stop, stop + n)
      jobs = [
        pool.submit(index.add, k[stop : stop + n], tokens)
        for index, k in zip(self.indexes, self.k, strict=True)
      ]
      for job in jobs:
        job.result()
      self.indexed = (first, stop + n)

  # Attention.

  def attend(
    self, head: int, q: np.ndarray, device: np.ndarray, search: Search
  ) -> Part:
    """Attention over the host's tokens of one kv head.

    Args:
      head: which.
      q: float32 [M H], scaled.
      device: float32 [M] the normaliser of what the device attends.
      search: how.
    """
    first, until = search.first, search.until(self.used)
    n, m = until - first, len(q)
    whole = Part(
      np.zeros(q.shape, np.float32),
      np.full((m,), -np.inf, np.float32),
      np.full((m,), -np.inf, np.float32),
      np.zeros(len(COUNTERS)),
      0.0,
    )
    if n <= 0:
      return whole
    everyone = np.arange(m)
    if search.top >= n or not self.indexes:
      return self._exact(whole, everyone, head, q, first, until, search.top)
    far = np.zeros(m, bool)
    if self.calibrations:
      near = self.calibrations[head]
      far = near.distance(q) > near.limit
      whole.counts[2] += far.sum()
    # (queries, keys, effort, times that a search missed)
    todo = [(everyone[~far], search.top, search.effort, 0)]
    todo += [(everyone[far], 2 * search.top, 2 * search.effort, 1)]
    while todo:
      rows, k, effort, misses = todo.pop()
      if not len(rows):
        continue
      if misses > 2 or k >= n:
        whole = self._exact(whole, rows, head, q, first, until, n)
        continue
      start = time.perf_counter()
      score, tokens = self._candidates(head, q[rows], k, effort, until)
      spent = time.perf_counter() - start
      whole = whole._replace(search_s=whole.search_s + spent)
      whole.counts[0] += len(rows) * (len(self._sample) + until)
      whole.counts[0] -= len(rows) * min(until, self.indexed[1])
      out, lse = self._over(head, score, tokens)
      rest, missed = self._left(head, q[rows], score, tokens, first, until)
      held = np.logaddexp(lse, device[rows])
      share = 1 / (1 + np.exp(np.clip(rest - held, -80, 80)))
      poor = ~missed & (share < search.mass) & (k < search.most)
      good = ~missed & ~poor
      done = rows[good]
      whole.out[done], whole.lse[done] = out[good], lse[good]
      whole.rest[done] = rest[good]
      whole.counts[1] += (tokens[good] >= 0).sum()
      whole.counts[3] += missed.sum()
      whole.counts[4] += poor.sum()
      more = 2 * k if misses else k
      todo.append((rows[missed], more, 2 * effort, misses + 1))
      more = min(4 * k, search.most)
      todo.append((rows[poor], more, effort, misses))
    return whole

  def _left(self, head, q, score, tokens, first, until):
    """(log of the estimated exp sum left out, whether a search missed a key).

    From a sample of the indexed keys, drawn once; those found do not count. A
    search failed where a key outside beats the middle one of those found: near
    the last one, a recall below 1 is no failure.
    """
    here = self._sample < until  # not so after a cut
    aside = np.where(here, q @ self._aside[head].T, -np.inf)
    found = (self._sample[:, None] == tokens[:, None, :]).any(2)
    left = np.where(found, -np.inf, aside)
    rest = _lse(left) + np.log((until - first) / max(1, here.sum()))
    middle = tokens.shape[1] // 2
    middle = np.where(tokens[:, middle] >= 0, score[:, middle], -np.inf)
    slack = 1e-3 * np.abs(middle)  # the index keeps 16-bit floats
    missed = (left > (middle + slack)[:, None]).any(1)
    return rest.astype(np.float32), missed

  def _candidates(self, head, q, k, effort, until):
    """(scores, tokens) [M k], best first, of index and fresh tokens."""
    stop = self.indexed[1]
    recent = max(0, stop - until)  # indexed, but on the device since a cut
    score, tokens = self.indexes[head].search(q, k + recent, effort)
    score = np.where(tokens < until, score, -np.inf)
    if until > stop:
      fresh = q @ self.k[head, stop:until].T.astype(np.float32)
      number = np.broadcast_to(np.arange(stop, until), fresh.shape)
      score = np.concatenate([score, fresh], 1)
      tokens = np.concatenate([tokens, number], 1)
    if until != stop:
      order = np.argsort(-score, axis=1)[:, :k]
      score = np.take_along_axis(score, order, 1)
      tokens = np.take_along_axis(tokens, order, 1)
    return score, np.where(score > -np.inf, tokens, -1)

  def _over(self, head, score, tokens):
    """(out, lse) over listed tokens, by the index's scores of them."""
    peak = np.max(score, axis=1, keepdims=True)
    peak = np.where(peak > -np.inf, peak, 0.0)
    weight = np.where(tokens >= 0, np.exp(score - peak), 0.0)
    total = weight.sum(1)
    value = self.v[head, np.maximum(tokens, 0)].astype(np.float32)
    out = np.matmul(weight[:, None].astype(np.float32), value)[:, 0]
    with np.errstate(divide='ignore'):
      lse = np.log(total) + peak[:, 0]
    out /= np.maximum(total, 1e-30)[:, None]
    return out, lse.astype(np.float32)

  def _exact(self, whole, rows, head, q, first, until, top) -> Part:
    """`whole` with attention of `rows` over all tokens, or the `top` best."""
    q, n = q[rows], until - first
    whole.counts[0] += len(rows) * n
    whole.counts[1] += len(rows) * min(top, n)
    whole.counts[5] += len(rows)
    if top < n:
      score = np.empty((len(rows), n), np.float32)
      for at in range(first, until, _BLOCK):
        stop = min(at + _BLOCK, until)
        keys = self.k[head, at:stop].astype(np.float32)
        score[:, at - first : stop - first] = q @ keys.T
      best = np.argpartition(-score, top - 1, axis=1)
      found = np.take_along_axis(score, best[:, :top], 1)
      left = np.take_along_axis(score, best[:, top:], 1)
      whole.rest[rows] = _lse(left)
      out, lse = self._over(head, found, best[:, :top] + first)
      whole.out[rows], whole.lse[rows] = out, lse
      return whole
    out = np.zeros(q.shape, np.float32)
    lse = np.full((len(rows),), -np.inf, np.float32)
    for at in range(first, until, _BLOCK):
      stop = min(at + _BLOCK, until)
      score = q @ self.k[head, at:stop].T.astype(np.float32)
      peak = score.max(1, keepdims=True)
      weight = np.exp(score - peak)
      total = weight.sum(1)
      part = weight @ self.v[head, at:stop].astype(np.float32)
      part /= total[:, None]
      out, lse = merged(out, lse, part, np.log(total) + peak[:, 0])
    whole.out[rows], whole.lse[rows], whole.rest[rows] = out, lse, -np.inf
    return whole


def merged(out, lse, more, more_lse):
  """Attention over two disjoint sets from (out [M H], lse [M]) of each."""
  both = np.logaddexp(lse, more_lse)
  safe = np.where(both > -np.inf, both, 0.0)
  mine, other = np.exp(lse - safe), np.exp(more_lse - safe)
  out = mine[:, None] * out + other[:, None] * more
  return out.astype(np.float32), both.astype(np.float32)


def _lse(x: np.ndarray) -> np.ndarray:
  """Logsumexp over the last axis; -inf of nothing."""
  peak = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
  peak = np.where(peak > -np.inf, peak, 0.0)
  with np.errstate(divide='ignore'):
    return np.log(np.exp(x - peak).sum(-1)) + peak[..., 0]
