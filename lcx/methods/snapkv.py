"""SnapKV: decode over the prompt tokens that its last queries looked at.

Li et al., arXiv:2404.14469; see `lcx.select.snapkv`. The prompt is read densely
and judged once, by its own last tokens: in the context-first protocol these are
the context's, since the question is not known yet. Tokens that are not kept are
never read again, but the cache still holds them: this saves time and no memory.
(The paper frees them.) So rewinding to the end of the prompt stays exact.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.keys import NEVER
from kernels_pallas.partial import merge
from kernels_pallas.selected_token import attend_tokens
from lcx import cache as caches
from lcx.methods import shards
from lcx.methods.base import Axes, Context, Decode, Method, Rope, Trace
from lcx.methods.dense import DenseDecode, DensePrefill, dense_pairs
from lcx.methods.listed_pages import attend_listed
from lcx.policy import AS_MEASURED
from lcx.select.snapkv import snapkv
from lcx.select.window import last_queries

# Numbers of the rows that lcx/policy.json has (configs/selector_speed.py:decode
# on an H200): another budget has another crossover.
MEASURED = {
  'budget': 2048,
  'window': 32,
  'kernel': 5,
  'pool': 'avg',
  'room': 2048,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
  """The prompt's last queries, while it is read.

  Attributes:
    q: rotated.
    at: positions, ascending; -1: none. Alike in all kv heads.
  """

  q: Float[Array, 'B N w H']
  at: Int32[Array, 'B K w']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
  """The prompt's tokens that are still read, once it has been judged.

  Attributes:
    rows: page * page_size + slot of kept tokens; -1: none.
    positions: of these.
    since: first position of the window; pages that reach it are seen whole.
  """

  rows: Int32[Array, 'B K n']
  positions: Int32[Array, 'B K n']
  since: Int32[Array, 'B K']


@dataclasses.dataclass(frozen=True)
class SnapKVDecode(Decode):
  """Kept tokens, the window and all that came after it.

  Attributes:
    budget: prompt tokens read per kv head, the window included.
    window: last prompt tokens, which judge the others and are always kept.
    kernel: positions over which votes are pooled, odd.
    pool: 'avg' or 'max'.
    room: tokens after the prompt that are seen; of more, the newest.
    crossover: a cache with room for at most so many tokens is read whole: below
      that reading less takes longer. The whole capacity counts, prompt and
      answer, and however few tokens a row holds: that is known only when the
      program runs. -1: one token less than the crossover that was measured on
      this device with these very numbers (lcx/policy.json), by tokens held; 0
      where there is none.
  """

  budget: int = 2048
  window: int = 32
  kernel: int = 5
  pool: str = 'avg'
  room: int = 2048
  crossover: int = AS_MEASURED

  needs = frozenset({'all_tokens', 'rotated'})

  @property
  def measured_as(self) -> str:
    """The method's name in measured rows; '': none has these numbers."""
    same = all(getattr(self, name) == x for name, x in MEASURED.items())
    return 'snapkv' if same else ''

  def at_full_budget(self, length: int) -> 'SnapKVDecode':
    return dataclasses.replace(
      self, budget=length + self.window + 1, room=max(self.room, length)
    )

  def at_tight_budget(self, length: int) -> 'SnapKVDecode':
    window = max(length // 32, 1)
    return dataclasses.replace(
      self, budget=length // 4, window=window, crossover=0
    )

  def check(self, config, capacity: int) -> None:
    if not 0 < self.window < self.budget:
      raise ValueError(
        f'decode.budget={self.budget} must exceed window={self.window}, which '
        'must be at least 1'
      )
    if self.kernel < 1 or self.kernel % 2 == 0:
      raise ValueError(f'decode.kernel={self.kernel} must be odd')
    if self.pool not in ('avg', 'max'):
      raise ValueError(f"decode.pool={self.pool!r} must be 'avg' or 'max'")
    if self.room < 1:
      raise ValueError(f'decode.room={self.room} must be at least 1')
    if self.crossover < AS_MEASURED:
      raise ValueError(f'decode.crossover={self.crossover} must be at least -1')

  def state_specs(self, axes: Axes):
    # What a row keeps differs by sequence shard; heads are split as in q and k.
    return jax.sharding.PartitionSpec((axes.data, axes.seq), axes.model)

  def observe(self, q, k, v, rope: Rope, state, ctx: Context):
    """The last queries so far: of this call's and those kept before."""
    q, at, valid = rope(q, ctx.positions), ctx.positions, ctx.valid
    if isinstance(state, Window):
      before = state.at[:, 0]
      q = jnp.concatenate([state.q.swapaxes(1, 2), q], axis=1)
      at = jnp.concatenate([before, at], axis=1)
      valid = jnp.concatenate([before >= 0, valid], axis=1)
    last, at = last_queries(q, at, valid, self.window, ctx.axes.seq)
    shape = (at.shape[0], k.shape[2], self.window)
    return Window(last, jnp.broadcast_to(at[:, None], shape))

  def start(self, cache, state) -> Kept:
    """Judges the prompt's tokens by the last queries."""
    seq = Axes().seq
    at = state.at[:, 0]
    newest = jnp.max(at, axis=1)
    since = newest - self.window + 1
    rows, positions = snapkv(
      state.q,
      at,
      cache.pages(),
      cache.page_ids(),
      cache.page_starts(),
      since=since,
      keep=self.budget - self.window,
      kernel=self.kernel,
      pool=self.pool,
      axis=seq,
    )
    return Kept(
      rows, positions, jnp.broadcast_to(since[:, None], rows.shape[:2])
    )

  def attend(self, q, k, v, rope: Rope, cache, state, ctx: Context):
    if shards.sees_all(
      self.crossover, 'layer', self.measured_as, q, cache, ctx
    ):
      return DenseDecode().attend(q, k, v, rope, cache, state, ctx)
    q, cache = shards.append_rotated(q, k, v, rope, cache, ctx)
    pages = cache.pages()
    ids, starts, lost = self._after(cache, state.since, pages.page)
    part = merge(
      attend_tokens(
        q,
        pages,
        state.rows,
        state.positions,
        q_positions=ctx.positions,
        **shards.window(k.shape[2], ctx.sliding_window),
      ),
      attend_listed(q, cache, ids, starts, ctx),
    )
    out = shards.merged(part, ctx.axes).astype(q.dtype)
    trace = None
    if ctx.trace:
      until = shards.seen_until(cache, ctx)
      trace = Trace(
        keys=_seen(state, starts, pages.page, q, until, ctx),
        pairs=dense_pairs(q, ctx),
        counters={'lost_new_tokens': lost * q.shape[1] * 1.0},
      )
    return out, cache, state, trace

  def _after(self, cache, since: Int32[Array, 'B K'], page: int):
    """Ids and starts of the pages that reach `since`, and what `room` lost."""
    ids, starts = cache.page_ids(), cache.page_starts()
    n_pages = ids.shape[2]
    n = min(n_pages, -(-(self.room + self.window) // page) + 1)
    used = starts < NEVER
    first = jnp.sum(used & (starts + page <= since[..., None]), axis=2)
    count = jnp.sum(used, axis=2) - first
    skipped = jnp.maximum(count - n, 0)
    place = (first + skipped)[..., None] + jnp.arange(n)
    safe = jnp.minimum(place, n_pages - 1)
    good = place < n_pages
    ids = jnp.where(good, jnp.take_along_axis(ids, safe, axis=2), -1)
    starts = jnp.where(good, jnp.take_along_axis(starts, safe, axis=2), NEVER)
    return ids, starts, jnp.sum(skipped * page, axis=1).astype(jnp.float32)


def _seen(state, starts, page, q, until, ctx: Context) -> Float[Array, 'B']:
  """Keys that valid queries see here, over all query heads."""
  low = -1
  if ctx.sliding_window is not None:
    low = ctx.positions - ctx.sliding_window
  low = jnp.broadcast_to(low, until.shape)[:, :, None, None]
  until = until[:, :, None, None]
  kept = state.positions[:, None]
  kept = jnp.sum((kept <= until) & (kept > low), axis=(2, 3))
  start = starts[:, None]
  end = jnp.minimum(until + 1, start + page)
  late = jnp.sum(jnp.maximum(end - jnp.maximum(start, low + 1), 0), axis=(2, 3))
  group = q.shape[2] // starts.shape[1]
  seen = jnp.where(ctx.valid, (kept + late) * group, 0)
  return jnp.sum(seen, axis=1, dtype=jnp.float32)


METHOD = Method(
  'snapkv', DensePrefill(), caches.CONFIGS['dense'], SnapKVDecode()
)
