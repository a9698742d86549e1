"""The host tier: sink and recent tokens on the device, all tokens in the host.

The device part is a paged cache of rings. The host part is a `Row` per row and
shard, known to the device by an int32 handle. This file is the one place where
programs call the host. The callbacks never raise (that would destroy the
donated caches): a row that fails has a `Fault` in its status, other rows go on.
Each takes the handles and returns them, so that data order the calls.

A cache of this kind must be used linearly, as donated ones are: the host keeps
the newest version alone, cut to what a call says the row holds. Rows are given
back with `release`; past the limit, the row that was not used for longest goes,
and whoever asks for it gets Fault.GONE.

Inside a `shard_map` each shard keeps its own tokens and heads.
"""

import collections
import concurrent.futures
import dataclasses
import enum
import functools
import os
import threading
import time
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.keys import Pages
from lcx.cache.base import CacheShape, check_tier, split
from lcx.cache.host_row import COUNTERS, Near, Row, Search
from lcx.cache.paged import Paged
from lcx.cache.paged_cache import PagedCache

_SHARDS = split(('data', 'seq', 'model'))
STATS = (*COUNTERS, 'host_us', 'search_us')


class Fault(enum.IntEnum):
  """Why the host lost a row; numbers follow `lcx.cache.Status`'s."""

  FULL = 16  # host memory is spent
  GONE = 17  # released, or pushed out by other rows
  FAILED = 18  # an exception: `last_error` says which


@dataclasses.dataclass(frozen=True)
class Host:
  """Numbers of the cache with a host tier.

  Attributes:
    sink: first tokens on the device, rounded up to pages.
    recent: last tokens on the device, at least.
    slack: tokens that can be truncated, as in `Paged`.
    page: tokens of a page.
  """

  sink: int = 128
  recent: int = 512
  slack: int = 256
  page: int = 64

  def __post_init__(self):
    _ = self.ring  # it checks the numbers

  @property
  def ring(self) -> Paged:
    """The device's part."""
    return Paged(
      page=self.page,
      logical_page=self.page,
      ring_heads='all',
      sink=self.sink,
      recent=self.recent,
      slack=self.slack,
      stats='none',
    )

  @property
  def provides(self) -> frozenset[str]:
    return frozenset({'recent_tokens', 'rotated', 'host_tokens'})

  def at_full_budget(self, length: int) -> Self:
    del length  # no token is ever dropped
    return self

  def init(self, shape: CacheShape) -> 'HostCache':
    """An empty cache; a row's memory is taken as it fills."""
    shards = shape.shards
    rows = shape.batch * shards.seq * shards.model
    return HostCache(
      ring=self.ring.init(shape),
      handles=jnp.full((rows,), -1, jnp.int32),
      fault=jnp.zeros((rows,), jnp.int32),
      config=self,
    )

  def specs(self) -> 'HostCache':
    return HostCache(self.ring.specs(), _SHARDS, _SHARDS, self)


class Attended(NamedTuple):
  """What the host found.

  Attributes:
    out: attention over the host's tokens.
    lse: its normaliser.
    rest: log of the estimated exp sum of the host's tokens not attended.
    stats: sums by the names in STATS.
  """

  out: Float[Array, 'B T N H']
  lse: Float[Array, 'B T N']
  rest: Float[Array, 'B T N']
  stats: Float[Array, 'B s']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostCache:
  """One layer's cache in two tiers.

  Attributes:
    ring: sink and recent tokens.
    handles: int32 [B] of the host's rows; -1: none yet.
    fault: int32 [B] a `Fault` or 0.
    config: its numbers (static).
  """

  ring: PagedCache
  handles: Int32[Array, 'B']
  fault: Int32[Array, 'B']
  config: Host = dataclasses.field(metadata={'static': True})

  @property
  def rotated(self) -> bool:
    return True

  @property
  def page(self) -> int:
    return self.config.page

  @property
  def used(self) -> Int32[Array, 'B']:
    return self.ring.used

  @property
  def status(self) -> Int32[Array, 'B']:
    """The ring's status or the host's; of all shards that hold a row."""
    repeat = self.fault.shape[0] // self.ring.status.shape[0]
    return jnp.maximum(jnp.repeat(self.ring.status, repeat), self.fault)

  def append(
    self,
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int32[Array, 'B T'],
    count: Int32[Array, 'B'] | None = None,
  ) -> Self:
    """Adds tokens to both tiers."""
    ring = self.ring.append(k, v, positions, count)
    row = _like(self.handles)
    handles, fault = io_callback(
      _put,
      (row, row),
      self.handles,
      self.ring.used,
      ring.used - self.ring.used,
      k,
      v,
      positions,
    )
    return self._after(ring, handles, fault)

  def attend(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int32[Array, 'B T'],
    count: Int32[Array, 'B'],
    search: Search,
    ready: Int32[Array, 'B'],
  ) -> tuple[Self, Attended]:
    """Appends few tokens and attends over the host's: one call of the host.

    Args:
      q: rotated queries.
      k: new rotated keys.
      v: new values.
      positions: of the new tokens.
      count: how many there are, a row.
      search: how to search.
      ready: what `index` returned.
    """
    ring = self.ring.append(k, v, positions, count)
    row, heads = _like(self.handles), q.shape[:3]
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    handles, fault, *found = io_callback(
      functools.partial(_attend, search=search),
      (
        row, row, floats(q.shape), floats(heads), floats(heads),
        floats((len(row.shape) and q.shape[0], len(STATS))),
      ),
      self.handles,
      self.ring.used,
      ring.used - self.ring.used,
      k,
      v,
      positions,
      q,
      ready,
    )  # fmt: skip
    return self._after(ring, handles, fault), Attended(*found)

  def index(
    self, near: Any, numbers: Any, search: Search, folder: str
  ) -> Int32[Array, 'B']:
    """Starts to index what the host attends; returns when it is under way.

    Args:
      near: `Near` of arrays [B K ...], or () where nothing was observed.
      numbers: `lcx.select.vector_index.Numbers`.
      search: which tokens stay on the device.
      folder: where indexes are kept; '': nowhere.

    Returns:
      What `attend` takes, so that it comes later.
    """
    return io_callback(
      functools.partial(_index, numbers=numbers, search=search, folder=folder),
      _like(self.handles),
      self.handles,
      self.ring.used,
      near,
    )

  def static_pages(
    self, search: Search
  ) -> tuple[Int32[Array, 'B K W'], Int32[Array, 'B K W']]:
    """Ids and starts of the device's pages that the host does not attend."""
    sink, n_ring = self.config.ring.sink_pages, self.config.ring.ring_pages
    slot = jnp.arange(self.ring.table.shape[2], dtype=jnp.int32)
    last = ((self.used - 1) // self.page)[:, None]
    around = last - (last - slot) % n_ring
    number = jnp.where(slot < sink, slot, around)
    until = (self.used - search.recent) // self.page
    until = jnp.maximum(until, sink)[:, None]
    kept = ((number < sink) | (number >= until))[:, None]
    starts = self.ring.page_starts()
    ids = jnp.where(kept, self.ring.page_ids(), -1)
    return ids, jnp.where(ids >= 0, starts, 2**30)

  def truncate(self, lengths: Int32[Array, 'B']) -> Self:
    """The host cuts its rows at its next call."""
    ring = self.ring.truncate(lengths)
    return dataclasses.replace(self, ring=ring)

  def fork(self, sources: Int32[Array, 'B']) -> Self:
    """Rows that go on as others copy their tokens, not their index."""
    handles = io_callback(
      _fork, _like(self.handles), self.handles, self.ring.used, sources
    )
    return dataclasses.replace(
      self,
      ring=self.ring.fork(sources),
      handles=handles,
      fault=self.fault[sources],
    )

  def free(self, rows: Bool[Array, 'B']) -> Self:
    """Empties rows and gives both tiers' memory back."""
    return self._without(rows, self.ring.free(rows))

  def reset(self, rows: Bool[Array, 'B']) -> Self:
    """Empties rows; the host's memory is given back."""
    return self._without(rows, self.ring.reset(rows))

  def insert(self, row: Int32[Array, ''], other: Self) -> Self:
    """Row `row` becomes the only row of `other`, whose host part it takes."""
    mine = jnp.arange(self.handles.shape[0]) == row
    empty = self._without(mine, self.ring)
    return dataclasses.replace(
      self,
      ring=self.ring.insert(row, other.ring),
      handles=jnp.where(mine, other.handles[0], empty.handles),
      fault=jnp.where(mine, other.fault[0], empty.fault),
    )

  def _without(self, rows, ring) -> Self:
    handles = io_callback(_release, _like(self.handles), self.handles, rows)
    return dataclasses.replace(
      self, ring=ring, handles=handles, fault=jnp.where(rows, 0, self.fault)
    )

  def _after(self, ring, handles, fault) -> Self:
    return dataclasses.replace(
      self, ring=ring, handles=handles, fault=jnp.maximum(self.fault, fault)
    )

  def pages(self) -> Pages:
    """The device's pool."""
    return self.ring.pages()

  def page_ids(self) -> Int32[Array, 'B K W']:
    return self.ring.page_ids()

  def page_starts(self) -> Int32[Array, 'B K W']:
    return self.ring.page_starts()

  def last_position(self) -> Int32[Array, 'B']:
    return self.ring.last_position()

  def bounds(self):
    return self.ring.bounds()

  def nbytes(self, tier: str = 'device') -> dict[str, int]:
    """Bytes by part; of the host, what is held now."""
    if check_tier(tier):
      return self.ring.nbytes(tier)
    with _lock:
      rows = [_rows[h] for h in np.asarray(self.handles) if h in _rows]
    tokens = sum(r.k.nbytes + r.v.nbytes for r in rows)
    return {
      'keys and values': tokens,
      'index': sum(r.nbytes for r in rows) - tokens,
    }


def _like(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


# The host's side. Handles are never used twice.

_rows: collections.OrderedDict[int, Row] = collections.OrderedDict()
_lock = threading.Lock()
_next = 0
last_error = ''


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(
    os.cpu_count(), 'lcx-search', _one_thread
  )


@functools.cache
def _builders() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(
    os.cpu_count(), 'lcx-index', _one_thread
  )


def _one_thread() -> None:
  """Heads are searched side by side; none needs threads of its own."""
  from lcx.select import vector_index

  if vector_index.has_faiss():
    import faiss

    faiss.omp_set_num_threads(1)


def available_bytes() -> int:
  """Host memory that may still be taken."""
  try:
    with open('/proc/meminfo', encoding='ascii') as file:
      for line in file:
        if line.startswith('MemAvailable'):
          return int(line.split()[1]) * 1024
  except OSError:
    pass
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def held_bytes() -> int:
  """Bytes that all rows hold."""
  with _lock:
    return sum(r.nbytes for r in _rows.values())


def release(handles) -> None:
  """Gives rows back."""
  with _lock:
    for h in np.asarray(handles).ravel():
      _rows.pop(int(h), None)


def _row(handle: int) -> Row:
  with _lock:
    _rows.move_to_end(handle)
    return _rows[handle]


def _add(row: Row) -> int:
  global _next
  with _lock:
    _next += 1
    _rows[_next] = row
    return _next


def _take(handle: int, need: int) -> None:
  """Makes room for `need` bytes, at the cost of rows long not used."""
  while need > 0.9 * available_bytes():
    with _lock:
      oldest = next(iter(_rows), None)
      if oldest is None or oldest == handle:
        raise MemoryError(f'{need} bytes of host memory')
      _rows.pop(oldest)


def _guarded(work, *args) -> int:
  """Runs `work`; a `Fault`, or 0."""
  global last_error
  try:
    work(*args)
    return 0
  except KeyError:
    return int(Fault.GONE)
  except MemoryError as error:
    last_error = repr(error)
    return int(Fault.FULL)
  except BaseException as error:  # the device must hear of it, not see it
    last_error = repr(error)
    return int(Fault.FAILED)


def _kept(x) -> np.ndarray:
  """Numpy has no bfloat16: 16-bit floats of the other kind."""
  x = np.asarray(x)
  return x if x.dtype == np.float32 else x.astype(np.float16)


def _write(handles, used, count, k, v, positions):
  """Appends to all rows; (handles, faults)."""
  handles, used, count = (np.array(x) for x in (handles, used, count))
  k, v, positions = _kept(k), _kept(v), np.asarray(positions)
  fault = np.zeros(len(handles), np.int32)

  def write(b):
    if handles[b] < 0:
      handles[b] = _add(Row(k.shape[2], k.shape[3], k.dtype))
    row, n = _row(int(handles[b])), int(count[b])
    _take(int(handles[b]), row.bytes_to_grow(n))
    with row.lock:
      row.write(int(used[b]), k[b, :n], v[b, :n], positions[b, :n])

  for b in np.flatnonzero(count):
    fault[b] = _guarded(write, b)
  return handles, fault


def _put(handles, used, count, k, v, positions):
  return _write(handles, used, count, k, v, positions)


def _attend(handles, used, count, k, v, positions, q, ready, *, search):
  del ready
  start = time.perf_counter()
  handles, fault = _write(handles, used, count, k, v, positions)
  q, count = np.asarray(q).astype(np.float32), np.asarray(count)
  batch, t, n, h = q.shape
  kv = k.shape[2]
  out = np.zeros(q.shape, np.float32)
  lse = np.full((batch, t, n), -np.inf, np.float32)
  rest = lse.copy()
  stats = np.zeros((batch, len(STATS)), np.float32)
  # Tokens of no row (count 0) are not asked for.
  asked = [b for b in np.flatnonzero(count) if not fault[b]]
  jobs = {}
  for b in asked:

    def prepare(b=b):
      row = _row(int(handles[b]))
      with row.lock:
        row.wait()
        row.join(search.until(row.used))
      ask = q[b].reshape(t, kv, n // kv, h).swapaxes(0, 1) * h**-0.5
      for head in range(kv):
        jobs[b, head] = _pool().submit(
          row.attend, head, ask[head].reshape(-1, h), search
        )

    fault[b] = _guarded(prepare)
  for (b, head), job in jobs.items():

    def collect(b=b, head=head, job=job):
      part = job.result()
      heads = slice(head * (n // kv), (head + 1) * (n // kv))
      out[b, :, heads] = part.out.reshape(t, -1, h)
      lse[b, :, heads] = part.lse.reshape(t, -1)
      rest[b, :, heads] = part.rest.reshape(t, -1)
      stats[b, : len(COUNTERS)] += part.counts
      stats[b, -1] += 1e6 * part.search_s

    fault[b] = max(fault[b], _guarded(collect))
  lost = fault > 0
  out[lost], lse[lost] = 0.0, -np.inf
  if asked:
    stats[asked, -2] = 1e6 * (time.perf_counter() - start) / len(asked)
  return handles, fault, out, lse, rest, stats


def _index(handles, used, near, *, numbers, search, folder):
  handles = np.asarray(handles)
  used, near = np.asarray(used), jax.tree.map(np.asarray, near)

  def build(b):
    row = _row(int(handles[b]))
    heads = None
    if isinstance(near, Near):
      one = jax.tree.map(lambda x: x[b], near)
      heads = [
        jax.tree.map(lambda x: x[h], one)  # noqa: B023
        for h in range(row.k.shape[0])
      ]
    with row.lock:
      row.truncate(int(used[b]))
      until = search.until(row.used)
      if until - search.first <= search.top:
        until = search.first  # all are attended: nothing to search
      row.build(numbers, search.first, until, heads, _builders(), folder)

  for b in np.flatnonzero(handles >= 0):
    _guarded(build, b)  # without an index, rows are scanned
  return np.zeros(len(handles), np.int32)


def _fork(handles, used, sources):
  handles, used = np.asarray(handles), np.asarray(used)
  sources = np.asarray(sources)
  forked = handles[sources].copy()

  def copy(b):
    row = _row(int(forked[b])).clone()
    row.truncate(int(used[sources[b]]))
    forked[b] = _add(row)

  for b in np.flatnonzero((sources != np.arange(len(sources))) & (forked >= 0)):
    if _guarded(copy, b):
      forked[b] = 0  # no row has handle 0: its next use says GONE
  return forked


def _release(handles, rows):
  handles, rows = np.array(handles), np.asarray(rows)
  release(handles[rows])
  handles[rows] = -1
  return handles
