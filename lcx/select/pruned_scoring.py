"""Token votes where page bounds promise any; a certificate that none is lost.

The bound of a page (Quest, arXiv:2406.10774, equation 2) is above the logit of
each of its tokens. Only tokens of the most promising pages are scored. With A
the scored candidates, U the pages that were not, n_p the candidates of page p,
b_hp its bound for head h, Z_h the sum of exponentials over A, and all of that
the same list for every head:

  top_k  a token of U has at most u = max_{p in U} sum_h b_hp votes: the list is
         the full scan's if the k-th best vote in A is above u.
  soft   the true sum of exponentials lies between Z_h and Z_h (1 + r),
         r = max_h sum_{p in U} n_p exp(b_hp) / Z_h, so a true vote lies between
         v / (1 + r) and v; and a token of U has at most
         u = max_{p in U} sum_h min(1, exp(b_hp) / Z_h): the list is the full
         scan's if v_k / (1 + r) > max(v_{k+1}, u).

Weights of heads multiply both sides. Rounding is allowed for: bounds are
raised, and votes lowered, by ROUNDING.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.keys import NEVER
from kernels_pallas.selected_token import page_scores, token_scores
from lcx.select import soft_vote
from lcx.select.top_tokens import top_tokens

# Of sum |q| |k|, for sums of H float32 products in whatever order.
ROUNDING = 2.0**-16


class Pruned(NamedTuple):
  """What the scored pages gave.

  Attributes:
    chosen: ascending tokens of this shard, NEVER behind them.
    count: of chosen tokens.
    certain: whether the full scan's list is the same, on all shards.
  """

  chosen: Int32[Array, 'B n']
  count: Int32[Array, 'B']
  certain: Bool[Array, 'B']


def pruned_tokens(
  voters: soft_vote.Voters,
  read: Callable[[Int32[Array, 'B M']], Float[Array, 'B K M page H']],
  bounds: tuple[Float[Array, 'B K C H'], Float[Array, 'B K C H']],
  low: Int32[Array, 'B'],
  high: Int32[Array, 'B'],
  *,
  page: int,
  scored: int,
  k: int,
  kind: soft_vote.Kind,
  scale: float,
  certify: bool = True,
  model: str | None = None,
  seq: str | None = None,
) -> Pruned:
  """The k tokens with most votes among those of the best pages.

  Args:
    voters: a query a row, in the frame of the bounds.
    read: keys of some of the bounds' pages, by index.
    bounds: (kmin, kmax) of this shard's pages.
    low: first candidate token of this shard.
    high: one past its last candidate.
    page: tokens of a page of the bounds.
    scored: tokens whose votes are counted, of all shards together.
    k: tokens to choose.
    kind: of vote.
    scale: of logits.
    certify: False: `certain` is False, and costs nothing.
    model: mesh axis that shards heads; None: it does not.
    seq: mesh axis that shards tokens; None: it does not.

  Returns:
    The list, and whether it is the full scan's.
  """
  batch, _, n_pages, _ = bounds[0].shape
  q, weight = voters.q, voters.weight
  if weight is not None:
    weight = weight[:, None]
  first = jnp.arange(n_pages, dtype=jnp.int32) * page
  n = jnp.minimum(first + page, high[:, None]) - jnp.maximum(
    first, low[:, None]
  )
  n = jnp.maximum(n, 0)  # [B C] candidates of a page
  bound = page_scores(q[:, None], *bounds) * scale  # [B 1 N C]
  by_bound = 'top_k' if kind == 'top_k' else 'soft'
  stats = soft_vote.head_stats(bound, (n > 0)[:, None], by_bound, k, seq)
  promise = soft_vote.votes(bound, stats, by_bound, weight)[:, 0]
  promise = soft_vote.over_heads(promise, model)
  promise = jnp.where(n > 0, promise, -jnp.inf)
  best, _ = top_tokens(promise, max(scored // page, 1), seq)

  safe = jnp.minimum(best, n_pages - 1)
  token = safe[:, :, None] * page + jnp.arange(page, dtype=jnp.int32)
  mask = (token >= low[:, None, None]) & (token < high[:, None, None])
  mask = (mask & (best < NEVER)[:, :, None]).reshape(batch, -1)
  keys = read(safe)
  keys = keys.reshape(*keys.shape[:2], -1, keys.shape[-1])
  scores = token_scores(q[:, None], keys, scale=scale)  # [B 1 N A]
  stats = soft_vote.head_stats(scores, mask[:, None], kind, k, seq)
  found = soft_vote.votes(scores, stats, kind, weight)
  found = soft_vote.over_heads(found, model)
  found = jnp.where(mask, found[:, 0], -jnp.inf)
  index, count = top_tokens(found, k, seq)
  token = token.reshape(batch, -1)
  chosen = jnp.take_along_axis(
    token, jnp.minimum(index, token.shape[1] - 1), axis=1
  )
  chosen = jnp.where(index < NEVER, chosen, NEVER)
  certain = jnp.zeros((batch,), bool)
  if certify:
    left = (n > 0).at[jnp.arange(batch)[:, None], best].set(False, mode='drop')
    certain = _certain(
      found,
      bound[:, 0],
      stats[:, 0],
      weight,
      jnp.where(left, n, 0),
      _error(q, bounds, scale, seq),
      k,
      kind,
      model,
      seq,
    )
  return Pruned(chosen, count, certain)


def _error(q, bounds, scale: float, seq) -> Float[Array, 'B N']:
  """How far rounding may take a logit or a bound from its true value."""
  largest = jnp.max(jnp.maximum(-bounds[0], bounds[1]), axis=2)  # [B K H]
  if seq is not None:
    largest = lax.pmax(largest, seq)
  group = q.shape[1] // largest.shape[1]
  largest = jnp.repeat(largest, group, axis=1).astype(jnp.float32)
  size = jnp.sum(jnp.abs(q.astype(jnp.float32)) * jnp.abs(largest), axis=-1)
  return ROUNDING * scale * size


def _certain(
  found: Float[Array, 'B A'],
  bound: Float[Array, 'B N C'],
  stats: Float[Array, 'B N'],
  weight: Float[Array, 'B 1 N'] | None,
  left: Int32[Array, 'B C'],
  error: Float[Array, 'B N'],
  k: int,
  kind: soft_vote.Kind,
  model: str | None,
  seq: str | None,
) -> Bool[Array, 'B']:
  """Whether no token of the pages that are left can change the list.

  Args:
    found: votes of scored candidates.
    bound: of all pages' logits.
    stats: of the scored candidates.
    weight: of heads; the bounds above hold term by term, whatever it is.
    left: candidates of each page that was not scored.
    error: of a bound, by rounding.
    k: tokens chosen.
    kind: of vote.
    model: mesh axis of heads.
    seq: mesh axis of tokens.
  """
  most = (
    jnp.max
    if seq is None
    else lambda x, axis: lax.pmax(jnp.max(x, axis=axis), seq)
  )
  bound += error[:, :, None]
  kth, after = soft_vote.kth_best(found, k, seq)
  at_most = soft_vote.votes(bound[:, None], stats[:, None], kind, weight)[:, 0]
  at_most = soft_vote.over_heads(at_most, model)
  at_most = most(jnp.where(left > 0, at_most, -jnp.inf), axis=1)
  none_left = at_most == -jnp.inf
  if kind == 'top_k':
    slack = soft_vote.over_heads(jnp.sum(error, axis=1), model)
    return none_left | (kth - slack > at_most)
  rest = jnp.exp(jnp.minimum(bound - stats[:, :, None], 80.0))
  rest = jnp.sum(left[:, None] * rest, axis=2)  # [B N]
  if seq is not None:
    rest = lax.psum(rest, seq)
  rest = jnp.max(rest, axis=1)
  if model is not None:
    rest = lax.pmax(rest, model)
  kth = kth * (1 - ROUNDING) / (1 + rest)
  return none_left | (kth > jnp.maximum(after, at_most))


def lost_votes(
  votes: Float[Array, 'B S'],
  chosen: Int32[Array, 'B n'],
  k: int,
  seq: str | None = None,
) -> Float[Array, 'B']:
  """Share of the full list's votes that another list lacks.

  Args:
    votes: of all tokens of this shard; -inf where there can be none.
    chosen: tokens of the other list; NEVER behind them.
    k: tokens of the full list.
    seq: mesh axis that shards tokens; None: it does not.
  """
  best, _ = top_tokens(votes, k, seq)

  def sum_of(chosen):
    index = jnp.minimum(chosen, votes.shape[1] - 1)
    found = jnp.take_along_axis(votes, index, axis=1)
    found = jnp.where(chosen < NEVER, jnp.maximum(found, 0.0), 0.0)
    found = jnp.sum(found, axis=1)
    return found if seq is None else lax.psum(found, seq)

  whole, kept = sum_of(best), sum_of(chosen)
  return jnp.where(whole > 0, 1 - kept / jnp.maximum(whole, 1e-30), 0.0)
