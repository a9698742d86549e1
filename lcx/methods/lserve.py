"""LServe: half the heads stream, the others choose pages, reused for 4 steps.

Yang et al., "LServe: efficient long-sequence LLM serving with unified sparse
attention", arXiv:2502.14866. Which kv heads stream says the cache, which keeps
only sink and recent tokens for them; prefill and decode read it there.

  prefill   streaming heads see 128 first and 8,192 last tokens, the others all
            or the blocks of any block selector: one launch (section 3.4)
  decode    streaming heads see their ring (128 + 256); the others the pages of
            64 whose best logical page of 16 promises most (section 3.5)

Here a list is shared by the query heads of a kv head, the first and the newest
pages are always in it, and pages that began since a selection join it at once;
the released code does neither.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from kernels_pallas.block_sparse import (
  EVERYTHING,
  BlockList,
  block_sparse,
  dense_blocks,
  mixed,
)
from kernels_pallas.page_choice.reuse import Rules
from lcx import head_profile
from lcx.cache import Paged
from lcx.cache.base import CacheShape, split
from lcx.methods import shards
from lcx.methods.base import Context, Decode, Method, Prefill, Rope, Trace
from lcx.methods.block_prefill import BlockPrefill, whole_mass
from lcx.methods.compose import get_method
from lcx.methods.dense import decode_trace, dense_pairs
from lcx.methods.listed_pages import attend_listed, is_ring, listed_keys
from lcx.policy import AS_MEASURED
from lcx.select import audit, reused_pages
from lcx.select.reused_pages import Choice
from lcx.select.top_pages import take_pages, top_pages

# Numbers of the rows that lcx/policy.json has (configs/lserve_speed.py:op=step
# on an H200, half of the heads streaming): others have another crossover.
MEASURED = {
  'budget': 4096,
  'sink': 64,
  'recent': 256,
  'reuse': 4,
  'scorer': 'bounds',
  'group': 'max',
}


@dataclasses.dataclass(frozen=True)
class TwoWayPaged(Paged):
  """The paged cache, with its ring heads taken from a head profile.

  Attributes:
    profile: '': no head streams (or those of `ring_heads`); 'alternate': a rule
      that knows no model, for measurements; else a file that
      configs/train_head_profile.py writes. It replaces `ring_heads`.
    streaming: share of the kv heads that stream.
    balanced: the same number in every layer, not a quantile over all heads.
  """

  profile: str = ''
  streaming: float = 0.5
  balanced: bool = False

  def __post_init__(self):
    super().__post_init__()
    head_profile.check_share(self.streaming)
    if self.profile and self.profile != head_profile.ALTERNATE:
      flags = head_profile.load(self.profile).streaming(
        self.streaming, self.balanced
      )
      object.__setattr__(self, 'ring_heads', flags)

  @property
  def has_ring(self) -> bool:
    return bool(self.profile) or super().has_ring

  def ring_flags(self, layer: int, n_kv_heads: int):
    if self.profile == head_profile.ALTERNATE:
      return np.asarray(
        head_profile.alternate(layer, n_kv_heads, self.streaming)
      )
    return super().ring_flags(layer, n_kv_heads)

  def check(self, config, capacity: int, batch: int, decode) -> None:
    """Refuses a profile of another model."""
    del capacity, batch, decode
    if self.profile and self.profile != head_profile.ALTERNATE:
      head_profile.load(self.profile).check(config)


@dataclasses.dataclass(frozen=True)
class LServePrefill(Prefill):
  """Streaming and retrieval heads in one launch.

  Attributes:
    sink: first tokens that streaming heads see.
    local: last tokens that streaming heads see, the query's own included.
    dynamic: '': retrieval heads see everything; else a block-selecting prefill,
      or the name of the method that it belongs to ('xattention').
    density: of `dynamic`; None, like the next: as that method has it.
    threshold: of `dynamic`.
    dense_below: prompts of at most so many tokens are not selected from. -1:
      as `BlockPrefill` has it, for the heads that are selected for.
  """

  sink: int = 128
  local: int = 8192
  dynamic: str | BlockPrefill = ''
  density: float | None = None
  threshold: float | None = None
  dense_below: int = AS_MEASURED

  def at_full_budget(self, length: int) -> 'LServePrefill':
    chooser = self.chooser()
    return dataclasses.replace(
      self,
      local=EVERYTHING,
      dynamic=chooser.at_full_budget(length) if chooser else '',
      density=None,
      threshold=None,
    )

  def check(self, config, capacity: int) -> None:
    if self.sink < 0 or self.local < 1:
      raise ValueError(
        f'prefill.sink={self.sink} must be at least 0 and '
        f'prefill.local={self.local} at least 1'
      )
    chooser = self.chooser()
    if chooser:
      chooser.check(config, capacity)
    if chooser and chooser.tail:
      raise ValueError(
        f'prefill.dynamic with tail={chooser.tail}: lserve reads no tail of a '
        'prompt densely, since streaming heads see none so'
      )

  def chooser(self) -> BlockPrefill | None:
    """What selects blocks for retrieval heads."""
    if isinstance(self.dynamic, BlockPrefill) or not self.dynamic:
      return self.dynamic or None
    part = get_method(self.dynamic).prefill
    if not isinstance(part, BlockPrefill):
      raise ValueError(
        f'prefill.dynamic={self.dynamic!r} selects no blocks; xattention does'
      )
    fields: dict[str, Any] = {'dense_below': self.dense_below}
    if self.density is not None or self.threshold is not None:
      fields |= {'density': self.density, 'threshold': self.threshold}
    known = {f.name for f in dataclasses.fields(part)}
    if not fields.keys() <= known:
      raise ValueError(
        f'prefill.dynamic={self.dynamic!r} has neither density nor threshold'
      )
    return dataclasses.replace(part, **fields)

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, length, heads, _ = q.shape
    rotated = rope(k, ctx.positions)
    cache = shards.store(cache, k, rotated, v, ctx)
    q = rope(q, ctx.positions)
    keys, values = shards.gather_sequence(rotated, v, ctx.axes)
    ring = jnp.zeros((k.shape[2],), bool)
    if is_ring(cache):
      ring = cache.ring
    ring = jnp.repeat(ring, heads // k.shape[2])
    where = {
      'q_start': shards.first_query(length, batch, ctx.axes),
      'lengths': ctx.lengths,
      'sliding_window': ctx.sliding_window,
    }

    def attended(blocks: BlockList):
      out, lse = block_sparse(q, keys, values, blocks, **where)
      if not ctx.trace:
        return out, None
      return out, self._trace(q, keys, lse, ring, blocks, where, ctx)

    def unselected():
      if not is_ring(cache):
        return attended(dense_blocks(batch, heads, length))
      return attended(self._rule(ring, EVERYTHING, batch, length))

    chooser = self.chooser()
    if not chooser:
      out, trace = unselected()
      return out, cache, trace
    # Only retrieval heads are estimated, where their number is static.
    full = retrieval_heads(cache)
    group = heads // k.shape[2]

    def selected():
      safe = jnp.maximum(full, 0)
      some = q.reshape(batch, length, k.shape[2], group, -1)[:, :, safe]
      lists = chooser.select(
        some.reshape(batch, length, -1, q.shape[3]),
        jnp.swapaxes(rotated, 1, 2)[:, safe],
        keys[:, safe],
        q_start=where['q_start'],
        ctx=ctx,
      ).blocks
      rule = self._rule(ring, 0, batch, length)
      return attended(_joined(lists, rule, ring, full))

    out, trace = chooser.unless_short(
      unselected, selected, group * len(full), len(full), keys, ctx
    )
    return out, cache, trace

  def _rule(self, ring, window: int, batch: int, length: int) -> BlockList:
    """Streaming heads see sink and local tokens, the others `window`."""
    sink = jnp.where(ring, self.sink, 0)
    return mixed(sink, jnp.where(ring, self.local, window), batch, length)

  def _trace(self, q, keys, lse, ring, blocks, where, ctx: Context) -> Trace:
    pairs = dense_pairs(q, ctx)
    if blocks.dense:
      return Trace(keys=pairs, pairs=pairs, mass=whole_mass(q, ctx))
    near = jnp.minimum(ctx.positions + 1, self.sink + self.local)
    near = jnp.sum(jnp.where(ctx.valid, near, 0), axis=1, dtype=jnp.float32)
    each = pairs / q.shape[2]
    seen = jnp.minimum(near, each) * jnp.sum(ring)
    if blocks.ids.shape[-1]:
      seen += audit.listed_keys(blocks, **where)
    else:
      seen += each * jnp.sum(~ring)
    mass = audit.sampled_mass(q, keys, lse, **where)
    return Trace(keys=seen, pairs=pairs, mass=mass)


@dataclasses.dataclass(frozen=True)
class LServeDecode(Decode):
  """Retrieval heads see the best pages, streaming heads their ring.

  Attributes:
    budget: tokens a retrieval kv head attends to, in whole pages.
    sink: first tokens that are always among them.
    recent: last tokens that are always among them.
    reuse: C, tokens that a selection serves; a longer piece of a question is
      selected for as a whole.
    selected_piece: tokens of the longest piece that pages are chosen for. For
      longer ones retrieval heads see everything, as in the paper's prefill: a
      list that 16 tokens and all query heads of a kv head share serves none of
      them well, and reading the cache once for 16 tokens costs what one dense
      token does. 1: decoded tokens alone; 16: every piece.
    scorer: 'bounds' (Quest's, of the least and largest key of each channel) or
      'moments' (what the best key is likely to reach, by mean and deviation: no
      bound). On one GPU both are scored by the launch of the append; sums of
      moments are float32, twice the bytes of 16 bit bounds.
    group: 'max' or 'sum' of the scores of a kv head's query heads.
    looseness: share of a bound's mean half width (|q| times that of the
      prompt's logical pages) that is taken off all scores of a query head, 0
      to 1. Bounds of 16 keys are far above the best of them, by more for one
      head than for the next; so of heads that share a list, those with the
      loosest bounds choose most of it. The order of one head's pages stays,
      and so do the lists of single tokens with group='sum'.
    crossover: with a cache that has room for at most so many tokens, retrieval
      heads see everything: below, selecting costs more than it saves. The whole
      capacity counts, as in `SnapKVDecode`, so that no step asks. -1: one token
      less than the crossover that was measured on this device with these very
      numbers and streaming heads (lcx/policy.json); 0 where there is none.
  """

  budget: int = 4096
  sink: int = 64
  recent: int = 256
  reuse: int = 4
  scorer: str = 'bounds'
  group: str = 'max'
  looseness: float = 0.0
  selected_piece: int = Decode.max_queries
  crossover: int = AS_MEASURED

  needs = frozenset({'recent_tokens', 'rotated'})

  @property
  def measured_as(self) -> str:
    """The method's name in measured rows; '': none has these numbers."""
    same = all(getattr(self, name) == x for name, x in MEASURED.items())
    # Rows of before there was a looseness have none.
    return 'lserve' if same and not self.looseness else ''

  def at_full_budget(self, length: int) -> 'LServeDecode':
    return dataclasses.replace(self, budget=2 * length + 4096)

  def check(self, config, capacity: int) -> None:
    del config, capacity
    if self.sink < 0 or self.recent < 1 or self.reuse < 1:
      raise ValueError(
        f'decode.sink={self.sink} must be at least 0, decode.recent='
        f'{self.recent} and decode.reuse={self.reuse} at least 1'
      )
    if not 1 <= self.selected_piece <= self.max_queries:
      raise ValueError(
        f'decode.selected_piece={self.selected_piece} must be within 1 and '
        f'{self.max_queries}, the tokens of a piece'
      )
    if self.crossover < AS_MEASURED:
      raise ValueError(f'decode.crossover={self.crossover} must be at least -1')
    if self.budget < self.sink + self.recent:
      raise ValueError(
        f'decode.budget={self.budget} is below sink={self.sink} + '
        f'recent={self.recent}: raise the budget'
      )
    if not 0 <= self.looseness <= 1:
      raise ValueError(
        f'decode.looseness={self.looseness} must be within 0 and 1'
      )
    if self.group not in ('max', 'sum'):
      raise ValueError(f"decode.group={self.group!r} must be 'max' or 'sum'")

  def misfit(self, cache) -> str | None:
    if self.scorer not in ('bounds', 'moments'):
      return f"decode.scorer={self.scorer!r} must be 'bounds' or 'moments'"
    if self.looseness and self.scorer != 'bounds':
      return (
        f'decode.looseness={self.looseness} is of bounds: decode.scorer must '
        f"be 'bounds' and not {self.scorer!r}"
      )
    if self.scorer not in cache.provides:
      return (
        f'decode scores pages by {self.scorer}, but the cache provides '
        f'{sorted(cache.provides)}'
      )
    return None

  def init_state(self, shape: CacheShape) -> Choice:
    # `start` gives it the width that the cache's pages ask for.
    choice = Choice.none(shape.batch, shape.n_kv_heads, shape.shards.seq)
    if not self.looseness:
      return choice
    heads = shape.batch, shape.n_kv_heads, shape.shards.seq, shape.head_dim
    return dataclasses.replace(choice, loose=jnp.zeros(heads, jnp.float32))

  def state_specs(self, axes) -> Choice:
    rows = split(axes.data)
    heads = split(axes.data, axes.model, axes.seq)
    return Choice(heads, rows, rows, heads if self.looseness else None)

  def start(self, cache, state: Choice) -> Choice:
    batch, kv_heads, width = cache.page_starts().shape
    choice = Choice.none(batch, kv_heads, min(self.pages(cache.page), width))
    if not self.looseness:
      return choice
    loose = reused_pages.looseness(cache, self.looseness)
    return dataclasses.replace(choice, loose=loose)

  def pages(self, page: int) -> int:
    """Pages of a list: the budget's, one as the newest is rarely full."""
    always = -(-self.sink // page) + (self.recent + page - 2) // page + 1
    return max(-(-self.budget // page), always) + 1

  def attend(self, q, k, v, rope: Rope, cache, state: Choice, ctx: Context):
    # Measured where half of the heads stream.
    measured = self.measured_as if is_ring(cache) else ''
    sees_all = shards.sees_all(self.crossover, 'step', measured, q, cache, ctx)
    long = q.shape[1] > self.selected_piece
    sees_all |= long
    rules, scoring = self._rules(cache), None
    # Rotated or not, the token in the cache or not: shapes are the same.
    if not sees_all and reused_pages.serves(q, cache, ctx, rules):
      ring = cache.ring if is_ring(cache) else None
      scoring = reused_pages.scoring(state, q, cache, ctx, rules, ring)
    q, cache, scored = shards.append_scored(q, k, v, rope, cache, ctx, scoring)
    if scoring is not None:
      state, ids, starts = reused_pages.listed(
        state, q, cache, ctx, rules, scoring, scored
      )
    elif sees_all:
      ids, starts = cache.page_ids(), cache.page_starts()
      if long:  # may have begun more pages than a choice is joined by
        state = state.outdated(ctx.count)
    else:
      state, ids, starts = self._listed(q, cache, state, ctx)
    part, keys = self._attended(q, cache, ids, starts, ctx)
    out = shards.merged(part, ctx.axes).astype(q.dtype)
    trace = decode_trace(keys, q, ctx)
    return out, cache, state, trace

  def _attended(self, q, cache, ids, starts, ctx: Context):
    kind = shards.part_dtype(q, ctx.axes)
    part = attend_listed(q, cache, ids, starts, ctx, out_dtype=kind)
    keys = listed_keys(cache, ids, starts, q, ctx) if ctx.trace else ()
    return part, keys

  def _listed(self, q, cache, state: Choice, ctx: Context):
    """Chooses and lists on any device: (state, ids, starts)."""
    ids, starts = cache.page_ids(), cache.page_starts()
    newest = ctx.lengths - 1
    # All rows choose on a common step, or it would come in almost every one.
    due = jnp.any(state.due(newest, ctx.count, self.reuse)).astype(jnp.int32)
    due = jax.lax.pmax(due, ctx.axes.data) > 0
    slots = self._choose(q, cache, newest, state, due, ctx)
    state = state.replaced(slots, newest, jnp.where(due, ctx.count, 0))
    state = state.served(ctx.count)
    slots = state.with_new_pages(
      starts, cache.used, page=cache.page, reuse=self.reuse
    )
    return state, *take_pages(_with_rings(slots, cache), ids, starts)

  def _rules(self, cache) -> Rules:
    return Rules(
      reuse=self.reuse,
      sink=self.sink,
      recent=self.recent,
      page=cache.page,
      group=self.group,
      first_slots=cache.config.ring_width if is_ring(cache) else 0,
      moments=self.scorer == 'moments',
    )

  def _choose(self, q, cache, newest, state: Choice, due, ctx: Context):
    """Slots [B K n] of the pages that retrieval heads see: held, if not due."""
    held, axis = state.slots, ctx.axes.seq
    loose = reused_pages.shared_looseness(state, cache.used, axis)
    bounds = self.scorer == 'bounds'

    def choose():
      low, high = cache.bounds() if bounds else cache.moments()
      return top_pages(
        q,
        low,
        high,
        cache.page_starts(),
        newest,
        ctx.valid,
        pages=self.pages(cache.page),
        sink=self.sink,
        recent=self.recent,
        page=cache.page,
        axis=axis,
        group=self.group,
        loose=loose,
        unscored=cache.ring if is_ring(cache) else None,
        held=held,
        due=due,
        moments=not bounds,
      )

    if bounds:  # they are there; others are made when due
      return choose()
    return jax.lax.cond(due, choose, lambda: held)


def retrieval_heads(cache) -> Int32[Array, 'h']:
  """Indices of the kv heads that do not stream; -1 pads.

  Of a ring cache without statistics, whose number of full heads is not known
  when it is traced: of all kv heads.
  """
  if is_ring(cache) and cache.stats is not None:
    return cache.stats_heads()
  return jnp.arange(cache.page_starts().shape[1], dtype=jnp.int32)


def _joined(lists: BlockList, rule: BlockList, ring, full) -> BlockList:
  """Lists of the kv heads `full` at their places; other heads follow the rule.

  Args:
    lists: of those heads' queries.
    rule: of all heads.
    ring: bool [N] which query heads stream.
    full: int32 [h] kv heads; -1 pads.
  """
  batch, heads = rule.count.shape[:2]
  group = lists.count.shape[1] // len(full)
  own = (jnp.where(full < 0, heads // group, full) * group)[:, None]
  own = (own + jnp.arange(group)).reshape(-1)

  def place(x):
    none = jnp.zeros((batch, heads, *x.shape[2:]), jnp.int32)
    return none.at[:, own].set(x, mode='drop')

  return dataclasses.replace(
    lists,
    ids=place(lists.ids),
    count=jnp.where(ring[:, None], 0, place(lists.count)),
    sink=rule.sink,
    window=rule.window,
  )


def _with_rings(slots, cache):
  """Lists in which each ring head has all pages of its ring."""
  if not is_ring(cache):
    return slots
  width = max(slots.shape[2], cache.config.ring_width)
  short = ((0, 0), (0, 0), (0, width - slots.shape[2]))
  slots = jnp.pad(slots, short, constant_values=-1)
  index = jnp.arange(width, dtype=jnp.int32)
  index = jnp.where(index < cache.config.ring_width, index, -1)
  return jnp.where(cache.ring[:, None], index, slots)


METHOD = Method('lserve', LServePrefill(), TwoWayPaged(), LServeDecode())
