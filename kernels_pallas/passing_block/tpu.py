"""passing_block on TPU: block_sparse's inner loop with the rows' intervals.

first = start, stop = stop, no sink, no list, a window of 0: a key is seen iff
start <= s < stop.
"""

import jax.numpy as jnp

from kernels_pallas import block_sparse, mosaic_tpu
from kernels_pallas.partial import Partial


def refuse(function: str, q, k, *args, **kwargs) -> str | None:
  """Why the kernel does not take the call, or None."""
  del function, args, kwargs
  return mosaic_tpu.refuse(q, k.dtype)


def passing_block(q, k, v, start, stop, *, scale, block_sizes) -> Partial:
  """See `kernels_pallas.passing_block.passing_block`."""
  sizes = {'block_q': 512, 'block_k': 512, **(block_sizes or {})}
  b, t, n = q.shape[:3]
  zero = jnp.zeros(n, jnp.int32)
  blocks = block_sparse.mixed(
    zero,
    zero,
    b,
    t,
    block_q=sizes.pop('block_q'),
    block_k=sizes.pop('block_k'),
  )
  return mosaic_tpu.attend_rows(
    q,
    (k.astype(q.dtype), v.astype(q.dtype)),
    None,
    start,
    jnp.where(start < stop, stop, 0),
    blocks,
    scale=scale,
    sliding_window=None,
    **sizes,
  )
