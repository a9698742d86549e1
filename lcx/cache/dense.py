"""The dense cache: contiguous keys and values, every token, every head."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import append_token
from kernels_pallas.keys import NEVER, Pages
from kernels_pallas.page_choice.gpu import Scoring
from lcx.cache.base import (
  ROWS,
  STATUSES,
  CacheShape,
  Status,
  arriving,
  check_tier,
  continues,
  last_token,
  settle,
  size_of,
  split,
  start_of_page,
  status_after_cut,
)
from lcx.cache.stats import Bounds
from lcx.cache.write import (
  first_positions,
  merged_pages,
  put_at,
  put_slices,
  take_at,
  window,
)


@dataclasses.dataclass(frozen=True)
class Dense:
  """Numbers of the dense cache.

  Attributes:
    page: tokens of a page, as kernels see them; bounds are kept per page.
    rotated: whether keys are stored rotated.
    stats: whether bounds of keys are kept.
  """

  page: int = 64
  rotated: bool = True
  stats: bool = False

  def __post_init__(self):
    if self.page < 1:
      raise ValueError(f'page={self.page} must be at least 1')

  @property
  def provides(self) -> frozenset[str]:
    found = {'all_tokens', 'recent_tokens', 'contiguous'}
    found.add('rotated' if self.rotated else 'unrotated')
    return frozenset(found | ({'bounds'} if self.stats else set()))

  def at_full_budget(self, length: int) -> Self:
    del length
    return self

  def check(self, config: Any, capacity: int, batch: int, decode: Any) -> None:
    """Refuses nothing."""

  def rewindable(self, tokens: int) -> Self:
    del tokens  # nothing is ever dropped
    return self

  def init(self, shape: CacheShape) -> 'DenseCache':
    """An empty cache; capacity is rounded up to pages."""
    b, h = shape.batch, shape.n_kv_heads
    pages = shape.pages_per_row(self.page)
    tokens = (b, h, pages * self.page, shape.head_dim)
    rows = b * shape.shards.seq
    stats = None
    if self.stats:
      stats = Bounds.zeros((b, h, pages, shape.head_dim), shape.dtype)
    return DenseCache(
      k=jnp.zeros(tokens, shape.dtype),
      v=jnp.zeros(tokens, shape.dtype),
      starts=jnp.full((b, pages), NEVER, jnp.int32),
      used=jnp.zeros((rows,), jnp.int32),
      status=jnp.zeros((rows,), jnp.int32),
      stats=stats,
      config=self,
    )

  def specs(self) -> 'DenseCache':
    """Batch over "data", kv heads over "model", tokens over "seq"."""
    tokens = split('data', 'model', 'seq', None)
    return DenseCache(
      k=tokens,
      v=tokens,
      starts=split('data', 'seq'),
      used=ROWS,
      status=ROWS,
      stats=Bounds(tokens, tokens) if self.stats else None,
      config=self,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
  """Keys and values of one layer, contiguous.

  Attributes:
    k: [B K S H] keys, in the order of arrival.
    v: [B K S H].
    starts: int32 [B W] position of each page's first token, W = S / page.
    used: int32 [B] tokens a row holds.
    status: int32 [B] a `Status` a row.
    stats: bounds per page, or None.
    config: its numbers (static).
  """

  k: Float[Array, 'B K S H']
  v: Float[Array, 'B K S H']
  starts: Int32[Array, 'B W']
  used: Int32[Array, 'B']
  status: Int32[Array, 'B']
  stats: Bounds | None
  config: Dense = dataclasses.field(metadata={'static': True})

  @property
  def rotated(self) -> bool:
    return self.config.rotated

  @property
  def page(self) -> int:
    return self.config.page

  def append(
    self,
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K H'],
    positions: Int32[Array, 'B T'],
    count: Int32[Array, 'B'] | None = None,
  ) -> Self:
    """Adds the first `count` tokens of each row (None: all T).

    Args:
      k: keys, rotated iff the config says so.
      v: values.
      positions: increasing, by 1 within a page; they continue a half full one.
      count: 0 to T.

    Returns:
      The cache. A row whose tokens do not fit drops them all and says so in
      `status`; other rows go on.
    """
    page, capacity = self.page, self.k.shape[2]
    rows, tokens, heads, dim = k.shape
    if tokens == 1 and append_token.serves(rows * heads, dim):
      k, v = k[:, 0].astype(self.k.dtype), v[:, 0].astype(self.v.dtype)
      heads = append_token.Heads(k), append_token.Heads(v)
      return self._append_one(heads, positions, count)[1]
    count = arriving(self.used, self.status, count, k.shape[1])
    open_start = start_of_page(self.starts, self.used // page)
    count, status = settle(
      self.status,
      count,
      (Status.OVER_CAPACITY, self.used + count > capacity),
      (
        Status.POSITION_GAP,
        ~continues(open_start, self.used, positions, count, page),
      ),
    )
    offset = self.used % page
    pages = self._touched(count, window(k.shape[1], page))

    def write(kept, tokens):
      tokens = jnp.swapaxes(tokens, 1, 2)
      older = take_at(self._in_pages(kept), pages[..., :1])[:, :, 0]
      new = merged_pages(tokens, older, offset, count)
      return put_slices(kept, pages, new)

    stats = self.stats
    if stats is not None:
      stats = stats.absorb(jnp.swapaxes(k, 1, 2), self.used, count, page)
    return dataclasses.replace(
      self,
      k=write(self.k, k),
      v=write(self.v, v),
      starts=self._new_starts(pages[:, :1], positions, offset),
      used=self.used + count,
      status=status,
      stats=stats,
    )

  def _append_one(self, tokens, positions, count, beside=None, scoring=None):
    """`append` of one token, in one launch: (queries, cache, scored)."""
    rules = append_token.Rules(
      page=self.page,
      logical=self.page,
      capacity=self.k.shape[2],
      statistics='' if self.stats is None else 'bounds',
      **STATUSES,
    )
    pool = self.pages()
    stats, tree = jax.tree.flatten(self.stats)
    moved = append_token.gpu.append_token(
      [pool.k, pool.v],
      tokens,
      append_token.Cursors(
        table=None,
        starts=self.starts,
        used=self.used,
        peak=None,
        status=self.status,
        taken=None,
      ),
      stats,
      tokens[0],
      positions[:, 0],
      count,
      heads=self.k.shape[1],
      rules=rules,
      beside=beside,
      scoring=scoring,
    )
    (pool_k, pool_v), cursors, stats, queries, found = moved
    cache = dataclasses.replace(
      self,
      k=pool_k.reshape(self.k.shape),
      v=pool_v.reshape(self.v.shape),
      starts=cursors.starts,
      used=cursors.used,
      status=cursors.status,
      stats=tree.unflatten(stats),
    )
    if queries is not None:
      queries = queries[:, None]
    return queries, cache, found

  def takes_joint(self, q, k, v) -> bool:
    """Whether `append_joint` can take what these [B T heads H] would be."""
    alike = self.k.dtype == k.dtype == v.dtype
    return alike and append_token.serves_joint(q, k)

  def append_joint(
    self,
    joint: append_token.Joint,
    positions: Int32[Array, 'B 1'],
    count: Int32[Array, 'B'] | None = None,
    scoring: Scoring | None = None,
  ) -> tuple[Float[Array, 'B 1 N H'] | None, Self, Any]:
    """`append` of one token beside its queries: (queries, cache, scored).

    On a GPU what makes queries, keys and values is then a single launch before
    that of the append, not three. `scoring`, by this cache's bounds, is done by
    the launch of the append.
    """
    return self._append_one(joint.heads(), positions, count, joint, scoring)

  def truncate(self, lengths: Int32[Array, 'B']) -> Self:
    """Keeps the first `lengths` tokens of each row, as if no more had come."""
    lengths = jnp.clip(lengths, 0, self.used)
    first = jnp.arange(self.starts.shape[1], dtype=jnp.int32) * self.page
    stats = self.stats
    if stats is not None:
      b, h = self.k.shape[:2]
      index = jnp.broadcast_to((lengths // self.page)[:, None, None], (b, h, 1))
      keys = take_at(self._in_pages(self.k), index)[:, :, 0]
      keys = keys.astype(jnp.float32)
      error = jnp.zeros(keys.shape[:3], jnp.float32)
      stats = stats.cut(keys, error, lengths < self.used, lengths)
    return dataclasses.replace(
      self,
      starts=jnp.where(first < lengths[:, None], self.starts, NEVER),
      used=lengths,
      status=status_after_cut(self.status, self.used, lengths),
      stats=stats,
    )

  def fork(self, sources: Int32[Array, 'B']) -> Self:
    """Row b goes on as a copy of row sources[b]; copies whole rows."""
    return jax.tree.map(lambda x: x[sources], self)

  def reset(self, rows: Bool[Array, 'B']) -> Self:
    """Empties the rows."""
    return dataclasses.replace(
      self,
      starts=jnp.where(rows[:, None], NEVER, self.starts),
      used=jnp.where(rows, 0, self.used),
      status=jnp.where(rows, jnp.int32(Status.OK), self.status),
    )

  def free(self, rows: Bool[Array, 'B']) -> Self:
    """Empties the rows; a row's memory is its own here, as in `reset`."""
    return self.reset(rows)

  def insert(self, row: Int32[Array, ''], other: Self) -> Self:
    """Row `row` becomes the only row of `other`, of any smaller capacity."""
    if other.k.shape[0] != 1 or other.k.shape[2] > self.k.shape[2]:
      raise ValueError(
        f'insert takes one row of at most {self.k.shape[2]} tokens, not '
        f'{other.k.shape[0]} rows of {other.k.shape[2]}'
      )
    if other.config != self.config:
      raise ValueError(f'{other.config} must equal {self.config}')

    def place(mine, theirs):
      start = (row,) + (0,) * (mine.ndim - 1)
      return jax.lax.dynamic_update_slice(mine, theirs, start)

    empty = self.reset(jnp.arange(self.used.shape[0]) == row)
    return jax.tree.map(place, empty, other)

  def pages(self) -> Pages:
    """The cache as a pool [B*K*W page H]; free."""
    shape = (-1, self.page, self.k.shape[-1])
    return Pages(self.k.reshape(shape), self.v.reshape(shape))

  def page_ids(self) -> Int32[Array, 'B K W']:
    """Ids count upwards; -1 where a page holds no token."""
    w = self.starts.shape[1]
    index = jnp.arange(w, dtype=jnp.int32)
    held = index * self.page < self.used[:, None, None]
    return jnp.where(held, self._row_pages() + index, -1)

  def page_starts(self) -> Int32[Array, 'B K W']:
    """Position of each page's first token; NEVER where there is none."""
    b, h = self.k.shape[:2]
    return jnp.broadcast_to(self.starts[:, None], (b, h, self.starts.shape[1]))

  def last_position(self) -> Int32[Array, 'B']:
    """Position of the newest token of each row; -1 where there is none."""
    index = (self.used - 1) // self.page
    return last_token(self.starts, index, self.used, self.page)

  def bounds(self) -> tuple[Float[Array, 'B K C H'], Float[Array, 'B K C H']]:
    """(kmin, kmax) per page; meaningful where the page holds tokens."""
    if self.stats is None:
      raise ValueError('this cache keeps no bounds: Dense(stats=True) does')
    return self.stats.kmin, self.stats.kmax

  def nbytes(self, tier: str = 'device') -> dict[str, int]:
    """Bytes by part, allocated whether used or not."""
    if not check_tier(tier):
      return {}
    return {
      'keys': size_of(self.k),
      'values': size_of(self.v),
      'stats': size_of(self.stats),
      'tables': size_of(self.starts, self.used, self.status),
    }

  def _row_pages(self) -> Int32[Array, 'B K 1']:
    """Id of the first page of each row and head."""
    b, h, w = *self.k.shape[:2], self.starts.shape[1]
    return jnp.arange(b * h, dtype=jnp.int32).reshape(b, h, 1) * w

  def _touched(self, count, n: int) -> Int32[Array, 'B K n']:
    """Index in the row of the n pages an append touches; -1: not touched."""
    index = (self.used // self.page)[:, None] + jnp.arange(n, dtype=jnp.int32)
    stop = jnp.where(count > 0, self.used + count, 0)
    index = jnp.where(index * self.page < stop[:, None], index, -1)
    b, h = self.k.shape[:2]
    return jnp.broadcast_to(index[:, None], (b, h, n))

  def _new_starts(self, pages: Int32[Array, 'B 1 n'], positions, offset):
    """Start positions, with those of the pages that an append touches."""
    first = first_positions(positions, offset, pages.shape[2], self.page)
    return put_at(self.starts[:, None], pages, first[:, None])[:, 0]

  def _in_pages(self, kept: Float[Array, 'B K S H']):
    """[B K W page H]; free."""
    b, h, _, d = kept.shape
    return kept.reshape(b, h, -1, self.page, d)
