"""Statistics of keys per logical page, from which selectors score pages.

They come from keys as they arrive, before quantisation, in the frame in which
they are stored. A logical page's statistics are *assigned* by its first token
and widened by later ones, so nothing of an earlier tenant survives. Logical
page c of a row is meaningful iff c * logical < used.

Truncating into the middle of a logical page recomputes its statistics from the
keys that are stored. Unquantised, this equals never having appended. From int8
and int4 codes the keys are known to half a step: bounds are taken over key -
step / 2 and key + step / 2 and never wider than before the cut. They hold for
the unquantised keys that remain, and are at most half a step looser than fresh
ones. (Keeping an unquantised tail would be exact and would cost every decoded
token a second write.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from lcx.cache.write import lay_out, put_at, slots_filled, take_at


@dataclasses.dataclass(frozen=True)
class _Touched:
  """The logical pages that an append touches: n from the open one on.

  Attributes:
    index: int32 [B h n] of logical pages; -1: not touched.
    had: bool [B n] whether a page held tokens before.
    arrived: bool [B n logical] the slots that new tokens take.
    keys: [B h n logical H] new keys by slot.
  """

  index: Int32[Array, 'B h n']
  had: Bool[Array, 'B n']
  arrived: Bool[Array, 'B n logical']
  keys: Float[Array, 'B h n logical H']

  @classmethod
  def by(cls, shape, keys, used, count, logical: int) -> '_Touched':
    b, h, c, _ = shape
    offset = used % logical
    if keys.shape[2] == 1:  # one slot is enough
      keys, arrived = keys[:, :, :, None], (count > 0)[:, None, None]
    else:
      keys = lay_out(keys, offset, logical)
      arrived = slots_filled(offset, count, keys.shape[2], logical)
    n = keys.shape[2]
    index = (used // logical)[:, None] + jnp.arange(n, dtype=jnp.int32)
    touched = index * logical < jnp.where(count > 0, used + count, 0)[:, None]
    index = jnp.where(touched & (index < c), index, -1)[:, None]
    had = (jnp.arange(n) == 0) & (offset > 0)[:, None]
    return cls(jnp.broadcast_to(index, (b, h, n)), had, arrived, keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
  """Channel-wise bounds of keys (Quest, arXiv:2406.10774, section 3.3).

  Attributes:
    kmin: [B h C H] in the keys' dtype, so that nothing is rounded.
    kmax: [B h C H].
  """

  kmin: Float[Array, 'B h C H']
  kmax: Float[Array, 'B h C H']

  @classmethod
  def zeros(cls, shape: tuple[int, ...], dtype) -> 'Bounds':
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def absorb(
    self,
    keys: Float[Array, 'B h T H'],
    used: Int32[Array, 'B'],
    count: Int32[Array, 'B'],
    logical: int,
  ) -> 'Bounds':
    """Takes in the first `count` keys of rows that hold `used` tokens."""
    new = _Touched.by(self.kmin.shape, keys, used, count, logical)
    arrived = new.arrived[:, None, :, :, None]
    low = jnp.min(jnp.where(arrived, new.keys, jnp.inf), axis=3)
    high = jnp.max(jnp.where(arrived, new.keys, -jnp.inf), axis=3)
    had = new.had[:, None, :, None]
    low = jnp.where(had, jnp.minimum(low, take_at(self.kmin, new.index)), low)
    high = jnp.where(
      had, jnp.maximum(high, take_at(self.kmax, new.index)), high
    )
    # Read and written in one fusion, each would be read by a launch of its own.
    low, high = jax.lax.optimization_barrier((low, high))
    return Bounds(
      put_at(self.kmin, new.index, low), put_at(self.kmax, new.index, high)
    )

  def cut(
    self,
    keys: Float[Array, 'B h logical H'],
    error: Float[Array, 'B h logical'],
    cut: Bool[Array, 'B'],
    lengths: Int32[Array, 'B'],
  ) -> 'Bounds':
    """Recomputes the logical page that `lengths` ends in, in the rows `cut`.

    Args:
      keys: float32, the page's keys as stored, dequantised.
      error: how far a stored key may be from the key that was appended.
      cut: rows to change.
      lengths: tokens that remain.
    """
    index, kept = _cut_page(self.kmin.shape, keys.shape[2], cut, lengths)
    kept = kept[:, None, :, None]
    error = error[..., None]
    low = jnp.where(kept, keys - error, jnp.inf).min(axis=2, keepdims=True)
    high = jnp.where(kept, keys + error, -jnp.inf).max(axis=2, keepdims=True)
    dtype = self.kmin.dtype
    low = jnp.maximum(_round_down(low, dtype), take_at(self.kmin, index))
    high = jnp.minimum(-_round_down(-high, dtype), take_at(self.kmax, index))
    return Bounds(put_at(self.kmin, index, low), put_at(self.kmax, index, high))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums from which mean and deviation follow, float32.

  Attributes:
    total: [B h C H] sum of keys.
    square: [B h C H] sum of squared keys.
  """

  total: Float[Array, 'B h C H']
  square: Float[Array, 'B h C H']

  @classmethod
  def zeros(cls, shape: tuple[int, ...], dtype) -> 'Moments':
    del dtype  # sums of 16 squares need more than bfloat16
    return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

  def absorb(self, keys, used, count, logical: int) -> 'Moments':
    """As `Bounds.absorb`."""
    new = _Touched.by(self.total.shape, keys, used, count, logical)
    arrived = new.arrived[:, None, :, :, None]
    keys = jnp.where(arrived, new.keys.astype(jnp.float32), 0)
    total, square = jnp.sum(keys, axis=3), jnp.sum(keys**2, axis=3)
    had = new.had[:, None, :, None]
    total += jnp.where(had, take_at(self.total, new.index), 0)
    square += jnp.where(had, take_at(self.square, new.index), 0)
    return Moments(
      put_at(self.total, new.index, total),
      put_at(self.square, new.index, square),
    )

  def cut(self, keys, error, cut, lengths) -> 'Moments':
    """As `Bounds.cut`; sums of quantised keys carry their rounding."""
    del error
    index, kept = _cut_page(self.total.shape, keys.shape[2], cut, lengths)
    keys = jnp.where(kept[:, None, :, None], keys, 0)
    return Moments(
      put_at(self.total, index, jnp.sum(keys, axis=2, keepdims=True)),
      put_at(self.square, index, jnp.sum(keys**2, axis=2, keepdims=True)),
    )

  def mean_std(
    self, used: Int32[Array, 'B'], logical: int
  ) -> tuple[Float[Array, 'B h C H'], Float[Array, 'B h C H']]:
    """Mean and (population) deviation of each logical page's keys."""
    first = jnp.arange(self.total.shape[2], dtype=jnp.int32) * logical
    n = jnp.clip(used[:, None] - first, 1, logical)[:, None, :, None]
    mean = self.total / n
    return mean, jnp.sqrt(jnp.maximum(self.square / n - mean**2, 0))


Stats = Bounds | Moments


def _cut_page(shape, logical: int, cut, lengths):
  """(index [B h 1] of the page that `lengths` ends in, kept [B logical])."""
  b, h, _, _ = shape
  cut &= lengths % logical > 0
  index = jnp.where(cut, lengths // logical, -1)
  kept = jnp.arange(logical) < (lengths % logical)[:, None]
  return jnp.broadcast_to(index[:, None, None], (b, h, 1)), kept


def _round_down(x: Float[Array, '*n'], dtype) -> Float[Array, '*n']:
  """float32 to the largest value of `dtype` that is not above it."""
  y = x.astype(dtype)
  return jnp.where(
    y.astype(jnp.float32) > x, jnp.nextafter(y, jnp.asarray(-jnp.inf, dtype)), y
  )
