"""A vector index on the device: keys in clusters, probed, then scored exactly.

The wave index of RetroInfer (arXiv:2505.02922, section 4) without its host
side: k-means of each kv head's keys, segment by segment, one centroid for
`cluster` tokens. A new segment is appended; nothing is built anew. It is dense
products and gathers alone, so it runs wherever XLA does.

  1. vote[c] = sum over the query heads of softmax_c(q.c / sqrt(H) + log |c|)
  2. clusters in the order of their votes, until `probe` tokens are gathered
  3. the exact scores of these, voted alike: the best `top` are attended

Tokens are numbered from the first indexed one: token n lies in page
`first + n // page` of the row, where `first` counts the pages of the sink.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.keys import NEVER

_ITERATIONS = 10  # of k-means; as in RetroInfer's release


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clusters:
  """The index of one shard's keys.

  Attributes:
    centroids: means of their keys; C = segments * clusters a segment.
    size: tokens of each; 0 where there is no cluster (yet).
    begin: where each begins in `order`.
    order: token numbers, cluster by cluster.
    joined: segments in the index, alike in all heads.
  """

  centroids: Float[Array, 'B K C H']
  size: Int32[Array, 'B K C']
  begin: Int32[Array, 'B K C']
  order: Int32[Array, 'B K S']
  joined: Int32[Array, 'B K']

  @classmethod
  def empty(
    cls, batch: int, heads: int, dim: int, segments: int, segment: int, per: int
  ) -> 'Clusters':
    """An index with room for `segments` of `segment` tokens each."""
    n = segments * per
    return cls(
      jnp.zeros((batch, heads, n, dim), jnp.float32),
      jnp.zeros((batch, heads, n), jnp.int32),
      jnp.zeros((batch, heads, n), jnp.int32),
      jnp.zeros((batch, heads, segments * segment), jnp.int32),
      jnp.zeros((batch, heads), jnp.int32),
    )

  def join(
    self, keys: Float[Array, 'B K n H'], due: Array, per: int
  ) -> 'Clusters':
    """With one more segment in the rows that are due.

    Args:
      keys: of the segment after the last one joined.
      due: bool [B].
      per: clusters of a segment.
    """
    n = keys.shape[2]
    centroids, size, order = jax.vmap(jax.vmap(lambda x: kmeans(x, per)))(keys)
    begin = jnp.cumsum(size, axis=2) - size
    joined = self.joined[:, 0]
    first = joined * n

    def put(old, new, at):
      def row(old, new, at):
        start = (jnp.int32(0), at) + (jnp.int32(0),) * (old.ndim - 2)
        return lax.dynamic_update_slice(old, new.astype(old.dtype), start)

      there = jnp.where(due, at, 0)
      keep = due.reshape(-1, *(1,) * (old.ndim - 1))
      return jnp.where(keep, jax.vmap(row)(old, new, there), old)

    place = joined * per
    offset = first[:, None, None]
    return Clusters(
      put(self.centroids, centroids, place),
      put(self.size, size, place),
      put(self.begin, begin + offset, place),
      put(self.order, order + offset, first),
      self.joined + due[:, None],
    )


def kmeans(
  keys: Float[Array, 'n H'], count: int, iterations: int = _ITERATIONS
) -> tuple[Float[Array, 'c H'], Int32[Array, 'c'], Int32[Array, 'n']]:
  """Spherical k-means of centred keys, from evenly spaced ones.

  Returns:
    (means, sizes, keys' numbers sorted by cluster).
  """
  keys = keys.astype(jnp.float32)
  n = keys.shape[0]
  mean = jnp.mean(keys, axis=0)
  x = keys - mean

  def assigned(centres):
    unit = centres / (jnp.linalg.norm(centres, axis=1, keepdims=True) + 1e-6)
    return jnp.argmax(x @ unit.T, axis=1)

  def means(owner, before):
    total = jnp.zeros((count, keys.shape[1])).at[owner].add(x)
    size = jnp.zeros((count,), jnp.int32).at[owner].add(1)
    some = size[:, None] > 0
    return jnp.where(some, total / jnp.maximum(size, 1)[:, None], before), size

  centres = x[jnp.arange(count) * n // count]
  centres = lax.fori_loop(
    0, iterations, lambda _, c: means(assigned(c), c)[0], centres
  )
  owner = assigned(centres)
  centres, size = means(owner, centres)
  return centres + mean, size, jnp.argsort(owner, stable=True).astype(jnp.int32)


class Found(NamedTuple):
  """What a search found, for each query.

  Attributes:
    tokens: numbers of the best tokens; -1: none.
    rest: log of the estimated sum of exp(score) over all other tokens of the
      index, for each query head.
    scored: tokens whose exact score was computed, over kv heads.
  """

  tokens: Int32[Array, 'B K T k']
  rest: Float[Array, 'B K T G']
  scored: Float[Array, 'B T']


def search(
  index: Clusters,
  q: Float[Array, 'B K T G H'],
  read,
  *,
  probe: int,
  top: int,
  axis: str,
) -> Found:
  """The best tokens of the index.

  Args:
    index: this shard's.
    q: rotated queries, by kv head.
    read: (token numbers [B K m]) -> keys [B K m H].
    probe: tokens whose exact score is computed, a kv head and shard.
    top: tokens found, a kv head, over all shards.
    axis: mesh axis that shards keys.
  """
  b, kv, t, _, h = q.shape
  q = q.astype(jnp.float32) * h**-0.5
  capacity = index.order.shape[2]
  probe = min(probe, capacity)

  near = jnp.einsum('bktgh,bkch->bktgc', q, index.centroids)
  size = index.size[:, :, None, None]
  near = jnp.where(size > 0, near + jnp.log(jnp.maximum(size, 1)), -jnp.inf)
  votes = vote(near, axis)
  _, best = lax.top_k(votes, votes.shape[-1])
  tokens, probed = _members(index, best, probe)

  keys = read(jnp.maximum(tokens, 0).reshape(b, kv, -1))
  keys = keys.reshape(b, kv, t, probe, h).astype(jnp.float32)
  exact = jnp.einsum('bktgh,bktch->bktgc', q, keys)
  exact = jnp.where(tokens[:, :, :, None] >= 0, exact, -jnp.inf)
  votes = vote(exact, axis)
  score, place = lax.top_k(jnp.where(tokens >= 0, votes, -1.0), min(top, probe))
  keep = (score >= 0) & (score >= global_kth(score, top, axis))
  found = jnp.where(keep, jnp.take_along_axis(tokens, place, axis=3), -1)

  taken = jnp.zeros(votes.shape, bool)
  taken = jnp.put_along_axis(taken, place, keep, axis=3, inplace=False)
  lost = jnp.where(taken[:, :, :, None], -jnp.inf, exact)
  far = jnp.where(probed[:, :, :, None], -jnp.inf, near)
  return Found(
    found,
    jnp.logaddexp(_lse(lost), _lse(far)),
    jnp.sum(tokens >= 0, axis=(1, 3)).astype(jnp.float32),
  )


def vote(logits: Float[Array, '*n G c'], axis: str) -> Float[Array, '*n c']:
  """Sum over heads of the softmax over all shards' candidates."""
  peak = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
  if lax.axis_size(axis) > 1:
    peak = lax.pmax(peak, axis)
  weight = jnp.exp(logits - jnp.where(peak > -jnp.inf, peak, 0.0))
  total = jnp.sum(weight, axis=-1, keepdims=True)
  if lax.axis_size(axis) > 1:
    total = lax.psum(total, axis)
  return jnp.sum(weight / jnp.where(total > 0, total, 1.0), axis=-2)


def global_kth(
  best: Float[Array, '*n c'], k: int, axis: str
) -> Float[Array, '*n 1']:
  """The k-th best score over all shards, given each shard's k best.

  Of shards that have fewer than k, all: the last of these.
  """
  if lax.axis_size(axis) > 1:
    best = lax.all_gather(best, axis, axis=best.ndim - 1, tiled=True)
    best, _ = lax.top_k(best, min(k, best.shape[-1]))
  return best[..., -1:]


def _lse(x: Float[Array, '*n c']) -> Float[Array, '*n']:
  """Logsumexp that gives -inf of nothing."""
  peak = jnp.max(x, axis=-1, initial=-jnp.inf)
  safe = jnp.where(peak > -jnp.inf, peak, 0.0)
  return jnp.log(jnp.sum(jnp.exp(x - safe[..., None]), axis=-1)) + safe


def _members(index: Clusters, best: Int32[Array, 'B K T C'], probe: int):
  """Tokens of the best clusters, `probe` of them, and which were read.

  Returns:
    (token numbers [B K T probe], -1 at the end; bool [B K T C] clusters that
    are read whole or in part).
  """
  b, kv, t, c = best.shape
  flat = best.reshape(b, kv, -1)

  def of(x):
    return jnp.take_along_axis(x, flat, axis=2).reshape(best.shape)

  size, begin = of(index.size), of(index.begin)
  stop = jnp.cumsum(size, axis=3)
  # Slot j belongs to the cluster whose [stop - size, stop) holds it.
  slot = jnp.arange(probe, dtype=jnp.int32)
  owner = jax.vmap(lambda s: jnp.searchsorted(s, slot, side='right'))(
    stop.reshape(-1, c)
  ).reshape(b, kv, t, probe)
  inside = owner < c
  owner = jnp.minimum(owner, c - 1)

  def at(x):
    return jnp.take_along_axis(x, owner, axis=3)

  where = at(begin) + slot - (at(stop) - at(size))
  where = jnp.clip(where, 0, index.order.shape[2] - 1).reshape(b, kv, -1)
  tokens = jnp.take_along_axis(index.order, where, axis=2)
  tokens = jnp.where(inside, tokens.reshape(b, kv, t, probe), -1)
  read = (size > 0) & (stop - size < probe)
  probed = jnp.put_along_axis(
    jnp.zeros(best.shape, bool), best, read, axis=3, inplace=False
  )
  return tokens, probed


def page_of(
  tokens: Int32[Array, 'B K m'],
  first: Int32[Array, 'B'],
  ids: Int32[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
  page: int,
) -> tuple[Int32[Array, 'B K m'], Int32[Array, 'B K m']]:
  """(rows, positions) of numbered tokens, as `attend_tokens` takes them."""
  slot = first[:, None, None] + jnp.maximum(tokens, 0) // page
  slot = jnp.minimum(slot, ids.shape[2] - 1)
  inner = tokens % page
  row = jnp.take_along_axis(ids, slot, axis=2) * page + inner
  position = jnp.take_along_axis(starts, slot, axis=2) + inner
  gone = tokens < 0
  return jnp.where(gone, -1, row), jnp.where(gone, NEVER, position)
