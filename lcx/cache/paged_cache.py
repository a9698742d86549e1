"""The paged cache: a pool of pages, two head classes, 16, 8 or 4 bits.

A page holds tokens of one kv head. A *full* head's table lists every page of
the row; a *ring* head (a streaming head of DuoAttention and LServe,
arXiv:2502.14866, section 3.3) keeps its sink pages and a ring of the last ones.
Page number j of a row stands in table slot

  j                                              full heads, and j < sink_pages
  sink_pages + (j - sink_pages) % ring_pages     ring heads

The ring has room for `recent` tokens and for `slack` more, so that up to
`slack` drafted tokens can be appended, attended and truncated again.

Sharing. Rows that were forked share full pages of full heads, which are never
written again. What may still be written (a row's open page, all pages of ring
heads) is private: `fork` copies it. So an append neither asks nor changes who
else holds a page. Truncating into a shared page copies that page.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import append_token
from kernels_pallas.keys import NEVER, Pages, dequantise
from kernels_pallas.page_choice import scored_heads
from kernels_pallas.page_choice.gpu import Scoring
from lcx.cache.base import (
  STATUSES,
  Status,
  arriving,
  check_tier,
  continues,
  last_token,
  settle,
  size_of,
  start_of_page,
  status_after_cut,
)
from lcx.cache.quantise import encode, error_bound, quantise
from lcx.cache.stats import Bounds, Moments, Stats
from lcx.cache.vacancy import Vacancy, holders
from lcx.cache.write import (
  first_positions,
  merged_pages,
  put,
  put_at,
  put_small,
  take_at,
  window,
)

if TYPE_CHECKING:
  from lcx.cache.paged import Paged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
  """Keys and values of one layer, in pages.

  Attributes:
    pool: P pages, each of one kv head of one row (or of several, when forked).
    table: int32 [B K W] page of the pool in each slot; -1: none. A slot whose
      start is NEVER may keep a page for the tokens to come.
    starts: int32 [B K W] position of the page's first token, or NEVER.
    used: int32 [B] tokens a row holds (ring heads: has seen).
    peak: int32 [B] most tokens a row ever held: rings lost what that pushed
      out.
    shared: int32 [B] tokens that may lie in pages which other rows hold, too; a
      multiple of the page.
    status: int32 [B] a `Status` a row.
    ring: bool [K] which kv heads are ring heads. Data: layers compile once.
    first: int32 [K] first tokens that a kv head's queries see: a ring's sink.
    last: int32 [K] last tokens that they see, a query's own included. Both
      follow from `ring`, but would be a launch of every decode step.
    vacancy: free pages.
    stats: statistics of full heads' keys per logical page, or None.
    config: its numbers (static).
  """

  pool: Pages
  table: Int32[Array, 'B K W']
  starts: Int32[Array, 'B K W']
  used: Int32[Array, 'B']
  peak: Int32[Array, 'B']
  shared: Int32[Array, 'B']
  status: Int32[Array, 'B']
  ring: Bool[Array, 'K']
  first: Int32[Array, 'K']
  last: Int32[Array, 'K']
  vacancy: Vacancy
  stats: Stats | None
  config: 'Paged' = dataclasses.field(metadata={'static': True})

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
      `status`; other rows go on. Ring heads keep sink and recent tokens alone.
    """
    rows, tokens, heads, dim = k.shape
    agree = self.config.agree_over
    if tokens == 1 and append_token.serves(rows * heads, dim, agree):
      k, v = k[:, 0], v[:, 0]
      codes = jax.tree.map(
        lambda x, to: x.astype(to.dtype),
        encode(k, v, self.config.bits),
        self.pool,
      )
      heads = [append_token.Heads(x) for x in jax.tree.leaves(codes)]
      keys = append_token.Heads(k)
      return self._append_one(heads, keys, positions, count)[1]
    page = self.page
    offset = self.used % page
    count, status = self._admitted(count, positions)
    slot, alive = self._touched(count, window(k.shape[1], page))
    held = jnp.where(alive, take_at(self.table, slot), -1)
    wanted = alive & (held < 0)
    granted = self._granted(wanted)
    count, status = settle(status, count, (Status.OUT_OF_PAGES, ~granted))
    fresh, vacancy = self.vacancy.take(wanted, granted)
    alive &= granted[:, None, None]
    target = jnp.where(alive, jnp.maximum(held, fresh), -1)
    # Computed once, not again by each kernel that follows.
    count, status, target, fresh = jax.lax.optimization_barrier(
      (count, status, target, fresh)
    )

    def write(pool, tokens):
      tokens = jnp.swapaxes(tokens, 1, 2)
      older = pool[jnp.maximum(held[..., 0], 0)]
      return put(pool, target, merged_pages(tokens, older, offset, count))

    first = first_positions(positions, offset, slot.shape[2], page)
    starts = jnp.broadcast_to(first[:, None], slot.shape)
    stats = self.stats
    if stats is not None:
      keys = jnp.swapaxes(k, 1, 2)[:, self._safe_stats_heads()]
      stats = stats.absorb(keys, self.used, count, self.config.logical_page)
    return dataclasses.replace(
      self,
      pool=jax.tree.map(write, self.pool, encode(k, v, self.config.bits)),
      table=put_small(self.table, jnp.where(fresh < 0, -1, slot), fresh),
      starts=put_small(self.starts, jnp.where(target < 0, -1, slot), starts),
      used=self.used + count,
      peak=jnp.maximum(self.peak, self.used + count),
      status=status,
      vacancy=vacancy,
      stats=stats,
    )

  def _append_one(
    self, tokens, keys, positions, count, beside=None, scoring=None
  ):
    """`append` of one token, in one launch: (queries, cache, scored)."""
    config = self.config
    rules = append_token.Rules(
      page=self.page,
      logical=config.logical_page,
      capacity=None if config.endless else self.table.shape[2] * self.page,
      sink_pages=config.sink_pages,
      ring_pages=config.ring_pages,
      statistics='' if self.stats is None else config.stats,
      **STATUSES,
    )
    pool, tree = jax.tree.flatten(self.pool)
    stats, stats_tree = jax.tree.flatten(self.stats)
    pool, cursors, stats, queries, found = append_token.gpu.append_token(
      pool,
      tokens,
      append_token.Cursors(
        table=self.table,
        starts=self.starts,
        used=self.used,
        peak=self.peak,
        status=self.status,
        taken=self.vacancy.taken,
      ),
      stats,
      keys,
      positions[:, 0],
      count,
      heads=self.table.shape[1],
      rules=rules,
      ring=self.ring if config.has_ring else None,
      beside=beside,
      scoring=scoring,
      order=self.vacancy.order,
    )
    assert cursors.taken is not None
    cache = dataclasses.replace(
      self,
      pool=tree.unflatten(pool),
      table=cursors.table,
      starts=cursors.starts,
      used=cursors.used,
      peak=cursors.peak,
      status=cursors.status,
      vacancy=dataclasses.replace(self.vacancy, taken=cursors.taken),
      stats=stats_tree.unflatten(stats),
    )
    if queries is not None:
      queries = queries[:, None]
    return queries, cache, found

  def takes_joint(self, q, k, v) -> bool:
    """Whether `append_joint` can take what these [B T heads H] would be."""
    bits, agree = self.config.bits, self.config.agree_over
    alike = k.dtype == v.dtype and (bits < 16 or self.pool.k.dtype == k.dtype)
    return alike and append_token.serves_joint(q, k, agree)

  def append_joint(
    self,
    joint: append_token.Joint,
    positions: Int32[Array, 'B 1'],
    count: Int32[Array, 'B'] | None = None,
    scoring: Scoring | None = None,
  ) -> tuple[Float[Array, 'B 1 N H'] | None, Self, Any]:
    """`append` of one token beside its queries: (queries, cache, scored).

    On a GPU what makes queries, keys and values is then a single launch before
    that of the append, not three, and keys and values are quantised together.
    `scoring`, by this cache's statistics, is done by the append's launch.
    """
    bits = self.config.bits
    keys, values = joint.heads()
    tokens = [keys, values]
    if bits < 16:
      found = quantise(joint.keys_and_values, bits)
      tokens = [
        append_token.Heads(x, first)
        for x in found
        if x is not None
        for first in (0, joint.kv_heads)
      ]
    return self._append_one(tokens, keys, positions, count, joint, scoring)

  def truncate(self, lengths: Int32[Array, 'B']) -> Self:
    """Keeps the first `lengths` tokens of each row, as if no more had come.

    A row keeps pages behind the cut for its next tokens (`trim` gives them
    back), but lets go of those that it shares. Cutting into a shared page needs
    a page for the copy: without one the row is OUT_OF_PAGES. Ring heads that
    have lost tokens which the next query may see make the row RING_LOST.
    """
    lengths = jnp.clip(lengths, 0, self.used)
    stats = self._cut_stats(lengths)
    newest = self._newest(lengths)[..., None]
    status = status_after_cut(self.status, self.used, lengths)
    status = jnp.where(self._ring_lost(lengths), Status.RING_LOST, status)
    cut = dataclasses.replace(
      self,
      starts=jnp.where(self.starts > newest, NEVER, self.starts),
      used=lengths,
      status=status.astype(jnp.int32),
      stats=stats,
    )
    return cut._unshared()

  def fork(self, sources: Int32[Array, 'B']) -> Self:
    """Row b goes on as a copy of row sources[b] (itself: goes on as it is).

    Full pages of full heads are shared. A row that finds no pages for the rest
    is empty and OUT_OF_PAGES.
    """
    moved = sources != jnp.arange(sources.shape[0])
    rows = dataclasses.replace(
      self, **jax.tree.map(lambda x: x[sources], self._per_row())
    )
    slot, mutable = rows._mutable()
    held = take_at(rows.page_ids(), slot)
    copied = mutable & moved[:, None, None] & (held >= 0)
    # Pages that wait for tokens to come stay with the source.
    table = jnp.where(moved[:, None, None], rows.page_ids(), rows.table)
    private = jnp.where(copied, slot, -1)
    table = put_at(table, private, jnp.full_like(slot, -1))
    forked, granted = rows._recounted(table)._with_copies(slot, copied, held)
    return forked._failed(~granted)

  def free(self, rows: Bool[Array, 'B']) -> Self:
    """Empties rows and gives back their pages that no other row holds."""
    empty = self._emptied(rows)
    return empty._recounted(jnp.where(rows[:, None, None], -1, empty.table))

  def reset(self, rows: Bool[Array, 'B']) -> Self:
    """Empties rows; their own pages wait for their next tokens."""
    keep = jnp.where(rows, 0, self.used)
    cut = self.truncate(keep)
    return cut._emptied(rows)

  def trim(self) -> Self:
    """Gives back all pages that only wait for tokens to come."""
    return self._recounted(self.page_ids())

  def insert(self, row: Int32[Array, ''], other: Self) -> Self:
    """Row `row` becomes the only row of `other`, of any smaller capacity.

    Without pages for it, the row is empty and OUT_OF_PAGES.

    Raises:
      ValueError: `other` has several rows, is larger, or is made otherwise.
    """
    self._check_insert(other)
    mine = jnp.arange(self.used.shape[0]) == row
    cache = self.free(mine)
    ids = other.page_ids()
    wanted = mine[:, None, None] & (ids >= 0)
    granted = cache._granted(wanted)
    fresh, vacancy = cache.vacancy.take(wanted, granted)
    fresh = jax.lax.dynamic_slice_in_dim(fresh, row, 1)

    def place(ours, theirs):
      start = (row,) + (0,) * (ours.ndim - 1)
      return jax.lax.dynamic_update_slice(ours, theirs, start)

    arrived = other._per_row() | {'table': fresh}
    inserted = dataclasses.replace(
      cache,
      pool=_copy_pages(cache.pool, fresh, other.pool, ids),
      vacancy=vacancy,
      **jax.tree.map(place, cache._per_row(), arrived),
    )
    return inserted._failed(mine & ~granted)

  def pages(self) -> Pages:
    """The pool."""
    return self.pool

  def page_ids(self) -> Int32[Array, 'B K W']:
    """Page in each slot that holds tokens; -1 elsewhere."""
    return jnp.where(self.starts < NEVER, self.table, -1)

  def page_starts(self) -> Int32[Array, 'B K W']:
    """Position of each page's first token; NEVER where there is none."""
    return self.starts

  def last_position(self) -> Int32[Array, 'B']:
    """Position of the newest token of each row; -1 where there is none."""
    return self._newest(self.used)[:, 0]

  def visible(self) -> tuple[Int32[Array, 'K'], Int32[Array, 'K']]:
    """(sink, window) per kv head: what a ring head's queries may see."""
    return self.first, self.last

  def bounds(self) -> tuple[Float[Array, 'B h C H'], Float[Array, 'B h C H']]:
    """(kmin, kmax) per logical page of the h full heads (`stats_heads`).

    Without ring heads, h = K. C = W * page / logical_page; logical page c of a
    row is meaningful iff c * logical_page < used.
    """
    if not isinstance(self.stats, Bounds):
      raise ValueError("this cache keeps no bounds: Paged(stats='bounds') does")
    return self.stats.kmin, self.stats.kmax

  def moments(self) -> tuple[Float[Array, 'B h C H'], Float[Array, 'B h C H']]:
    """(mean, deviation) of keys, shaped as `bounds`."""
    if not isinstance(self.stats, Moments):
      raise ValueError(
        "this cache keeps no moments: Paged(stats='moments') does"
      )
    return self.stats.mean_std(self.used, self.config.logical_page)

  def stats_heads(self) -> Int32[Array, 'h']:
    """The kv head of each row of the statistics; -1: of none.

    Ascending. On a shard with fewer full heads than another, -1 pads.
    """
    n = 0 if self.stats is None else jax.tree.leaves(self.stats)[0].shape[1]
    if not self.config.has_ring:
      return jnp.arange(n, dtype=jnp.int32)
    return scored_heads(self.ring, n)

  def nbytes(self, tier: str = 'device') -> dict[str, int]:
    """Bytes by part, allocated whether used or not."""
    if not check_tier(tier):
      return {}
    pool = self.pool
    return {
      'keys': size_of(pool.k),
      'values': size_of(pool.v),
      'scales': size_of(pool.k_scale, pool.v_scale, pool.k_zero, pool.v_zero),
      'stats': size_of(self.stats),
      'tables': size_of(
        *(self.table, self.starts, self.used, self.peak, self.shared),
        *(self.status, self.ring, self.first, self.last, self.vacancy),
      ),
    }

  def _per_row(self) -> dict:
    """The fields that lead with the batch and move with a row."""
    names = ('table', 'starts', 'used', 'peak', 'status', 'stats')
    return {name: getattr(self, name) for name in names}

  def _slot(self, number: Int32[Array, 'B n']) -> Int32[Array, 'B K n']:
    """Table slot of each page number of a row."""
    sink, ring = self.config.sink_pages, self.config.ring_pages
    around = sink + (number - sink) % ring
    ringed = jnp.where(number < sink, number, around)
    return jnp.where(self.ring[:, None], ringed[:, None], number[:, None])

  def _admitted(self, count, positions: Int32[Array, 'B T']):
    """(count, status) of an append, before pages are asked for."""
    page, used = self.page, self.used
    count = arriving(used, self.status, count, positions.shape[1])
    open_slot = self._slot((used // page)[:, None])[:, 0, 0]
    open_start = start_of_page(self.starts[:, 0], open_slot)
    follows = continues(open_start, used, positions, count, page)
    faults = [(Status.POSITION_GAP, ~follows)]
    if not self.config.endless:
      over = used + count > self.table.shape[2] * page
      faults.append((Status.OVER_CAPACITY, over))
    return settle(self.status, count, *faults)

  def _touched(
    self, count: Int32[Array, 'B'], n: int
  ) -> tuple[Int32[Array, 'B K n'], Bool[Array, 'B K n']]:
    """Slots of the n pages from the open one on, and which are written.

    Ring heads skip pages that the same append would overwrite.
    """
    number = (self.used // self.page)[:, None] + jnp.arange(n, dtype=jnp.int32)
    last = ((self.used + count - 1) // self.page)[:, None]
    arrives = (number <= last) & (count > 0)[:, None]
    stays = number > last - self.config.ring_pages
    stays |= number < self.config.sink_pages
    stays = stays[:, None] | ~self.ring[:, None]
    return self._slot(number), arrives[:, None] & stays

  def _granted(self, wanted: Bool[Array, 'B K n']) -> Bool[Array, 'B']:
    granted = self.vacancy.grant(wanted)
    axis = self.config.agree_over
    if axis is not None:
      granted = jax.lax.pmin(granted.astype(jnp.int32), axis) > 0
    return granted

  def _newest(self, lengths: Int32[Array, 'B']) -> Int32[Array, 'B K']:
    """Position of token number lengths - 1 as each head has it; -1: none."""
    slot = self._slot(((lengths - 1) // self.page)[:, None])[..., 0]
    return last_token(self.starts, slot, lengths[:, None], self.page)

  def _ring_lost(self, lengths: Int32[Array, 'B']) -> Bool[Array, 'B']:
    """Whether a cut needs pages that later tokens pushed out of the rings."""
    config, page = self.config, self.page
    if not config.has_ring:
      return jnp.zeros(lengths.shape, bool)
    # The next query, at number `lengths`, sees `recent` tokens, itself one.
    needed = jnp.maximum(lengths - config.recent + 1, 0) // page
    needed = jnp.maximum(needed, config.sink_pages)
    pushed_out = (self.peak - 1) // page - config.ring_pages
    held_before = needed <= (lengths - 1) // page
    return (lengths < self.used) & held_before & (needed <= pushed_out)

  def _cut_stats(self, lengths: Int32[Array, 'B']) -> Stats | None:
    """Statistics after a cut, recomputed from the keys that are stored."""
    if self.stats is None:
      return None
    logical = self.config.logical_page
    ids = take_at(self.table, self._slot((lengths // self.page)[:, None]))
    ids = jnp.maximum(ids[:, self._safe_stats_heads(), 0], 0)
    part = (lengths % self.page) // logical

    def logical_page(pool):
      x = pool[ids]
      x = x.reshape(*ids.shape, -1, logical, *pool.shape[2:])
      return jax.vmap(lambda row, i: row[:, i])(x, part)

    pool = self.pool
    codes, scale, zero = jax.tree.map(
      logical_page, (pool.k, pool.k_scale, pool.k_zero)
    )
    keys = dequantise(codes, scale, zero, jnp.float32)
    error = jnp.zeros(keys.shape[:3]) if scale is None else error_bound(scale)
    return self.stats.cut(keys, error, lengths < self.used, lengths)

  def _safe_stats_heads(self) -> Int32[Array, 'h']:
    """`stats_heads` as an index: padding reads head 0, for nobody."""
    return jnp.maximum(self.stats_heads(), 0)

  def _unshared(self) -> Self:
    """What a row that was cut may write again becomes its own."""
    page, used = self.page, self.used
    held_until = -(-used // page) * page
    slot = self._slot((used // page)[:, None])
    cut = (used < self.shared) & (used % page > 0)
    copied = cut[:, None, None] & ~self.ring[:, None]
    held = take_at(self.table, slot)
    first = jnp.arange(self.table.shape[2], dtype=jnp.int32) * page
    behind = (held_until[:, None] <= first) & (first < self.shared[:, None])
    behind = behind[:, None] & ~self.ring[:, None]
    alone = dataclasses.replace(self, table=jnp.where(behind, -1, self.table))
    cache, granted = alone._with_copies(slot, copied, held)
    still_shared = jnp.where(granted, used // page * page, held_until)
    status = jnp.where(granted, self.status, jnp.int32(Status.OUT_OF_PAGES))
    return dataclasses.replace(
      cache, shared=jnp.minimum(self.shared, still_shared), status=status
    )

  def _mutable(self) -> tuple[Int32[Array, 'B K n'], Bool[Array, 'B K n']]:
    """Slots of the pages that a row may still write, and which of them are.

    The open page of a full head; all pages of a ring head.
    """
    is_open = (self.used % self.page > 0)[:, None, None]
    slot = self._slot((self.used // self.page)[:, None])
    if not self.config.has_ring:
      return slot, jnp.broadcast_to(is_open, slot.shape)
    index = jnp.arange(self.config.ring_width, dtype=jnp.int32)
    ring = self.ring[:, None]
    return (
      jnp.where(ring, index, slot),
      jnp.where(ring, True, is_open & (index == 0)),
    )

  def _with_copies(self, slot, copied, held) -> tuple[Self, Bool[Array, 'B']]:
    """Copies pages `held` to new ones in `slot`, and which rows got them."""
    granted = self._granted(copied)
    fresh, vacancy = self.vacancy.take(copied, granted)
    cache = dataclasses.replace(
      self,
      pool=_copy_pages(self.pool, fresh, self.pool, held),
      table=put_at(self.table, jnp.where(fresh < 0, -1, slot), fresh),
      vacancy=vacancy,
    )
    return cache, granted

  def _recounted(self, table: Int32[Array, 'B K W']) -> Self:
    """With this table, and vacancy and sharing as they follow from it."""
    held = holders(table, self.pool.k.shape[0])
    several = (table >= 0) & (held[jnp.maximum(table, 0)] > 1)
    stop = (jnp.arange(table.shape[2], dtype=jnp.int32) + 1) * self.page
    return dataclasses.replace(
      self,
      table=table,
      vacancy=Vacancy.without(held),
      shared=jnp.max(jnp.where(several, stop, 0), axis=(1, 2)),
    )

  def _emptied(self, rows: Bool[Array, 'B'], status=Status.OK) -> Self:
    return dataclasses.replace(
      self,
      starts=jnp.where(rows[:, None, None], NEVER, self.starts),
      used=jnp.where(rows, 0, self.used),
      peak=jnp.where(rows, 0, self.peak),
      status=jnp.where(rows, jnp.int32(status), self.status),
    )

  def _failed(self, rows: Bool[Array, 'B']) -> Self:
    """Empties rows that found no pages."""
    failed = self._emptied(rows, Status.OUT_OF_PAGES)
    table = jnp.where(rows[:, None, None], -1, failed.table)
    return dataclasses.replace(failed, table=table)

  def _check_insert(self, other: Self) -> None:
    same = dataclasses.replace(other.config, pool_pages=self.config.pool_pages)
    if same != self.config:
      raise ValueError(f'{other.config} must equal {self.config}')
    if other.table.shape[0] != 1 or other.table.shape[2] > self.table.shape[2]:
      raise ValueError(
        f'insert takes one row of at most {self.table.shape[2]} pages a head, '
        f'not {other.table.shape[0]} rows of {other.table.shape[2]}'
      )


def _copy_pages(
  pool: Pages, ids: Int32[Array, '*n'], source: Pages, old: Int32[Array, '*n']
) -> Pages:
  """Pool with source's pages `old` at `ids`; nothing where an id is -1."""
  return jax.tree.map(
    lambda to, of: put(to, ids, of[jnp.maximum(old, 0)]), pool, source
  )
