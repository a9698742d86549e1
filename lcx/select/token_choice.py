"""The list of a decode step: all tokens scored, or those of the best pages."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.keys import NEVER
from kernels_pallas.selected_token import token_scores
from lcx.methods.base import Context
from lcx.select import soft_vote, working_set
from lcx.select.key_copies import KeyCopies
from lcx.select.pruned_scoring import lost_votes, pruned_tokens
from lcx.select.token_rules import ReuseRules
from lcx.select.top_tokens import top_tokens


class Choice(NamedTuple):
  """Tokens that votes chose.

  Attributes:
    chosen: ascending tokens of this shard, NEVER behind them.
    count: of chosen tokens.
    fell_back: 1 where no certificate was found and all tokens were scored.
    lost: share of the full list's votes that this one lacks; 0 where it is the
      full list, or where nobody traces.
  """

  chosen: Int32[Array, 'B n']
  count: Int32[Array, 'B']
  fell_back: Float[Array, 'B']
  lost: Float[Array, 'B']


def choose_tokens(
  asked: Float[Array, 'B N H'],
  cache,
  copies: KeyCopies | None,
  low: Int32[Array, 'B'],
  high: Int32[Array, 'B'],
  rules: ReuseRules,
  ctx: Context,
) -> Choice:
  """The `rules.k` candidates with most votes, over all shards.

  Args:
    asked: the query that votes, in the frame of the cache's keys.
    cache: of this layer and shard.
    copies: of its keys, which are scored in their place; None: themselves.
    low: first candidate token of this shard.
    high: one past its last.
    rules: how to choose.
    ctx: the context.

  Raises:
    ValueError: votes are pooled, and rows lie on several devices.
  """
  shards = lax.axis_size(ctx.axes.seq)
  if rules.pool > 1 and shards > 1:
    raise ValueError(
      f'pool={rules.pool} needs each row on one device: mesh axis seq > 1'
    )
  axes = {'model': ctx.axes.model, 'seq': ctx.axes.seq}
  capacity = cache.page_ids().shape[2] * cache.page
  k = min(rules.k, capacity * shards)
  scale = rules.scale(asked.shape[-1])
  voters = rules.asking(asked, cache.page_ids().shape[1])
  none = jnp.zeros((asked.shape[0],), jnp.float32)

  def scores(q, exactly):
    if copies is not None and not exactly:
      return copies.scores(q, scale)
    keys = working_set.all_keys(cache, asked.dtype)
    return token_scores(q, keys, scale=scale)

  def votes(exactly):
    return soft_vote.all_votes(
      voters,
      functools.partial(scores, exactly=exactly),
      low,
      high,
      kind=rules.vote,
      k=k,
      pool=rules.pool,
      **axes,
    )

  def lost(chosen):
    if not ctx.trace:
      return none
    return lost_votes(votes(exactly=True), chosen, k, ctx.axes.seq)

  if rules.scoring == 'full':
    chosen, count = top_tokens(votes(exactly=False), k, ctx.axes.seq)
    return Choice(chosen, count, none, none if copies is None else lost(chosen))

  page = capacity // cache.bounds()[0].shape[2]
  read = functools.partial(working_set.read, cache, page, asked.dtype)
  if copies is not None:
    read = functools.partial(copies.read, page, asked.dtype)
  pruned = pruned_tokens(
    voters,
    read,
    cache.bounds(),
    low,
    high,
    page=page,
    scored=rules.scored,
    k=k,
    kind=rules.vote,
    scale=scale,
    certify=rules.scoring == 'pruned',
    **axes,
  )
  if rules.scoring == 'budget':
    return Choice(pruned.chosen, pruned.count, none, lost(pruned.chosen))

  fails = ~pruned.certain & (ctx.count > 0)
  n = min(k, capacity)

  def found():
    short = ((0, 0), (0, max(n - pruned.chosen.shape[1], 0)))
    chosen = jnp.pad(pruned.chosen, short, constant_values=NEVER)
    return chosen[:, :n], pruned.count

  def scan():
    return top_tokens(votes(exactly=True), k, ctx.axes.seq)

  anyone = lax.pmax(jnp.any(fails).astype(jnp.int32), ctx.axes.data)
  chosen, count = lax.cond(anyone > 0, scan, found)
  return Choice(chosen, count, fails.astype(jnp.float32), none)
