"""How keys and values lie in memory when they lie in pages."""

import dataclasses

import jax
from jaxtyping import Array, Float, Num


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
