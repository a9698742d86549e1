"""What a choice of pages is made of, in plain XLA: scores, rules, when."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.selected_token import likely_page_scores, page_scores


def scored_heads(unscored: Bool[Array, 'K'], rows: int) -> Int32[Array, 'h']:
  """The kv head of each of the h = `rows` rows of the bounds; -1: of none."""
  # Head by head, all of it fuses: on a GPU `nonzero` would be five kernels, a
  # sum one.
  heads, nth = jnp.full((rows,), -1, jnp.int32), jnp.int32(0)
  for head in range(unscored.shape[0]):
    scored = ~unscored[head]
    heads = jnp.where(scored & (nth == jnp.arange(rows)), head, heads)
    nth += scored
  return heads


def kv_page_scores(
  q: Float[Array, 'B T N H'],
  low: Float[Array, 'B h C H'],
  high: Float[Array, 'B h C H'],
  valid: Bool[Array, 'B T'],
  *,
  width: int,
  kv_heads: int,
  group: str = 'max',
  loose: Float[Array, 'B h H'] | None = None,
  heads: Int32[Array, 'h'] | None = None,
  moments: bool = False,
) -> Float[Array, 'B h W']:
  """The scores by which `choose_pages` chooses, of one row of bounds each.

  Args:
    q: rotated queries.
    low: as in `choose_pages`, like all that follow.
    high: see there.
    valid: see there.
    width: W, pages.
    kv_heads: K.
    group: see there.
    loose: see there.
    heads: `scored_heads`, of which -1 is scored as kv head 0; None: every head.
    moments: low and high are mean and deviation (`likely_page_scores`).

  Returns:
    float32; -inf where no query is valid.
  """
  b, t, n_heads, h = q.shape
  if heads is not None:
    q = q.reshape(b, t, kv_heads, n_heads // kv_heads, h)
    q = q[:, :, jnp.maximum(heads, 0)].reshape(b, t, -1, h)
  score = likely_page_scores if moments else page_scores
  scores = score(q, low, high)  # [B T h * G C]
  if loose is not None:
    wide = jnp.abs(q.astype(jnp.float32)).reshape(b, t, low.shape[1], -1, h)
    off = jnp.sum(wide * loose[:, None, :, None], axis=-1)  # [B T h G]
    scores -= off.reshape(b, t, -1, 1)
  scores = scores.reshape(b, t, low.shape[1], -1, width, low.shape[2] // width)
  mask = valid[:, :, None, None, None, None]
  if group == 'max':  # one maximum: one launch
    return jnp.max(jnp.where(mask, scores, -jnp.inf), axis=(1, 3, 5))
  scores = jnp.sum(scores, axis=3, keepdims=True)
  return jnp.max(jnp.where(mask, scores, -jnp.inf), axis=(1, 3, 5))


def forced_scores(
  scores: Float[Array, 'B h W'],
  starts: Int32[Array, 'B h W'],
  newest: Int32[Array, 'B'],
  *,
  sink: int,
  recent: int,
  page: int,
) -> Float[Array, 'B h W']:
  """Scores, inf for pages that are always seen and -inf for unused ones."""
  newest = newest[:, None, None]
  forced = (starts < sink) | (starts + page > newest - recent + 1)
  scores = jnp.where(forced, jnp.inf, scores.astype(jnp.float32))
  return jnp.where(starts <= newest, scores, -jnp.inf)


def ascending(
  slots: Int32[Array, 'B h n'], kept: Bool[Array, 'B h n'], width: int
) -> Int32[Array, 'B h n']:
  """The slots (below `width`) that are kept, sorted; -1 behind them."""
  slots = jnp.sort(jnp.where(kept, slots, width), axis=-1)
  return jnp.where(slots < width, slots, -1)


def when_due(
  choose: Callable[[], Int32[Array, 'B h n']],
  valid: Bool[Array, 'B T'],
  *,
  kv_heads: int,
  heads: Int32[Array, 'h'] | None,
  held: Int32[Array, 'B K n'] | None,
  due: Bool[Array, ''] | None,
) -> Int32[Array, 'B K n']:
  """A choice at its kv heads where it is due, else what is held.

  Args:
    choose: slots of each row of the bounds; called when due.
    valid: as in `choose_pages`, like all that follow.
    kv_heads: K.
    heads: `scored_heads`; None: every head.
    held: see there.
    due: see there.
  """

  def chosen():
    slots = choose()
    if heads is not None:
      none = jnp.full((slots.shape[0], kv_heads, slots.shape[2]), -1, jnp.int32)
      place = jnp.where(heads < 0, kv_heads, heads)
      slots = none.at[:, place].set(slots, mode='drop')
    rest = -1 if held is None else held
    return jnp.where(jnp.any(valid, axis=1)[:, None, None], slots, rest)

  return chosen() if held is None else jax.lax.cond(due, chosen, lambda: held)
