"""The best pages by a score, over all sequence shards, some always in.

Used by Quest (arXiv:2406.10774, section 3.3) and by LServe's page selection
(arXiv:2502.14866, section 3.5).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.keys import NEVER


def top_pages(
  scores: Float[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
  newest: Int32[Array, 'B'],
  *,
  budget: int,
  sink: int,
  recent: int,
  page: int,
  axis: str,
) -> Int32[Array, 'B K n']:
  """Indices of the pages that a budget of tokens buys.

  Pages that hold one of the first `sink` or last `recent` tokens are always
  in; they count against the budget. The budget is global: shards exchange the
  scores of their best pages and keep those above the global k-th.

  Args:
    scores: this shard's page scores.
    starts: position of each page's first token; NEVER where unused.
    newest: position of the newest token of each row.
    budget: tokens, at least one page.
    sink: first tokens that are always seen.
    recent: last tokens that are always seen.
    page: tokens a page holds.
    axis: name of the mesh axis that shards pages.

  Returns:
    Sorted indices into W, -1 at the end where fewer pages exist;
    n = min(budget / page, W).
  """
  newest = newest[:, None, None]
  used = starts <= newest
  forced = (starts < sink) | (starts + page > newest - recent + 1)
  scores = jnp.where(forced, jnp.inf, scores.astype(jnp.float32))
  scores = jnp.where(used, scores, -jnp.inf)
  count = min(budget // page, scores.shape[-1])
  best, index = jax.lax.top_k(scores, count)
  kept = best > -jnp.inf
  if jax.lax.axis_size(axis) > 1:
    kept &= _among_global_best(best, jax.lax.axis_index(axis), count, axis)
  index = jnp.sort(jnp.where(kept, index, NEVER), axis=-1)
  return jnp.where(index < NEVER, index, -1)


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
