"""Writes new tokens into pages: the one place that moves keys and values.

An append touches a window of pages that begins with the row's open page (the
one its cursor stands in). New tokens are laid out by slot, the open page's old
tokens are merged in, and whole pages are scattered. One scatter of pages serves
a prompt and a decoded token alike, in place where the pool is donated, and old
and new page may differ.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Num


def window(tokens: int, page: int) -> int:
  """Pages that `tokens` consecutive tokens can touch, wherever they begin."""
  return (tokens + page - 2) // page + 1


def lay_out(
  tokens: Num[Array, 'B K T *R'], offset: Int32[Array, 'B'], page: int
) -> Num[Array, 'B K n page *R']:
  """Tokens by page and slot, when the first goes to slot `offset` of page 0.

  n = `window(T, page)`; what lies outside the tokens is 0.
  """
  b, h, t, *rest = tokens.shape
  slots = window(t, page) * page
  padding = [(0, 0), (0, 0), (page, slots - t)] + [(0, 0)] * len(rest)
  padded = jnp.pad(tokens, padding)
  shift = jax.vmap(
    lambda x, o: jax.lax.dynamic_slice_in_dim(x, page - o, slots, axis=1)
  )
  return shift(padded, offset).reshape(b, h, -1, page, *rest)


def slots_filled(
  offset: Int32[Array, 'B'], count: Int32[Array, 'B'], pages: int, page: int
):
  """The slots bool [B pages page] of a window that `count` tokens take."""
  slot = jnp.arange(pages * page, dtype=jnp.int32)
  first, stop = offset[:, None], (offset + count)[:, None]
  return ((first <= slot) & (slot < stop)).reshape(-1, pages, page)


def put(
  pool: Num[Array, 'P *R'], ids: Int32[Array, '*n'], values: Num[Array, '...']
) -> Num[Array, 'P *R']:
  """Scatters values to pool[ids]; a negative id writes nothing.

  Ids that are not negative must be unique.
  """
  size = pool.shape[0]
  ids = ids.reshape(-1)
  # Different ids out of range, dropped, keep the promise that ids are unique.
  away = size + jnp.arange(ids.shape[0], dtype=jnp.int32)
  ids = jnp.where(ids < 0, away, ids)
  values = values.reshape(-1, *pool.shape[1:]).astype(pool.dtype)
  return pool.at[ids].set(values, mode='drop', unique_indices=True)


def write_pages(
  pool: Num[Array, 'P page *R'],
  tokens: Num[Array, 'B K T *R'],
  offset: Int32[Array, 'B'],
  count: Int32[Array, 'B'],
  source: Int32[Array, 'B K'],
  target: Int32[Array, 'B K n'],
) -> Num[Array, 'P page *R']:
  """Writes the first `count` tokens of each row, from slot `offset` on.

  Args:
    pool: keys, values, or their scales.
    tokens: new ones.
    offset: slots of the open page that hold older tokens.
    count: tokens that arrive, from 0 to T.
    source: page with the open page's older tokens; read where offset > 0.
    target: pages of the window in the pool; -1: not written.

  Returns:
    The pool. Slots behind the last token of a written page are 0.
  """
  page = pool.shape[1]
  new = lay_out(tokens.astype(pool.dtype), offset, page)
  filled = slots_filled(offset, count, new.shape[2], page)
  tail = (1,) * (new.ndim - 4)
  filled = filled.reshape(*filled.shape[:1], 1, *filled.shape[1:], *tail)
  new = jnp.where(filled, new, 0)
  older = jnp.arange(page) < offset[:, None, None]
  older = older.reshape(*older.shape, *tail)
  open_page = jnp.where(older, pool[jnp.maximum(source, 0)], new[:, :, 0])
  return put(pool, target, new.at[:, :, 0].set(open_page))
