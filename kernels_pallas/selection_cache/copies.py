"""The int8 copy of a row's newest key, in one launch."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, Int32

_TINY = float(jnp.finfo(jnp.float32).tiny)


def copied(
  codes: Int8[Array, 'B K S H'],
  scale: Float[Array, 'B K S'],
  keys: Float[Array, 'B K S H'],
  used: Int32[Array, 'B'],
  *,
  interpret: bool = False,
) -> tuple[Int8[Array, 'B K S H'], Float[Array, 'B K S']]:
  """Codes and scales, in place, with those of key `used` - 1.

  As `lcx.cache.quantise.quantise(keys, 8)` has them.

  Args:
    codes: key = code * scale.
    scale: of each key.
    keys: of the cache.
    used: tokens that it holds; of a row that holds none, nothing is copied.
    interpret: runs on any device.
  """
  batch, kv, _, dim = keys.shape

  def kernel(_, __, keys_ref, used_ref, codes_ref, scale_ref):
    head, row = pl.program_id(0), pl.program_id(1)
    token, channels = used_ref[row] - 1, pl.ds(0, dim)

    @pl.when(token >= 0)
    def _():
      key = plgpu.load(keys_ref.at[row, head, token, channels])
      key = key.astype(jnp.float32)
      step = jnp.maximum(jnp.max(jnp.abs(key)) / 127, _TINY)
      code = jnp.clip(_round(key / step), -127, 127)
      plgpu.store(
        codes_ref.at[row, head, token, channels], code.astype(jnp.int8)
      )
      scale_ref[row, head, token] = step

  return pl.pallas_call(
    kernel,
    out_shape=(
      jax.ShapeDtypeStruct(codes.shape, codes.dtype),
      jax.ShapeDtypeStruct(scale.shape, scale.dtype),
    ),
    grid=(kv, batch),
    input_output_aliases={0: 0, 1: 1},
    compiler_params=plgpu.CompilerParams(num_warps=4),
    interpret=interpret,
    name='selection_copy',
  )(codes, scale, keys, used)


def _round(x: jax.Array) -> jax.Array:
  """To the next integer, halves to the even one (Triton has floor alone)."""
  below = jnp.floor(x)
  rest = x - below
  odd = below - 2 * jnp.floor(below / 2)
  up = (rest > 0.5) | ((rest == 0.5) & (odd > 0))
  return jnp.where(up, below + 1, below)
