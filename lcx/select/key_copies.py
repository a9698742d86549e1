"""int8 copies of a cache's keys, for scoring alone: half of its bytes.

Attention reads the keys that the cache has; the copies only choose. A key's
codes have one scale (`lcx.cache.quantise`).
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from kernels_pallas import dispatch, selection_cache
from kernels_pallas.keys import NEVER
from kernels_pallas.selected_token import token_scores
from lcx.cache import DenseCache
from lcx.cache.quantise import quantise
from lcx.select import working_set


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyCopies:
  """Keys of this shard by number, in the cache's frame.

  Attributes:
    codes: int8.
    scale: key = code * scale.
  """

  codes: Int8[Array, 'B K S H']
  scale: Float[Array, 'B K S']

  @classmethod
  def of(cls, keys: Float[Array, 'B K S H']) -> Self:
    codes, scale, _ = quantise(keys, 8)
    assert scale is not None
    return cls(codes, scale)

  def refreshed(self, cache, last: int) -> Self:
    """With the cache's `last` newest tokens, which may be new, copied again."""
    # In place: head dims of whole vectors, offsets that 32 bits hold.
    fits = self.codes.shape[-1] in (64, 128, 256) and self.codes.size < 2**31
    fits &= last == 1 and isinstance(cache, DenseCache)
    if fits and dispatch.prefers('gpu'):
      return type(self)(
        *selection_cache.copied(self.codes, self.scale, cache.k, cache.used)
      )
    token = cache.used[:, None] - last + jnp.arange(last, dtype=jnp.int32)
    keys, _ = working_set.gather(cache, jnp.maximum(token, 0), jnp.float32)
    new = KeyCopies.of(keys)
    row = jnp.arange(token.shape[0])[:, None]
    at = jnp.where(token >= 0, token, NEVER)

    def put(kept, new):
      return kept.at[row, :, at].set(new.swapaxes(1, 2), mode='drop')

    return jax.tree.map(put, self, new)

  def scores(
    self, q: Float[Array, 'B T N H'], scale: float
  ) -> Float[Array, 'B T N S']:
    """Logits of queries; the scales of keys join behind the product."""
    found = token_scores(q, self.codes.astype(q.dtype), scale=scale)
    group = q.shape[2] // self.scale.shape[1]
    return found * jnp.repeat(self.scale, group, axis=1)[:, None]

  def read(
    self, page: int, dtype, index: Int32[Array, 'B M']
  ) -> Float[Array, 'B K M page H']:
    """Keys of some pages of `page` tokens."""
    b, kv, _, h = self.codes.shape
    at = index[:, None, :, None]
    codes = self.codes.reshape(b, kv, -1, page, h)
    scale = self.scale.reshape(b, kv, -1, page)
    codes = jnp.take_along_axis(codes, at[..., None], axis=2)
    scale = jnp.take_along_axis(scale, at, axis=2)
    return (codes.astype(jnp.float32) * scale[..., None]).astype(dtype)
