"""Votes of heads for tokens: one list of tokens for all heads of a layer.

Wu et al., "TokenSelect: efficient long-context inference and length
extrapolation for LLMs via dynamic token-level KV cache selection",
arXiv:2411.02886, section 5.1. With s_hi the logit of query head h and token i,

  top_k      v_i = sum_h s_hi                                   (equation 5)
  head_vote  v_i = sum_h [token i is among the k best of head h] (equation 6)
  soft       v_i = sum_h softmax_i(s_h)                         (equation 7)

Each is a sum over heads of f(s_hi, stat_h) with one number a head that depends
on all candidates: the log-sum-exp, what parts the k-th best logit from the
next, nothing. So tokens may be scored in tiles, on shards, or in part. Heads
may weigh differently: heads='energy' counts a vote as often as its query is
long (a variant that third parties tried; the paper counts all alike).

Two departures from the public release: query head h reads kv head h // G (the
release takes h modulo K, which no checkpoint means), and pooling windows are
odd (an even one shifts votes by half a token).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

Kind = Literal['soft', 'top_k', 'head_vote']
Heads = Literal['equal', 'energy']
Pooling = Literal['mean', 'l2']
KINDS, HEADS, POOLINGS = get_args(Kind), get_args(Heads), get_args(Pooling)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Voters:
  """Whose logits count, and how much.

  Attributes:
    q: queries, equally many for every kv head.
    weight: of each query's vote; None: all alike.
  """

  q: Float[Array, '*R n H']
  weight: Float[Array, '*R n'] | None = None


def pool_queries(
  q: Float[Array, 'B T N H'],
  valid: Bool[Array, 'B T'],
  pooling: Pooling = 'mean',
) -> Float[Array, 'B N H']:
  """One query for several tokens (section 5.2): their mean, head by head.

  Args:
    q: queries.
    valid: those that count; a row without any gives 0.
    pooling: 'mean', or 'l2': weighted by the norms of a head's queries.
  """
  return mean_of(*query_sums(q, valid, pooling)).astype(q.dtype)


def query_sums(
  q: Float[Array, 'B T N H'], valid: Bool[Array, 'B T'], pooling: Pooling
) -> tuple[Float[Array, 'B N H'], Float[Array, 'B N 1']]:
  """What a mean is made of: (weighted sum, sum of weights), float32."""
  x = q.astype(jnp.float32)
  weight = valid[:, :, None, None].astype(jnp.float32)
  weight = jnp.broadcast_to(weight, (*x.shape[:3], 1))
  if pooling == 'l2':
    weight = weight * jnp.linalg.norm(x, axis=-1, keepdims=True)
  return jnp.sum(x * weight, axis=1), jnp.sum(weight, axis=1)


def mean_of(
  total: Float[Array, '*R H'], weight: Float[Array, '*R 1']
) -> Float[Array, '*R H']:
  """The mean; 0 where nothing has weight."""
  return total / jnp.where(weight > 0, weight, 1.0)


def voters(
  q: Float[Array, '*R N H'], n_kv_heads: int, kind: Kind, heads: Heads = 'equal'
) -> Voters:
  """The queries whose logits are summed.

  A sum of logits over the query heads of one kv head is the logit of their
  sum, so 'top_k' has one voter a kv head.

  Args:
    q: a query a head.
    n_kv_heads: K; query head h reads kv head h // (N / K).
    kind: of vote.
    heads: 'equal', or 'energy': each counts by the norm of its query.
  """
  weight = None
  if heads == 'energy':
    weight = jnp.linalg.norm(q.astype(jnp.float32), axis=-1)
  if kind != 'top_k':
    return Voters(q, weight)
  x = q.astype(jnp.float32)
  if weight is not None:
    x = x * weight[..., None]
  *rows, n, h = q.shape
  x = jnp.sum(x.reshape(*rows, n_kv_heads, n // n_kv_heads, h), axis=-2)
  return Voters(x.astype(q.dtype))


def head_stats(
  scores: Float[Array, 'B R N S'],
  candidates: Bool[Array, 'B R S'],
  kind: Kind,
  k: int,
  seq: str | None = None,
) -> Float[Array, 'B R N']:
  """The number a head that `votes` needs, over the candidates of all shards.

  Args:
    scores: logits.
    candidates: tokens that can be chosen.
    kind: of vote.
    k: tokens that a head votes for ('head_vote').
    seq: mesh axis that shards tokens; None: it does not.
  """
  if kind == 'top_k':
    return jnp.zeros(scores.shape[:3], jnp.float32)
  scores = jnp.where(candidates[:, :, None], scores, -jnp.inf)
  if kind == 'head_vote':
    # Half way to the next, so that a logit that is computed again, in another
    # order of its sum, falls on the same side.
    last, after = kth_best(scores, k, seq)
    return (last + after) / 2
  top = jnp.max(scores, axis=-1)
  if seq is not None:
    top = lax.pmax(top, seq)
  top = jnp.maximum(top, -1e30)  # finite where there is no candidate
  total = jnp.sum(jnp.exp(scores - top[..., None]), axis=-1)
  if seq is not None:
    total = lax.psum(total, seq)
  return top + jnp.log(total)


def kth_best(
  scores: Float[Array, '*R S'], k: int, seq: str | None = None
) -> tuple[Float[Array, '*R'], Float[Array, '*R']]:
  """The k-th and the (k+1)-th largest of all shards; -inf: there is none."""
  short = [(0, 0)] * (scores.ndim - 1) + [(0, max(k + 1 - scores.shape[-1], 0))]
  best = lax.top_k(jnp.pad(scores, short, constant_values=-jnp.inf), k + 1)[0]
  if seq is not None and lax.axis_size(seq) > 1:
    best = lax.all_gather(best, seq, axis=best.ndim - 1, tiled=True)
    best = lax.top_k(best, k + 1)[0]
  return best[..., k - 1], best[..., k]


def votes(
  scores: Float[Array, 'B R N S'],
  stats: Float[Array, 'B R N'],
  kind: Kind,
  weight: Float[Array, 'B R N'] | None = None,
) -> Float[Array, 'B R S']:
  """Votes for each token from this shard's heads.

  Args:
    scores: logits of some tokens; all heads of `voters`.
    stats: from `head_stats`.
    kind: of vote.
    weight: of each head; None: all alike.
  """
  stats = stats[..., None]
  if kind == 'soft':
    # A head without candidates has no vote; what is scored is not one.
    part = jnp.exp(jnp.minimum(scores - stats, 0.0))
  elif kind == 'head_vote':
    part = (scores >= stats).astype(jnp.float32)
  else:
    part = scores
  if weight is not None:
    part = part * weight[..., None]
  return jnp.sum(part, axis=2)


def over_heads(x: Array, model: str | None) -> Array:
  """Votes of all heads, where the mesh axis `model` shards them."""
  return x if model is None else lax.psum(x, model)


def max_pool(
  x: Float[Array, '*R S'], candidates: Bool[Array, '*R S'], window: int
) -> Float[Array, '*R S']:
  """Each candidate's best vote within an odd window; -inf for others."""
  x = jnp.where(candidates, x, -jnp.inf)
  if window == 1:
    return x
  shape = (1,) * (x.ndim - 1) + (window,)
  wide = lax.reduce_window(x, -jnp.inf, lax.max, shape, (1,) * x.ndim, 'SAME')
  return jnp.where(candidates, wide, -jnp.inf)


def cosine(
  x: Float[Array, '*R N H'], y: Float[Array, '*R N H'], model: str | None = None
) -> Float[Array, '*R']:
  """Cosine of two vectors that run over all heads; 0 where one is 0."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  sums = jnp.stack(
    [jnp.sum(a * b, axis=(-2, -1)) for a, b in ((x, y), (x, x), (y, y))]
  )
  dot, xx, yy = over_heads(sums, model)
  return dot * jax.lax.rsqrt(jnp.maximum(xx * yy, 1e-30))


def candidates(
  low: Int32[Array, '*R'], high: Int32[Array, '*R'], length: int
) -> Bool[Array, '*R S']:
  """Which of `length` tokens lie in [low, high)."""
  token = jnp.arange(length, dtype=jnp.int32)
  return (token >= low[..., None]) & (token < high[..., None])


def all_votes(
  voters: Voters,
  scores_of: Callable[[Float[Array, 'B 1 N H']], Float[Array, 'B 1 N S']],
  low: Int32[Array, 'B'],
  high: Int32[Array, 'B'],
  *,
  kind: Kind,
  k: int,
  pool: int = 1,
  model: str | None = None,
  seq: str | None = None,
) -> Float[Array, 'B S']:
  """Votes for every candidate of this shard; -inf for other tokens.

  Args:
    voters: a query a row.
    scores_of: logits of queries, for every key of this shard.
    low: first candidate token of this shard.
    high: one past its last.
    kind: of vote.
    k: tokens that a head votes for ('head_vote').
    pool: odd window over which votes are max-pooled.
    model: mesh axis that shards heads; None: it does not.
    seq: mesh axis that shards tokens; None: it does not.
  """
  scores = scores_of(voters.q[:, None])
  mask = candidates(low, high, scores.shape[-1])
  stats = head_stats(scores, mask[:, None], kind, k, seq)
  weight = None if voters.weight is None else voters.weight[:, None]
  found = votes(scores, stats, kind, weight)[:, 0]
  return max_pool(over_heads(found, model), mask, pool)
