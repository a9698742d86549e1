"""A step of the Selection Cache in launches of its own, where a GPU has them.

`kernels_pallas.selection_cache` does in place what `TokenSelectDecode` says in
array operations: for rows on one device, lists of true positions, and keys of a
contiguous cache. What else a selection may be asked for goes the other way.
"""

import dataclasses

from jax import lax
from jaxtyping import Array, Bool, Float

from kernels_pallas import dispatch, selection_cache
from lcx.cache import DenseCache
from lcx.methods.base import Context
from lcx.select import soft_vote
from lcx.select.key_copies import KeyCopies
from lcx.select.token_rules import ReuseRules
from lcx.select.working_set import WorkingSet


def serves(
  rules: ReuseRules,
  cache,
  working: WorkingSet,
  voters: soft_vote.Voters,
  ctx: Context,
) -> bool:
  """Whether `step` can take a step."""
  axes = ctx.axes
  shards = lax.axis_size(axes.seq) * lax.axis_size(axes.model)
  guesses = rules.scoring == 'budget' or rules.score_bits == 8
  return (
    dispatch.prefers('gpu')
    and shards == 1
    and isinstance(cache, DenseCache)
    and rules.positions == 'true'
    and rules.scoring != 'pruned'
    and rules.pool == 1
    and not (ctx.trace and guesses)  # that compares with all votes
    and selection_cache.refuse(
      working.query.shape[1],
      _keys(cache, None, rules),
      working.k.shape[2],
      _static(rules, cache),
      voters.q.shape[1],
    )
    is None
  )


def step(
  rules: ReuseRules,
  query: Float[Array, 'B N H'],
  voters: soft_vote.Voters,
  cache: DenseCache,
  copies: KeyCopies | None,
  working: WorkingSet,
  ctx: Context,
) -> tuple[WorkingSet, Bool[Array, 'B']]:
  """The working set that serves this step's tokens, and which rows selected.

  Args:
    rules: how to choose.
    query: pooled and unrotated.
    voters: the queries that vote, in the frame of the cache's keys.
    cache: of this layer, the new tokens in it.
    copies: of its keys, which are scored in their place; None: themselves.
    working: that served until now.
    ctx: the context.
  """
  counts = working.held, working.chosen, working.until, working.age
  new, due = selection_cache.step(
    query,
    voters.q,
    voters.weight,
    _keys(cache, copies, rules),
    selection_cache.Working(
      working.query,
      working.k,
      working.v,
      selection_cache.Counts(*counts),
    ),
    selection_cache.Context(ctx.positions, ctx.valid, ctx.lengths),
    _static(rules, cache),
  )
  working = dataclasses.replace(
    working, query=new.query, k=new.k, v=new.v, **new.counts._asdict()
  )
  return working, due


def _keys(
  cache: DenseCache, copies: KeyCopies | None, rules: ReuseRules
) -> selection_cache.Keys:
  return selection_cache.Keys(
    cache.k,
    cache.v,
    cache.starts,
    cache.used,
    None if rules.scoring == 'full' else cache.bounds(),
    None if copies is None else (copies.codes, copies.scale),
  )


def _static(rules: ReuseRules, cache: DenseCache) -> selection_cache.Rules:
  pages = 0
  if rules.scoring == 'budget':
    pages = min(max(rules.scored // cache.page, 1), cache.starts.shape[1])
  return selection_cache.Rules(
    kind=rules.vote,
    k=rules.k,
    scale=rules.scale(cache.k.shape[3]),
    threshold=rules.threshold,
    reuse=rules.reuse,
    sink=rules.sink,
    window=rules.local - rules.reuse + 1,
    page=cache.page,
    pages=pages,
  )
