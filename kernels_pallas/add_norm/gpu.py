"""Residual sum and RMSNorm on NVIDIA GPUs, in Pallas Triton: a program a row.

A row stays in registers between the sum of its squares and their use.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

WARP_NUMBERS = 512  # that a warp holds: 16 a lane
MOST_WARPS = 16


def add_norm(
  x: Float[Array, '*R D'],
  delta: Float[Array, '*R D'],
  scale: Float[Array, 'D'],
  eps: float,
  *,
  interpret: bool = False,
) -> tuple[Float[Array, '*R D'], Float[Array, '*R D']]:
  """The sum and its norm (arXiv:1910.07467), float32 inside; forward only.

  Args:
    x: rows.
    delta: added to them, of their dtype.
    scale: of the channels.
    eps: added to the mean of squares.
    interpret: runs on any device.

  Returns:
    x + delta, rounded to x's dtype, and that over its root mean square, times
    scale.
  """
  width = x.shape[-1]
  wide = pl.next_power_of_2(width)

  def kernel(x_ref, delta_ref, scale_ref, total_ref, out_ref):
    at = (pl.program_id(0), pl.ds(0, wide))
    real = lax.broadcasted_iota(jnp.int32, (wide,), 0) < width

    def load(ref, at):
      return plgpu.load(ref.at[at], mask=real, other=0).astype(jnp.float32)

    total = (load(x_ref, at) + load(delta_ref, at)).astype(x.dtype)
    by = load(scale_ref, at[1:])
    plgpu.store(total_ref.at[at], total, mask=real)
    wider = total.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.sum(wider * wider) / width + eps)
    out = wider * inverse * by
    plgpu.store(out_ref.at[at], out.astype(x.dtype), mask=real)

  rows = x.reshape(-1, width)
  shape = jax.ShapeDtypeStruct(rows.shape, x.dtype)
  warps = max(1, min(MOST_WARPS, wide // WARP_NUMBERS))
  total, out = pl.pallas_call(
    kernel,
    out_shape=(shape, shape),
    grid=(rows.shape[0],),
    compiler_params=plgpu.CompilerParams(num_warps=warps),
    interpret=interpret,
    name='add_norm',
  )(rows, delta.reshape(rows.shape), scale)
  return total.reshape(x.shape), out.reshape(x.shape)
