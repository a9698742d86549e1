"""Votes of a prompt's chunks for the tokens before them.

Every chunk has one pooled query (TokenSelect, arXiv:2411.02886, section 5.2).
The number a head that votes need, the log-sum-exp, comes for all chunks from
one launch of an attention kernel over each chunk's interval of candidates;
votes then take a second look at the keys, tile by tile, with no more than
TILE_SCORES logits in memory. Tiles behind a group's last candidate are skipped.

A few chunks do not fill an accelerator with rows of queries: on an H200 one of
them took 1.6 ms over 128K keys by that kernel, as long as dense attention of
all its rows (experiments/results/superseded_speed.jsonl). Where the logits of
all chunks fit into ONCE_SCORES, they are kept, keys are read once, and every
step is spread over the keys (`kernels_pallas.token_votes`).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas import token_votes
from kernels_pallas.passing_block import passing_block
from kernels_pallas.selected_token import token_scores
from lcx.select import soft_vote
from lcx.select.top_tokens import top_tokens

TILE_SCORES = 2**24  # logits of a tile, all heads: 64 MB in float32
ONCE_SCORES = 2**25


def fit_at_once(q: Float[Array, 'B R N H'], k: Float[Array, 'B K S H']) -> bool:
  """Whether the logits of all chunks may be kept (static)."""
  return q[..., 0].size * k.shape[2] <= ONCE_SCORES


def best_at_once(
  voters: soft_vote.Voters,
  k: Float[Array, 'B K S H'],
  low: Int32[Array, 'B R'],
  high: Int32[Array, 'B R'],
  *,
  kind: soft_vote.Kind,
  n_best: int,
  scale: float,
  pool: int = 1,
  model: str | None = None,
) -> tuple[Int32[Array, 'L n'], Int32[Array, 'L']]:
  """The candidates with most votes, ascending, and how many: a row a chunk.

  Args:
    voters: of R chunks, q [B R n H].
    k: keys.
    low: first candidate of a chunk.
    high: one past its last.
    kind: of vote.
    n_best: tokens to choose, for which a head votes, too ('head_vote').
    scale: of logits.
    pool: odd window over which votes are max-pooled.
    model: mesh axis that shards heads; None: it does not.
  """
  alone = model is None or lax.axis_size(model) == 1
  if kind in token_votes.KINDS and pool == 1 and alone:
    chosen, count = token_votes.best_voted(
      voters.q,
      k,
      low,
      high,
      n_best,
      kind=kind,
      scale=scale,
      weight=voters.weight,
    )
    return chosen.reshape(-1, n_best), count.reshape(-1)
  votes = votes_at_once(
    voters, k, low, high, kind=kind, n_best=n_best, scale=scale, model=model
  )
  mask = soft_vote.candidates(low, high, k.shape[2])
  votes = soft_vote.max_pool(votes, mask, pool)
  return top_tokens(votes.reshape(-1, k.shape[2]), n_best)


def votes_at_once(
  voters: soft_vote.Voters,
  k: Float[Array, 'B K S H'],
  low: Int32[Array, 'B R'],
  high: Int32[Array, 'B R'],
  *,
  kind: soft_vote.Kind,
  n_best: int,
  scale: float,
  model: str | None = None,
) -> Float[Array, 'B R S']:
  """`chunk_votes` without `chunk_stats` before it; arguments as there."""
  scores = token_scores(voters.q, k, scale=scale)
  mask = soft_vote.candidates(low, high, k.shape[2])
  stats = soft_vote.head_stats(scores, mask, kind, n_best)
  found = soft_vote.votes(scores, stats, kind, voters.weight)
  return soft_vote.over_heads(found, model)


def chunk_stats(
  q: Float[Array, 'B R N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  low: Int32[Array, 'B R'],
  high: Int32[Array, 'B R'],
  *,
  kind: soft_vote.Kind,
  n_best: int,
  scale: float,
) -> Float[Array, 'B R N']:
  """What each head's votes need to know of all its candidates.

  Args:
    q: pooled queries of R chunks.
    k: keys.
    v: values; the kernel that sums exponentials reads them, too.
    low: first candidate of a chunk.
    high: one past its last.
    kind: of vote.
    n_best: tokens that a head votes for ('head_vote').
    scale: of logits.
  """
  if kind == 'soft':
    return passing_block(q, k, v, low, high, scale=scale).lse
  if kind == 'top_k':
    return jnp.zeros(q.shape[:3], jnp.float32)

  def one(row):  # an ablation: a chunk at a time
    q, low, high = (x[:, None] for x in row)
    scores = token_scores(q, k, scale=scale)
    mask = soft_vote.candidates(low, high, k.shape[2])
    return soft_vote.head_stats(scores, mask, kind, n_best)[:, 0]

  rows = (q.swapaxes(0, 1), low.T, high.T)
  return lax.map(one, rows).swapaxes(0, 1)


def chunk_votes(
  voters: soft_vote.Voters,
  stats: Float[Array, 'B R N'],
  k: Float[Array, 'B K S H'],
  high: Int32[Array, 'B R'],
  *,
  kind: soft_vote.Kind,
  scale: float,
  model: str | None = None,
) -> Float[Array, 'B R S']:
  """Votes of all heads; meaningless outside a chunk's candidates.

  Args:
    voters: of R chunks, q [B R n H].
    stats: from `chunk_stats`.
    k: keys.
    high: one past each chunk's last candidate.
    kind: of vote.
    scale: of logits.
    model: mesh axis that shards heads; None: it does not.
  """
  batch, rows, heads, _ = voters.q.shape
  length = k.shape[2]
  tile = _tile(length, TILE_SCORES // (batch * rows * heads))

  def visit(j, found):
    keys = lax.dynamic_slice_in_dim(k, j * tile, tile, axis=2)
    scores = token_scores(voters.q, keys, scale=scale)
    part = soft_vote.votes(scores, stats, kind, voters.weight)
    return lax.dynamic_update_slice_in_dim(found, part, j * tile, axis=2)

  found = jnp.zeros((batch, rows, length), jnp.float32)
  found = lax.fori_loop(0, (jnp.max(high) + tile - 1) // tile, visit, found)
  return soft_vote.over_heads(found, model)


def _tile(length: int, limit: int) -> int:
  """The largest divisor of `length` that is at most `limit`, and at least 1.

  Prompts are padded to multiples of 128, so that it is a large one.
  """
  parts = max(1, -(-length // max(limit, 1)))
  return next(length // n for n in range(parts, length + 1) if length % n == 0)
