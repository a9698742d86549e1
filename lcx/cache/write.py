"""Writes new tokens into pages: the one place that moves keys and values.

An append touches a window of pages that begins with the row's open page (the
one its cursor stands in). New tokens are laid out by slot, the open page's old
tokens are merged in, and whole pages are scattered. One scatter of pages serves
a prompt and a decoded token alike, in place where the pool is donated, and old
and new page may differ. Slots behind the last token become 0: a recycled page
may hold a NaN, which a weight of 0 would not keep out of a sum over values.
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


def merged_pages(
  tokens: Num[Array, 'B K T *R'],
  older: Num[Array, 'B K page *R'],
  offset: Int32[Array, 'B'],
  count: Int32[Array, 'B'],
) -> Num[Array, 'B K n page *R']:
  """Whole pages to write: older tokens, then the first `count` new ones.

  Args:
    tokens: new ones.
    older: the open page as it is; its first `offset` slots are kept.
    offset: slots of the open page that hold tokens.
    count: tokens that arrive, from 0 to T.

  Returns:
    The window's pages; slots behind the last token are 0.
  """
  # Read and written in one fusion, the whole pool would be copied.
  older = jax.lax.optimization_barrier(older)
  page = older.shape[2]
  new = lay_out(tokens.astype(older.dtype), offset, page)
  filled = slots_filled(offset, count, new.shape[2], page)
  kept = jnp.arange(page) < offset[:, None]
  tail = (1,) * (new.ndim - 4)
  filled = filled.reshape(filled.shape[0], 1, *filled.shape[1:], *tail)
  kept = kept.reshape(kept.shape[0], 1, page, *tail)
  new = jnp.where(filled, new, 0)
  return new.at[:, :, 0].set(jnp.where(kept, older, new[:, :, 0]))


def first_positions(
  positions: Int32[Array, 'B T'],
  offset: Int32[Array, 'B'],
  pages: int,
  page: int,
) -> Int32[Array, 'B pages']:
  """Position of the first slot of each page of an append's window.

  Positions may jump between pages (a shard of a zigzag layout holds two runs),
  not within one.
  """
  token = jnp.arange(pages, dtype=jnp.int32) * page - offset[:, None]
  inside = jnp.clip(token, 0, positions.shape[1] - 1)
  return jnp.take_along_axis(positions, inside, axis=1) + token - inside


def put(
  pool: Num[Array, 'P *R'], ids: Int32[Array, '*n'], values: Num[Array, '...']
) -> Num[Array, 'P *R']:
  """Scatters values [*n *R] to pool[ids]; a negative id writes nothing.

  Ids that are not negative must be unique.
  """
  ids = _out_of_reach(ids.reshape(-1), pool.shape[0])
  values = values.reshape(-1, *pool.shape[1:]).astype(pool.dtype)
  return pool.at[ids].set(values, mode='drop', unique_indices=True)


def put_at(
  array: Num[Array, 'B K W *R'],
  index: Int32[Array, 'B K n'],
  values: Num[Array, 'B K n *R'],
) -> Num[Array, 'B K W *R']:
  """Scatters values to array[b, h, index[b, h]]; a negative one is dropped.

  Indices of a (row, head) that are not negative must be unique. Not flattened
  to `put`: XLA would copy the array where K is 1.
  """
  b, h, _ = index.shape
  return array.at[
    jnp.arange(b)[:, None, None],
    jnp.arange(h)[:, None],
    _out_of_reach(index, array.shape[2]),
  ].set(values.astype(array.dtype), mode='drop', unique_indices=True)


def put_small(
  array: Num[Array, 'B K W'],
  index: Int32[Array, 'B K n'],
  values: Num[Array, 'B K n'],
) -> Num[Array, 'B K W']:
  """`put_at` on a small array: one value is selected into place.

  A select fuses with its like, where every scatter is a launch of its own.
  """
  if index.shape[2] > 1:
    return put_at(array, index, values)
  here = jnp.arange(array.shape[2], dtype=jnp.int32) == index
  return jnp.where(here, values.astype(array.dtype), array)


def take_at(
  array: Num[Array, 'B K W *R'], index: Int32[Array, 'B K n']
) -> Num[Array, 'B K n *R']:
  """Gathers array[b, h, index[b, h]]; indices out of range are clipped."""
  b, h, _ = index.shape
  index = jnp.clip(index, 0, array.shape[2] - 1)
  return array[jnp.arange(b)[:, None, None], jnp.arange(h)[:, None], index]


def put_slices(
  array: Num[Array, 'B K S *R'],
  index: Int32[Array, 'B K n'],
  values: Num[Array, 'B K n page *R'],
) -> Num[Array, 'B K S *R']:
  """Writes pages of a contiguous array: [b, h, index * page : + page].

  As `put_at` on the array in pages, without the reshape, after which XLA would
  copy the array where K is 1.
  """
  b, h, _, page = values.shape[:4]
  start = _out_of_reach(index, array.shape[2]) * page
  row = jnp.broadcast_to(jnp.arange(b)[:, None, None], index.shape)
  head = jnp.broadcast_to(jnp.arange(h)[:, None], index.shape)
  return jax.lax.scatter(
    array,
    jnp.stack([row, head, start], axis=-1),
    values.astype(array.dtype),
    jax.lax.ScatterDimensionNumbers(
      update_window_dims=tuple(range(3, values.ndim)),
      inserted_window_dims=(0, 1),
      scatter_dims_to_operand_dims=(0, 1, 2),
    ),
    unique_indices=True,
    mode='drop',
  )


def _out_of_reach(index: Int32[Array, '*n'], size: int) -> Int32[Array, '*n']:
  """Negative indices beyond `size`, all different: dropped, yet unique."""
  away = jnp.arange(index.size, dtype=jnp.int32).reshape(index.shape)
  return jnp.where(index < 0, size + away, index)
