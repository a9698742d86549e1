"""block_sparse on TPU: rows of the BlockList's rule, in Pallas Mosaic TPU."""

import jax.numpy as jnp

from kernels_pallas import mosaic_tpu, tiles
from kernels_pallas.partial import Partial

# The kernel copies whole pages; smaller ones are gathered by XLA first.
_MIN_PAGE = 32


def refuse(function: str, q, *args, **kwargs) -> str | None:
  """Why the kernel does not take the call, or None."""
  del kwargs
  blocks = args[-1]
  paged = function == 'block_sparse_paged'
  reason = mosaic_tpu.refuse(q, args[0].k.dtype if paged else args[0].dtype)
  return reason or mosaic_tpu.refuse_blocks(blocks.block_q, blocks.block_k)


def block_sparse(
  q, k, v, blocks, *, q_start, lengths, scale, sliding_window, block_sizes
) -> Partial:
  """See `kernels_pallas.block_sparse.block_sparse`."""
  first, stop = tiles.rows_of(q.shape[1], q_start, lengths)
  return mosaic_tpu.attend_rows(
    q,
    (k.astype(q.dtype), v.astype(q.dtype)),
    None,
    first,
    stop,
    blocks,
    scale=scale,
    sliding_window=sliding_window,
    **(block_sizes or {}),
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
  """See `kernels_pallas.block_sparse.block_sparse_paged`.

  Floating point pages of at least 32 tokens are copied by the kernel.
  Quantised or smaller pages are gathered and dequantised by XLA first: 2 S K H
  values more through memory a layer, a few percent of a long chunk's time.
  """
  keys = {
    'q_start': q_start,
    'lengths': lengths,
    'scale': scale,
    'sliding_window': sliding_window,
    'block_sizes': block_sizes,
  }
  if pages.bits < 16 or pages.page < _MIN_PAGE or pages.k.dtype != q.dtype:
    b, kv, width = table.shape
    shape = (b, kv, width * pages.page, pages.head_dim)
    k, v = pages.read(jnp.maximum(table, 0), q.dtype)
    return block_sparse(q, k.reshape(shape), v.reshape(shape), blocks, **keys)
  first, stop = tiles.rows_of(q.shape[1], q_start, lengths)
  return mosaic_tpu.attend_rows(
    q,
    pages,
    table,
    first,
    stop,
    blocks,
    scale=scale,
    sliding_window=sliding_window,
    **(block_sizes or {}),
  )
