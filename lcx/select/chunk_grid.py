"""The chunks of a prompt, whichever shard their rows are on.

The grid is the prompt's, so that what a chunk selects does not depend on the
mesh: a chunk may lie on two shards, which both attend for their rows of it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from lcx.methods.base import Context
from lcx.select import soft_vote


@dataclasses.dataclass(frozen=True)
class ChunkGrid:
  """The chunks that this shard's rows touch.

  Attributes:
    chunk: tokens of a chunk.
    count: of chunks.
    length: rows of this shard.
    first: place in the prompt of the first chunk's first token.
    before: rows of the first chunk that other shards hold.
  """

  chunk: int
  count: int
  length: int
  first: Int32[Array, '']
  before: Int32[Array, '']

  @classmethod
  def make(cls, length: int, chunk: int, ctx: Context) -> 'ChunkGrid':
    start = lax.axis_index(ctx.axes.seq) * length
    zero = jnp.zeros_like(start)
    if length % chunk == 0:
      return cls(chunk, length // chunk, length, start, zero)
    if lax.axis_size(ctx.axes.seq) == 1:
      return cls(chunk, -(-length // chunk), length, zero, zero)
    before = start % chunk
    count = (length - 2) // chunk + 2
    return cls(chunk, count, length, start - before, before)

  def begins(self, batch: int) -> Int32[Array, 'B C']:
    """Place in the prompt of each chunk's first token."""
    begin = self.first + jnp.arange(self.count, dtype=jnp.int32) * self.chunk
    return jnp.broadcast_to(begin, (batch, self.count))

  def cut(self, x: Shaped[Array, 'B T *R']) -> Shaped[Array, 'B C chunk *R']:
    """This shard's rows in chunks; zeros where it has none."""
    room = self.count * self.chunk
    if room != self.length:
      zeros = jnp.zeros((x.shape[0], room, *x.shape[2:]), x.dtype)
      x = lax.dynamic_update_slice_in_dim(zeros, x, self.before, axis=1)
    return x.reshape(x.shape[0], self.count, self.chunk, *x.shape[2:])

  def join(self, x: Shaped[Array, 'B C chunk *R']) -> Shaped[Array, 'B T *R']:
    """The way back."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return lax.dynamic_slice_in_dim(x, self.before, self.length, axis=1)


def pooled(
  q: Float[Array, 'B T N H'],
  grid: ChunkGrid,
  ctx: Context,
  *,
  pooling: soft_vote.Pooling,
  merge: float,
  merged: int,
) -> Float[Array, 'B C N H']:
  """One query for each chunk (TokenSelect, section 5.2).

  Args:
    q: queries of this shard, in the frame of the keys that they score.
    grid: the chunks.
    ctx: the context.
    pooling: how a mean is weighted.
    merge: cosine from which neighbouring chunks share a query.
    merged: tokens that share one at most.
  """
  batch, _, heads, dim = q.shape
  x = grid.cut(q).reshape(-1, grid.chunk, heads, dim)
  valid = grid.cut(ctx.valid).reshape(-1, grid.chunk)
  total, weight = soft_vote.query_sums(x, valid, pooling)
  total = total.reshape(batch, grid.count, *total.shape[1:])
  weight = weight.reshape(batch, grid.count, *weight.shape[1:])
  apart = grid.length % grid.chunk > 0  # chunks lie on several shards
  spread = lax.axis_size(ctx.axes.seq) > 1 and (apart or merge < 1)
  place = grid.first // grid.chunk
  chunks = -(-ctx.room // grid.chunk) + grid.count

  def everywhere(x):
    whole = jnp.zeros((batch, chunks, *x.shape[2:]), x.dtype)
    whole = lax.dynamic_update_slice_in_dim(whole, x, place, axis=1)
    return lax.psum(whole, ctx.axes.seq)

  def here(x):
    return lax.dynamic_slice_in_dim(x, place, grid.count, axis=1)

  if spread:
    total, weight = everywhere(total), everywhere(weight)
  if merge < 1:
    most = merged // grid.chunk
    total, weight = alike_as_one(total, weight, merge, most, ctx.axes.model)
  if spread:
    total, weight = here(total), here(weight)
  return soft_vote.mean_of(total, weight).astype(q.dtype)


def alike_as_one(
  total: Float[Array, 'B C N H'],
  weight: Float[Array, 'B C N 1'],
  merge: float,
  most: int,
  model: str | None = None,
):
  """Neighbouring chunks with queries that are alike get the query of all.

  A chunk joins the one before it where the cosine of their means, over all
  heads, is at least `merge`, and fewer than `most` have joined. It helped in a
  third party's runs (QuangNguyen711/TokenSelectExperiment: 96 for 90 in
  key-value retrieval at 0.95), which selected once a group; here every chunk
  still has its own list, of its own candidates, and only the query is shared,
  rows of the group's later chunks included.

  Args:
    total: weighted sum of each chunk's queries.
    weight: sum of weights.
    merge: least cosine.
    most: chunks that share a query at most.
    model: mesh axis that shards heads; None: it does not.

  Returns:
    (total, weight), of each chunk's group.
  """
  mean = soft_vote.mean_of(total, weight)
  near = soft_vote.cosine(mean[:, 1:], mean[:, :-1], model) >= merge
  near = jnp.pad(near, ((0, 0), (1, 0)))

  def visit(size, near):
    joins = near & (size < most)
    return jnp.where(joins, size + 1, 1), ~joins

  size = jnp.zeros(near.shape[:1], jnp.int32)
  _, begins = lax.scan(visit, size, near.T)
  group = jnp.cumsum(begins.T, axis=1) - 1

  def of_group(x, group):
    return jax.ops.segment_sum(x, group, num_segments=x.shape[0])[group]

  return tuple(jax.vmap(of_group)(x, group) for x in (total, weight))
