"""The last tokens of a prompt see everything.

A question stands at the end of a prompt, in one query block with tokens that
are no part of it. What a prefill selects is selected for the block as a whole:
the keys that only the question asks for are outvoted. MInference estimates from
the last queries for that reason (arXiv:2407.02490, section 3.2); reading their
rows densely costs 2 tail / T of dense attention.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.block_sparse import block_sparse, dense_blocks


def read_densely(
  out: Float[Array, 'B T N H'],
  lse: Float[Array, 'B T N'],
  q: Float[Array, 'B T N H'],
  keys: Float[Array, 'B K S H'],
  values: Float[Array, 'B K S H'],
  tail: int,
  *,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  sliding_window: int | None = None,
) -> tuple[Float[Array, 'B T N H'], Float[Array, 'B T N'], Int32[Array, 'B T']]:
  """Attention in which the last `tail` of `lengths` tokens see all keys.

  Args:
    out: attention of all rows as they were selected for.
    lse: of these.
    q: rotated queries of this shard.
    keys: rotated keys of all shards.
    values: of these.
    tail: tokens, at least 1.
    q_start: position of this shard's first query.
    lengths: keys of each row of the batch.
    sliding_window: the layer's own window.

  Returns:
    out and lse, and the keys that each row read here (0: it is no such row).
  """
  batch, length, heads, _ = q.shape
  n = min(tail, length)
  # The shard's own rows of the tail lie within n rows that end at its last
  # row, or at the prompt's; others among these stay as they are.
  begin = jnp.clip(lengths - n - q_start, 0, length - n)

  def cut(x):
    return jax.vmap(
      lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, n, axis=0)
    )(x, begin)

  def put(x, new):
    return jax.vmap(
      lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=0)
    )(x, new.astype(x.dtype), begin)

  part = block_sparse(
    cut(q),
    keys,
    values,
    dense_blocks(batch, heads, n),
    q_start=q_start + begin,
    lengths=lengths,
    sliding_window=sliding_window,
  )
  at = (q_start + begin)[:, None] + jnp.arange(n, dtype=jnp.int32)
  mine = (at >= lengths[:, None] - tail) & (at < lengths[:, None])
  seen = at + 1
  if sliding_window is not None:
    seen = jnp.minimum(seen, sliding_window)
  return (
    put(out, jnp.where(mine[..., None, None], part.out, cut(out))),
    put(lse, jnp.where(mine[..., None], part.lse, cut(lse))),
    put(jnp.zeros((batch, length), jnp.int32), jnp.where(mine, seen, 0)),
  )
