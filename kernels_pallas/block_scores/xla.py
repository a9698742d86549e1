"""block_lse in plain XLA: one matrix product a head and range of cells.

Scores are kept in the rows' dtype, a tile at a time; those of float16, which
might be above its largest number, in float32.
"""

import jax.numpy as jnp
from jax import lax

# Elements of cells that one product copies (32 MiB of bfloat16).
_TILE = 2**24
# Ranges of cells that are compiled: a call reads the shortest that holds what
# its rows see, in eighths.
_RUNGS = 8
_RUNG = 512  # cells of a range, at least


def refuse(function: str, *args, **kwargs) -> str | None:
  """XLA takes every call that the public function lets through."""
  del function, args, kwargs
  return None


def block_lse(rows, cells, last, factor, *, per_block):
  """See `kernels_pallas.block_scores.block_lse`."""
  batch, kv_heads, group, n_rows, f = rows.shape
  n_cells = cells.shape[2]
  row = jnp.arange(batch * kv_heads) // kv_heads
  q = rows.reshape(batch * kv_heads, group, n_rows, f)
  k = cells.reshape(batch * kv_heads, n_cells, f)

  def upto(end):
    """Of all heads, from the first `end` cells."""

    def one(args):
      head, q, row = args
      lse = _head(q, k, head, end, last[row], factor[row], per_block)
      short = (n_cells - end) // per_block
      return jnp.pad(
        lse, ((0, 0), (0, 0), (0, short)), constant_values=-jnp.inf
      )

    return lambda: lax.map(one, (jnp.arange(len(row)), q, row))

  unit = -(-max(n_cells // _RUNGS, _RUNG) // per_block) * per_block
  ends = [*range(unit, n_cells, unit), n_cells]
  rung = jnp.clip(jnp.max(last) // unit, 0, len(ends) - 1)
  lse = lax.switch(rung, [upto(end) for end in ends])
  return lse.reshape(batch, kv_heads, *lse.shape[1:])


def _head(q, k, head, end, last, factor, per_block):
  """[G R end / per_block] of one head, q [G R F]."""
  group, n_rows, f = q.shape
  tile = max(min(_TILE // f, end) // per_block * per_block, per_block)
  n_tiles = -(-end // tile)
  q = q.reshape(group * n_rows, f)
  exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  kept = jnp.float32 if q.dtype == jnp.float16 else q.dtype

  def one(i):
    # The last tile is moved back; what it shares with the one before is
    # dropped below.
    first = jnp.minimum(i * tile, end - tile)
    keys = lax.dynamic_slice(k, (head, first, 0), (1, tile, f))[0]
    score = jnp.einsum(
      'mf,cf->mc', q, keys, precision=exact, preferred_element_type=kept
    ).reshape(group, n_rows, tile)
    seen = first + jnp.arange(tile) <= last[:, None]
    score = jnp.where(
      seen, score.astype(jnp.float32) * factor[:, None], -jnp.inf
    )
    score = score.reshape(group, n_rows, -1, per_block)
    top = jnp.max(score, axis=-1, keepdims=True)
    safe = jnp.where(top > -jnp.inf, top, 0.0)
    weight = jnp.sum(jnp.exp2(score - safe), axis=-1)
    return safe[..., 0] + jnp.log2(weight)

  lse = lax.map(one, jnp.arange(n_tiles))  # [i G R tile / per_block]
  tail = (end - (n_tiles - 1) * tile) // per_block
  flat = jnp.moveaxis(lse[:-1], 0, 2).reshape(group, n_rows, -1)
  return jnp.concatenate([flat, lse[-1, ..., -tail:]], axis=-1)


def granule() -> int:
  """See `kernels_pallas.block_scores.granule`: whatever there is."""
  return 1
