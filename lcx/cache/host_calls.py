"""What the host does when a program calls it; it never raises.

All rows of the process, by handles that are never used twice, and the threads
that search and build. Arrays come and go as numpy's. What a call cannot do for
a row is said by a `Fault`; the other rows of the call go on.
"""

import collections
import concurrent.futures
import contextlib
import enum
import functools
import os
import threading
import time

import jax
import numpy as np

from lcx import cores
from lcx.cache.host_row import Row
from lcx.cache.host_step import COUNTERS

# Microseconds: of the first call until the index is there, of a call, of that
# what its own thread did while no other thread searched or multiplied for it
# (Python's share), in the index (`Part.search_s`).
STATS = (*COUNTERS, 'wait_us', 'host_us', 'python_us', 'search_us')


class Fault(enum.IntEnum):
  """Why the host lost a row; numbers follow `lcx.cache.Status`'s."""

  FULL = 16  # host memory is spent: `Host.gigabytes`
  GONE = 17  # released
  FAILED = 18  # an exception: `last_error` says which


def host_fault(code: int) -> str:
  """The name of a `Fault`, as in 'host_full'; '' of other numbers."""
  return f'host_{Fault(code).name.lower()}' if code in list(Fault) else ''


_rows: dict[int, Row] = {}
_lock = threading.Lock()
_growing = threading.Lock()
_returned: collections.deque[int] = collections.deque()
_next = 0
last_error = ''


@functools.cache
def pool() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that search: a few queries of a head are one job."""
  return concurrent.futures.ThreadPoolExecutor(
    cores.available(), 'lcx-search', _one_thread
  )


@functools.cache
def rows_pool() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that attend, one a row, where a call is of several rows."""
  return concurrent.futures.ThreadPoolExecutor(cores.available(), 'lcx-row')


@functools.cache
def builders() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that build: a row of a layer is one job."""
  return concurrent.futures.ThreadPoolExecutor(
    cores.available(), 'lcx-index', _one_thread
  )


def _one_thread() -> None:
  """Heads are searched side by side; none needs threads of its own."""
  from lcx.select import vector_index

  if vector_index.has_faiss():
    from lcx.select.vector_index_native import faiss

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
  _drop_returned()
  with _lock:
    rows = list(_rows.values())
  return sum(r.nbytes for r in rows)


def release(handles) -> None:
  """Gives rows back. A finaliser may call it, whatever this thread is at."""
  _returned.extend(int(h) for h in np.asarray(handles).ravel())
  _drop_returned()


def _drop_returned() -> None:
  if _lock.acquire(blocking=False):
    try:
      while _returned:
        _rows.pop(_returned.popleft(), None)
    finally:
      _lock.release()


def known(handles) -> list[Row]:
  """The rows of those handles that are in use."""
  with _lock:
    return [_rows[int(h)] for h in handles if int(h) in _rows]


class Gone(Exception):
  """A row that was released."""


def row_of(handle: int) -> Row:
  """The row of a handle; raises `Gone`."""
  with _lock:
    row = _rows.get(handle)
  if row is None:
    raise Gone(handle)
  return row


def add(row: Row) -> int:
  """Keeps a row; its handle."""
  global _next
  _drop_returned()
  with _lock:
    _next += 1
    _rows[_next] = row
    return _next


@contextlib.contextmanager
def room(host, row: Row, need: int):
  """Sets bytes aside while a row grows by them; refuses to pass the bound."""
  if need <= 0:
    yield
    return
  with _growing:  # else two rows take the same room
    held, bound = held_bytes(), host.bound()
    if held + need > bound:
      raise MemoryError(
        f'{need} more bytes of host memory beside {held}; the bound is {bound}'
      )
    row.growing += need
  try:
    yield
  finally:
    row.growing -= need


def guarded(work, *args) -> int:
  """Runs `work`; a `Fault`, or 0."""
  global last_error
  try:
    work(*args)
    return 0
  except Gone:
    return int(Fault.GONE)
  except MemoryError as error:
    last_error = f'{type(error).__name__}: {error}'
    return int(Fault.FULL)
  except BaseException as error:  # the device must hear of it, not see it
    last_error = f'{type(error).__name__}: {error}'
    return int(Fault.FAILED)


def write_all(handles, used, count, k, v, positions, host):
  """Appends to all rows; (handles, faults)."""
  handles, used, count = (np.array(x) for x in (handles, used, count))
  k, v, positions = np.asarray(k), np.asarray(v), np.asarray(positions)
  fault = np.zeros(len(handles), np.int32)

  def write(b):
    if handles[b] < 0:
      handles[b] = add(Row(k.shape[2], k.shape[3], k.dtype))
    row, n = row_of(int(handles[b])), int(count[b])
    with row.lock, room(host, row, row.bytes_to_grow(n)):
      row.write(int(used[b]), k[b, :n], v[b, :n], positions[b, :n])

  for b in np.flatnonzero(count):
    fault[b] = guarded(write, b)
  return handles, fault


def put(handles, used, count, k, v, positions, *, host):
  """Appends a prompt's tokens: (handles, faults)."""
  return write_all(handles, used, count, k, v, positions, host)


def attend(numbers, new, asked, *, search, host):
  """Appends few tokens and attends.

  Args:
    numbers: int32 [B 3+T+K]: handle, tokens used, tokens new, their positions,
      and what `index` returned.
    new: [B T 2K H] keys, then values.
    asked: float32 [B T N H+1] queries, each with what the device's normaliser
      of it is.
    search: how.
    host: the cache's `Host`.

  Returns:
    int32 [B 2+m] of a row's handle and fault, then bits of float32
    [T*N*(H+2) + len(STATS)], what `HostCache.attend_host` says.
  """
  start = time.perf_counter()
  numbers, new, asked = (np.asarray(x) for x in (numbers, new, asked))
  batch, t, n, h = asked.shape
  h, kv = h - 1, new.shape[2] // 2
  handles, used, count = numbers[:, :3].T
  positions, ready = numbers[:, 3 : 3 + t], numbers[:, 3 + t :]
  keys, values = new[:, :, :kv], new[:, :, kv:]
  handles, fault = write_all(
    handles, used, count, keys, values, positions, host
  )
  fault = np.maximum(fault, ready.max(1, initial=0))
  both = np.zeros((batch, 2 + t * n * (h + 2) + len(STATS)), np.int32)
  packed = both[:, 2:].view(np.float32)
  found = packed[:, : -len(STATS)].reshape(batch, t, n, h + 2)
  stats = packed[:, -len(STATS) :]
  found[..., h:] = -np.inf
  # Padding is not asked for, and rows of nothing else are not, either.
  rows = [b for b in range(batch) if count[b] and not fault[b]]

  def one(b):
    begin, m = time.perf_counter(), int(count[b])
    row = row_of(int(handles[b]))
    with row.lock:
      row.wait()
      joins = time.perf_counter()
      until = search.until(row.used)
      with room(host, row, row.bytes_to_join(until)):
        row.join(until, pool())
    attends = time.perf_counter()
    # [T N H+1] -> [K, T * G, H+1]; padding is at the end.
    ask = asked[b, :m].reshape(m, kv, n // kv, h + 1).swapaxes(0, 1)
    q = np.ascontiguousarray(ask[..., :h]).reshape(kv, -1, h)
    q *= np.float32(h**-0.5)
    part = row.attend(q, ask[..., h].reshape(kv, -1), search, pool())
    mine = found[b, :m].reshape(m, kv, n // kv, h + 2).swapaxes(0, 1)
    shape = mine.shape[:3]
    mine[..., :h] = part.out.reshape(*shape, h)
    mine[..., h] = part.lse.reshape(shape)
    mine[..., h + 1] = part.rest.reshape(shape)
    stats[b, : len(COUNTERS)] = part.counts
    stats[b, -4] = 1e6 * (joins - begin)
    stats[b, -2] = -1e6 * (part.native_s + attends - begin)
    stats[b, -1] = 1e6 * part.search_s

  if len(rows) > 1:
    jobs = [rows_pool().submit(guarded, one, b) for b in rows]
    fault[rows] = [job.result() for job in jobs]
  elif rows:
    fault[rows[0]] = guarded(one, rows[0])
  lost = fault > 0
  if lost.any():
    found[lost, ..., :h], found[lost, ..., h:] = 0.0, -np.inf
  both[:, 0], both[:, 1] = handles, fault
  spent = 1e6 * (time.perf_counter() - start)
  for b in rows:
    stats[b, -3] = spent / len(rows)
    stats[b, -2] = max(stats[b, -2] + spent, 0) / len(rows)
  return both


def attend_bits(bits, *, shape, dtype, search, host):
  """`attend` of one array.

  Args:
    bits: int32 [B w] of each row's `numbers`, `asked` and `new`, one behind
      the other.
    shape: (T, N, K, H).
    dtype: of `new`.
    search: how.
    host: the cache's `Host`.
  """
  bits, (t, n, kv, h) = np.asarray(bits), shape
  head = 3 + t + kv
  body = head + t * n * (h + 1)
  numbers, asked, new = bits[:, :head], bits[:, head:body], bits[:, body:]
  asked = asked.view(np.float32).reshape(-1, t, n, h + 1)
  new = new.view(dtype).reshape(-1, t, 2 * kv, h)
  return attend(numbers, new, asked, search=search, host=host)


def index(handles, used, near, *, numbers, search, folder, host):
  """Hands every row to the builders: faults int32 [B K]."""
  handles = np.asarray(handles)
  used, near = np.asarray(used), jax.tree.map(np.asarray, near)
  heads = near.held_out.shape[1]
  fault = np.zeros((len(handles), heads), np.int32)

  def build(b):
    row = row_of(int(handles[b]))
    each = [
      jax.tree.map(lambda x, at=(b, h): x[at], near) for h in range(heads)
    ]
    with row.lock:
      row.truncate(int(used[b]))
      until = search.until(row.used)
      if until - search.first <= search.top:
        until = search.first  # all are attended: nothing to search
      keys = until - search.first
      row.indexes = []  # one that this one replaces
      need = row.bytes_to_index(numbers, each, keys)
      with room(host, row, need):
        row.reserved = need
      row.build(numbers, search.first, until, each, builders(), folder)

  for b in np.flatnonzero(handles >= 0):
    fault[b] = guarded(build, b)
  return fault


def fork(handles, used, sources, *, host):
  """(handles, faults) of rows that go on as copies of others."""
  handles, used = np.asarray(handles), np.asarray(used)
  sources = np.asarray(sources)
  forked, fault = handles[sources].copy(), np.zeros(len(sources), np.int32)

  def copy(b):
    source = row_of(int(forked[b]))
    with source.lock, room(host, source, source.bytes_to_clone()):
      row = source.clone()
      row.truncate(int(used[sources[b]]))
      forked[b] = add(row)

  for b in np.flatnonzero((sources != np.arange(len(sources))) & (forked >= 0)):
    fault[b] = guarded(copy, b)
    if fault[b]:
      forked[b] = 0  # no row's handle: it is not the source's, which goes on
  return forked, fault


def release_rows(handles, rows):
  """Gives back those that `rows` marks; -1 in their place."""
  handles, rows = np.array(handles), np.asarray(rows)
  release(handles[rows])
  handles[rows] = -1
  return handles
