"""One token a row, appended in place by one program: Pallas Triton.

Its keys and values may come beside queries, in one array (`Joint`), and their
codes in another: each array more would be a launch before this one. Further
programs of the launch may score pages for these queries meanwhile (`Scoring`).

A lane stands for a kv head of a row, lane = row * K + head, padded to a power
of two; sums over a row or over earlier lanes are masked sums over lanes. All
lanes are one program, since pages are granted to rows in an order that all of
them must see.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32, Num

from kernels_pallas.keys import NEVER
from kernels_pallas.page_choice.gpu import Scoring

_WARPS = 8


@dataclasses.dataclass(frozen=True)
class Rules:
  """Static numbers of an append.

  Attributes:
    page: tokens of a page.
    logical: tokens of a page of the statistics.
    capacity: tokens a row may hold; None: without end.
    statistics: 'bounds' (least and largest key), 'moments' (sums of keys and of
      their squares), or '' (no statistics).
    ok: a row's status while it takes tokens.
    position_gap: its status after a token that continues nothing.
    over_capacity: after one too many.
    out_of_pages: after one for which no page was free.
    sink_pages: pages of ring heads that stay.
    ring_pages: pages of ring heads that are used again and again.
  """

  page: int
  logical: int
  capacity: int | None
  statistics: str
  ok: int
  position_gap: int
  over_capacity: int
  out_of_pages: int
  sink_pages: int = 0
  ring_pages: int = 0


class Cursors(NamedTuple):
  """What an append moves, a row; `lcx.cache.paged_cache` has the meanings.

  Attributes:
    table: int32 [B K W]; None in a contiguous cache.
    starts: int32 [B K W], or [B W] in a contiguous cache.
    used: int32 [B].
    peak: int32 [B]; None in a contiguous cache.
    status: int32 [B].
    taken: int32 [1]; None in a contiguous cache.
  """

  table: Int32[Array, 'B K W'] | None
  starts: Int32[Array, 'B *K W']
  used: Int32[Array, 'B']
  peak: Int32[Array, 'B'] | None
  status: Int32[Array, 'B']
  taken: Int32[Array, '1'] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joint:
  """What a layer makes of a token, in one array: one launch writes it.

  Attributes:
    array: [B N+2K H] queries, then keys, then values, head by head.
    kv_heads: K, static.
  """

  array: Float[Array, 'B heads H']
  kv_heads: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, q, k, v) -> 'Joint':
    """Of queries [B 1 N H], keys and values [B 1 K H] of one dtype."""
    x = jnp.concatenate([q, k, v], axis=2)[:, 0]
    # Computed at once, not again by each that reads a part of it.
    return cls(jax.lax.optimization_barrier(x), k.shape[2])

  @property
  def queries(self) -> int:
    """N."""
    return self.array.shape[1] - 2 * self.kv_heads

  @property
  def keys_and_values(self) -> Float[Array, 'B 2K H']:
    return self.array[:, self.queries :]

  def heads(self) -> tuple['Heads', 'Heads']:
    """Keys and values."""
    n = self.queries
    return Heads(self.array, n), Heads(self.array, n + self.kv_heads)


class Heads(NamedTuple):
  """The kv heads of an array that begin at its head `first` (static).

  Attributes:
    array: [B heads *D], or its ref.
    first: of K heads.
  """

  array: Any
  first: int = 0

  def load(self, row, head, *channel, mask):
    at = (row, head + self.first, *channel)
    return plgpu.load(self.array.at[at], mask=mask)


def append_token(
  pool: Sequence[Num[Array, 'P page *D']],
  tokens: Sequence[Heads],
  cursors: Cursors,
  stats: Sequence[Float[Array, 'B h C H']],
  keys: Heads,
  positions: Int32[Array, 'B'],
  count: Int32[Array, 'B'] | None,
  *,
  heads: int,
  rules: Rules,
  ring: Bool[Array, 'K'] | None = None,
  order: Int32[Array, 'P'] | None = None,
  beside: Joint | None = None,
  scoring: Scoring | None = None,
  interpret: bool = False,
) -> tuple[list, Cursors, list, Float[Array, 'B N H'] | None, Any]:
  """Appends one token to each row that takes it.

  A page's first token makes the page's other slots 0: a recycled page may hold
  a NaN, which a weight of 0 would not keep out of a sum over values.

  Args:
    pool: arrays of pages that one token each enters: keys, values, scales. A
      contiguous cache [B K W*page H] is a pool of its pages in order.
    tokens: what enters them, in their dtypes.
    cursors: of the rows.
    stats: two arrays, or none.
    keys: [B K H] unquantised, for the statistics.
    positions: of the tokens.
    count: 0 or 1; None: 1.
    heads: K.
    rules: static numbers.
    ring: which heads are ring heads; None: none.
    order: free pages in order, from `cursors.taken` on; None: contiguous.
    beside: whose queries are copied to an array of their own; None: nobody's.
    scoring: of the queries of `beside` by `stats`; None: nothing is scored.
      Its `Always` must have the newest page seen, as one of the recent ones:
      its statistics are read as they are before the append or after it, or
      half way.
    interpret: runs on the CPU, for tests.

  Returns:
    (pool, cursors, stats), in the places of the old ones, the queries, and what
    `scoring` found.

  Raises:
    ValueError: `scoring` without queries or without the statistics it is of.
  """
  if scoring is not None and beside is None:
    raise ValueError('scoring takes queries beside the token')
  kind = 'moments' if scoring is not None and scoring.moments else 'bounds'
  if scoring is not None and rules.statistics != kind:
    raise ValueError(f'{rules.statistics=} must be {kind!r}, which are scored')
  batch = keys.array.shape[0]
  lanes = pl.next_power_of_2(batch * heads)
  moved = [list(pool), cursors, list(stats)]
  entering = [x.array for x in (*tokens, keys)]
  copied, queries = [], []
  if beside is not None:
    shape = (batch, beside.queries, beside.array.shape[2])
    copied = [beside.array]
    queries = [jax.ShapeDtypeStruct(shape, beside.array.dtype)]
  fixed = [entering, copied, (positions, count, ring, order)]
  changed, tree = jax.tree.flatten(moved)
  given, given_tree = jax.tree.flatten(fixed)
  scored = [] if scoring is None else scoring.outputs()
  read = [] if scoring is None else scoring.operands()
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed]
  shapes += queries + scored

  def kernel(*refs):
    inputs, out = refs[: -len(shapes)], refs[-len(shapes) :]
    old = tree.unflatten(inputs[: len(changed)])
    new = tree.unflatten(out[: len(changed)])
    rest = inputs[len(changed) :]
    entering, copied, rest = given_tree.unflatten(rest[: len(given)])
    *entering, mine = (
      Heads(ref, x.first) for ref, x in zip(entering, (*tokens, keys))
    )

    def append():
      _kernel(
        old, new, entering, mine, *rest, lanes=lanes, batch=batch, heads=heads,
        rules=rules,
      )  # fmt: skip
      for source in copied:
        _copy_heads(source, out[len(changed)])

    if scoring is None:
      append()
      return
    # The first program appends, so that it is not the last to begin.
    step, *others = (pl.program_id(i) for i in range(3))
    pl.when((step == 0) & (others[0] == 0) & (others[1] == 0))(append)

    @pl.when(step > 0)
    def _():
      (queries_ref,), (low, high) = copied, old[2]
      scoring.run(
        (step - 1, *others),
        (queries_ref, low, high),
        inputs[len(changed) + len(given) :],
        out[-len(scored) :],
      )

  grid = ()
  if scoring is not None:
    grid = (1 + scoring.grid[0], *scoring.grid[1:])
  out = pl.pallas_call(
    kernel,
    out_shape=shapes,
    grid=grid,
    input_output_aliases={i: i for i in range(len(changed))},
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
    interpret=interpret,
    name='append_token',
  )(*changed, *given, *read)
  pool, cursors, stats = tree.unflatten(out[: len(changed)])
  found = scoring and scoring.found(out[-len(scored) :])
  return pool, cursors, stats, out[len(changed)] if queries else None, found


def _copy_heads(source, target):
  """The first heads of each row of `source` [B heads H] to `target` [B N H]."""
  batch, heads, width = target.shape
  # At most what its threads hold in a few registers.
  some = min(
    pl.next_power_of_2(heads), max(1, 4096 // pl.next_power_of_2(width))
  )
  head = jnp.arange(some, dtype=jnp.int32)
  for row in range(batch):
    for begin in range(0, heads, some):
      spread, inside, channel = _channels(head, width)
      at = (jnp.full_like(channel[0], row), spread(begin + head), *channel)
      mask = spread(begin + head < heads) & inside
      plgpu.store(
        target.at[at], plgpu.load(source.at[at], mask=mask), mask=mask
      )


class _Lanes(NamedTuple):
  """A vector each: what a lane stands for, and what its token does.

  Attributes:
    real: whether it stands for anything.
    row: of the batch; 0 where it is not real.
    head: kv head.
    used: tokens the row holds before.
    slot: of the head's table that the token's page has.
    comes: whether the token is taken.
    status: of the row, after it.
    target: page of the pool; -1: none.
  """

  real: jax.Array
  row: jax.Array
  head: jax.Array
  used: jax.Array
  slot: jax.Array
  comes: jax.Array
  status: jax.Array
  target: jax.Array

  @property
  def speaks(self):
    """The lanes that write what a row has once."""
    return self.real & (self.head == 0)


def _kernel(
  old, new, tokens, keys, positions, count, ring, order, *, lanes, batch, heads,
  rules,
):  # fmt: skip
  """Old and new are the same memory: what is read again is read from `old`.

  A load costs more than all arithmetic here, and waits for what its address or
  mask was made of. So all that do not need one another come first, with masks
  that are wider than what is used of them.
  """
  _, cursors, stats = old
  lane = jnp.arange(lanes, dtype=jnp.int32)
  real = lane < batch * heads
  row, head = jnp.where(real, lane // heads, 0), lane % heads
  zeros = jnp.zeros_like(row)

  def of_row(ref):
    return plgpu.load(ref.at[row], mask=real, other=0)

  used, status, position = map(
    of_row, (cursors.used, cursors.status, positions)
  )
  counted = None if count is None else of_row(count)
  peak = None if cursors.peak is None else of_row(cursors.peak)
  values = [_load(x, row, head, real) for x in tokens]
  offset = used % rules.page
  slot, is_ring, first_slot = _slots(
    used // rules.page, real, head, ring, rules
  )
  width = cursors.starts.shape[-1]
  first = (row, *(zeros,) * (len(cursors.starts.shape) - 2), first_slot)
  first_start = plgpu.load(
    cursors.starts.at[first], mask=real & (first_slot < width), other=NEVER
  )
  held = taken = zeros
  if order is not None:
    taken = plgpu.load(cursors.taken.at[zeros])
    held = plgpu.load(
      cursors.table.at[row, head, slot], mask=real & (slot < width), other=-1
    )
  index, absorbed = head, []
  if rules.statistics:
    # The statistics have rows for full heads alone.
    if ring is not None:
      other = jnp.arange(pl.next_power_of_2(heads), dtype=jnp.int32)
      rings = plgpu.load(ring.at[other], mask=other < heads, other=True)
      index = _sum((~rings).astype(jnp.int32), other < head[:, None])
    room = used // rules.logical < stats[0].shape[2]
    absorbed = _absorbed(
      stats, keys, (row, index, used), head, real & ~is_ring & room, rules
    )

  comes = real & (status == rules.ok)
  if counted is not None:
    comes &= counted > 0

  def settled(comes, status, fault, hit):
    hit &= comes
    return comes & ~hit, jnp.where(hit, fault, status)

  gap = (offset > 0) & (position != first_start + offset)
  faults = [(rules.position_gap, gap)]
  if rules.capacity is not None:
    faults.append((rules.over_capacity, used >= rules.capacity))
  if order is None:  # the contiguous cache names them the other way round
    faults.reverse()
  for fault, hit in faults:
    comes, status = settled(comes, status, fault, hit)

  if order is None:
    first_page = (row * heads + head) * width
    target = jnp.where(comes, first_page + slot, -1)
  else:
    wanted = (comes & (held < 0)).astype(jnp.int32)
    need = _sum(wanted, row[:, None] == row)
    # The modest first, then lower rows: as `Vacancy.grant`.
    ahead = (need < need[:, None]) | (
      (need == need[:, None]) & (row <= row[:, None])
    )
    refused = _sum(wanted, ahead) > order.shape[0] - taken
    comes, status = settled(comes, status, rules.out_of_pages, refused)
    wanted = jnp.where(comes, wanted, 0)
    place = taken + _sum(wanted, lane < lane[:, None])
    fresh = plgpu.load(order.at[place], mask=wanted > 0, other=-1)
    target = jnp.where(comes, jnp.maximum(held, fresh), -1)
    _store(new[1].table, (row, head, slot), fresh, wanted > 0)
    _store(new[1].taken, (zeros,), taken + jnp.sum(wanted), lane == 0)

  at = _Lanes(real, row, head, used, slot, comes, status, target)
  _move(new[1], peak, at, position - offset)
  for leaf, value in zip(new[0], values):
    _write(leaf, value, at, offset)
  if rules.statistics:
    spread, inside, channel = _channels(row, keys.array.shape[2])
    where = map(spread, (row, index, used // rules.logical))
    mask = spread(comes & ~is_ring) & inside
    where = (*where, *channel)
    for leaf, value in zip(new[2], absorbed):
      _store(leaf, where, value, mask)


def _slots(number, real, head, ring, rules: Rules):
  """Table slot of page `number`, whether the head is a ring, head 0's slot."""
  if ring is None:
    return number, jnp.zeros_like(real), number
  around = number - rules.sink_pages
  around = rules.sink_pages + around % rules.ring_pages
  around = jnp.where(number < rules.sink_pages, number, around)
  is_ring = plgpu.load(ring.at[head], mask=real, other=False)
  first = plgpu.load(ring.at[jnp.zeros_like(head)])
  return (
    jnp.where(is_ring, around, number),
    is_ring,
    jnp.where(first, around, number),
  )


def _sum(x, chosen):
  """Sum over the last axis of x where `chosen` [lanes n]."""
  return jnp.sum(jnp.where(chosen, x, 0), axis=1)


def _store(ref, at, value, mask):
  """Stores value at ref[at] where `mask`.

  Other lanes point behind the end: an interpreted store writes back what their
  place holds, which must not be the place of a lane that stores.
  """
  first = jnp.where(mask, at[0], ref.shape[0])
  plgpu.store(ref.at[(first, *at[1:])], value, mask=mask)


def _move(new: Cursors, peak, at: _Lanes, first):
  speaks, total = at.comes & at.speaks, at.used + 1
  _store(new.status, (at.row,), at.status, at.speaks)
  _store(new.used, (at.row,), total, speaks)
  if peak is None:  # contiguous
    _store(new.starts, (at.row, at.slot), first, speaks)
    return
  _store(new.peak, (at.row,), jnp.maximum(peak, total), speaks)
  _store(new.starts, (at.row, at.head, at.slot), first, at.comes)


def _load(values: Heads, row, head, real):
  """A token's channels, [lanes H], or its number, [lanes]."""
  if len(values.array.shape) == 2:
    return values.load(row, head, mask=real)
  spread, inside, channel = _channels(row, values.array.shape[2])
  mask = spread(real) & inside
  return values.load(spread(row), spread(head), *channel, mask=mask)


def _write(leaf, value, at: _Lanes, offset):
  """A token into slot `offset` of its page; a new page's others are 0."""
  begins = at.comes & (offset == 0)
  if len(leaf.shape) == 2:
    spread, inside, channel = (lambda x: x), True, ()
  else:
    spread, inside, channel = _channels(at.row, leaf.shape[2])
  target = spread(at.target)
  comes = spread(at.comes) & inside
  _store(leaf, (target, spread(offset), *channel), value, comes)

  @pl.when(jnp.max(begins.astype(jnp.int32)) > 0)
  def _():
    zero = jnp.zeros(target.shape, leaf.dtype)
    cleared = spread(begins) & inside

    @pl.loop(1, leaf.shape[1])
    def _(slot):
      _store(
        leaf, (target, jnp.full_like(target, slot), *channel), zero, cleared
      )


def _absorbed(old, keys, page, head, mask, rules: Rules):
  """The statistics of the logical page that the token enters, with it.

  Args:
    old: the two arrays.
    keys: of the tokens.
    page: row, row of the statistics and tokens before, of each lane.
    head: kv head of each lane.
    mask: lanes whose page exists.
    rules: static numbers.
  """
  row, index, used = page
  spread, inside, channel = _channels(row, keys.array.shape[2])
  mask = spread(mask) & inside
  key = keys.load(spread(row), spread(head), *channel, mask=mask)
  key = key.astype(old[0].dtype)
  where = (*map(spread, (row, index, used // rules.logical)), *channel)
  had = spread(used % rules.logical > 0)
  if rules.statistics == 'bounds':
    entering = (key, jnp.minimum), (key, jnp.maximum)
  else:
    entering = (key, jnp.add), (key * key, jnp.add)
  found = []
  for before, (value, combine) in zip(old, entering):
    earlier = plgpu.load(before.at[where], mask=mask & had)
    found.append(jnp.where(had, combine(earlier, value), value))
  return found


def _channels(row, width: int):
  """How lanes become a tile of channels: (spread, mask, (channel,))."""
  shape = (*row.shape, pl.next_power_of_2(width))
  channel = jnp.arange(shape[1], dtype=jnp.int32)
  channel = jnp.broadcast_to(channel[None], shape)
  return (
    lambda x: jnp.broadcast_to(x[:, None], shape),
    channel < width,
    (channel,),
  )
