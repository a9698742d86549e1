"""passing_block, dense in float32: the definition, for tests."""

import jax.numpy as jnp

from kernels_pallas.block_sparse.reference import masked_attention
from kernels_pallas.partial import Partial


def passing_block(q, k, v, start, stop, *, scale, block_sizes=None) -> Partial:
  """See `kernels_pallas.passing_block.passing_block`."""
  del block_sizes
  key = jnp.arange(k.shape[2])
  mask = (key >= start[..., None]) & (key < stop[..., None])
  mask = jnp.broadcast_to(
    mask[:, None], (q.shape[0], q.shape[2], q.shape[1], k.shape[2])
  )
  out, lse = masked_attention(q, k, v, mask, scale)
  return Partial(out.astype(q.dtype), lse)
