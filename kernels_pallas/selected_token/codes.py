"""Codes of quantised pages in the decode kernel: how products take them.

A query is two 8-bit integers a channel, so that keys need no conversion; values
become bfloat16 numbers.
"""

import jax.numpy as jnp
from jax import lax

from kernels_pallas import mosaic_gpu

SPREAD4 = 128.0  # what `spread4` adds to every code
FINE = 254.0  # fine steps of a query's coarse one


def two_codes(rows, bits: int, wide: int):
  """Queries as two 8-bit integers a channel.

  Args:
    rows: [B K R H].
    bits: of the pages.
    wide: queries of a program.

  Returns:
    codes int8 [B K 2R' H], R' = R in whole programs, each `wide` coarse rows
    and then the fine ones of the same queries; step float32 [B K R'], so that
    query = step * (coarse + fine / FINE); and, for 4 bits, the queries' sums.
  """
  b, kv, _, h = rows.shape
  x = mosaic_gpu.pad_to(rows, 2, wide).astype(jnp.float32)
  step = jnp.max(jnp.abs(x), axis=3) / 127
  x = x / jnp.where(step > 0, step, 1.0)[..., None]
  coarse = jnp.round(x)
  fine = jnp.round((x - coarse) * FINE)
  sums = step * jnp.sum(coarse + fine / FINE, axis=3)
  codes = jnp.stack([coarse, fine], axis=2).astype(jnp.int8)
  if bits == 4:  # even channels of all 8, then odd ones, as `spread8` does
    codes = codes.reshape(*codes.shape[:4], h // 8, 4, 2)
    codes = jnp.moveaxis(codes, -1, 4)
  codes = codes.reshape(b, kv, 2, -1, wide, h).swapaxes(2, 3)
  codes = codes.reshape(b, kv, -1, h)
  return codes, step, sums if bits == 4 else None


def spread8(source, target):
  """Turns a tile of 4-bit codes into 8-bit integers, as words."""
  word = source[...]
  width = word.shape[1]
  for i in range(2):
    codes = lax.shift_right_logical(word, jnp.int32(4 * i))
    codes = lax.bitwise_and(codes, jnp.int32(0x0F0F0F0F))
    target[:, i * width : (i + 1) * width] = codes


def spread4(source, target):
  """Turns a tile of 4-bit codes into bfloat16 numbers 128 + code, as words.

  0x4300 | code is that number: its unit is the lowest bit of the mantissa.
  """
  word = source[...]
  width = word.shape[1]
  for i in range(4):
    nibbles = lax.shift_right_logical(word, jnp.int32(4 * i))
    target[:, i * width : (i + 1) * width] = lax.bitwise_or(
      lax.bitwise_and(nibbles, jnp.int32(0x000F000F)), jnp.int32(0x43004300)
    )
