"""The host tier: sink and recent tokens on the device, all tokens in the host.

The device part is a paged cache of rings. The host part is a `Row` per row and
shard, known to the device by an int32 handle. This file is the one place where
programs call the host. The callbacks never raise (that would destroy the
donated caches): a row that fails has a `Fault` in its status, other rows go on.
Each takes the handles and returns them, so that data order the calls.

A cache of this kind must be used linearly, as donated ones are: the host keeps
the newest version alone, cut to what a call says the row holds. Rows are given
back by `reset`, `free` and `insert`, or with `release`, by whoever owns the
cache. What all rows of the process hold is bounded: a row that would pass the
bound fails, the others keep theirs.

Inside a `shard_map` each shard keeps its own rows and heads. A row's tokens are
not spread over `seq` shards: its best keys would have to be found in all of
their hosts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.keys import NEVER, Pages
from lcx.cache import host_calls
from lcx.cache.base import CacheShape, check_tier, split
from lcx.cache.host_calls import STATS
from lcx.cache.host_row import TOKENS_AHEAD, Near, Row, Search
from lcx.cache.paged import Paged
from lcx.cache.paged_cache import PagedCache

_SHARDS = split(('data', 'seq', 'model'))


@dataclasses.dataclass(frozen=True)
class Host:
  """Numbers of the cache with a host tier.

  Attributes:
    sink: first tokens on the device, rounded up to pages.
    recent: last tokens on the device, at least.
    slack: tokens that can be truncated, as in `Paged`.
    page: tokens of a page.
    gigabytes: that all rows of this process may hold, in 2^30 bytes; 0: nine
      tenths of what the machine has free.
  """

  sink: int = 128
  recent: int = 512
  slack: int = 256
  page: int = 64
  gigabytes: float = 0.0

  shards_sequence = False

  def __post_init__(self):
    _ = self.ring  # it checks the numbers
    if self.gigabytes < 0:
      raise ValueError(f'cache.gigabytes={self.gigabytes} must be at least 0')

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
    return frozenset({'rotated', 'host_tokens'})

  def at_full_budget(self, length: int) -> Self:
    del length  # no token is ever dropped
    return self

  def check(self, config: Any, capacity: int, batch: int, decode: Any) -> None:
    """Refuses what the host cannot hold, before anything is computed.

    Args:
      config: the model.
      capacity: tokens of a row.
      batch: rows.
      decode: the part that decodes; what it indexes counts.

    Raises:
      ValueError: with the bytes that are needed and those that there are.
    """
    size = 4 if config.dtype == 'float32' else 2
    per_key = 2 * config.head_dim * size
    if hasattr(decode, 'index_bytes'):
      per_key += decode.index_bytes(config)
    keys = batch * capacity * config.n_layers * config.n_kv_heads
    need, room = keys * per_key, self.bound() - host_calls.held_bytes()
    need += int(TOKENS_AHEAD * need)
    if need > room:
      raise ValueError(
        f'{batch} x {capacity} tokens take {need / 2**30:.3g} GiB of host '
        f'memory, keys, values and index, but {max(0, room) / 2**30:.3g} GiB '
        'are left: lower capacity or batch, or raise cache.gigabytes'
      )

  def rewindable(self, tokens: int) -> Self:
    return dataclasses.replace(self, slack=max(self.slack, tokens))

  def bound(self) -> int:
    """Bytes that all rows may hold together."""
    if self.gigabytes:
      return int(self.gigabytes * 2**30)
    return host_calls.held_bytes() + int(0.9 * host_calls.available_bytes())

  def init(self, shape: CacheShape) -> 'HostCache':
    """An empty cache; a row's memory is taken as it fills.

    Raises:
      ValueError: the sequence is sharded, or numbers do not fit the shape.
    """
    shards = shape.shards
    if shards.seq > 1:
      raise ValueError(
        f'mesh axis seq={shards.seq} must be 1 for a cache with a host tier, '
        'which keeps each row whole: shard over data or model instead'
      )
    rows = shape.batch * shards.model
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
    """The ring's status or the host's, of each shard that holds a row."""
    repeat = self.fault.shape[0] // self.ring.status.shape[0]
    return jnp.maximum(jnp.repeat(self.ring.status, repeat), self.fault)

  def append(
    self,
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int32[Array, 'B T'],
    count: Int32[Array, 'B'] | None = None,
  ) -> Self:
    """Adds tokens to both tiers.

    The host's copy is made in the call: a device's stream waits for it.
    """
    ring = self.ring.append(k, v, positions, count)
    row = _like(self.handles)
    handles, fault = io_callback(
      functools.partial(host_calls.put, host=self.config),
      (row, row),
      self.handles,
      self.ring.used,
      ring.used - self.ring.used,
      _narrow(k),
      _narrow(v),
      positions,
    )
    return self._after(ring, handles, fault)

  def append_device(
    self,
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int32[Array, 'B T'],
    count: Int32[Array, 'B'],
  ) -> Self:
    """Adds tokens to the device's tier; `attend_host` adds to the host's."""
    ring = self.ring.append(k, v, positions, count)
    return dataclasses.replace(self, ring=ring)

  def attend_host(
    self,
    used: Int32[Array, 'B'],
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int32[Array, 'B T'],
    lse: Float[Array, 'B T N'],
    search: Search,
    ready: Int32[Array, 'B K'],
  ) -> tuple[Self, Attended]:
    """Adds few tokens to the host and attends over its: one call of the host.

    Args:
      used: tokens that rows held before `append_device`.
      q: rotated queries, of the new tokens.
      k: new rotated keys.
      v: new values.
      positions: of the new tokens.
      lse: normaliser of what the device attends, by which the host knows what
        its own tokens weigh.
      search: how to search.
      ready: what `index` returned.
    """
    batch, t, n, h = q.shape
    count = self.ring.used - used
    numbers = jnp.stack([self.handles, used, count], axis=1)
    asked = jnp.concatenate([q, lse[..., None]], axis=3, dtype=jnp.float32)
    numbers = [numbers, positions, ready]
    numbers = jnp.concatenate(numbers, axis=1, dtype=jnp.int32)
    new = jnp.concatenate([_narrow(k), _narrow(v)], axis=2)
    size = t * n * (h + 2)
    # Each array that goes or comes is a copy of its own, and costs more than
    # its bytes: one goes, one comes, of their bits.
    found = io_callback(
      functools.partial(
        host_calls.attend_bits,
        shape=(t, n, k.shape[2], h),
        dtype=new.dtype,
        search=search,
        host=self.config,
      ),
      jax.ShapeDtypeStruct((batch, 2 + size + len(STATS)), jnp.int32),
      jnp.concatenate([_bits(numbers), _bits(asked), _bits(new)], axis=1),
    )
    rows = found[:, :2]
    found = lax.bitcast_convert_type(found[:, 2:], jnp.float32)
    stats, found = found[:, size:], found[:, :size].reshape(batch, t, n, h + 2)
    found = Attended(found[..., :h], found[..., h], found[..., h + 1], stats)
    return self._after(self.ring, rows[:, 0], rows[:, 1]), found

  def index(
    self, near: Near, numbers: Any, search: Search, folder: str
  ) -> Int32[Array, 'B K']:
    """Starts to index what the host attends; returns when it is under way.

    Args:
      near: of arrays [B K ...].
      numbers: `lcx.select.vector_index.Numbers`.
      search: which tokens stay on the device.
      folder: where indexes are kept; '': nowhere.

    Returns:
      What `attend_host` takes: a `Fault` or 0, of each row and head.
    """
    return io_callback(
      functools.partial(
        host_calls.index,
        numbers=numbers,
        search=search,
        folder=folder,
        host=self.config,
      ),
      jax.ShapeDtypeStruct(self.ring.table.shape[:2], jnp.int32),
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
    # A ring's slot holds the last page of all that fall on it.
    around = last - (last - slot) % n_ring
    number = jnp.where(slot < sink, slot, around)
    first = search.first // self.page
    until = (self.used - search.recent) // self.page
    until = jnp.maximum(until, first)[:, None]
    kept = ((number < first) | (number >= until))[:, None]
    ids = jnp.where(kept, self.ring.page_ids(), -1)
    return ids, jnp.where(ids >= 0, self.ring.page_starts(), NEVER)

  def truncate(self, lengths: Int32[Array, 'B']) -> Self:
    """The host cuts its rows at its next call."""
    ring = self.ring.truncate(lengths)
    return dataclasses.replace(self, ring=ring)

  def fork(self, sources: Int32[Array, 'B']) -> Self:
    """Rows that go on as others copy their tokens, not their index."""
    row = _like(self.handles)
    handles, fault = io_callback(
      functools.partial(host_calls.fork, host=self.config),
      (row, row),
      self.handles,
      self.ring.used,
      sources,
    )
    return dataclasses.replace(
      self,
      ring=self.ring.fork(sources),
      handles=handles,
      fault=jnp.maximum(self.fault[sources], fault),
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
    handles = io_callback(
      host_calls.release_rows, _like(self.handles), self.handles, rows
    )
    return dataclasses.replace(
      self, ring=ring, handles=handles, fault=jnp.where(rows, 0, self.fault)
    )

  def _after(self, ring, handles, fault) -> Self:
    first = jnp.where(self.fault > 0, self.fault, fault)  # those after follow
    return dataclasses.replace(self, ring=ring, handles=handles, fault=first)

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
    rows = self.rows()
    tokens = sum(r.k.nbytes + r.v.nbytes for r in rows)
    return {
      'keys_and_values': tokens,
      'index': sum(r.nbytes for r in rows) - tokens,
    }

  def rows(self) -> list[Row]:
    """The host's rows, of those handles that it knows."""
    return host_calls.known(self._own_handles())

  def owned(self) -> Callable[[], None]:
    """Gives back what the host holds now; never blocks, needs no array."""
    return functools.partial(host_calls.release, self._own_handles())

  def _own_handles(self) -> np.ndarray:
    """Those of this process's hosts."""
    pieces = self.handles.addressable_shards
    return np.concatenate([np.array(p.data) for p in pieces])


def _narrow(x: Array) -> Array:
  """As the host keeps it: numpy has no bfloat16."""
  if x.dtype == jnp.float32:
    return x
  most = float(jnp.finfo(jnp.float16).max)
  return jnp.clip(x, -most, most).astype(jnp.float16)


def _bits(x: Array) -> Int32[Array, 'B w']:
  """Each row's elements, of 32 or 16 bits, as int32."""
  pairs = (2,) if x.dtype.itemsize == 2 else ()
  x = x.reshape(x.shape[0], -1, *pairs)
  return lax.bitcast_convert_type(x, jnp.int32)


def _like(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)
