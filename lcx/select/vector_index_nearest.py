"""Exact nearest keys of sampled queries, and of keys, on the device.

A tile of queries at a time, so that [M, S] of all M never exists. 2 M S H FLOPs
a kv head; of a tile's scores, which are written once and read once, only those
of the best groups are sorted.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

_SCORES = 1 << 27  # of a tile
_ROWS = 16  # of a tile, at least
_GROUP = 32


def sampled(
  valid: Bool[Array, 'B T'], n: int
) -> tuple[Int32[Array, 'B n'], Bool[Array, 'B n']]:
  """Indices of n valid tokens of each row, evenly spaced, and which differ.

  A row with fewer valid tokens repeats some, which are not marked.
  """
  order = jnp.argsort(~valid, axis=1, stable=True)
  count = jnp.sum(valid, axis=1, keepdims=True)
  step = jnp.arange(n, dtype=jnp.float32) / n
  place = jnp.floor(step * count).astype(jnp.int32)
  before = jnp.concatenate([jnp.full_like(place[:, :1], -1), place[:, :-1]], 1)
  return jnp.take_along_axis(order, place, axis=1), (place > before) & (
    count > 0
  )


def nearest(
  q: Float[Array, 'B K M H'],
  q_at: Int32[Array, 'B K M'],
  k: Float[Array, 'B T K H'],
  k_at: Int32[Array, 'B T'],
  count: int,
  causal: bool = True,
) -> Int32[Array, 'B K M c']:
  """Positions of the keys of largest inner product, best first; -1: none.

  Args:
    q: queries of each kv head.
    q_at: their positions; -1: no query.
    k: keys, rotated as q is.
    k_at: their positions, negative: not to be found.
    count: c.
    causal: keys later than the query are not found; otherwise the key at the
      query's own position is not.
  """
  length, dim = k.shape[1], k.shape[3]
  tile = min(q.shape[2], max(_ROWS, _SCORES // length))
  count = min(count, length)

  def head(args):
    q, q_at, k, k_at = args

    def one_tile(args):
      q, q_at = args
      score = jnp.einsum('mh,sh->ms', q, k, preferred_element_type=jnp.float32)
      seen = k_at <= q_at[:, None] if causal else k_at != q_at[:, None]
      score = jnp.where(seen & (k_at >= 0), score, -jnp.inf)
      value, index = top_of_groups(score, count)
      some = (value > -jnp.inf) & (q_at >= 0)[:, None]
      return jnp.where(some, k_at[index], -1)

    size = q.shape[0]
    q = jnp.pad(q, ((0, -size % tile), (0, 0)))
    q_at = jnp.pad(q_at, (0, -size % tile), constant_values=-1)
    tiles = (q.reshape(-1, tile, dim), q_at.reshape(-1, tile))
    return lax.map(one_tile, tiles).reshape(-1, count)[:size]

  b, kv = q.shape[:2]
  k_at = jnp.broadcast_to(k_at[:, None], (b, kv, length))
  flat = jax.tree.map(
    lambda x: x.reshape(b * kv, *x.shape[2:]), (q, q_at, k.swapaxes(1, 2), k_at)
  )
  return lax.map(head, flat).reshape(b, kv, q.shape[2], count)


def top_of_groups(
  x: Float[Array, 'R S'], count: int
) -> tuple[Float[Array, 'R c'], Int32[Array, 'R c']]:
  """The largest of each row, best first, and where they are.

  `lax.top_k` sorts whole rows. Here the row is cut into groups; the c largest
  are all in the c groups of largest maxima, which are found in the same way.
  """
  rows, size = x.shape
  if size <= 2 * count * _GROUP:
    return lax.top_k(x, count)
  x = jnp.pad(x, ((0, 0), (0, -size % _GROUP)), constant_values=-jnp.inf)
  # Neighbours are alike: a group holds none, and all are read side by side.
  groups = x.reshape(rows, _GROUP, -1)
  _, group = top_of_groups(jnp.max(groups, axis=1), count)
  step = groups.shape[2] * jnp.arange(_GROUP, dtype=jnp.int32)
  index = (group[:, :, None] + step).reshape(rows, -1)
  value, place = lax.top_k(jnp.take_along_axis(x, index, axis=1), count)
  return value, jnp.take_along_axis(index, place, axis=1)
