"""How keys and values lie in memory when they lie in pages."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Num

# Start of an unused page or slot: later than any query, so never visible.
NEVER = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """A pool of pages; each page holds consecutive tokens of one kv head.

  A contiguous cache [B K S H] is a pool, too: reshaped to
  [B * K * S / page, page, H], with page ids that count upwards.

  Attributes:
    k: [P page H] keys: bfloat16 / float16 / float32, or int8, or uint8
      [P page H/2] with two 4-bit codes a byte (low nibble: even channel).
    v: values, like k.
    k_scale: [P page] float32 per token per head, for int8 and int4; else None.
    v_scale: like k_scale.
    k_zero: [P page] float32 for int4: key = (code - zero) * scale. int8 is
      symmetric: key = code * scale, zero is None.
    v_zero: like k_zero.
  """

  k: Num[Array, 'P page _']
  v: Num[Array, 'P page _']
  k_scale: Float[Array, 'P page'] | None = None
  v_scale: Float[Array, 'P page'] | None = None
  k_zero: Float[Array, 'P page'] | None = None
  v_zero: Float[Array, 'P page'] | None = None

  @property
  def page(self) -> int:
    return self.k.shape[1]

  @property
  def bits(self) -> int:
    """16 or 32 for unquantised pages, 8, or 4."""
    if self.k_scale is None:
      return self.k.dtype.itemsize * 8
    return 4 if self.k_zero is not None else 8

  @property
  def head_dim(self) -> int:
    return self.k.shape[2] * (2 if self.bits == 4 else 1)

  def read(
    self, ids: Int32[Array, '*N'], dtype
  ) -> tuple[Float[Array, '*N page H'], Float[Array, '*N page H']]:
    """The keys and values of some pages, dequantised to `dtype`."""
    p = jax.tree.map(lambda pool: pool[ids], self)
    return (
      dequantise(p.k, p.k_scale, p.k_zero, dtype),
      dequantise(p.v, p.v_scale, p.v_zero, dtype),
    )

  def tokens(self, rows: Int32[Array, '*N']) -> 'Pages':
    """The tokens page * page_size + slot, with leading axes *N.

    The result's leaves are [*N H] and [*N]: `tokens(rows).read(())`, a read of
    no further index, dequantises them.
    """

    def take(pool):
      return pool.reshape(-1, *pool.shape[2:])[rows]

    return jax.tree.map(take, self)


def dequantise(codes, scale, zero, dtype) -> Float[Array, '... H']:
  """Codes [... H] (or packed [... H/2]) -> (codes - zero) * scale.

  Args:
    codes: as in `Pages`: floating point, int8, or packed uint8.
    scale: [...] float32, or None for floating point codes.
    zero: [...] float32 for packed 4-bit codes, or None.
    dtype: of the result.
  """
  if scale is None:
    return codes.astype(dtype)
  if zero is None:
    x = codes.astype(jnp.float32)
  else:
    pair = jnp.stack([codes & 15, codes >> 4], axis=-1)
    x = pair.reshape(*codes.shape[:-1], -1).astype(jnp.float32)
    x = x - zero[..., None]
  return (x * scale[..., None]).astype(dtype)
