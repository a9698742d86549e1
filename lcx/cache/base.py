"""What a cache is: one object a layer that keeps keys and values per row.

A cache config (`Dense`, `Paged`) is a frozen dataclass of numbers; `init` makes
the cache of one layer, a pytree whose every leaf leads with the batch or is a
pool that a per-row table points into. Methods of a cache are pure and can be
jitted; with the cache donated, they write in place.

Tokens of a row are numbered by a cursor: token number n lies in page n // page
of its row. `page_starts` holds the *position* of a page's first token. A row's
positions need not start at 0 (a shard of the sequence, a host's piece) and may
jump between pages, but increase, by 1 within a page. A page that is not in use
starts at NEVER.

Inside a `shard_map` a cache is the shard's own piece: used tokens, lengths and
capacity are those of the shard, and page ids are local.
"""

import dataclasses
import enum
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.keys import NEVER, Pages


def split(*axes: str | tuple[str, ...] | None) -> Any:
  """A `PartitionSpec` that may stand where a tree has an array."""
  return PartitionSpec(*axes)


ROWS = split(('data', 'seq'))  # a row's cursor differs by seq shard


class Status(enum.IntEnum):
  """Why a row takes no more tokens. 0: it does.

  A row that is not OK drops whole appends, never parts of one, until it is
  reset, freed, inserted into, or truncated below what it holds.
  """

  OK = 0
  OVER_CAPACITY = 1  # the append would pass the row's capacity
  OUT_OF_PAGES = 2  # the pool has no page left for this row
  POSITION_GAP = 3  # positions jump within a page
  RING_LOST = 4  # truncated by more than the slack: recent tokens are gone


# As `kernels_pallas.append_token.Rules` asks for them.
STATUSES = {
  'ok': Status.OK,
  'position_gap': Status.POSITION_GAP,
  'over_capacity': Status.OVER_CAPACITY,
  'out_of_pages': Status.OUT_OF_PAGES,
}


class Shards(NamedTuple):
  """Devices along each mesh axis that split a cache."""

  data: int = 1
  seq: int = 1
  model: int = 1


ONE_DEVICE = Shards()


@dataclasses.dataclass(frozen=True)
class CacheShape:
  """What `init` needs to know about model and request, all shards together.

  Attributes:
    batch: rows B.
    n_kv_heads: K.
    head_dim: H.
    capacity: tokens a row can hold; every seq shard holds an equal part.
    dtype: of keys and values as they arrive.
    layer: index of the layer; head classes may differ by layer.
    shards: the mesh. Arrays are global; `specs` says how they are split.
  """

  batch: int
  n_kv_heads: int
  head_dim: int
  capacity: int
  dtype: Any = jnp.bfloat16
  layer: int = 0
  shards: Shards = ONE_DEVICE

  def __post_init__(self):
    numbers = (self.batch, self.n_kv_heads, self.head_dim, self.capacity)
    if min(numbers) < 1:
      raise ValueError(
        f'batch={self.batch}, n_kv_heads={self.n_kv_heads}, '
        f'head_dim={self.head_dim}, capacity={self.capacity} must all be at '
        'least 1'
      )
    for name, size, parts in (
      ('batch', self.batch, self.shards.data),
      ('n_kv_heads', self.n_kv_heads, self.shards.model),
    ):
      if size % parts:
        raise ValueError(f'{name}={size} must be divisible by {parts} shards')

  def pages_per_row(self, page: int) -> int:
    """Pages that hold `capacity` tokens, a multiple of the seq shards."""
    per_shard = -(-self.capacity // (page * self.shards.seq))
    return per_shard * self.shards.seq


class Cache(Protocol):
  """Keys and values of one layer. Frozen; every method returns a new one.

  Attributes:
    used: int32 [B] tokens a row holds.
    status: int32 [B] a `Status` a row.
  """

  used: Int32[Array, 'B']
  status: Int32[Array, 'B']

  @property
  def rotated(self) -> bool:
    """Whether keys are stored rotated."""
    ...

  def append(
    self,
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int32[Array, 'B T'],
    count: Int32[Array, 'B'] | None = None,
  ) -> Self:
    """Adds the first `count` tokens of each row (None: all T)."""
    ...

  def truncate(self, lengths: Int32[Array, 'B']) -> Self:
    """Keeps the first `lengths` tokens of each row."""
    ...

  def fork(self, sources: Int32[Array, 'B']) -> Self:
    """Row b goes on as a copy of row sources[b]."""
    ...

  def free(self, rows: Bool[Array, 'B']) -> Self:
    """Empties rows and gives their memory back."""
    ...

  def reset(self, rows: Bool[Array, 'B']) -> Self:
    """Empties rows, which keep their memory for what comes next."""
    ...

  def insert(self, row: Int32[Array, ''], other: Self) -> Self:
    """Row `row` becomes the only row of `other`."""
    ...

  def pages(self) -> Pages:
    """The pool of pages."""
    ...

  def page_ids(self) -> Int32[Array, 'B K W']:
    """Page of the pool that holds a row's page; -1: none."""
    ...

  def page_starts(self) -> Int32[Array, 'B K W']:
    """Position of each page's first token; NEVER where there is none."""
    ...

  def last_position(self) -> Int32[Array, 'B']:
    """Position of the newest token of each row; -1 where there is none."""
    ...

  def bounds(self) -> tuple[Float[Array, 'B K C H'], Float[Array, 'B K C H']]:
    """Channel-wise (kmin, kmax) over each logical page's keys."""
    ...

  def nbytes(self, tier: str = 'device') -> dict[str, int]:
    """Bytes by part ('keys', 'values', 'scales', 'stats', 'tables')."""
    ...


class CacheConfig(Protocol):
  """Numbers of a cache.

  Attributes:
    provides: capabilities that prefill and decode parts may need:
      'all_tokens' (no token is ever dropped), 'recent_tokens', 'contiguous'
      ([B K S H] arrays k and v), 'rotated' or 'unrotated', 'bounds', 'moments'.
  """

  @property
  def provides(self) -> frozenset[str]: ...

  def init(self, shape: CacheShape) -> Cache:
    """An empty cache of one layer; ValueError where the numbers clash."""
    ...

  def specs(self) -> Any:
    """The cache's tree with a `PartitionSpec` at every leaf."""
    ...

  def check(self, config: Any, capacity: int, batch: int, decode: Any) -> None:
    """Refuses a model, a capacity or a decode part before anything is made.

    Args:
      config: the model.
      capacity: tokens of a row.
      batch: rows.
      decode: the part that decodes.

    Raises:
      ValueError: with the reason.
    """
    ...

  def rewindable(self, tokens: int) -> Self:
    """The config with which rows can go back by so many tokens."""
    ...

  def at_full_budget(self, length: int) -> Self | None:
    """The config under which nothing is dropped up to `length` tokens."""
    ...


def arriving(
  used: Int32[Array, 'B'],
  status: Int32[Array, 'B'],
  count: Int32[Array, 'B'] | None,
  tokens: int,
) -> Int32[Array, 'B']:
  """How many tokens an append brings to each row; 0 where status is not OK."""
  if count is None:
    count = jnp.full_like(used, tokens)
  return jnp.where(status == Status.OK, jnp.clip(count, 0, tokens), 0)


def settle(
  status: Int32[Array, 'B'],
  count: Int32[Array, 'B'],
  *faults: tuple[Status, Bool[Array, 'B']],
) -> tuple[Int32[Array, 'B'], Int32[Array, 'B']]:
  """Drops whole appends that meet a fault; the first fault names the status.

  Returns:
    (count, status), count 0 in the rows that are dropped.
  """
  for fault, hit in faults:
    hit &= count > 0
    status = jnp.where(hit, jnp.int32(fault), status)
    count = jnp.where(hit, 0, count)
  return count, status


def continues(
  open_start: Int32[Array, 'B'],
  used: Int32[Array, 'B'],
  positions: Int32[Array, 'B T'],
  count: Int32[Array, 'B'],
  page: int,
) -> Bool[Array, 'B']:
  """Whether positions are consecutive within each page of a row.

  Args:
    open_start: position of the first token of the row's open page.
    used: tokens in the row.
    positions: of the tokens that arrive.
    count: how many do.
    page: tokens of a page.
  """
  before = (open_start + used % page - 1)[:, None]
  before = jnp.concatenate([before, positions[:, :-1]], axis=1)
  token = jnp.arange(positions.shape[1], dtype=jnp.int32)
  begins = (used[:, None] + token) % page == 0
  padding = token >= count[:, None]
  return jnp.all((positions == before + 1) | begins | padding, axis=1)


def status_after_cut(
  status: Int32[Array, 'B'],
  used: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
) -> Int32[Array, 'B']:
  """A row that gives up tokens it holds may take new ones again."""
  return jnp.where(lengths < used, jnp.int32(Status.OK), status)


def start_of_page(
  starts: Int32[Array, '*D W'], index: Int32[Array, '*D']
) -> Int32[Array, '*D']:
  """starts[..., index], NEVER where there is no such page."""
  w = starts.shape[-1]
  start = jnp.take_along_axis(
    starts, jnp.clip(index, 0, w - 1)[..., None], axis=-1
  )[..., 0]
  return jnp.where((index >= 0) & (index < w), start, NEVER)


def last_token(
  starts: Int32[Array, '*D W'],
  index: Int32[Array, '*D'],
  lengths: Int32[Array, '*D'],
  page: int,
) -> Int32[Array, '*D']:
  """Position of token number lengths - 1, which lies in page slot `index`.

  -1 where lengths is 0.
  """
  position = start_of_page(starts, index) + (lengths - 1) % page
  return jnp.where(lengths > 0, position, -1)


def size_of(*arrays: Any) -> int:
  """Bytes of arrays (or of trees of them, or of their shapes)."""
  leaves = jax.tree.leaves(arrays)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def check_tier(tier: str) -> bool:
  """Whether a cache that lives on the device alone has anything in `tier`."""
  if tier not in ('device', 'host'):
    raise ValueError(f"{tier=} must be 'device' or 'host'")
  return tier == 'device'
