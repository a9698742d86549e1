"""Queries over one interval of keys each: [passing | anchor | local].

  out[b, t, n] = sum_s p_s v[b, n // G, s]
  p = softmax over start[b, t] <= s < stop[b, t] of scale * q . k

With the gathered passing blocks rolled by the rank and laid before the anchor
and the local keys, what each row of APB (arXiv:2502.12085, equation 2) may see
is one interval, rank 0 included. Tiles outside a tile's union of intervals are
skipped: 4 H FLOPs a visited pair, keys read once a query tile.
"""

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.partial import Partial


def passing_block(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  start: Int32[Array, 'B T'],
  stop: Int32[Array, 'B T'],
  *,
  scale: float | None = None,
  block_sizes: dict[str, int] | None = None,
  implementation: str | None = None,
) -> Partial:
  """Attention of row t over keys start[b, t] <= s < stop[b, t].

  Args:
    q: rotated queries.
    k: keys; they keep the rotation of their own positions.
    v: values.
    start: first key of each row.
    stop: one past the last key of each row; stop <= start: none. Intervals
      should move monotonically within a tile: a tile visits their union.
    scale: of the scores; None: H**-0.5.
    block_sizes: explicit tile sizes of the implementation; None: tuned or
      default.
    implementation: 'reference', 'xla', 'gpu', 'tpu', or None.

  Returns:
    Partial(out [B T N H] of q's dtype, lse [B T N] float32); a row without
    keys has out 0, lse -inf.

  Raises:
    ValueError: an argument does not fit; the message names it. Values are
      checked under `jax.experimental.checkify.checkify` only.
    NotImplementedError: on differentiation.
  """
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
    raise ValueError(
      f'{q.shape=} must be [B T N H], {k.shape=} and {v.shape=} [B K S H]'
    )
  b, t, n, h = q.shape
  if k.shape[0] != b or k.shape[3] != h or n % k.shape[1]:
    raise ValueError(
      f'{k.shape=} must be [B K S H] with B = {b}, H = {h}, K dividing N = {n}'
    )
  for name, x in (('q', q), ('k', k), ('v', v)):
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
      raise ValueError(f'{name}.dtype={x.dtype} must be a 16 or 32 bit float')
  for name, x in (('start', start), ('stop', stop)):
    if x.shape != (b, t) or x.dtype != jnp.int32:
      raise ValueError(f'{name} must be int32 {(b, t)}, is {x.dtype}{x.shape}')
  checkify.debug_check(
    jnp.all((start >= 0) & (stop <= k.shape[2])),
    'start and stop must be within 0 and S',
  )
  static = {
    'scale': h**-0.5 if scale is None else float(scale),
    'block_sizes': block_sizes,
  }
  run = dispatch.choose(
    implementation,
    'passing_block',
    'passing_block',
    q,
    k,
    v,
    start,
    stop,
    **static,
  )

  def call(q, k, v, start, stop):
    return run(q, k, v, start, stop, **static)

  if implementation != 'reference':
    call = dispatch.forward_only(call, 'passing_block')
  return call(q, k, v, start, stop)
