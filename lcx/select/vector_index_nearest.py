"""Exact nearest keys of sampled queries, and of keys, on the device.

Blocked: scores of one block of keys are merged into the best so far, so that
[queries, S] never exists. 2 M S H FLOPs a kv head, M queries.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

_BLOCK = 4096  # keys
_TILE = 2048  # queries


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
  length = k.shape[1]
  block, tile = min(_BLOCK, length), min(_TILE, q.shape[2])
  pad = -length % block
  k = jnp.pad(k, ((0, 0), (0, pad), (0, 0), (0, 0)))
  k_at = jnp.pad(k_at, ((0, 0), (0, pad)), constant_values=-1)
  count = min(count, length)

  def head(args):
    q, q_at, k, k_at = args

    def one_tile(args):
      q, q_at = args

      def step(i, best):
        value, found = best
        keys = lax.dynamic_slice_in_dim(k, i * block, block)
        at = lax.dynamic_slice_in_dim(k_at, i * block, block)
        score = jnp.einsum(
          'mh,sh->ms', q, keys, preferred_element_type=jnp.float32
        )
        seen = at <= q_at[:, None] if causal else at != q_at[:, None]
        score = jnp.where(seen & (at >= 0), score, -jnp.inf)
        value = jnp.concatenate([value, score], axis=1)
        at = jnp.broadcast_to(at, score.shape)
        found = jnp.concatenate([found, at], axis=1)
        value, place = lax.top_k(value, count)
        return value, jnp.take_along_axis(found, place, axis=1)

      none = jnp.full((tile, count), -jnp.inf), jnp.full((tile, count), -1)
      value, found = lax.fori_loop(0, k.shape[0] // block, step, none)
      some = (value > -jnp.inf) & (q_at >= 0)[:, None]
      return jnp.where(some, found, -1)

    size = q.shape[0]
    q = jnp.pad(q, ((0, -size % tile), (0, 0)))
    q_at = jnp.pad(q_at, (0, -size % tile), constant_values=-1)
    tiles = (q.reshape(-1, tile, q.shape[1]), q_at.reshape(-1, tile))
    return lax.map(one_tile, tiles).reshape(-1, count)[:size]

  b, kv = q.shape[:2]
  k_at = jnp.broadcast_to(k_at[:, None], (b, kv, k_at.shape[1]))
  flat = jax.tree.map(
    lambda x: x.reshape(b * kv, *x.shape[2:]), (q, q_at, k.swapaxes(1, 2), k_at)
  )
  return lax.map(head, flat).reshape(b, kv, q.shape[2], count)
