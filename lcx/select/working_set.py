"""Tokens of a cache by number, and the ones that decode reads until it selects.

Numbers count a shard's own tokens in the order of arrival, which is the order
of their positions. The list of a row is the same for all its heads.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.keys import NEVER, Pages
from lcx.cache import CacheShape, DenseCache
from lcx.cache.base import split
from lcx.cache.write import put_at
from lcx.methods.base import Axes

PAGE = 64  # of a working set, as kernels see it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WorkingSet:
  """What decode reads until it selects again: the Selection Cache.

  Attributes:
    query: the pooled, unrotated query that selected (C_Q of algorithm 1).
    k: keys of the list (C_I) and of what came since, in ascending order.
    v: their values.
    held: int32 tokens that this shard's piece holds, a row.
    chosen: int32 tokens that all shards held after the selection.
    until: int32 position that followed the newest token then.
    age: int32 tokens that came since.
  """

  query: Float[Array, 'B N H']
  k: Float[Array, 'B K W H']
  v: Float[Array, 'B K W H']
  held: Int32[Array, 'B']
  chosen: Int32[Array, 'B']
  until: Int32[Array, 'B']
  age: Int32[Array, 'B']

  @property
  def total(self) -> Int32[Array, 'B']:
    """Tokens that all shards hold."""
    return self.chosen + self.age

  @property
  def expected(self) -> Int32[Array, 'B']:
    """Position of the next token; anything else selects anew."""
    return self.until + self.age

  @classmethod
  def empty(cls, shape: CacheShape) -> Self:
    """One that fits no token; `start` gives it room."""
    b, kv_heads, seq = shape.batch, shape.n_kv_heads, shape.shards.seq
    tokens = jnp.zeros((b, kv_heads, seq, shape.head_dim), shape.dtype)
    none = jnp.zeros((b,), jnp.int32)
    return cls(
      query=jnp.zeros((b, kv_heads, shape.head_dim), shape.dtype),
      k=tokens,
      v=tokens,
      held=jnp.zeros((b * seq,), jnp.int32),
      chosen=none,
      until=none - 1,
      age=none,
    )

  @classmethod
  def specs(cls, axes: Axes) -> Self:
    """Its tree of `PartitionSpec`s."""
    rows, tokens = split(axes.data), split(axes.data, axes.model, axes.seq)
    return cls(
      query=split(axes.data, axes.model),
      k=tokens,
      v=tokens,
      held=split((axes.data, axes.seq)),
      chosen=rows,
      until=rows,
      age=rows,
    )

  def with_room(self, tokens: int) -> Self:
    """Empty arrays of at least `tokens`, in whole pages."""
    batch, kv_heads, _, dim = self.k.shape
    tokens = -(-tokens // PAGE) * PAGE
    empty = jnp.zeros((batch, kv_heads, tokens, dim), self.k.dtype)
    return dataclasses.replace(self, k=empty, v=empty)

  def written(
    self,
    k: Float[Array, 'B 1 K H'],
    v: Float[Array, 'B 1 K H'],
    mine: Bool[Array, 'B'],
  ) -> Self:
    """With one more token behind those of some rows, not yet `counted`.

    Args:
      k: rotated keys.
      v: values.
      mine: the rows.
    """
    slot = jnp.where(mine, self.held, -1)
    slot = jnp.broadcast_to(slot[:, None, None], (*self.k.shape[:2], 1))
    return dataclasses.replace(
      self,
      k=put_at(self.k, slot, jnp.swapaxes(k, 1, 2)),
      v=put_at(self.v, slot, jnp.swapaxes(v, 1, 2)),
    )

  def counted(self, count: Int32[Array, 'B'], mine: Bool[Array, 'B']) -> Self:
    """With `count` more tokens, which live on this shard where `mine`."""
    return dataclasses.replace(
      self,
      held=self.held + jnp.where(mine, count, 0),
      age=self.age + count,
    )

  def where(self, rows: Bool[Array, 'B'], other: Self) -> Self:
    """These rows, and those of another working set elsewhere."""

    def pick(x, y):
      return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(pick, self, other)

  def pages(self) -> tuple[Pages, Int32[Array, 'B W']]:
    """The working set as (pages, starts).

    Places are counted from 1, so that the newest token's is `held`.
    """
    batch, _, width, dim = self.k.shape
    shape = (-1, PAGE, dim)
    # A literal: the same broadcast would be a launch in every layer.
    starts = np.arange(1, width + 1, PAGE, dtype=np.int32)
    starts = jnp.asarray(np.tile(starts, (batch, 1)))
    return Pages(self.k.reshape(shape), self.v.reshape(shape)), starts


def below(
  starts: Int32[Array, 'B W'], cache, position: Int32[Array, 'B']
) -> Int32[Array, 'B']:
  """How many of this shard's tokens stand before a position."""
  n = jnp.clip(position[:, None] - starts, 0, cache.page)
  return jnp.minimum(jnp.sum(n, axis=1, dtype=jnp.int32), cache.used)


def rows(cache, listed: Int32[Array, 'B n']) -> Int32[Array, 'B K n']:
  """Places page * page_size + slot in the cache's pool, of tokens by number."""
  ids = cache.page_ids()
  page = jnp.broadcast_to(
    (listed // cache.page)[:, None], (*ids.shape[:2], listed.shape[1])
  )
  ids = jnp.maximum(jnp.take_along_axis(ids, page, axis=2), 0)
  return ids * cache.page + (listed % cache.page)[:, None]


def gather(cache, listed: Int32[Array, 'B n'], dtype):
  """Keys and values [B K n H] of some tokens, the same for all heads."""
  return cache.pages().tokens(rows(cache, listed)).read((), dtype)


def all_keys(cache, dtype) -> Float[Array, 'B K S H']:
  """Every key of this shard; free in a dense cache."""
  if isinstance(cache, DenseCache):
    return cache.k
  k, _ = cache.pages().read(jnp.maximum(cache.page_ids(), 0), dtype)
  return k.reshape(*k.shape[:2], -1, k.shape[-1])


def read(cache, page: int, dtype, index: Int32[Array, 'B M']):
  """Keys [B K M page H] of pages of the bounds, which divide the cache's."""
  small = jax.tree.map(
    lambda x: x.reshape(-1, page, *x.shape[2:]), cache.pages()
  )
  small = dataclasses.replace(
    small, v=small.k, v_scale=small.k_scale, v_zero=small.k_zero
  )
  return small.read(rows(cache, index * page) // page, dtype)[0]


def ranks(cache, starts, listed, held, seq: str) -> Int32[Array, 'B n']:
  """Place of each listed token in the list of all shards."""
  place = jnp.arange(listed.shape[1], dtype=jnp.int32)
  place = jnp.broadcast_to(place, listed.shape)
  if jax.lax.axis_size(seq) == 1:
    return place
  start = jnp.take_along_axis(starts, listed // cache.page, axis=1)
  at = jnp.where(place < held[:, None], start + listed % cache.page, NEVER)
  everyone = jax.lax.all_gather(at, seq, axis=1, tiled=True)
  everyone = jnp.sort(everyone, axis=1)
  rank = jax.vmap(jnp.searchsorted)(everyone, at)
  return rank.astype(jnp.int32)
