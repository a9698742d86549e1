"""TokenSelect: one list of tokens a layer, chosen by the votes of all heads.

Wu et al., "TokenSelect: efficient long-context inference and length
extrapolation for LLMs via dynamic token-level KV cache selection",
arXiv:2411.02886. What a query sees is

  [first `sink` tokens | `k` tokens with most votes | last `local` tokens],

in ascending order, the same for all heads (`lcx.select.soft_vote`).

  prefill   chunks of 512 tokens select with one pooled query each (section 5.2)
            and attend to [list | themselves], causally. Lists ascend, so what
            a row sees is a prefix of its chunk's gathered keys: one interval.
  decode    a list serves as long as the query stays close to the one that
            selected it (algorithm 1, the Selection Cache). Its keys and values
            lie together in a working set to which new tokens are appended, so
            that a hit reads 2,688 tokens and nothing else.

positions='rank' gives keys their rank in the list as position (section 5.4), so
that a model never sees a distance that it was not trained for; the cache then
keeps keys unrotated. Scoring follows the release there: keys at position 0, a
chunk's query i at `local` + i.

Beyond the paper: page bounds may choose whose tokens are scored in decode
(`lcx.select.pruned_scoring`; a cache with page=16 and stats keeps them); a list
serves at most `reuse` tokens, for which the local window keeps room, so that no
token leaves it unselected; the release's kv head (h modulo K) is not kept, nor
its even pooling windows.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Shaped

from kernels_pallas.block_sparse import block_sparse, dense_blocks
from kernels_pallas.keys import NEVER
from kernels_pallas.passing_block import passing_block
from kernels_pallas.selected_token import attend_pages
from lcx import cache as caches
from lcx.cache import CacheShape
from lcx.methods import shards
from lcx.methods.base import Context, Decode, Method, Prefill, Rope, Trace
from lcx.methods.dense import decode_trace, dense_pairs, dense_trace
from lcx.select import soft_vote, working_set
from lcx.select.audit import sampled_mass
from lcx.select.chunk_votes import chunk_stats, chunk_votes
from lcx.select.pruned_scoring import lost_votes, pruned_tokens
from lcx.select.token_rules import TokenRules
from lcx.select.top_tokens import top_tokens, with_ends
from lcx.select.working_set import WorkingSet

Scoring = Literal['full', 'pruned', 'budget']

GROUP_BYTES = 2**29  # temporary memory of the chunks that go together


@dataclasses.dataclass(frozen=True)
class TokenSelectPrefill(TokenRules, Prefill):
  """Chunks select, and attend to what they selected and to themselves.

  Attributes:
    chunk: tokens that share a list; `local` counts back from a chunk's end.
  """

  chunk: int = 512

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    if self.chunk < 1 or (self.chunk % 128 and 128 % self.chunk):
      raise ValueError(
        f'chunk={self.chunk} must be a multiple or a divisor of 128'
      )
    if self.local < self.chunk:
      raise ValueError(
        f'local={self.local} must hold the chunk={self.chunk} itself'
      )

  def at_tight_budget(self, length: int) -> 'TokenSelectPrefill':
    return dataclasses.replace(self, k=length // 8, sink=4, local=32, chunk=32)

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, length, heads, _ = q.shape
    rotated = rope(k, ctx.positions)
    cache = shards.store(cache, k, rotated, v, ctx)
    where = {
      'q_start': shards.first_query(length, batch, ctx.axes),
      'lengths': ctx.lengths,
    }
    size = jax.lax.axis_size(ctx.axes.seq)
    if self.width >= size * length:  # every list would hold every token
      out, _ = block_sparse(
        rope(q, ctx.positions),
        *shards.gather_sequence(rotated, v, ctx.axes),
        dense_blocks(batch, heads, length),
        **where,
      )
      return out, cache, dense_trace(q, ctx)

    frame = k if self.positions == 'rank' else rotated
    keys, values = shards.gather_sequence(frame, v, ctx.axes)
    out, lse, seen = self._chunks(q, keys, values, rope, ctx)
    trace = None
    if ctx.trace:
      seen = jnp.sum(jnp.where(ctx.valid, seen, 0), axis=1, dtype=jnp.float32)
      mass = None
      if self.positions == 'true':
        mass = sampled_mass(rope(q, ctx.positions), keys, lse, **where)
      trace = Trace(seen * heads, dense_pairs(q, ctx), mass=mass)
    return out, cache, trace

  def _chunks(self, q, keys, values, rope: Rope, ctx: Context):
    """Selection and attention of this shard's rows, some chunks at a time.

    Returns:
      (out [B T N H], lse [B T N], keys that each row sees [B T]).
    """
    batch, length, _, dim = q.shape
    scale = self.scale(dim)
    chunks, first, offset = self._grid(length, ctx)
    laid = functools.partial(_laid, offset=offset, room=chunks * self.chunk)
    q, positions, valid = laid(q), laid(ctx.positions), laid(ctx.valid)
    begin = first + jnp.arange(chunks, dtype=jnp.int32) * self.chunk
    begin = jnp.broadcast_to(begin, (batch, chunks))
    high = jnp.maximum(begin + self.chunk - self.local, 0)
    low = jnp.minimum(self.sink, high)
    asked = self._asked(q, positions, valid, first, rope, ctx)
    stats = chunk_stats(
      asked,
      keys,
      values,
      low,
      high,
      kind=self.vote,
      n_best=min(self.k, keys.shape[2]),
      scale=scale,
    )
    asked = soft_vote.voters(asked, keys.shape[1], self.vote)
    together = self._together(chunks, keys)

    def one(args):
      q, positions, asked, stats, begin, low, high = args
      found = chunk_votes(
        asked,
        stats,
        keys,
        high,
        kind=self.vote,
        scale=scale,
        model=ctx.axes.model,
      )
      mask = soft_vote.candidates(low, high, keys.shape[2])
      found = soft_vote.max_pool(found, mask, self.pool)
      chosen, count = top_tokens(found.reshape(-1, keys.shape[2]), self.k)
      listed, total = with_ends(
        chosen,
        count,
        low=low.reshape(-1),
        high=high.reshape(-1),
        stop=begin.reshape(-1) + self.chunk,
        width=self.width,
      )
      return self._attend(q, keys, values, listed, total, positions, rope)

    def grouped(x):
      """[B chunks ...] to [groups B together ...]."""
      return jnp.moveaxis(x.reshape(batch, -1, together, *x.shape[2:]), 1, 0)

    def back(x):
      """[groups B*together chunk ...] to this shard's [B T ...]."""
      x = x.reshape(-1, batch, together * self.chunk, *x.shape[3:])
      x = jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])
      return jax.lax.dynamic_slice_in_dim(x, offset, length, axis=1)

    def by_chunk(x):
      return x.reshape(batch, chunks, self.chunk, *x.shape[2:])

    args = (by_chunk(q), by_chunk(positions), asked, stats, begin, low, high)
    found = jax.lax.map(one, tuple(grouped(x) for x in args))
    return tuple(back(x) for x in found)

  def _grid(self, length: int, ctx: Context):
    """(chunks that this shard's rows touch, place of the first, rows before).

    The grid is the prompt's, so that lists do not depend on the mesh.
    """
    start = jax.lax.axis_index(ctx.axes.seq) * length
    if length % self.chunk == 0:
      return length // self.chunk, start, 0
    if jax.lax.axis_size(ctx.axes.seq) == 1:
      return -(-length // self.chunk), 0, 0
    offset = start % self.chunk
    return (length - 2) // self.chunk + 2, start - offset, offset

  def _asked(self, q, positions, valid, first, rope: Rope, ctx: Context):
    """One query a chunk [B chunks N H], in the frame of the keys it scores."""
    batch, length, heads, dim = q.shape
    if self.positions == 'rank':
      positions = self.local + jnp.arange(length, dtype=jnp.int32) % self.chunk
      positions = jnp.broadcast_to(positions, (batch, length))
    sums = soft_vote.query_sums(
      rope(q, positions).reshape(-1, self.chunk, heads, dim),
      valid.reshape(-1, self.chunk),
      self.pooling,
    )
    total, weight = (x.reshape(batch, -1, *x.shape[1:]) for x in sums)
    size, chunks = jax.lax.axis_size(ctx.axes.seq), total.shape[1]
    if size > 1 and ctx.room // size % self.chunk:
      # A chunk may lie on two shards and more.
      place = first // self.chunk
      whole = (batch, -(-ctx.room // self.chunk) + chunks)

      def over_shards(x):
        grid = jnp.zeros((*whole, *x.shape[2:]), x.dtype)
        grid = jax.lax.dynamic_update_slice_in_dim(grid, x, place, axis=1)
        grid = jax.lax.psum(grid, ctx.axes.seq)
        return jax.lax.dynamic_slice_in_dim(grid, place, chunks, axis=1)

      total, weight = over_shards(total), over_shards(weight)
    return soft_vote.mean_of(total, weight).astype(q.dtype)

  def _attend(self, q, keys, values, listed, total, positions, rope: Rope):
    """Attention of chunks [B R chunk N H] over their lists [B*R width].

    Returns:
      (out [B*R chunk N H], lse [B*R chunk N], keys seen [B*R chunk]).
    """
    batch, _, length, _ = keys.shape
    chunks = listed.shape[0]
    kv_heads, dim = keys.shape[1], keys.shape[3]
    pool = jnp.arange(batch, dtype=jnp.int32).repeat(chunks // batch)
    pool = pool[:, None] * kv_heads + jnp.arange(kv_heads, dtype=jnp.int32)
    listed = jnp.minimum(listed, length - 1)  # the last chunk may be short
    rows = pool[:, :, None] * length + listed[:, None]  # [B*R K width]
    k = keys.reshape(-1, dim)[rows]
    v = values.reshape(-1, dim)[rows]
    q = q.reshape(chunks, self.chunk, *q.shape[3:])
    row = total[:, None] - self.chunk + jnp.arange(self.chunk, dtype=jnp.int32)
    if self.positions == 'rank':
      rank = jnp.arange(self.width, dtype=jnp.int32)
      rank = jnp.broadcast_to(rank, (chunks, self.width))
      k = rope(k.swapaxes(1, 2), rank).swapaxes(1, 2)
      q = rope(q, row)
    else:
      q = rope(q, positions.reshape(chunks, self.chunk))
    part = passing_block(q, k, v, jnp.zeros_like(row), row + 1)
    return *part, row + 1

  def _together(self, chunks: int, keys) -> int:
    """Chunks that are selected for and attended at once."""
    batch, kv_heads, length, dim = keys.shape
    gathered = 2 * kv_heads * self.width * dim * keys.dtype.itemsize
    limit = max(1, GROUP_BYTES // (batch * (12 * length + gathered)))
    return next(n for n in range(min(chunks, limit), 0, -1) if chunks % n == 0)


@dataclasses.dataclass(frozen=True)
class TokenSelectDecode(TokenRules, Decode):
  """Attention over a working set that is selected anew when queries turn.

  Keys are scanned on a step on which some row must select; the other rows keep
  their lists, so that answers do not depend on who else is in the batch. A
  piece of several tokens always selects, by its pooled query.

  Attributes:
    threshold: cosine to the last query that selected, below which a row selects
      (0.9 in the paper); 1: practically always.
    reuse: tokens that a list serves at most, 1: always select. `local` keeps
      room for them: right after a selection it holds `local` - `reuse` + 1.
    scoring: 'full'; 'pruned': only the best pages by bounds, with a certificate
      that the list is the same, else all tokens; 'budget': only the best pages.
    scored: tokens of the best pages, for 'pruned' and 'budget'.
  """

  threshold: float = 0.9
  reuse: int = 16
  scoring: str = 'full'
  scored: int = 8192

  @property
  def needs(self) -> frozenset[str]:
    frame = 'unrotated' if self.positions == 'rank' else 'rotated'
    bounds = set() if self.scoring == 'full' else {'bounds'}
    return frozenset({'all_tokens', frame} | bounds)

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    if not 0 <= self.threshold <= 1:
      raise ValueError(f'threshold={self.threshold} must be within 0 and 1')
    if self.reuse < 1:
      raise ValueError(f'reuse={self.reuse} must be at least 1')
    if self.local - self.reuse + 1 < self.max_queries:
      raise ValueError(
        f'local={self.local} must hold reuse={self.reuse} - 1 tokens to come '
        f'and a piece of {self.max_queries}'
      )
    if self.scoring not in get_args(Scoring):
      raise ValueError(
        f'scoring={self.scoring!r} must be in {get_args(Scoring)}'
      )
    if self.scoring == 'full':
      return
    if self.pool > 1:
      raise ValueError(
        f'pool={self.pool}: pooled votes reach beyond the pages that are '
        "scored; take scoring='full'"
      )
    if self.scoring == 'pruned' and self.vote == 'head_vote':
      raise ValueError(
        "vote='head_vote' has no certificate; take scoring='full' or 'budget'"
      )
    if self.scored < self.k:
      raise ValueError(f'scored={self.scored} must be at least k={self.k}')

  def at_full_budget(self, length: int):
    return dataclasses.replace(
      self, k=length, scored=max(self.scored, 2 * length)
    )

  def at_tight_budget(self, length: int):
    return dataclasses.replace(
      self, k=length // 8, sink=4, local=32, reuse=4, scored=length // 4
    )

  # The working set's life.

  def init_state(self, shape: CacheShape) -> WorkingSet:
    # `observe` learns the number of query heads, `start` the capacity.
    b, kv_heads, seq = shape.batch, shape.n_kv_heads, shape.shards.seq
    zeros = functools.partial(jnp.zeros, dtype=shape.dtype)
    none = jnp.zeros((b,), jnp.int32)
    return WorkingSet(
      query=zeros((b, kv_heads, shape.head_dim)),
      k=zeros((b, kv_heads, seq, shape.head_dim)),
      v=zeros((b, kv_heads, seq, shape.head_dim)),
      held=jnp.zeros((b * seq,), jnp.int32),
      total=none,
      age=none,
      expected=none - 1,
    )

  def state_specs(self, axes) -> WorkingSet:
    rows, tokens = P(axes.data), P(axes.data, axes.model, axes.seq)
    return WorkingSet(
      query=P(axes.data, axes.model),
      k=tokens,
      v=tokens,
      held=P((axes.data, axes.seq)),
      total=rows,
      age=rows,
      expected=rows,
    )

  def observe(self, q, k, v, rope: Rope, state: WorkingSet, ctx: Context):
    return dataclasses.replace(state, query=jnp.zeros_like(q[:, 0]))

  def start(self, cache, state: WorkingSet) -> WorkingSet:
    batch, kv_heads, pages = cache.page_ids().shape
    width = min(self.width, pages * cache.page)
    width = -(-width // working_set.PAGE) * working_set.PAGE
    dim, dtype = state.query.shape[-1], state.query.dtype
    empty = jnp.zeros((batch, kv_heads, width, dim), dtype)
    return dataclasses.replace(state, k=empty, v=empty)

  def attend(self, q, k, v, rope: Rope, cache, state: WorkingSet, ctx: Context):
    cache = shards.append(cache, k, rope(k, ctx.positions), v, ctx)
    mine = working_set.on_this_shard(ctx)
    query = soft_vote.pool_queries(q, ctx.valid, self.pooling)
    due = self._due(query, state, ctx)
    is_rank = self.positions == 'rank'

    def keep():
      """Algorithm 1, line 7; and the new token."""
      at = state.total[:, None] if is_rank else ctx.positions[:, :1]
      came = jnp.minimum(ctx.count, 1)
      none = jnp.zeros((q.shape[0],), jnp.float32)
      k1 = rope(k[:, :1], at)
      return state.appended(k1, v[:, :1], came, mine[:, 0]), none, none

    def select():
      """Lines 4 to 6, for the rows that must."""
      fresh, uncertain, lost = self._select(q, query, rope, cache, state, ctx)
      if q.shape[0] > 1:
        fresh = fresh.where(due, keep()[0])
      return fresh, jnp.where(due, uncertain, 0), jnp.where(due, lost, 0)

    anyone = jax.lax.pmax(jnp.any(due).astype(jnp.int32), ctx.axes.data)
    state, uncertain, lost = jax.lax.cond(anyone > 0, select, keep)
    # New tokens stand last; a query sees none that came after its own.
    after = jnp.cumsum(mine[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] - mine
    seen = state.held[:, None] - 1 - after
    behind = ctx.count[:, None] - 1 - jnp.arange(q.shape[1], dtype=jnp.int32)
    rank = state.total[:, None] - 1 - jnp.maximum(behind, 0)
    at = jnp.maximum(rank, 0) if is_rank else ctx.positions
    part = attend_pages(rope(q, at), *state.pages(), q_positions=seen)
    out = shards.merged(part, ctx.axes).astype(q.dtype)
    trace = None
    if ctx.trace:
      keys = jnp.sum(jnp.where(ctx.valid, seen + 1, 0), axis=1)
      keys = jax.lax.psum(keys.astype(jnp.float32), ctx.axes.seq) * q.shape[2]
      trace = dataclasses.replace(
        decode_trace(keys, q, ctx),
        counters=_counters(due, uncertain, lost, self.scoring, ctx),
      )
    return out, cache, state, trace

  def _due(self, query, state: WorkingSet, ctx: Context) -> Bool[Array, 'B']:
    """Which rows must select (algorithm 1, line 3, and our limits)."""
    near = soft_vote.cosine(query, state.query, ctx.axes.model)
    hit = (near >= self.threshold) & (ctx.count == 1)
    hit &= ctx.positions[:, 0] == state.expected
    hit &= state.age + 1 < self.reuse
    return (ctx.count > 0) & ~hit

  def _select(self, q, query, rope: Rope, cache, state, ctx: Context):
    """A new working set; which rows fell back; the votes that they lost."""
    newest = ctx.lengths - 1
    window = self.local - self.reuse + 1
    starts = cache.page_starts()[:, 0]
    low = working_set.below(starts, cache, jnp.full_like(newest, self.sink))
    high = working_set.below(starts, cache, newest - window + 1)
    low = jnp.minimum(low, high)
    chosen, count, uncertain, lost = self._choose(
      self._asked(q, rope, ctx), cache, low, high, ctx
    )
    listed, held = with_ends(
      chosen,
      count,
      low=low,
      high=high,
      stop=cache.used,
      width=state.k.shape[2],
    )
    k, v = working_set.gather(cache, listed, state.k.dtype)
    if self.positions == 'rank':
      rank = working_set.ranks(cache, starts, listed, held, ctx.axes.seq)
      k = rope(k.swapaxes(1, 2), rank).swapaxes(1, 2)
    fresh = WorkingSet(
      query=query,
      k=k,
      v=v,
      held=held,
      total=jax.lax.psum(held, ctx.axes.seq),
      age=jnp.zeros_like(newest),
      expected=ctx.lengths,
    )
    return fresh, uncertain, lost

  def _asked(self, q, rope: Rope, ctx: Context) -> Float[Array, 'B N H']:
    """The query that votes, in the frame of the cache's keys."""
    positions = ctx.positions
    if self.positions == 'rank':
      positions = self.local + jnp.arange(q.shape[1], dtype=jnp.int32)
      positions = jnp.broadcast_to(positions, ctx.positions.shape)
    return soft_vote.pool_queries(rope(q, positions), ctx.valid, self.pooling)

  def _choose(self, asked, cache, low, high, ctx: Context):
    """(chosen tokens, their number, fallen back, lost votes)."""
    axes = {'model': ctx.axes.model, 'seq': ctx.axes.seq}
    if self.pool > 1 and jax.lax.axis_size(ctx.axes.seq) > 1:
      raise ValueError(
        f'pool={self.pool} needs each row on one device: mesh axis seq > 1'
      )
    capacity = cache.page_ids().shape[2] * cache.page
    everywhere = capacity * jax.lax.axis_size(ctx.axes.seq)
    how = {
      'kind': self.vote,
      'k': min(self.k, everywhere),
      'scale': self.scale(asked.shape[-1]),
    }
    none = jnp.zeros((asked.shape[0],), jnp.float32)

    def all_votes():
      keys = working_set.all_keys(cache, asked.dtype)
      return soft_vote.all_votes(
        asked, keys, low, high, pool=self.pool, **how, **axes
      )

    def scan():
      return top_tokens(all_votes(), how['k'], axes['seq'])

    if self.scoring == 'full':
      return *scan(), none, none
    page = capacity // cache.bounds()[0].shape[2]
    pruned = pruned_tokens(
      asked,
      functools.partial(working_set.read, cache, page, asked.dtype),
      cache.bounds(),
      low,
      high,
      page=page,
      scored=self.scored,
      certify=self.scoring == 'pruned',
      **how,
      **axes,
    )
    if self.scoring == 'budget':
      lost = none
      if ctx.trace:
        lost = lost_votes(all_votes(), pruned.chosen, how['k'], axes['seq'])
      return pruned.chosen, pruned.count, none, lost
    fails = jnp.any(~pruned.certain & (ctx.count > 0)).astype(jnp.int32)
    n = min(how['k'], capacity)

    def found():
      short = ((0, 0), (0, max(n - pruned.chosen.shape[1], 0)))
      chosen = jnp.pad(pruned.chosen, short, constant_values=NEVER)
      return chosen[:, :n], pruned.count

    chosen, count = jax.lax.cond(
      jax.lax.pmax(fails, ctx.axes.data) > 0, scan, found
    )
    return chosen, count, (~pruned.certain).astype(jnp.float32), none


def _laid(x: Shaped[Array, 'B T *R'], offset, room: int):
  """The rows in a longer array of zeros, from `offset` on."""
  if room == x.shape[1]:
    return x
  zeros = jnp.zeros((x.shape[0], room, *x.shape[2:]), x.dtype)
  return jax.lax.dynamic_update_slice_in_dim(zeros, x, offset, axis=1)


def _counters(due, uncertain, lost, scoring: str, ctx: Context):
  """Sums a row, divided by the shards that all count the same."""
  copies = jax.lax.axis_size(ctx.axes.seq) * jax.lax.axis_size(ctx.axes.model)
  active = (ctx.count > 0) / copies
  counters = {'hits': active * ~due, 'selections': active * due}
  if scoring == 'pruned':
    counters['fallbacks'] = uncertain / copies
  if scoring == 'budget':
    counters['lost_votes'] = lost / copies
  return counters


METHOD = Method(
  'tokenselect',
  TokenSelectPrefill(),
  caches.CONFIGS['dense'],
  TokenSelectDecode(),
)
