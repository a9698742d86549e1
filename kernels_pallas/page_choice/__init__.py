"""Which pages a few queries attend to: the best by bounds of their keys.

  score[b, k, w] = max over valid queries t and logical pages c of page w of
                   (max or sum) over the query heads g of kv head k of
                   sum_h max(q[b, t, g, h] low[b, k, c, h],
                             q[b, t, g, h] high[b, k, c, h])
                   - |q[b, t, g, h]| loose[b, k, h]

With a page's least and largest key per channel this bounds every q . k in it
(Quest, arXiv:2406.10774, equation 2); a page of several logical pages scores as
its best one (LServe, arXiv:2502.14866, section 3.5.2). A bound is loose, of one
query head more than of another, and a list is shared by several: `loose`, if
given, takes off what bounds of a head are too large by on average. It changes
no order of one query's pages. Pages that hold one of the first `sink` or last
`recent` tokens are always chosen.

A choice costs 4 T N C H FLOPs and reads the bounds once: bound by bytes. It
may be asked for in every step and made in a few (`due`): where it is not due,
no implementation reads the bounds.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.page_choice.scores import (
  ascending,
  forced_scores,
  kv_page_scores,
  scored_heads,
  when_due,
)

__all__ = [
  'GROUPS',
  'ascending',
  'choose_pages',
  'forced_scores',
  'kv_page_scores',
  'scored_heads',
  'when_due',
]

GROUPS = ('max', 'sum')


def choose_pages(
  q: Float[Array, 'B T N H'],
  low: Float[Array, 'B h C H'],
  high: Float[Array, 'B h C H'],
  starts: Int32[Array, 'B K W'],
  newest: Int32[Array, 'B'],
  valid: Bool[Array, 'B T'],
  *,
  n: int,
  sink: int,
  recent: int,
  page: int,
  group: str = 'max',
  loose: Float[Array, 'B h H'] | None = None,
  unscored: Bool[Array, 'K'] | None = None,
  held: Int32[Array, 'B K n'] | None = None,
  due: Bool[Array, ''] | None = None,
  implementation: str | None = None,
) -> Int32[Array, 'B K n']:
  """Slots of the n best pages of each row and kv head.

  Args:
    q: rotated queries, T <= 16.
    low: least key per channel of each logical page, W dividing C.
    high: largest key per channel.
    starts: position of each page's first token; above `newest` where unused.
      The page in slot w starts at w * page or later.
    newest: position of each row's newest token.
    valid: which queries count. A row without any answers nothing.
    n: pages to choose, at most W.
    sink: first tokens that are always seen.
    recent: last tokens that are always seen.
    page: tokens a page holds.
    group: 'max' or 'sum' over the query heads of a kv head.
    loose: float32, how far a key may be from the middle of its bounds without
      being worth it, per channel and row of the bounds; None: 0.
    unscored: kv heads without bounds, for which nothing is chosen. The rows of
      the bounds are the other heads', in order; the last may be nobody's. None:
      every head has bounds, h = K.
    held: an earlier choice; comes with `due`. None: there is none.
    due: whether to choose now; else, and for rows that answer nothing, what is
      held stays.
    implementation: 'reference', 'xla', 'gpu', or None.

  Returns:
    int32 [B K n] slots, ascending, -1 behind the last; of equal pages the
    earlier is chosen, unused pages never are. -1 everywhere for kv heads
    without bounds, and for rows that answer nothing and hold nothing. No
    derivative passes.

  Raises:
    ValueError: an argument does not fit; the message names it.
  """
  _check(
    q, low, high, starts, newest, valid, n, group, loose, unscored, held, due
  )
  q, low, high = jax.lax.stop_gradient((q, low, high))
  kwargs = {
    'n': n,
    'sink': sink,
    'recent': recent,
    'page': page,
    'group': group,
    'loose': None if loose is None else jax.lax.stop_gradient(loose),
    'unscored': unscored,
    'held': held,
    'due': due,
  }
  args = q, low, high, starts, newest, valid
  run = dispatch.choose(
    implementation, 'page_choice', 'choose_pages', *args, **kwargs
  )
  return run(*args, **kwargs)


def _check(
  q, low, high, starts, newest, valid, n, group, loose, unscored, held, due
):  # fmt: skip
  """Refuses what is known to be wrong at trace time."""
  if q.ndim != 4 or starts.ndim != 3:
    raise ValueError(
      f'{q.shape=} must be [B T N H] and {starts.shape=} [B K W]'
    )
  b, t, n_heads, h = q.shape
  kv, width = starts.shape[1:]
  if t > 16:
    raise ValueError(f'T={t} queries a row must be at most 16')
  if starts.shape[0] != b or n_heads % kv:
    raise ValueError(
      f'{starts.shape=} must be [B K W] with B = {b} and K dividing '
      f'N = {n_heads}'
    )
  fits = low.ndim == 4 and low.shape == high.shape
  rows = kv if unscored is None or not fits else low.shape[1]
  if not fits or low.shape != (b, rows, low.shape[2], h) or rows > kv:
    raise ValueError(
      f'{low.shape=} and {high.shape=} must be [B h C H] with B = {b}, '
      f'H = {h}, and h = {kv} or, with `unscored`, fewer'
    )
  if low.dtype != high.dtype:
    raise ValueError(f'{low.dtype=} must be {high.dtype=}')
  if low.shape[2] % width:
    raise ValueError(f'C={low.shape[2]} must be a multiple of W={width}')
  if not 0 < n <= width:
    raise ValueError(f'{n=} must be within 1 and W={width}')
  if group not in GROUPS:
    raise ValueError(f'{group=} must be in {GROUPS}')
  if (held is None) != (due is None):
    raise ValueError('held and due must come together')
  for name, x, shape, dtype in (
    ('starts', starts, starts.shape, jnp.int32),
    ('newest', newest, (b,), jnp.int32),
    ('valid', valid, (b, t), jnp.bool_),
    ('loose', loose, (b, low.shape[1], h), jnp.float32),
    ('unscored', unscored, (kv,), jnp.bool_),
    ('held', held, (b, kv, n), jnp.int32),
    ('due', due, (), jnp.bool_),
  ):
    if x is not None and (x.shape != shape or x.dtype != dtype):
      raise ValueError(
        f'{name} is {x.dtype}{list(x.shape)}; it must be '
        f'{jnp.dtype(dtype)}{list(shape)}'
      )
