"""The tokens with most votes, over all sequence shards, in their order."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.best_in_order import best_in_order
from kernels_pallas.keys import NEVER


def top_tokens(
  votes: Float[Array, 'R S'], k: int, seq: str | None = None
) -> tuple[Int32[Array, 'R n'], Int32[Array, 'R']]:
  """This shard's tokens among the k best of all shards.

  Of equal votes the earlier token wins, on one device and on many.

  Args:
    votes: -inf where a token cannot be chosen.
    k: tokens of all shards together.
    seq: mesh axis that shards tokens, in ascending order; None: it does not.

  Returns:
    (indices into S, ascending, NEVER behind them; their number), n = min(k, S).
  """
  n = min(k, votes.shape[-1])
  if seq is None or lax.axis_size(seq) == 1:
    return best_in_order(votes, n)
  best, index = lax.top_k(votes, n)
  kept = (best > -jnp.inf) & _among_best(best, k, seq)
  index = jnp.sort(jnp.where(kept, index, NEVER), axis=-1)
  return index, jnp.sum(kept, axis=-1, dtype=jnp.int32)


def _among_best(
  best: Float[Array, 'R n'], k: int, seq: str
) -> Bool[Array, 'R n']:
  """Which of this shard's best are among the k best of all shards."""
  n = best.shape[-1]
  everyone = lax.all_gather(best, seq, axis=1, tiled=True)
  _, winners = lax.top_k(everyone, min(k, everyone.shape[-1]))
  rows = jnp.arange(best.shape[0])[:, None]
  won = jnp.zeros(everyone.shape, bool).at[rows, winners].set(True)
  return lax.dynamic_slice_in_dim(won, lax.axis_index(seq) * n, n, axis=1)


def with_ends(
  chosen: Int32[Array, '*R n'],
  count: Int32[Array, '*R'],
  *,
  low: Int32[Array, '*R'],
  high: Int32[Array, '*R'],
  stop: Int32[Array, '*R'],
  width: int,
) -> tuple[Int32[Array, '*R width'], Int32[Array, '*R']]:
  """[0, low) ++ chosen ++ [high, stop): one ascending list.

  Args:
    chosen: ascending, within [low, high); whatever behind the first `count`.
    count: of chosen tokens.
    low: end of the sink.
    high: start of the local window.
    stop: end of the local window.
    width: of the list; what is longer is cut.

  Returns:
    (the list, 0 behind its end; its length).
  """
  place = jnp.arange(width, dtype=jnp.int32)
  place = jnp.broadcast_to(place, (*count.shape, width))
  low, count, high = low[..., None], count[..., None], high[..., None]
  middle = place - low
  picked = jnp.take_along_axis(
    chosen, jnp.clip(middle, 0, chosen.shape[-1] - 1), axis=-1
  )
  late = high + middle - count
  total = jnp.minimum(low[..., 0] + count[..., 0] + stop - high[..., 0], width)
  listed = jnp.where(middle < 0, place, jnp.where(middle < count, picked, late))
  return jnp.where(place < total[..., None], listed, 0), total


def listed_tokens(
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  listed: Int32[Array, 'L W'],
) -> tuple[Float[Array, 'L K W H'], Float[Array, 'L K W H']]:
  """Keys and values of lists, which are as many for every row of the batch.

  A place behind the last key, in the list of a short last chunk, reads it.
  """
  batch, kv_heads, length, dim = k.shape
  lists = listed.shape[0]
  row = jnp.arange(batch, dtype=jnp.int32).repeat(lists // batch)
  pool = row[:, None] * kv_heads + jnp.arange(kv_heads, dtype=jnp.int32)
  listed = jnp.minimum(listed, length - 1)
  at = pool[:, :, None] * length + listed[:, None]  # [L K W]
  return k.reshape(-1, dim)[at], v.reshape(-1, dim)[at]
