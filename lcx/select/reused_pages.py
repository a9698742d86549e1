"""A selection of pages that serves several steps, with every new page in it.

LServe, arXiv:2502.14866, section 3.5.3: pages are chosen once every C tokens.
What is kept are *slots* of the row's table, not pages of the pool, so that a
recycled page cannot be read for an old one; and the newest position at the
choice, so that pages which began since then are added at every step. (Without
that, C = 4 and pages of 64 lose the newest tokens at two steps of 64.)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.page_choice import reuse as in_place
from kernels_pallas.page_choice.gpu import Scoring
from kernels_pallas.page_choice.reuse import LONG_AGO
from lcx.cache import PagedCache
from lcx.methods.base import Context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
  """The pages that were chosen, and for how long they have served.

  Attributes:
    slots: int32 [B K n] of each row's table, this shard's; -1: none.
    newest: int32 [B] position of the newest token when they were chosen.
    age: int32 [B] tokens that were answered from them.
    loose: float32 [B h 1 H] what bounds are too wide by, of the prompt's keys
      on this shard (`looseness`); None: nothing is taken off.
  """

  slots: Int32[Array, 'B K n']
  newest: Int32[Array, 'B']
  age: Int32[Array, 'B']
  loose: Float[Array, 'B h 1 H'] | None = None

  @classmethod
  def none(cls, batch: int, n_kv_heads: int, n: int) -> 'Choice':
    """Of rows that must choose at their first step."""
    return cls(
      jnp.full((batch, n_kv_heads, n), -1, jnp.int32),
      jnp.full((batch,), -1, jnp.int32),
      jnp.full((batch,), LONG_AGO, jnp.int32),
    )

  def due(
    self, newest: Int32[Array, 'B'], count: Int32[Array, 'B'], reuse: int
  ) -> Bool[Array, 'B']:
    """Rows that must choose before they answer `count` more tokens.

    Also rows that were cut behind their last choice: pages that were recent
    then may not be listed.
    """
    old = self.age + count > reuse
    cut = newest - count < self.newest
    return (count > 0) & (old | cut)

  def served(self, count: Int32[Array, 'B']) -> 'Choice':
    """After `count` more tokens."""
    age = jnp.minimum(self.age + count, LONG_AGO)
    return dataclasses.replace(self, age=age)

  def outdated(self, count: Int32[Array, 'B']) -> 'Choice':
    """After `count` more tokens, none from it: the next ones choose anew."""
    age = jnp.where(count > 0, LONG_AGO, self.age)
    return dataclasses.replace(self, age=age)

  def replaced(
    self,
    slots: Int32[Array, 'B K n'],
    newest: Int32[Array, 'B'],
    count: Int32[Array, 'B'],
  ) -> 'Choice':
    """Chosen anew where `count` is above 0; other rows' slots are as before."""
    active = count > 0
    return dataclasses.replace(
      self,
      slots=slots,
      newest=jnp.where(active, newest, self.newest),
      age=jnp.where(active, 0, self.age),
    )

  def with_new_pages(
    self,
    starts: Int32[Array, 'B K W'],
    used: Int32[Array, 'B'],
    *,
    page: int,
    reuse: int,
  ) -> Int32[Array, 'B K m']:
    """The slots and those of all pages that began since the choice.

    Args:
      starts: of the table's pages.
      used: tokens that this shard holds of each row.
      page: tokens a page holds.
      reuse: tokens a choice serves, at most.
    """
    n = -(-(reuse - 1) // page)  # pages that reuse - 1 tokens can begin
    if n == 0:
      return self.slots
    last = (used - 1) // page
    slot = last[:, None, None] - jnp.arange(n, dtype=jnp.int32)
    slot = jnp.broadcast_to(slot, (*starts.shape[:2], n))
    safe = jnp.clip(slot, 0, starts.shape[2] - 1)
    start = jnp.take_along_axis(starts, safe, axis=2)
    fresh = (slot >= 0) & (start > self.newest[:, None, None])
    return jnp.concatenate([self.slots, jnp.where(fresh, slot, -1)], axis=2)


def looseness(cache, share: float) -> Float[Array, 'B h 1 H']:
  """`share` of half of the mean width of the cache's bounds, per channel.

  The largest q . k of a page is about q . middle + (1 - share) |q| . half of
  the width, so a bound is too large by share |q| . half. Which pages that makes
  too good is not known; that it makes a query head with wide channels too good
  beside its mates is.
  """
  low, high = cache.bounds()
  pages, width = low.shape[2], cache.page_starts().shape[2]
  logical = cache.page * width // pages
  used = jnp.arange(pages) * logical < cache.used[:, None]
  half = (high.astype(jnp.float32) - low.astype(jnp.float32)) / 2
  half = jnp.sum(jnp.where(used[:, None, :, None], half, 0), axis=2)
  count = jnp.maximum(jnp.sum(used, axis=1), 1)[:, None, None]
  return (share * half / count)[:, :, None]


def shared_looseness(
  choice: Choice, used: Int32[Array, 'B'], axis: str
) -> Float[Array, 'B h H'] | None:
  """`choice.loose` over all shards, each by the tokens it holds."""
  if choice.loose is None:
    return None
  loose = choice.loose[:, :, 0]
  if jax.lax.axis_size(axis) == 1:
    return loose
  part = used / jnp.maximum(jax.lax.psum(used, axis), 1)
  return jax.lax.psum(loose * part[:, None, None], axis)


def serves(
  q: Float[Array, 'B T N H'], cache, ctx: Context, rules: in_place.Rules
) -> bool:
  """Whether `listed` can take a step: on one GPU, by statistics of keys."""
  axes = ctx.axes
  one = jax.lax.axis_size(axes.seq) * jax.lax.axis_size(axes.data) == 1
  low, _ = _statistics(cache, rules)
  return one and in_place.serves(q, low, cache.page_starts())


def scoring(
  choice: Choice,
  q: Float[Array, 'B T N H'],
  cache,
  ctx: Context,
  rules: in_place.Rules,
  unscored: Bool[Array, 'K'] | None,
) -> Scoring:
  """The scores by which `listed` chooses where it must: work of a launch.

  Args:
    choice: that served until now.
    q: queries, rotated or not: their shape counts.
    cache: of this layer, the new tokens in it or not.
    ctx: the context.
    rules: how to choose.
    unscored: kv heads without bounds, which see their first slots.
  """
  # Of rows that answer nothing, the newest position counts for nothing. So of
  # one token it is that token's, which is there without a launch.
  one = ctx.positions.shape[1] == 1
  return in_place.scoring(
    q,
    _statistics(cache, rules)[0],
    cache.page_starts(),
    ctx.positions[:, 0] if one else ctx.lengths - 1,
    ctx.valid,
    ctx.count,
    _held(choice),
    rules=rules,
    loose=shared_looseness(choice, cache.used, ctx.axes.seq),
    unscored=unscored,
  )


def listed(
  choice: Choice,
  q: Float[Array, 'B T N H'],
  cache,
  ctx: Context,
  rules: in_place.Rules,
  work: Scoring,
  scored: Any = None,
) -> tuple[Choice, Int32[Array, 'B K m'], Int32[Array, 'B K m']]:
  """The choice after this step, and ids and starts of the pages it shows.

  Two launches in place do what `top_pages`, `Choice` and `take_pages` say in
  array operations; the first may be that of the append.

  Args:
    choice: that served until now.
    q: rotated queries.
    cache: of this layer, the new tokens in it.
    ctx: the context.
    rules: how to choose.
    work: of `scoring`.
    scored: what it found in another launch; None: it gets its own.
  """
  ids = cache.table if isinstance(cache, PagedCache) else cache.page_ids()
  low, high = _statistics(cache, rules)
  ids, starts, held = in_place.list_pages(
    q,
    low,
    high,
    in_place.Table(ids, cache.page_starts(), cache.used),
    ctx.count,
    _held(choice),
    work,
    rules=rules,
    scored=scored,
  )
  return Choice(*held, choice.loose), ids, starts


def _statistics(cache, rules: in_place.Rules):
  """Bounds, or the sums that moments are of: the launch divides."""
  if rules.moments:
    return cache.stats.total, cache.stats.square
  return cache.bounds()


def _held(choice: Choice) -> in_place.Held:
  return in_place.Held(choice.slots, choice.newest, choice.age)
