"""The merge of a decode kernel's splits on NVIDIA GPUs, in Pallas Triton.

XLA takes three or four launches for it, of which each costs as much as the
attention of a short list: a maximum, a sum, the weighted sum, a transpose.
Here it is one, over (row, kv head) and pieces of the head dim. A piece is so
small that one warp holds it of all splits (or several warps, of very many): all
loads are in flight at once, and sums over splits are shuffles: no barriers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from kernels_pallas.partial import Partial

WARP_NUMBERS = 1024  # that a warp holds at once: 32 a lane
MOST_WARPS = 8


def merge_splits(
  out: Float[Array, 'B K S H Q'],
  lse: Float[Array, 'B K S Q'],
  queries: int,
  *,
  out_dtype: jnp.dtype | type = jnp.float32,
  interpret: bool = False,
) -> Partial:
  """The exact merge over S, as `kernels_pallas.partial.merge_axis` does it.

  Args:
    out: of each split; 0 where it saw nothing.
    lse: of each split; -inf where it saw nothing.
    queries: R <= Q, of which there are results.
    out_dtype: of the merged output.
    interpret: runs on any device.

  Returns:
    out [B K R H], lse float32 [B K R].
  """
  b, kv, splits, h, width = out.shape
  wide = pl.next_power_of_2(width)
  most = max(1, MOST_WARPS * WARP_NUMBERS // wide)
  some = min(pl.next_power_of_2(splits), most)  # splits at a time
  piece = max(1, min(h, WARP_NUMBERS // (some * wide)))
  warps = max(1, min(MOST_WARPS, some * wide * piece // WARP_NUMBERS))

  def kernel(out_ref, lse_ref, merged_ref, merged_lse_ref):
    at, first = pl.program_id(0), pl.program_id(1) * piece
    query = lax.broadcasted_iota(jnp.int32, (some, wide), 1)
    split = lax.broadcasted_iota(jnp.int32, (some, wide), 0)

    def step(i, carry):
      total, top, acc = carry
      place = i * some
      real = (query < width) & (place + split < splits)
      rows = pl.ds(place, some)
      x = plgpu.load(
        lse_ref.at[at, rows, pl.ds(0, wide)], mask=real, other=-jnp.inf
      )
      new = jnp.maximum(top, x.max(axis=0))
      base = jnp.where(new == -jnp.inf, 0.0, new)  # no -inf - -inf
      weight = jnp.exp(x - base)
      decay = jnp.exp(top - base)
      values = plgpu.load(
        out_ref.at[at, rows, pl.ds(first, piece), pl.ds(0, wide)],
        mask=jnp.broadcast_to(real[:, None], (some, piece, wide)),
        other=0.0,
      )
      acc = acc * decay + jnp.sum(values * weight[:, None], axis=0)
      return total * decay + jnp.sum(weight, axis=0), new, acc

    total, top, acc = lax.fori_loop(
      0,
      pl.cdiv(splits, some),
      step,
      (
        jnp.zeros((wide,), jnp.float32),
        jnp.full((wide,), -jnp.inf, jnp.float32),
        jnp.zeros((piece, wide), jnp.float32),
      ),
    )
    acc = acc / jnp.where(total > 0, total, 1.0)
    row = lax.broadcasted_iota(jnp.int32, (wide, piece), 0)
    plgpu.store(
      merged_ref.at[at, pl.ds(0, wide), pl.ds(first, piece)],
      acc.T.astype(out_dtype),
      mask=row < queries,
    )
    plgpu.store(
      merged_lse_ref.at[at, pl.ds(0, wide)],
      jnp.where(total > 0, jnp.log(total) + top, -jnp.inf),
      mask=lax.broadcasted_iota(jnp.int32, (wide,), 0) < queries,
    )

  merged, merged_lse = pl.pallas_call(
    kernel,
    out_shape=(
      jax.ShapeDtypeStruct((b * kv, queries, h), out_dtype),
      jax.ShapeDtypeStruct((b * kv, queries), jnp.float32),
    ),
    grid=(b * kv, h // piece),
    compiler_params=plgpu.CompilerParams(num_warps=warps),
    interpret=interpret,
    name='merge_splits',
  )(out.reshape(-1, *out.shape[2:]), lse.reshape(-1, *lse.shape[2:]))
  return Partial(
    merged.reshape(b, kv, queries, h), merged_lse.reshape(b, kv, queries)
  )
