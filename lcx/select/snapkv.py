"""SnapKV: the prompt's tokens that its last queries look at.

Li et al., "SnapKV: LLM knows what you are looking for before generation",
arXiv:2404.14469, section 4 and Algorithm 1:

  vote[s] = sum over the w last queries of softmax(q k^T / sqrt(H))[s]
  vote    = 1-D pooling of vote over positions (kernel 5 or 7, stride 1)
  keep the best cap - w tokens before the window, and the window

Votes of a kv head's query heads are added, so that a token is kept once a kv
head (the released code repeats keys and keeps tokens per query head).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.block_choice import choose, to_list
from kernels_pallas.keys import NEVER, Pages
from lcx.select import window

_TILE = 65536  # tokens read at a time


def snapkv(
  q: Float[Array, 'B N w H'],
  at: Int32[Array, 'B w'],
  pages: Pages,
  ids: Int32[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
  *,
  since: Int32[Array, 'B'],
  keep: int,
  kernel: int = 5,
  pool: str = 'avg',
  scale: float | None = None,
  axis: str | None = None,
) -> tuple[Int32[Array, 'B K n'], Int32[Array, 'B K n']]:
  """The kept tokens in the pages that end at or before `since`.

  Later pages are the window's: they are seen whole.

  Args:
    q: the rotated last queries of each row.
    at: their positions; -1: none.
    pages: the pool.
    ids: page of the pool, per row, kv head and place; -1: none.
    starts: position of each page's first token; NEVER: unused.
    since: first position of the window.
    keep: tokens kept a kv head.
    kernel: positions that are pooled, odd.
    pool: 'avg' or 'max'.
    scale: of the scores; None: H**-0.5.
    axis: mesh axis that shards pages by sequence. Votes are exchanged and the
      budget is global; each shard returns what it holds.

  Returns:
    (rows, positions) as `attend_tokens` takes them, n = min(keep, W page),
    -1 and NEVER where fewer are kept.

  Raises:
    ValueError: a budget below 1, an even kernel, or an unknown pool.
  """
  if keep < 1:
    raise ValueError(f'{keep=} must be at least 1')
  if kernel < 1 or kernel % 2 == 0:
    raise ValueError(f'{kernel=} must be odd')
  if pool not in ('avg', 'max'):
    raise ValueError(f"{pool=} must be 'avg' or 'max'")
  size, h = q.shape[2:]
  batch, kv_heads, n_pages = ids.shape
  page = pages.page
  slots = n_pages * page
  sharded = axis is not None and lax.axis_size(axis) > 1
  span = slots * (lax.axis_size(axis) if sharded else 1)
  scale = h**-0.5 if scale is None else scale
  per_tile = min(max(_TILE // page, 1), n_pages)
  n_tiles = -(-n_pages // per_tile)

  def head(q, at, ids, starts, since):
    q = q.reshape(-1, h)
    at = jnp.tile(at, q.shape[0] // size)

    def fetch(i):
      first = jnp.minimum(i * per_tile, n_pages - per_tile)
      place = first + jnp.arange(per_tile)
      start = jnp.where(place >= i * per_tile, starts[place], NEVER)
      keys, _ = pages.read(jnp.maximum(ids[place], 0), q.dtype)
      position = start[:, None] + jnp.arange(page)
      return keys.reshape(-1, h), position.reshape(-1)

    lse = window.normaliser(q, at, fetch, n_tiles, scale, axis)

    def vote(votes, i):
      keys, position = fetch(i)
      weight = jnp.exp(
        window.scores(q, at, keys, position, scale) - lse[:, None]
      )
      # By position, so that neighbours are neighbours wherever they live.
      return votes.at[position].add(weight.sum(0), mode='drop'), None

    votes, _ = lax.scan(vote, jnp.zeros(span, jnp.float32), jnp.arange(n_tiles))
    position = (starts[:, None] + jnp.arange(page)).reshape(-1)
    old = (starts + page <= since) & (ids >= 0)
    old = jnp.repeat(old, page)
    mine = (
      jnp.zeros(span, jnp.int32)
      .at[position]
      .add(old.astype(jnp.int32), mode='drop')
    )
    if sharded:
      votes, mine = lax.psum((votes, mine), axis)
    pooled = _pool(jnp.where(mine > 0, votes, 0.0), kernel, pool)
    chosen = choose(
      pooled,
      reachable=mine > 0,
      forced=jnp.zeros(span, bool),
      limit=keep,
    )
    chosen = jnp.take(chosen, position, mode='fill', fill_value=False) & old
    slot, count = to_list(chosen, min(keep, slots))
    used = jnp.arange(slot.shape[0]) < count
    row = jnp.take(ids, slot // page) * page + slot % page
    return jnp.where(used, row, -1), jnp.where(used, position[slot], NEVER)

  shape = (batch, kv_heads)
  return window.map_heads(
    head,
    q.reshape(*shape, -1, size, h),
    jnp.broadcast_to(at[:, None], (*shape, size)),
    ids,
    starts,
    jnp.broadcast_to(since[:, None], shape),
  )


def _pool(x: Float[Array, 'S'], kernel: int, pool: str) -> Float[Array, 'S']:
  """Pooling of stride 1 that keeps the length; zeros beyond the ends."""
  if pool == 'max':
    return lax.reduce_window(x, 0.0, lax.max, (kernel,), (1,), 'SAME')
  total = lax.reduce_window(x, 0.0, lax.add, (kernel,), (1,), 'SAME')
  return total / kernel
