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
import itertools
import os
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from lcx import cores
from lcx.cache.host_step import (
  Calibration,
  Part,
  Step,
  lse_of,
  mixed,
  products,
  scanned,
  weighted_sum,
  weights,
)
from lcx.select import vector_index as vi

_GROW = 1024  # tokens by which a row grows at least
# Share of a row's tokens that it gets room for beside them: zeros take memory
# once they are written, and a row that is full is copied, all of it, at one
# token: some 500 MB a layer of an 8B model's shape at 128K.
TOKENS_AHEAD = 1 / 16
_SAMPLE = 256  # keys whose scores tell what a search left out
# Fresh tokens that join an index together: few are a short wait, and those that
# have not joined are scanned at every step.
_JOIN = 64
_WIDE = 512  # fresh tokens that there is room for at first
_VALUES = 1024  # values that are multiplied together: they stay in a cache
_A_JOB = 4  # times as many are a job: fewer take less time than a thread's wait
# Scores of one job of an exact search, 32 MiB: a thread a head holds as many, a
# few times over, and none of it counts in `Row.nbytes`.
_SCORES = 2**23


@dataclasses.dataclass(frozen=True)
class Search:
  """How a row is searched.

  Attributes:
    top: tokens attended per query head.
    effort: efSearch of a graph, nprobe of IVF, keys that `fastscan` ranks.
    first: tokens at the start that the device holds.
    recent: last tokens that the device holds, at least.
    page: tokens leave the device by pages.
    mass: share of a query's softmax below which more keys are taken.
    most: keys that are taken for the sake of `mass`, at most.
    jobs: threads among which the queries of a call are split; 0: the cores.
  """

  top: int
  effort: int
  first: int
  recent: int
  page: int
  mass: float = 0.0
  most: int = 2000
  jobs: int = 0

  def until(self, used: int) -> int:
    """End of what the host attends when a row holds `used` tokens."""
    return max(self.first, (used - self.recent) // self.page * self.page)


class Near(NamedTuple):
  """What the prompt's queries say of its keys, of one kv head.

  `lcx.select.vector_index.Queries`, in positions until `Row.build` turns them
  into numbers. `near`, `key_near` and `key_at` are None where no index of a
  kind that uses them is built, `near_of` where no index has a graph a query
  head.

  Attributes:
    near: int [Q c] nearest keys of sampled queries.
    near_of: int [Q] query head of its group, of each of those queries.
    key_near: int [T d] nearest keys of each key.
    key_at: int [T] position of each key; -1: padding.
    held_out: float [h H] queries that are not in `near`.
    held_near: int [h c] their nearest keys.
    held_of: int [h] as `near_of`.
    centre: float [H] mean of the sampled queries.
    spread: float [H] their standard deviation.
  """

  near: Any
  near_of: Any
  key_near: Any
  key_at: Any
  held_out: Any
  held_near: Any
  held_of: Any
  centre: Any
  spread: Any


class Row:
  """Keys and values [K S H] of one row, and its indexes.

  Attributes:
    used: tokens held.
    indexed: (first, stop) of the tokens in the indexes; equal: no index.
    indexes: one a kv head.
    build_s: seconds that the slowest head's build took.
    reserved: bytes that an index under way will take.
    growing: bytes that are being taken for more tokens.
  """

  def __init__(self, n_kv_heads: int, dim: int, dtype: Any):
    self.k = np.zeros((n_kv_heads, 0, dim), dtype)
    self.v = np.zeros((n_kv_heads, 0, dim), dtype)
    self.at = np.zeros((0,), np.int32)
    self.used, self.indexed, self.build_s = 0, (0, 0), 0.0
    self.reserved = self.growing = 0
    self.indexes: list[vi.Index] = []
    self.calibration: Calibration | None = None
    self.lock = threading.Lock()
    self._sample = np.zeros((0,), np.int64)
    self._slot = np.zeros((0,), np.int16)
    self._aside = np.zeros((n_kv_heads, 0, dim), np.float32)
    self._wide, self._widened = self._aside, (0, 0)
    self._build: list[concurrent.futures.Future] = []
    self._indexing, self._per_key = (0, 0), 0

  @property
  def nbytes(self) -> int:
    own = self.k.nbytes + self.v.nbytes + self.at.nbytes
    own += self._aside.nbytes + self._slot.nbytes + self._wide.nbytes
    own += self.reserved + self.growing
    return own + int((1 + vi.ROOM) * sum(i.nbytes for i in self.indexes))

  def bytes_to_grow(self, tokens: int) -> int:
    """Bytes that an append of so many tokens would allocate."""
    short = self.used + tokens - self.k.shape[1]
    if short <= 0:
      return 0
    per_token = 2 * self.k.shape[0] * self.k.shape[2] * self.k.itemsize
    return self._more(short) * (per_token + self.at.itemsize)

  def _more(self, short: int) -> int:
    held = self.k.shape[1]
    return max(short + int(TOKENS_AHEAD * (held + short)), _GROW, held // 4)

  def write(self, used: int, k, v, positions) -> None:
    """Appends k, v [T K H] after the first `used` tokens."""
    self.truncate(used)
    stop = used + len(positions)
    if stop > self.k.shape[1]:
      size = self.k.shape[1] + self._more(stop - self.k.shape[1])
      self.k, self.v = _wider(self.k, size), _wider(self.v, size)
      self.at = np.pad(self.at, (0, size - len(self.at)))
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
          index.remove(np.arange(used, self.indexed[1]))
        self.indexed = (self.indexed[0], max(self.indexed[0], used))
        self._remember(self._sample[self._sample < used])
      begin, end = self._widened
      self._widened = begin, max(begin, min(end, used))
    self.used = used

  def bytes_to_clone(self) -> int:
    """Bytes that `clone` would allocate."""
    return self.k.nbytes + self.v.nbytes + self.at.nbytes

  def clone(self) -> 'Row':
    """A copy without an index: its tokens are scanned."""
    row = Row(self.k.shape[0], self.k.shape[2], self.k.dtype)
    row.k, row.v, row.at = self.k.copy(), self.v.copy(), self.at.copy()
    row.used = self.used
    return row

  # Index.

  def bytes_to_index(self, numbers: vi.Numbers, near, keys: int) -> int:
    """Bytes of the indexes of so many keys, about; `near` as in `build`."""
    group = 1 + max(int(x.held_of.max()) for x in near)
    each = numbers.bytes_per_key(self.k.shape[2], group)
    return int((1 + vi.ROOM) * keys * len(near) * each)

  def build(
    self, numbers: vi.Numbers, first: int, stop: int, near, pool, folder: str
  ) -> None:
    """Starts to index tokens [first, stop); the first search waits for it.

    Args:
      numbers: of the indexes.
      first: first token.
      stop: behind the last one.
      near: a `Near` a kv head, in positions.
      pool: where it is built, a head a job.
      folder: where indexes are kept, by the fingerprint of all that they are
        made of; '': nowhere.
    """
    self._build, self.indexes, self.indexed = [], [], (first, first)
    self.calibration = Calibration.together([Calibration.of(x) for x in near])
    self._per_key = self.bytes_to_index(numbers, near, 1)
    if stop > first:
      self._indexing = first, stop
      self._build = [
        pool.submit(self._built, numbers, head, first, stop, x, folder)
        for head, x in enumerate(near)
      ]

  def _built(self, numbers, head, first, stop, near, folder):
    """(index of a head, seconds)."""
    start = time.perf_counter()
    keys, path, of = self.k[head, first:stop], '', ''
    if folder:
      # Other numbers, or a prompt whose queries say other things of the same
      # keys, make another index: it has a file of its own.
      said = (self.at[first:stop], *near[: Near._fields.index('centre')])
      of = vi.fingerprint(numbers, keys, first, said)
      path = os.path.join(folder, f'{of[:32]}.index')
    if folder and os.path.exists(path):
      with open(path, 'rb') as file:
        saved = file.read()
      try:
        index = vi.from_bytes(saved, numbers, of)
      except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    else:
      index = vi.build(numbers, keys, first, self._numbered(near, first, stop))
      if folder:
        vi.save(path, vi.to_bytes(index, numbers, of))
    return index, time.perf_counter() - start

  def _numbered(self, near: Near, first: int, stop: int) -> Near:
    """Positions as numbers in the index; -1 where they are not in it."""
    at = self.at[first:stop]

    def number(x):
      place = np.minimum(np.searchsorted(at, x), len(at) - 1)
      place = np.where(at[place] == x, place, -1)
      order = np.argsort(place < 0, axis=1, kind='stable')
      return np.take_along_axis(place, order, 1)

    asked, asked_of, key_near = near.near, near.near_of, near.key_near
    if asked is not None:
      asked = number(asked)
      some = asked[:, 0] >= 0
      asked = asked[some]
      asked_of = asked_of if asked_of is None else asked_of[some]
    if key_near is not None and near.key_at is not None:
      order = np.argsort(near.key_at, kind='stable')
      place = np.searchsorted(near.key_at[order], at)
      key_near = number(key_near[order[place]])
    return near._replace(
      near=asked,
      near_of=asked_of,
      key_near=key_near,
      held_near=number(near.held_near),
    )

  def wait(self) -> None:
    """Takes the index over when it is built; a failed build raises here.

    It raises at every call: a row whose index failed never answers without.
    """
    if self._build:
      built = [job.result() for job in self._build]
      self.indexes, seconds = ([x[i] for x in built] for i in (0, 1))
      self.indexed, self.build_s = self._indexing, max(seconds)
      self._build, self.reserved = [], 0
      first, stop = self.indexed
      draw = np.random.default_rng(0)
      size = min(_SAMPLE, stop - first)
      self._remember(draw.choice(stop - first, size, replace=False) + first)

  def _remember(self, sample: np.ndarray) -> None:
    """The keys whose scores tell what a search left out."""
    self._sample = sample
    self._aside = self.k[:, sample].astype(np.float32)
    # Place of a token in the sample; the last: of those that are not in it.
    self._slot = np.full(self.indexed[1] + 1, len(sample), np.int16)
    self._slot[sample] = np.arange(len(sample))

  def _joining(self, until: int) -> int:
    """How many of the fresh tokens are whole blocks."""
    n = (until - self.indexed[1]) // _JOIN * _JOIN
    return max(0, n) if self.indexes else 0

  def bytes_to_join(self, until: int) -> int:
    """Bytes that `join` would allocate, about."""
    if not self.indexes:
      return 0
    n = self._joining(until)
    fresh = until - self.indexed[1] - n
    kv, _, dim = self.k.shape
    wide = kv * max(_WIDE, fresh) * dim * 4 if fresh > 0 else 0
    return n * self._per_key + max(0, wide - self._wide.nbytes)

  def join(self, until: int, pool) -> None:
    """Fresh tokens join the indexes, a block at a time, heads side by side."""
    first, stop = self.indexed
    n = self._joining(until)
    if n:
      tokens = np.arange(stop, stop + n)
      jobs = [
        pool.submit(index.add, k[stop : stop + n], tokens)
        for index, k in zip(self.indexes, self.k, strict=True)
      ]
      for job in jobs:
        job.result()
      self.indexed = (first, stop + n)
    if self.indexes and until > self.indexed[1]:
      self._fresh(until)

  # Attention.

  def attend(
    self, q: np.ndarray, device: np.ndarray, search: Search, pool
  ) -> Part:
    """Attention over the host's tokens.

    Args:
      q: float32 [K M H], scaled; query m is of head m % G of the group.
      device: float32 [K M] the normaliser of what the device attends.
      search: how.
      pool: threads that search; not the one that calls.
    """
    kv, m, dim = q.shape
    first, until = search.first, search.until(self.used)
    step = Step(q.reshape(-1, dim), m, first, until, pool)
    everyone = np.arange(kv * m)
    if until > first:
      if search.top >= until - first or not self.indexes:
        self._exact(step, everyone, search.top)
      else:
        self._found(step, everyone, device.reshape(-1), search)
    return Part(
      step.out.reshape(q.shape),
      step.lse.reshape(kv, m),
      step.rest.reshape(kv, m),
      step.counts,
      step.search_s,
      step.native_s,
    )

  def _found(self, step: 'Step', everyone, device, search: Search) -> None:
    """Attention over what the indexes find, widened where it is too little."""
    q, m = step.q, step.m
    grouped = q.reshape(-1, m, q.shape[1])
    stop = self.indexed[1]
    aside = products(grouped, self._aside).reshape(len(q), -1)
    if step.until < stop:  # cut since
      aside = np.where(self._sample < step.until, aside, -np.inf)
    fresh = None
    if step.until > stop:
      fresh = products(grouped, self._fresh(step.until)).reshape(len(q), -1)
    far = np.zeros(len(q), bool)
    if self.calibration is not None:
      far = self.calibration.far(grouped).reshape(-1)
      step.counts[2] += far.sum()
    # (queries, keys, effort, times that a search missed)
    todo = [(everyone[~far], search.top, search.effort, 0)]
    todo += [(everyone[far], 2 * search.top, 2 * search.effort, 1)]
    while todo:
      rows, k, effort, misses = todo.pop()
      if not len(rows):
        continue
      if misses > 2 or k >= step.until - step.first:
        self._exact(step, rows, step.until - step.first)
        continue
      score, tokens = self._candidates(
        step, rows, k, effort, fresh, search.jobs or cores.available()
      )
      scored = len(self._sample) + max(0, step.until - stop)
      step.counts[0] += len(rows) * scored
      weight, lse = weights(score)
      rest, missed = self._left(aside, rows, score, tokens, step)
      held = np.logaddexp(lse, device[rows])
      share = 1 / (1 + np.exp(np.clip(rest - held, -80, 80)))
      poor = ~missed & (share < search.mass) & (k < search.most)
      good = ~missed & ~poor
      if not good.all():
        step.counts[3] += missed.sum()
        step.counts[4] += poor.sum()
        more = 2 * k if misses else k
        todo.append((rows[missed], more, 2 * effort, misses + 1))
        more = min(4 * k, search.most)
        todo.append((rows[poor], more, effort, misses))
        rows, tokens, weight = rows[good], tokens[good], weight[good]
        lse, rest = lse[good], rest[good]
      step.counts[1] += (tokens >= 0).sum()
      step.lse[rows], step.rest[rows] = lse, rest
      self._mix(step, rows, weight, tokens)

  def _fresh(self, until: int) -> np.ndarray:
    """Keys [K F H] of the tokens behind the indexed ones, as float32.

    Each is widened once, not at every step.
    """
    stop = self.indexed[1]
    begin, end = self._widened
    if begin != stop:
      begin = end = stop
      shape = self.k.shape[0], max(_WIDE, until - stop), self.k.shape[2]
      self._wide = np.empty(shape, np.float32)
    if until - stop > self._wide.shape[1]:
      more = until - stop - self._wide.shape[1]
      self._wide = np.pad(self._wide, ((0, 0), (0, more), (0, 0)))
    if until > end:
      self._wide[:, end - stop : until - stop] = self.k[:, end:until]
      end = until
    self._widened = begin, end
    return self._wide[:, : until - stop]

  def _left(self, aside, rows, score, tokens, step: 'Step'):
    """(log of the estimated exp sum left out, whether a search missed a key).

    From a sample of the indexed keys, drawn once; those found do not count. A
    search failed where a key outside beats the middle one of those found: near
    the last one, a recall below 1 is no failure.
    """
    width = aside.shape[1]
    left = np.empty((len(rows), width + 1), np.float32)
    left[:, :width] = aside if len(rows) == len(aside) else aside[rows]
    slot = self._slot.take(tokens, mode='clip')  # the last: of fresh tokens
    if tokens.min() < 0:
      slot[tokens < 0] = width
    place = slot + (width + 1) * np.arange(len(left))[:, None]
    left.reshape(-1)[place.ravel()] = -np.inf
    left[:, width] = -np.inf  # where tokens beside the sample fell
    here = len(self._sample)
    if step.until < self.indexed[1]:
      here = max(1, (self._sample < step.until).sum())
    most = left.max(1)
    rest = lse_of(left, most) + np.log((step.until - step.first) / here)
    middle = tokens.shape[1] // 2
    some, middle = tokens[:, middle] >= 0, score[:, middle]
    middle = np.where(some, middle, 0)
    slack = 1e-3 * np.abs(middle)  # the index keeps 16-bit floats
    missed = most > np.where(some, middle + slack, -np.inf)
    return rest.astype(np.float32), missed

  def _candidates(self, step: 'Step', rows, k, effort, fresh, jobs: int):
    """(scores, tokens) [R k] of listed queries, of index and fresh tokens."""
    stop, until = self.indexed[1], step.until
    recent = max(0, stop - until)  # indexed, but on the device since a cut
    graphs, order = self.indexes[0].graphs, None
    if graphs == 1 and len(rows) == len(step.q):
      heads = step.q.reshape(len(self.indexes), step.m, -1)
      asked = [(x, 0, q) for x, q in zip(self.indexes, heads, strict=True)]
    else:
      kind = rows // step.m * graphs + rows % step.m % graphs
      order = np.argsort(kind, kind='stable')
      cuts = [0, *(np.flatnonzero(np.diff(kind[order])) + 1), len(order)]
      heads = [order[a:b] for a, b in itertools.pairwise(cuts)]
      asked = [
        (
          self.indexes[kind[x[0]] // graphs],
          kind[x[0]] % graphs,
          step.q[rows[x]],
        )
        for x in heads
      ]
    score, tokens = step.searched(asked, k + recent, effort, jobs)
    if order is not None:
      back = np.argsort(order)
      score, tokens = score[back], tokens[back]
    if until == stop:
      return score, tokens
    if recent:
      score = np.where(tokens < until, score, -np.inf)
    if fresh is not None:
      number = np.arange(stop, until)
      number = np.broadcast_to(number, (len(rows), len(number)))
      score = np.concatenate([score, fresh[rows]], 1)
      tokens = np.concatenate([tokens, number], 1)
    order = np.argsort(-score, axis=1)[:, :k]
    score = np.take_along_axis(score, order, 1)
    tokens = np.take_along_axis(tokens, order, 1)
    return score, np.where(score > -np.inf, tokens, -1)

  def _mix(self, step: 'Step', rows, weight, tokens) -> None:
    """Puts the values' means into `step.out`, several rows a job."""
    size = self.v.shape[1]
    values = self.v.reshape(-1, self.v.shape[2])
    place = np.maximum(tokens, 0)
    place += (rows // step.m * size)[:, None]
    at_once = max(1, _VALUES // tokens.shape[1])
    a_job = _A_JOB * at_once

    def mix(first):
      for at in range(first, min(first + a_job, len(rows)), at_once):
        some = slice(at, at + at_once)
        # As indices, bfloat16 would be copied element by element.
        value = values.take(place[some], axis=0)
        step.out[rows[some]] = mixed(weight[some], value)

    step.side_by_side(mix, range(0, len(rows), a_job))

  def _exact(self, step: 'Step', rows, top: int) -> None:
    """Attention of listed queries over all tokens, or the `top` best."""
    n = step.until - step.first
    step.counts[0] += len(rows) * n
    step.counts[1] += len(rows) * min(top, n)
    step.counts[5] += len(rows)
    scan = self._scan_best if top < n else self._scan
    at_once, jobs = max(1, _SCORES // n), []
    for head in np.unique(rows // step.m):
      mine = rows[rows // step.m == head]
      cuts = range(0, len(mine), at_once)
      jobs += [(int(head), mine[at : at + at_once]) for at in cuts]
    step.side_by_side(lambda job: scan(step, job[0], job[1], top), jobs)

  def _scan_best(self, step: 'Step', head: int, rows, top: int) -> None:
    """The `top` best of all tokens of a head."""
    q, first, until = step.q[rows], step.first, step.until
    score = scanned(q, self.k[head, first:until])
    best = np.argpartition(-score, top - 1, axis=1)
    left = np.take_along_axis(score, best[:, top:], 1)
    weight, lse = weights(np.take_along_axis(score, best[:, :top], 1))
    value = self.v[head, best[:, :top] + first].astype(np.float32)
    step.out[rows] = np.matmul(weight[:, None], value)[:, 0]
    step.lse[rows], step.rest[rows] = lse, lse_of(left)

  def _scan(self, step: 'Step', head: int, rows, top: int) -> None:
    """All tokens of a head."""
    del top
    q, first, until = step.q[rows], step.first, step.until
    weight, lse = weights(scanned(q, self.k[head, first:until]))
    step.out[rows] = weighted_sum(weight, self.v[head, first:until])
    step.lse[rows], step.rest[rows] = lse, -np.inf


def _wider(x: np.ndarray, size: int) -> np.ndarray:
  """Of [K S H], with room for `size` tokens; `np.pad` writes the room, too."""
  out = np.zeros((x.shape[0], size, x.shape[2]), x.dtype)
  out[:, : x.shape[1]] = x
  return out
