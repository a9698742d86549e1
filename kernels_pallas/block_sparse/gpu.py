"""block_sparse on Hopper: Pallas Mosaic GPU.

The visibility rule of BlockList is turned, in XLA, into a plan for each tile
of 128 query rows (`plan_tiles`); the kernel in kernels_pallas/mosaic_gpu.py
streams it. Key tiles of one query tile, from left to right, when all differ:

  full sink | sink edge | gap: listed ids | window edge | full window | diagonal
   no mask      mask          no mask          mask         no mask       mask

Regions that meet are cut so that a tile stands in one of them only; that is
why a key which two sets hold counts once.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch, mosaic_gpu
from kernels_pallas.block_sparse import BlockList
from kernels_pallas.keys import Pages
from kernels_pallas.partial import Partial

TILE_Q = mosaic_gpu.TILE_Q
MAX_MASKED = 31  # whether a masked tile is listed is one bit of an int32


def stream_sizes(
  function: str, q, block_k: int, explicit: dict[str, int] | None
) -> mosaic_gpu.StreamSizes:
  """Explicit sizes over tuned ones over defaults that fit at a head dim."""
  h = q.shape[-1]
  if h == 256:
    sizes = mosaic_gpu.StreamSizes(tile_k=64, overlap=False)
  else:
    sizes = mosaic_gpu.StreamSizes(tile_k=64 if block_k % 128 else 128)
  kind = jax.devices()[0].device_kind
  tuned = dispatch.tuned(function, kind, f'h{h}')
  if 'tile_k' in tuned and block_k % tuned['tile_k']:
    tuned = {}
  chosen: dict[str, Any] = {**tuned, **(explicit or {})}
  return dataclasses.replace(sizes, **chosen)


def refuse(
  function: str, q, k, *rest, sliding_window=None, block_sizes=None, **_
) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  if function == 'block_sparse_paged':
    blocks = rest[1]
    reason = mosaic_gpu.unsupported(q, q)
  else:
    blocks = rest[1]
    reason = mosaic_gpu.unsupported(q, k)
  if reason:
    return reason
  if blocks.block_q % TILE_Q:
    return f'{blocks.block_q=} is no multiple of {TILE_Q}'
  if blocks.block_k % 64:
    return f'{blocks.block_k=} is no multiple of 64'
  tile_k = stream_sizes('block_sparse', q, blocks.block_k, block_sizes).tile_k
  masked = most_masked(tile_k, blocks.block_k // tile_k)
  if blocks.ids.shape[3] and masked > MAX_MASKED:
    return (
      f'lists with {blocks.block_k=} and {tile_k=}: up to {masked} tiles of a '
      f'query tile would be masked, {MAX_MASKED} can be'
    )
  if sliding_window is not None and not blocks.dense:
    # It would cut sinks and listed blocks by row; a plan has one left edge.
    return f'{sliding_window=} with blocks that are not dense'
  return None


def _ceil_div(a, b):
  return -jnp.floor_divide(-a, b)


def plan_tiles(
  blocks: BlockList,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  t: int,
  tile_k: int,
) -> mosaic_gpu.Plan:
  """The key tiles of every query tile, by BlockList's rule.

  Args:
    blocks: the lists; block_q a multiple of TILE_Q, block_k of tile_k.
    q_start: position of query 0.
    lengths: positions from here on are padding.
    t: queries.
    tile_k: keys of a tile.

  Returns:
    Plan with fields int32 [B N ceil(t / TILE_Q)].
  """
  tiles = -(-t // TILE_Q)
  parts = blocks.block_k // tile_k
  index = jnp.arange(tiles, dtype=jnp.int32)
  # First and last valid position of a tile; [B 1 tiles]. All that follows
  # counts in key tiles, half-open, clipped to 0 .. end.
  low = (q_start[:, None] + index * TILE_Q)[:, None]
  last = jnp.minimum(low + TILE_Q, (q_start + t)[:, None, None])
  high = jnp.minimum(last, lengths[:, None, None]) - 1
  end = jnp.maximum(jnp.floor_divide(high, tile_k) + 1, 0)
  end = jnp.where(high < low, 0, end)
  before = jnp.minimum((low + 1) // tile_k, end)  # wholly before row `low`
  sink = blocks.sink[None, :, None]
  window = blocks.window[None, :, None]

  sink_full = jnp.minimum(sink // tile_k, before)
  window_full = _ceil_div(jnp.maximum(high - window + 1, 0), tile_k)
  window_full = jnp.clip(window_full, sink_full, before)
  sink_any = jnp.clip(_ceil_div(sink, tile_k), sink_full, window_full)
  window_any = jnp.maximum(low - window + 1, 0) // tile_k
  window_any = jnp.clip(window_any, sink_any, window_full)
  # The gap between them holds whole listed blocks; cut blocks are masked.
  gap0 = _ceil_div(sink_any, parts) * parts
  gap1 = window_any // parts * parts
  no_gap = gap0 >= gap1
  gap0 = jnp.where(no_gap, sink_any, gap0)
  gap1 = jnp.where(no_gap, sink_any, gap1)

  shape = jnp.broadcast_shapes(low.shape, sink.shape)
  zero = jnp.zeros(shape, jnp.int32)
  plan = mosaic_gpu.Plan(
    full0=zero,
    n_full0=sink_full,
    full1=window_full,
    n_full1=before - window_full,
    list0=zero,
    n_list=zero,
    masked0=sink_full,
    n_masked0=gap0 - sink_full,
    masked1=gap1,
    n_masked1=window_full - gap1,
    masked2=before,
    n_masked2=end - before,
    listed=zero,
    sink=sink,
    window=window,
    spare=zero,
  )
  plan = mosaic_gpu.Plan(*(jnp.broadcast_to(x, shape) for x in plan))
  if blocks.ids.shape[3] == 0:
    return plan
  return _add_listed(plan, blocks, gap0, gap1, tile_k)


def most_masked(tile_k: int, parts: int) -> int:
  """Bound on the masked tiles of one query tile.

  One at the sink's edge, those that the left edge of the window crosses while
  it moves by TILE_Q rows, those on the diagonal, and the rest of a block that
  an edge of the gap cuts.
  """
  crossed = TILE_Q // tile_k + 1
  return 1 + 2 * crossed + 2 * (parts - 1)


def _add_listed(plan, blocks, gap0, gap1, tile_k):
  """Adds what the id lists say: a range for the gap, a bit a masked tile."""
  parts = blocks.block_k // tile_k
  rows = jnp.arange(plan.full0.shape[2]) * TILE_Q // blocks.block_q
  ids = blocks.ids[:, :, rows]
  place = jnp.arange(ids.shape[3], dtype=jnp.int32)
  used = place < blocks.count[:, :, rows][..., None]
  left = used & (ids < (gap0 // parts)[..., None])
  inside = used & ~left & (ids < (gap1 // parts)[..., None])
  listed = jnp.zeros_like(plan.listed)
  for e in range(most_masked(tile_k, parts)):
    block = plan.masked_tile(e) // parts
    hit = jnp.any(used & (ids == block[..., None]), axis=-1)
    hit &= e < plan.n_masked
    listed |= hit.astype(jnp.int32) << e
  return plan._replace(
    list0=jnp.sum(left, axis=-1, dtype=jnp.int32),
    n_list=jnp.sum(inside, axis=-1, dtype=jnp.int32) * parts,
    listed=listed,
  )


def block_sparse(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  blocks: BlockList,
  *,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  scale: float,
  sliding_window: int | None = None,
  block_sizes: dict[str, int] | None = None,
) -> Partial:
  """`kernels_pallas.block_sparse.block_sparse` on a Hopper GPU.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse(
    'block_sparse', q, k, v, blocks, sliding_window=sliding_window
  ):
    raise NotImplementedError(reason)
  if sliding_window is not None:
    window = jnp.minimum(blocks.window, sliding_window)
    blocks = dataclasses.replace(blocks, window=window)
  t = q.shape[1]
  sizes = stream_sizes('block_sparse', q, blocks.block_k, block_sizes)
  # The last valid query bounds the keys: lengths need no mask of their own.
  plan = plan_tiles(blocks, q_start, lengths, t, sizes.tile_k)
  padded = -(-t // TILE_Q) * TILE_Q
  position = q_start[:, None] + jnp.arange(padded, dtype=jnp.int32)
  stop = jnp.where(position < lengths[:, None], position + 1, 0)
  return mosaic_gpu.stream_attention(
    q,
    k,
    v,
    plan,
    blocks.ids if blocks.ids.shape[3] else None,
    position + 1,
    stop,
    scale=scale,
    ids_k=blocks.block_k,
    sizes=sizes,
  )


def block_sparse_paged(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  table: Int32[Array, 'B K W'],
  blocks: BlockList,
  *,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  scale: float,
  sliding_window: int | None = None,
  block_sizes: dict[str, int] | None = None,
) -> Partial:
  """`block_sparse` over pages: they are gathered, then streamed.

  A key is copied once and then read by T * G queries: for a chunk of 2048
  queries the copy is under 2% of the time (4 H bytes a key at 3 TB/s against
  4 * 2048 * G * H FLOPs at 600 TFLOP/s).
  """

  def contiguous(codes, scales, zeros):
    x = dequantized(codes[table], scales, zeros, table, q.dtype)
    return x.reshape(*table.shape[:2], -1, x.shape[-1])

  return block_sparse(
    q,
    contiguous(pages.k, pages.k_scale, pages.k_zero),
    contiguous(pages.v, pages.v_scale, pages.v_zero),
    blocks,
    q_start=q_start,
    lengths=lengths,
    scale=scale,
    sliding_window=sliding_window,
    block_sizes=block_sizes,
  )


def dequantized(codes, scales, zeros, table, dtype):
  """Gathered codes [... page H or H/2] as floating point numbers."""
  if zeros is not None:  # two 4-bit codes a byte, the low nibble first
    low, high = codes & 15, codes >> 4
    codes = jnp.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1)
    codes = codes.astype(jnp.float32) - zeros[table][..., None]
  if scales is not None:
    codes = codes.astype(jnp.float32) * scales[table][..., None]
  return codes.astype(dtype)
