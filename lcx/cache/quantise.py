"""int8 and int4 codes of keys and values, one scale per token and head.

int8 is symmetric: x = code * scale, scale = max |x| / 127. int4 is asymmetric:
x = (code - zero) * scale, scale = (max - min) / 15, zero = -min / scale kept as
a float, two codes a byte, the even channel in the low nibble. Both are the
dynamic ("fine-grained") kinds of QServe, arXiv:2405.04532, section 5.1;
`kernels_pallas.keys.dequantise` is the way back.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.keys import Pages

BITS = (16, 8, 4)  # 16: as keys arrive, be it bfloat16, float16 or float32

# A step must not vanish beside the values it stands for: `zero` stays below
# 2**16, where float32 still resolves 1/128 of a step.
_SMALLEST_STEP = 2.0**-16
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Half a step for rounding, and a little for float32 arithmetic around it.
_ERROR_STEPS = 0.52


def empty_pool(pages: int, page: int, head_dim: int, bits: int, dtype) -> Pages:
  """A pool of zeros.

  Raises:
    ValueError: `bits` is unknown, or 4 with an odd head dim.
  """
  if bits not in BITS:
    raise ValueError(f'{bits=} must be one of {BITS}')
  if bits == 4 and head_dim % 2:
    raise ValueError(f'bits=4 packs two channels a byte: {head_dim=} is odd')
  code = {16: dtype, 8: jnp.int8, 4: jnp.uint8}[bits]
  width = head_dim // 2 if bits == 4 else head_dim

  def codes():
    return jnp.zeros((pages, page, width), code)

  def numbers(kept: bool):
    return jnp.zeros((pages, page), jnp.float32) if kept else None

  return Pages(
    k=codes(),
    v=codes(),
    k_scale=numbers(bits < 16),
    v_scale=numbers(bits < 16),
    k_zero=numbers(bits == 4),
    v_zero=numbers(bits == 4),
  )


def encode(
  k: Float[Array, '*B H'], v: Float[Array, '*B H'], bits: int
) -> Pages:
  """Keys and values as a pool stores them; leaves [*B ...], not paged."""
  k_codes, k_scale, k_zero = quantise(k, bits)
  v_codes, v_scale, v_zero = quantise(v, bits)
  return Pages(k_codes, v_codes, k_scale, v_scale, k_zero, v_zero)


def quantise(x: Float[Array, '*B H'], bits: int):
  """(codes, scale [*B] or None, zero [*B] or None) of each vector of H."""
  if bits == 16:
    return x, None, None
  x = x.astype(jnp.float32)
  peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  if bits == 8:
    scale = jnp.maximum(peak / 127, _TINY)
    codes = jnp.clip(jnp.round(x / scale), -127, 127).astype(jnp.int8)
    return codes, scale[..., 0], None
  low = jnp.min(x, axis=-1, keepdims=True)
  high = jnp.max(x, axis=-1, keepdims=True)
  scale = jnp.maximum((high - low) / 15, jnp.maximum(peak, 1) * _TINY)
  scale = jnp.maximum(scale, peak * _SMALLEST_STEP)
  zero = -low / scale
  codes = jnp.clip(jnp.round(x / scale + zero), 0, 15).astype(jnp.uint8)
  packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
  return packed, scale[..., 0], zero[..., 0]


def error_bound(scale: Float[Array, '*B']) -> Float[Array, '*B']:
  """How far any channel of a dequantised vector is from the original."""
  return _ERROR_STEPS * scale
