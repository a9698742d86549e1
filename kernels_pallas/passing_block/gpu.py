"""passing_block on Hopper: the stream kernel with an interval a row.

Within a tile of query rows the keys that every row sees are full tiles, and
what only some rows see, at both ends, is masked tiles.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas import mosaic_gpu
from kernels_pallas.block_sparse.gpu import stream_sizes
from kernels_pallas.partial import Partial

TILE_Q = mosaic_gpu.TILE_Q
# Above every position; as the first key of a row it admits none.
NEVER = 2**30


def refuse(function: str, q, k, *_, **__) -> str | None:
  """Why this implementation cannot serve; None if it can."""
  del function
  return mosaic_gpu.unsupported(q, k)


def plan_tiles(first, stop, tile_k: int) -> mosaic_gpu.Plan:
  """The key tiles of every query tile.

  Args:
    first: int32 [B Tp] first key of a row, Tp a multiple of TILE_Q.
    stop: int32 [B Tp] one past its last key; 0: the row sees nothing.
    tile_k: keys of a tile.

  Returns:
    Plan with fields int32 [B 1 Tp / TILE_Q].
  """
  first = first.reshape(first.shape[0], 1, -1, TILE_Q)
  stop = stop.reshape(first.shape)
  some = stop > 0  # an empty row bounds nothing
  begin = jnp.min(jnp.where(some, first, NEVER), axis=-1) // tile_k
  end = -(-jnp.max(stop, axis=-1) // tile_k)
  begin = jnp.minimum(begin, end)
  full0 = -(-jnp.max(jnp.where(some, first, 0), axis=-1) // tile_k)
  full1 = jnp.min(jnp.where(some, stop, NEVER), axis=-1) // tile_k
  full0 = jnp.clip(full0, begin, end)
  full1 = jnp.clip(full1, full0, end)
  zero = jnp.zeros_like(begin)
  return mosaic_gpu.Plan(
    full0=full0,
    n_full0=full1 - full0,
    full1=zero,
    n_full1=zero,
    list0=zero,
    n_list=zero,
    masked0=begin,
    n_masked0=full0 - begin,
    masked1=full1,
    n_masked1=end - full1,
    masked2=zero,
    n_masked2=zero,
    listed=zero,
    sink=zero,
    window=zero,
    spare=zero,
  )


def passing_block(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  start: Int32[Array, 'B T'],
  stop: Int32[Array, 'B T'],
  *,
  scale: float,
  block_sizes: dict[str, int] | None = None,
) -> Partial:
  """`kernels_pallas.passing_block.passing_block` on a Hopper GPU.

  Raises:
    NotImplementedError: with the reason, where the kernel does not apply.
  """
  if reason := refuse('passing_block', q, k):
    raise NotImplementedError(reason)
  t = q.shape[1]
  sizes = stream_sizes('passing_block', q, 128, block_sizes)
  pad = ((0, 0), (0, -t % TILE_Q))
  start = jnp.maximum(start, 0)
  stop = jnp.minimum(stop, k.shape[2])
  stop = jnp.pad(jnp.where(stop > start, stop, 0), pad)
  first = jnp.pad(start, pad)
  return mosaic_gpu.stream_attention(
    q,
    k,
    v,
    plan_tiles(first, stop, sizes.tile_k),
    None,
    first,
    stop,
    scale=scale,
    ids_k=sizes.tile_k,
    sizes=sizes,
  )
