"""The best pages by bounds of their keys, over all sequence shards.

Used by Quest (arXiv:2406.10774, section 3.3) and by LServe's page selection
(arXiv:2502.14866, section 3.5). On one shard, it is a kernel's
(`kernels_pallas.page_choice`); several exchange their best scores.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import page_choice
from kernels_pallas.keys import NEVER


def top_pages(
  q: Float[Array, 'B T N H'],
  low: Float[Array, 'B h C H'],
  high: Float[Array, 'B h C H'],
  starts: Int32[Array, 'B K W'],
  newest: Int32[Array, 'B'],
  valid: Bool[Array, 'B T'],
  *,
  pages: int,
  sink: int,
  recent: int,
  page: int,
  axis: str,
  group: str = 'max',
  loose: Float[Array, 'B h H'] | None = None,
  unscored: Bool[Array, 'K'] | None = None,
  held: Int32[Array, 'B K n'] | None = None,
  due: Bool[Array, ''] | None = None,
  moments: bool = False,
) -> Int32[Array, 'B K n']:
  """Slots of this shard's pages among the best of all shards.

  A row that needs at most pages - 1 pages sees everything: over shards, its
  tokens may take a few more, half full.

  Args:
    q: rotated queries; scores, and what is not said here, are those of
      `kernels_pallas.page_choice.choose_pages`.
    low: this shard's bounds.
    high: likewise.
    starts: of this shard's pages; NEVER where unused.
    newest: position of each row's newest token, on any shard.
    valid: which queries count.
    pages: to choose over all shards, a row and kv head.
    sink: first tokens that are always seen.
    recent: last tokens that are always seen.
    page: tokens a page holds.
    axis: name of the mesh axis that shards pages.
    group: 'max' or 'sum' over query heads.
    loose: alike on all shards of a row.
    unscored: kv heads without bounds, of which nothing is chosen.
    held: the earlier choice, or None.
    due: whether to choose now, alike on all shards of a row.
    moments: low and high are mean and deviation, of which scores are likely
      and no bounds; in plain XLA (`lcx.select.reused_pages` has a launch).

  Returns:
    Ascending, -1 at the end where fewer pages exist; n = min(pages, W).
  """
  kv, width = starts.shape[1:]
  n = min(pages, width)
  rule = {'sink': sink, 'recent': recent, 'page': page}
  when = {'held': held, 'due': due}
  if jax.lax.axis_size(axis) == 1 and not moments:
    return page_choice.choose_pages(
      *(q, low, high, starts, newest, valid),
      n=n,
      group=group,
      loose=loose,
      unscored=unscored,
      **rule,
      **when,
    )
  heads = None
  if unscored is not None:
    heads = page_choice.scored_heads(unscored, low.shape[1])
  own = starts if heads is None else starts[:, jnp.maximum(heads, 0)]

  def choose():
    scores = page_choice.kv_page_scores(
      *(q, low, high, valid),
      width=width,
      kv_heads=kv,
      group=group,
      loose=loose,
      heads=heads,
      moments=moments,
    )
    scores = page_choice.forced_scores(scores, own, newest, **rule)
    best, slots = jax.lax.top_k(scores, n)
    kept = _among_global_best(best, jax.lax.axis_index(axis), pages, axis)
    kept |= (newest < (pages - 1) * page)[:, None, None]
    return page_choice.ascending(slots, kept & (best > -jnp.inf), width)

  return page_choice.when_due(choose, valid, kv_heads=kv, heads=heads, **when)


def _among_global_best(
  best: Float[Array, 'B K n'], shard: Array, count: int, axis: str
) -> Bool[Array, 'B K n']:
  """Which of this shard's best are among the best of all shards.

  Earlier shards win ties, as earlier pages do on one device.
  """
  gathered = jax.lax.all_gather(best, axis, axis=2, tiled=True)
  _, winners = jax.lax.top_k(gathered, min(count, gathered.shape[-1]))
  mine = shard * best.shape[-1] + jnp.arange(best.shape[-1])
  return jnp.any(winners[..., None, :] == mine[:, None], axis=-1)


def take_pages(
  index: Int32[Array, 'B K n'],
  ids: Int32[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
) -> tuple[Int32[Array, 'B K n'], Int32[Array, 'B K n']]:
  """Physical ids and start positions of selected pages; -1 and NEVER pad."""
  safe = jnp.maximum(index, 0)
  chosen = jnp.where(index < 0, -1, jnp.take_along_axis(ids, safe, axis=2))
  first = jnp.where(index < 0, NEVER, jnp.take_along_axis(starts, safe, axis=2))
  return chosen, first
