"""block_sparse in plain XLA: work proportional to the list, on any chip."""

import jax.numpy as jnp

from kernels_pallas import tiles, xla_tiles
from kernels_pallas.partial import Partial


def refuse(function: str, *args, **kwargs) -> str | None:
  """XLA takes every call that the public functions let through."""
  del function, args, kwargs
  return None


def _sizes(blocks, block_sizes) -> dict[str, int]:
  sizes = dict(block_sizes or {})
  chunk = sizes.get('chunk', max(1, 512 // blocks.block_k))
  lanes = sizes.get('lanes') or xla_tiles.default_lanes(
    blocks.block_q, chunk * blocks.block_k
  )
  return {'chunk': chunk, 'lanes': lanes}


def block_sparse(
  q, k, v, blocks, *, q_start, lengths, scale, sliding_window, block_sizes
) -> Partial:
  """See `kernels_pallas.block_sparse.block_sparse`."""
  first, stop = tiles.rows_of(q.shape[1], q_start, lengths)
  if blocks.dense:
    low = jnp.zeros_like(first)
    if sliding_window is not None:
      low = jnp.maximum(first - sliding_window, 0)
    return xla_tiles.attend_intervals(q, k, v, low, stop, scale=scale)
  bk = blocks.block_k
  b, kv, s, h = k.shape
  pad = ((0, 0), (0, 0), (0, -s % bk), (0, 0))
  if s % bk:
    k, v = jnp.pad(k, pad), jnp.pad(v, pad)
  n_blocks = k.shape[2] // bk
  k = k.reshape(b * kv, n_blocks, bk, h)
  v = v.reshape(b * kv, n_blocks, bk, h)

  def fetch(row, head, block):
    at = (row * kv + head)[:, None]
    shape = (block.shape[0], block.shape[1] * bk, h)
    return k[at, block].reshape(shape), v[at, block].reshape(shape)

  return xla_tiles.attend_lists(
    q,
    fetch,
    kv,
    first,
    stop,
    blocks,
    scale=scale,
    sliding_window=sliding_window,
    **_sizes(blocks, block_sizes),
  )


def block_sparse_paged(
  q,
  pages,
  table,
  blocks,
  *,
  q_start,
  lengths,
  scale,
  sliding_window,
  block_sizes,
) -> Partial:
  """See `kernels_pallas.block_sparse.block_sparse_paged`."""
  first, stop = tiles.rows_of(q.shape[1], q_start, lengths)
  per_block = blocks.block_k // pages.page
  kv, width = table.shape[1], table.shape[2]

  def fetch(row, head, block):
    slot = block[..., None] * per_block + jnp.arange(per_block)
    at = table[row[:, None, None], head[:, None, None], slot]
    at = jnp.maximum(at, 0)  # an unused page lies past the row's length
    shape = (block.shape[0], -1, pages.head_dim)
    k, v = pages.read(at.reshape(-1), q.dtype)
    return k.reshape(shape), v.reshape(shape)

  del width
  return xla_tiles.attend_lists(
    q,
    fetch,
    kv,
    first,
    stop,
    blocks,
    scale=scale,
    sliding_window=sliding_window,
    **_sizes(blocks, block_sizes),
  )
