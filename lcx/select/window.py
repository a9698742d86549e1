"""The last queries of a prompt, and what they look at.

MInference (arXiv:2407.02490) and SnapKV (arXiv:2404.14469) judge keys by the
softmax of a window of last queries. Keys are read in tiles, twice: once for the
normaliser, once for the weights; [queries, S] never exists.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

# Gives tile i: keys [c H] and their positions [c], NEVER where unused.
Fetch = Callable[[Int32[Array, '']], tuple[Array, Array]]


def last_queries(
  q: Float[Array, 'B T N H'],
  positions: Int32[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  size: int,
  axis: str | None = None,
) -> tuple[Float[Array, 'B N w H'], Int32[Array, 'B w']]:
  """The `size` queries of highest position of each row, over all shards.

  Args:
    q: in any order.
    positions: of the queries; where several share one (copies), their mean
      counts.
    valid: False for padding.
    size: w.
    axis: mesh axis that shards the sequence.

  Returns:
    (queries, positions in ascending order); position -1 and query 0 where a row
    has fewer.
  """
  sharded = axis is not None and lax.axis_size(axis) > 1
  newest = jnp.max(jnp.where(valid, positions, -1), axis=1)
  if sharded:
    newest = lax.pmax(newest, axis)
  slot = positions - (newest[:, None] - size + 1)
  slot = jnp.where(valid & (slot >= 0), slot, size)
  row = jnp.arange(q.shape[0])[:, None]
  hits = jnp.zeros((q.shape[0], size), jnp.float32)
  hits = hits.at[row, slot].add(1.0, mode='drop')
  found = jnp.zeros((q.shape[0], size, *q.shape[2:]), jnp.float32)
  found = found.at[row, slot].add(q.astype(jnp.float32), mode='drop')
  if sharded:
    hits, found = lax.psum((hits, found), axis)
  found = found / jnp.maximum(hits, 1)[..., None, None]
  at = newest[:, None] - size + 1 + jnp.arange(size)
  return found.astype(q.dtype).swapaxes(1, 2), jnp.where(hits > 0, at, -1)


def scores(
  q: Float[Array, 'M H'],
  at: Int32[Array, 'M'],
  keys: Float[Array, 'c H'],
  key_at: Int32[Array, 'c'],
  scale: float,
) -> Float[Array, 'M c']:
  """Scaled scores; -inf where a key is later than the query."""
  exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  score = jnp.einsum(
    'mh,ch->mc',
    q,
    keys.astype(q.dtype),
    precision=exact,
    preferred_element_type=jnp.float32,
  )
  return jnp.where(key_at <= at[:, None], score * scale, -jnp.inf)


def normaliser(
  q: Float[Array, 'M H'],
  at: Int32[Array, 'M'],
  fetch: Fetch,
  n_tiles: int,
  scale: float,
  axis: str | None = None,
) -> Float[Array, 'M']:
  """The log of each query's sum of exponentials; +inf where it sees no key.

  So that exp(score - normaliser) is the softmax weight, 0 in empty rows.
  """

  def one(i):
    return _lse(scores(q, at, *fetch(i), scale), 1)

  lse = _lse(lax.map(one, jnp.arange(n_tiles)), 0)
  if axis is not None and lax.axis_size(axis) > 1:
    lse = _lse(lax.all_gather(lse, axis), 0)
  return jnp.where(lse > -jnp.inf, lse, jnp.inf)


def _lse(x: Array, axis: int) -> Array:
  """Logsumexp that gives -inf of nothing."""
  top = jnp.max(x, axis=axis, keepdims=True)
  top = jnp.where(top > -jnp.inf, top, 0.0)
  total = jnp.sum(jnp.exp(x - top), axis=axis)
  return jnp.log(total) + jnp.squeeze(top, axis)


def contiguous_tiles(
  k: Float[Array, 'S H'], length: Int32[Array, ''], tile: int, never: int
) -> tuple[Fetch, int]:
  """Tiles of keys that lie in order; the last one is moved back.

  Keys that a tile shares with the one before are `never` in it.

  Returns:
    (fetch, number of tiles).
  """
  size = k.shape[0]
  tile = min(tile, size)

  def fetch(i):
    first = jnp.minimum(i * tile, size - tile)
    at = first + jnp.arange(tile)
    fresh = (at >= i * tile) & (at < length)
    keys = lax.dynamic_slice_in_dim(k, first, tile, 0)
    # Padding may hold anything, infinities too.
    keys = jnp.where(fresh[:, None], keys, 0)
    return keys, jnp.where(fresh, at, never)

  return fetch, -(-size // tile)


def map_heads(function, *arrays: Array):
  """`function` over the flattened leading [B K] of every array, in turn."""
  lead = arrays[0].shape[:2]
  flat = [a.reshape(-1, *a.shape[2:]) for a in arrays]
  out = lax.map(lambda args: function(*args), tuple(flat))
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)
