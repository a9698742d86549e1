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
(`lcx.select.pruned_scoring`; a cache with page=16 and stats keeps them), or
int8 copies of keys be scored; neighbouring chunks with queries that are alike
may vote as one; a list serves at most `reuse` tokens, for which the local
window keeps room, so that no token leaves it unselected. The release's kv head
(h modulo K) is not kept, nor its even pooling windows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas.block_sparse import block_sparse, dense_blocks
from kernels_pallas.passing_block import passing_block
from kernels_pallas.selected_token import attend_contiguous
from lcx import cache as caches
from lcx.cache import CacheShape
from lcx.cache.base import split
from lcx.methods import prompt_tail, shards
from lcx.methods.base import Context, Decode, Method, Prefill, Rope, Trace
from lcx.methods.dense import decode_trace, dense_pairs, dense_trace
from lcx.select import chunk_grid, in_place, soft_vote, working_set
from lcx.select.audit import sampled_mass
from lcx.select.chunk_grid import ChunkGrid
from lcx.select.chunk_votes import (
  best_at_once,
  chunk_stats,
  chunk_votes,
  fit_at_once,
)
from lcx.select.key_copies import KeyCopies
from lcx.select.token_choice import choose_tokens
from lcx.select.token_rules import ChunkRules, ReuseRules
from lcx.select.top_tokens import listed_tokens, top_tokens, with_ends
from lcx.select.working_set import WorkingSet

GROUP_BYTES = 2**29  # temporary memory of the chunks that go together


@dataclasses.dataclass(frozen=True)
class TokenSelectPrefill(ChunkRules, Prefill):
  """Chunks select, and attend to what they selected and to themselves."""

  def at_tight_budget(self, length: int) -> 'TokenSelectPrefill':
    return dataclasses.replace(self, k=length // 8, sink=4, local=32, chunk=32)

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, length, heads, _ = q.shape
    cache = shards.store(cache, k, _kept(k, cache, rope, ctx), v, ctx)
    where = {
      'q_start': shards.first_query(length, batch, ctx.axes),
      'lengths': ctx.lengths,
    }
    if self.width >= jax.lax.axis_size(ctx.axes.seq) * length:
      # Every list would hold every token, and every rank be a position.
      out, _ = block_sparse(
        rope(q, ctx.positions),
        *shards.gather_sequence(rope(k, ctx.positions), v, ctx.axes),
        dense_blocks(batch, heads, length),
        **where,
      )
      return out, cache, dense_trace(q, ctx)

    frame = k if self.positions == 'rank' else rope(k, ctx.positions)
    keys, values = shards.gather_sequence(frame, v, ctx.axes)
    grid = ChunkGrid.make(length, self.chunk, ctx)
    out, lse, seen = self.by_chunk(q, keys, values, grid, rope, ctx)
    if self.tail:
      out, lse, again = prompt_tail.read_densely(
        out, lse, rope(q, ctx.positions), keys, values, self.tail, **where
      )
      seen = jnp.maximum(seen, again)
    trace = None
    if ctx.trace:
      seen = jnp.sum(jnp.where(ctx.valid, seen, 0), axis=1, dtype=jnp.float32)
      mass = None
      if self.positions == 'true':
        mass = sampled_mass(rope(q, ctx.positions), keys, lse, **where)
      trace = Trace(seen * heads, dense_pairs(q, ctx), mass=mass)
    return out, cache, trace

  def by_chunk(
    self, q, keys, values, grid: ChunkGrid, rope: Rope, ctx: Context
  ):
    """Every chunk of this shard's rows selects and attends.

    Args:
      q: [B T N H] unrotated queries of this shard.
      keys: [B K S H] of all shards, in the frame in which they are scored.
      values: [B K S H].
      grid: the chunks that these rows touch.
      rope: rotation.
      ctx: the context.

    Returns:
      (out [B T N H], lse [B T N], keys that each row sees [B T]).
    """
    batch, _, _, dim = q.shape
    begin = grid.begins(batch)
    high = jnp.maximum(begin + self.chunk - self.local, 0)
    low = jnp.minimum(self.sink, high)
    how = {'kind': self.vote, 'scale': self.scale(dim)}

    # Section 5.2: a query a chunk. All of a layer's in one launch.
    asked = self._asked(q, grid, rope, ctx)
    best = {'n_best': min(self.k, keys.shape[2])}
    stats = None
    if not fit_at_once(asked, keys):
      stats = chunk_stats(asked, keys, values, low, high, **best, **how)
    voters = self.asking(asked, keys.shape[1])

    def some(args):
      """Equation 7, top k, and attention, for as many chunks as fit."""
      q, positions, voters, stats, begin, low, high = args
      if stats is None:
        chosen, count = best_at_once(
          voters,
          keys,
          low,
          high,
          model=ctx.axes.model,
          pool=self.pool,
          **best,
          **how,
        )
      else:
        votes = chunk_votes(
          voters, stats, keys, high, model=ctx.axes.model, **how
        )
        mask = soft_vote.candidates(low, high, keys.shape[2])
        votes = soft_vote.max_pool(votes, mask, self.pool)
        chosen, count = top_tokens(votes.reshape(-1, keys.shape[2]), self.k)
      low, high, begin = (x.reshape(-1) for x in (low, high, begin))
      listed, total = with_ends(
        chosen,
        count,
        low=low,
        high=high,
        stop=begin + self.chunk,
        width=self.width,
      )
      return self._attend(q, keys, values, listed, total, positions, rope)

    together = self._together(grid.count, keys)

    def grouped(x):
      """[B C ...] to [groups B together ...]."""
      return jnp.moveaxis(x.reshape(batch, -1, together, *x.shape[2:]), 1, 0)

    def back(x):
      """[groups B*together chunk ...] to this shard's [B T ...]."""
      x = x.reshape(-1, batch, together, *x.shape[2:])
      return grid.join(jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:]))

    args = (grid.cut(q), grid.cut(ctx.positions), voters, stats)
    args = jax.tree.map(grouped, (*args, begin, low, high))
    return jax.tree.map(back, jax.lax.map(some, args))

  def _asked(self, q, grid: ChunkGrid, rope: Rope, ctx: Context):
    """One query a chunk [B C N H], in the frame of the keys it scores."""
    positions = ctx.positions
    if self.positions == 'rank':
      place = grid.before + jnp.arange(q.shape[1], dtype=jnp.int32)
      positions = self.local + place % self.chunk
      positions = jnp.broadcast_to(positions, q.shape[:2])
    asked = chunk_grid.pooled(
      rope(q, positions),
      grid,
      ctx,
      pooling=self.pooling,
      merge=self.merge,
      merged=self.merged,
    )
    return self.in_order(asked)

  def _attend(self, q, keys, values, listed, total, positions, rope: Rope):
    """Attention of chunks [B R chunk N H] over their lists [B*R width].

    Returns:
      (out [B*R chunk N H], lse [B*R chunk N], keys seen [B*R chunk]).
    """
    k, v = listed_tokens(keys, values, listed)
    q = q.reshape(-1, *q.shape[2:])
    row = total[:, None] - self.chunk + jnp.arange(self.chunk, dtype=jnp.int32)
    if self.positions == 'rank':
      rank = jnp.arange(self.width, dtype=jnp.int32)
      rank = jnp.broadcast_to(rank, listed.shape)
      k = rope(k.swapaxes(1, 2), rank).swapaxes(1, 2)
      q = rope(q, row)
    else:
      q = rope(q, positions.reshape(row.shape))
    part = passing_block(q, k, v, jnp.zeros_like(row), row + 1)
    return *part, row + 1

  def _together(self, chunks: int, keys) -> int:
    """Chunks that are selected for and attended at once."""
    batch, kv_heads, length, dim = keys.shape
    gathered = 2 * kv_heads * self.width * dim * keys.dtype.itemsize
    limit = max(1, GROUP_BYTES // (batch * (12 * length + gathered)))
    return next(n for n in range(min(chunks, limit), 0, -1) if chunks % n == 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
  """What decode keeps between steps.

  Attributes:
    working: the Selection Cache.
    copies: of all keys, for scoring; None: keys are scored themselves.
  """

  working: WorkingSet
  copies: KeyCopies | None


@dataclasses.dataclass(frozen=True)
class TokenSelectDecode(ReuseRules, Decode):
  """Attention over a working set that is selected anew when queries turn.

  Keys are scanned on a step on which some row must select; the other rows keep
  their lists, so that answers do not depend on who else is in the batch. A
  piece of several tokens always selects, by its pooled query.

  On a GPU `lcx.select.in_place` takes algorithm 1 in launches of its own, for
  most of what can be asked for; `_due` and `_served` say the same anywhere.
  """

  @property
  def needs(self) -> frozenset[str]:  # pyrefly: ignore[bad-override]
    frame = 'unrotated' if self.positions == 'rank' else 'rotated'
    bounds = set() if self.scoring == 'full' else {'bounds'}
    return frozenset({'all_tokens', frame} | bounds)

  def check(self, config, capacity: int) -> None:
    super().check(config, capacity)
    if self.local - self.reuse + 1 < self.max_queries:
      raise ValueError(
        f'local={self.local} must hold reuse={self.reuse} - 1 tokens to come '
        f'and a piece of {self.max_queries}'
      )

  def at_full_budget(self, length: int):
    return dataclasses.replace(
      self, k=length, scored=max(self.scored, 2 * length)
    )

  def at_tight_budget(self, length: int):
    return dataclasses.replace(
      self, k=length // 8, sink=4, local=32, reuse=4, scored=length // 4
    )

  def init_state(self, shape: CacheShape) -> Selection:
    working = WorkingSet.empty(shape)
    copies = None if self.score_bits == 16 else KeyCopies.of(working.k)
    return Selection(working, copies)

  def state_specs(self, axes) -> Selection:
    working = WorkingSet.specs(axes)
    tokens = split(axes.data, axes.model, axes.seq)
    copies = None if self.score_bits == 16 else KeyCopies(tokens, tokens)
    return Selection(working, copies)

  def observe(self, q, k, v, rope: Rope, state: Selection, ctx: Context):
    working = dataclasses.replace(state.working, query=jnp.zeros_like(q[:, 0]))
    return dataclasses.replace(state, working=working)

  def start(self, cache, state: Selection) -> Selection:
    capacity = cache.page_ids().shape[2] * cache.page
    copies = state.copies
    if copies is not None:
      keys = working_set.all_keys(cache, state.working.k.dtype)
      copies = KeyCopies.of(keys)
    working = state.working.with_room(min(self.width, capacity))
    return Selection(working, copies)

  def attend(self, q, k, v, rope: Rope, cache, state: Selection, ctx: Context):
    if self.positions == 'rank':
      rotated, cache = q, shards.append(cache, k, k, v, ctx)  # turned at use
    else:
      # The query is compared as it was, so it is not made rotated alone.
      plain = dataclasses.replace(ctx, joint=None)
      rotated, cache = shards.append_rotated(q, k, v, rope, cache, plain)
    copies = state.copies
    if copies is not None:
      copies = copies.refreshed(cache, q.shape[1])
    working, mine = state.working, shards.belong_here(ctx)
    query = self._one_query(q, ctx)
    asked = self._asked(q, rotated, rope, ctx)
    voters = self.asking(asked, k.shape[2])
    fell_back = lost = jnp.zeros((q.shape[0],), jnp.float32)
    if in_place.serves(self, cache, working, voters, ctx):
      working, due = in_place.step(
        self, query, voters, cache, copies, working, ctx
      )
    else:
      due = self._due(query, working, ctx)
      working, fell_back, lost = self._served(
        query, asked, due, k, v, rope, cache, copies, working, ctx
      )
    out, seen = self._attend(q, rotated, rope, working, mine, ctx)
    trace = None
    if ctx.trace:
      keys = jnp.sum(jnp.where(ctx.valid, seen, 0), axis=1)
      keys = jax.lax.psum(keys.astype(jnp.float32), ctx.axes.seq) * q.shape[2]
      trace = decode_trace(keys, q, ctx)
      if trace is not None:
        counters = self._counters(due, fell_back, lost, ctx)
        trace = dataclasses.replace(trace, counters=counters)
    return out, cache, Selection(working, copies), trace

  def _due(self, query, working: WorkingSet, ctx) -> Bool[Array, 'B']:
    """Which rows must select (algorithm 1, line 3, and our limits).

    Queries are compared unrotated: the release turns all by one angle, which
    does not change a cosine.
    """
    near = soft_vote.cosine(query, working.query, ctx.axes.model)
    hit = (near >= self.threshold) & (ctx.count == 1)
    hit &= ctx.positions[:, 0] == working.expected
    hit &= working.age + 1 < self.reuse
    return (ctx.count > 0) & ~hit

  def _served(
    self, query, asked, due, k, v, rope: Rope, cache, copies, working, ctx
  ):
    """Algorithm 1, lines 4 to 7: a new list for rows that are due.

    Returns:
      (the working set with the new tokens, which rows fell back, the share of
      votes that they lost).
    """
    mine = shards.belong_here(ctx)
    # Line 7; and the new token. Outside the `cond`, whose branch of a hit then
    # passes on what it got.
    at = ctx.positions[:, :1]
    if self.positions == 'rank':
      # At most: a selection drops what would not fit.
      at = jnp.minimum(working.total, self.width - 1)[:, None]
    here = mine[:, 0] & (ctx.count > 0)
    kept = working.written(rope(k[:, :1], at), v[:, :1], here)
    none = jnp.zeros(due.shape, jnp.float32)

    def select():
      """Lines 4 to 6, for the rows that must."""
      fresh, fell_back, lost = self._select(
        query, asked, rope, cache, copies, working, ctx
      )
      if due.shape[0] * jax.lax.axis_size(ctx.axes.data) > 1:
        fresh = fresh.where(due, kept)  # another row may be the one
      return fresh, jnp.where(due, fell_back, 0), jnp.where(due, lost, 0)

    anyone = jax.lax.pmax(jnp.any(due).astype(jnp.int32), ctx.axes.data)
    listing, fell_back, lost = jax.lax.cond(
      anyone > 0, select, lambda: (kept, none, none)
    )
    # What is known without a selection stays outside: the `cond` would copy it.
    came = jnp.where(due, 0, jnp.minimum(ctx.count, 1))
    served = dataclasses.replace(
      listing,
      query=jnp.where(due[:, None, None], query, working.query),
      age=jnp.where(due, 0, working.age),
      until=jnp.where(due, ctx.lengths, working.until),
    ).counted(came, mine[:, 0])
    return served, fell_back, lost

  def _select(
    self, query, asked, rope: Rope, cache, copies, working, ctx: Context
  ):
    """A new working set; which rows fell back; the votes that they lost."""
    newest = ctx.lengths - 1
    window = self.local - self.reuse + 1
    starts = cache.page_starts()[:, 0]
    low = working_set.below(starts, cache, jnp.full_like(newest, self.sink))
    high = working_set.below(starts, cache, newest - window + 1)
    low = jnp.minimum(low, high)
    found = choose_tokens(asked, cache, copies, low, high, self, ctx)
    listed, held = with_ends(
      found.chosen,
      found.count,
      low=low,
      high=high,
      stop=cache.used,
      width=working.k.shape[2],
    )
    k, v = working_set.gather(cache, listed, working.k.dtype)
    if self.positions == 'rank':
      rank = working_set.ranks(cache, starts, listed, held, ctx.axes.seq)
      rank = jnp.minimum(rank, self.width - 1)  # what lies behind the list
      k = rope(k.swapaxes(1, 2), rank).swapaxes(1, 2)
    fresh = WorkingSet(
      query=query,
      k=k,
      v=v,
      held=held,
      chosen=jax.lax.psum(held, ctx.axes.seq),
      until=ctx.lengths,
      age=jnp.zeros_like(newest),
    )
    return fresh, found.fell_back, found.lost

  def _asked(
    self, q, rotated, rope: Rope, ctx: Context
  ) -> Float[Array, 'B N H']:
    """The query that votes, in the frame of the cache's keys."""
    if self.positions == 'rank':
      positions = self.local + jnp.arange(q.shape[1], dtype=jnp.int32)
      positions = jnp.broadcast_to(positions, ctx.positions.shape)
      rotated = rope(q, positions)
    return self.in_order(self._one_query(rotated, ctx))

  def _one_query(self, q, ctx: Context) -> Float[Array, 'B N H']:
    """Of several tokens; of a row that has none, which never selects, any."""
    if q.shape[1] == 1:
      return q[:, 0]
    return soft_vote.pool_queries(q, ctx.valid, self.pooling)

  def _attend(
    self, q, rotated, rope: Rope, working: WorkingSet, mine, ctx: Context
  ):
    """Attention over the working set, whose last tokens are the queries'.

    Returns:
      (out [B T N H], keys that each query sees here [B T]).
    """
    seen = working.held[:, None]
    if q.shape[1] > 1:
      # New tokens stand last; a query sees none that came after its own.
      after = jnp.cumsum(mine[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
      seen -= after - mine
    if self.positions == 'rank':
      behind = ctx.count[:, None] - 1 - jnp.arange(q.shape[1], dtype=jnp.int32)
      rank = working.total[:, None] - 1 - jnp.maximum(behind, 0)
      rotated = rope(q, jnp.maximum(rank, 0))
    part = attend_contiguous(
      rotated,
      *working.pages(),
      working.held,
      q_positions=seen,
      out_dtype=shards.part_dtype(q, ctx.axes),
    )
    return shards.merged(part, ctx.axes).astype(q.dtype), seen

  def _counters(self, due, fell_back, lost, ctx: Context):
    """Sums a row, divided by the shards that all count the same.

    `lost_votes` is a sum of shares: divided by `selections`, their mean.
    """
    copies = jax.lax.axis_size(ctx.axes.seq) * jax.lax.axis_size(ctx.axes.model)
    active = (ctx.count > 0) / copies
    counters = {'hits': active * ~due, 'selections': active * due}
    if self.scoring == 'pruned':
      counters['fallbacks'] = fell_back / copies
    elif self.scoring == 'budget' or self.score_bits == 8:
      counters['lost_votes'] = lost / copies
    return counters


def _kept(k, cache, rope: Rope, ctx: Context):
  """Keys as the cache keeps them."""
  return rope(k, ctx.positions) if cache.rotated else k


METHOD = Method(
  'tokenselect',
  TokenSelectPrefill(),
  caches.CONFIGS['dense'],
  TokenSelectDecode(),
)
