"""Methods that only measurements need: what ours are compared with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lcx import cache as caches
from lcx.methods import shards
from lcx.methods.base import Context, Method, Prefill, Rope
from lcx.methods.dense import DenseDecode, dense_trace

_SCORE_BYTES = 2**31  # temporary memory of scores


@dataclasses.dataclass(frozen=True)
class UnfusedPrefill(Prefill):
  """Dense attention as one writes it first: scores go to memory and back.

  Two products and a softmax, for as many rows at once as memory allows: what
  PyTorch's scaled_dot_product_attention does without a fused kernel.
  """

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, length, heads, dim = q.shape
    rotated = rope(k, ctx.positions)
    cache = shards.store(cache, k, rotated, v, ctx)
    keys, values = shards.gather_sequence(rotated, v, ctx.axes)
    kv_heads, total = keys.shape[1:3]
    first = shards.first_query(length, batch, ctx.axes)
    limit = max(1, _SCORE_BYTES // (4 * batch * heads * total))
    rows = next(n for n in range(min(length, limit), 0, -1) if length % n == 0)

    def some(args) -> Any:
      q, at = args
      q = q.reshape(batch, rows, kv_heads, -1, dim)
      scores = jnp.einsum(
        'btkgh,bksh->bkgts', q, keys, preferred_element_type=jnp.float32
      )
      place = first[:, None] + at + jnp.arange(rows, dtype=jnp.int32)
      reach = place[..., None] - jnp.arange(total, dtype=jnp.int32)
      seen = reach >= 0
      if ctx.sliding_window is not None:
        seen &= reach < ctx.sliding_window
      scores = jnp.where(seen[:, None, None], scores * dim**-0.5, -jnp.inf)
      p = jax.nn.softmax(scores).astype(values.dtype)
      out = jnp.einsum('bkgts,bksh->btkgh', p, values)
      return out.reshape(batch, rows, heads, dim)

    pieces = rope(q, ctx.positions).reshape(batch, -1, rows, heads, dim)
    at = jnp.arange(0, length, rows, dtype=jnp.int32)
    out = jax.lax.map(some, (pieces.swapaxes(0, 1), at))
    out = out.swapaxes(0, 1).reshape(q.shape)
    return out, cache, dense_trace(q, ctx)


METHODS = {
  'unfused': Method(
    'unfused', UnfusedPrefill(), caches.CONFIGS['dense'], DenseDecode()
  )
}
