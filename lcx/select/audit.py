"""What lists of blocks really did: keys seen, softmax mass captured."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.block_sparse import BlockList


def listed_keys(
  blocks: BlockList,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  sliding_window: int | None = None,
) -> Float[Array, 'B']:
  """Keys that valid queries see through their lists, over all query heads.

  For lists alone: sink and window of `blocks` must be 0.
  """
  width, tb = blocks.ids.shape[-1], blocks.ids.shape[2]
  first = q_start[:, None] + jnp.arange(tb) * blocks.block_q
  stop = jnp.minimum(first + blocks.block_q, lengths[:, None])
  low, high = (x[:, None, :, None] for x in (first, jnp.maximum(stop, first)))
  key = blocks.ids * blocks.block_k

  def pairs(reach):
    """Pairs of queries low..high - 1 and keys that `reach` lags behind."""
    ends = [_ramp(p - reach - key, blocks.block_k) for p in (high, low)]
    return ends[0] - ends[1]

  seen = pairs(0)
  if sliding_window is not None:
    seen -= pairs(sliding_window)
  used = jnp.arange(width) < blocks.count[..., None]
  return jnp.sum(jnp.where(used, seen, 0.0), axis=(1, 2, 3))


def _ramp(x: Int32[Array, '*R'], top: int) -> Float[Array, '*R']:
  """Sum of clip(m, 0, top) over all m <= x."""
  x = jnp.maximum(x, 0).astype(jnp.float32)
  inside = jnp.minimum(x, top)
  return inside * (inside + 1) / 2 + (x - inside) * top


def sampled_mass(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  lse: Float[Array, 'B T N'],
  *,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  sliding_window: int | None = None,
  scale: float | None = None,
  samples: int = 16,
) -> Float[Array, 'B']:
  """Captured softmax mass, summed over valid queries and query heads.

  exp(lse of the sparse attention - lse of the dense one) is exactly the share
  of a query's softmax that it saw. The dense one is computed for `samples`
  queries a row, spread evenly over the valid ones, whose mean stands for all:
  2 samples S N H FLOPs.

  Args:
    q: rotated queries of the sparse attention.
    k: rotated keys.
    lse: of the sparse attention.
    q_start: position of each row's first query.
    lengths: keys of each row.
    sliding_window: the layer's own window, in both attentions.
    scale: of the scores; None: H**-0.5.
    samples: queries a row.
  """
  batch, t, heads, h = q.shape
  kv_heads, s = k.shape[1:3]
  scale = h**-0.5 if scale is None else scale
  n_valid = jnp.clip(lengths - q_start, 0, t)
  index = (jnp.arange(samples) * 2 + 1) * n_valid[:, None] // (2 * samples)
  at = q_start[:, None] + index
  sample = jnp.take_along_axis(q, index[..., None, None], axis=1)
  seen = jnp.take_along_axis(lse, index[..., None], axis=1)  # [B m N]
  sample = sample.reshape(batch, samples, kv_heads, -1, h)

  def one(args):
    sample, k, at, length = args
    exact = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    score = jnp.einsum(
      'mgh,sh->mgs',
      sample,
      k,
      precision=exact,
      preferred_element_type=jnp.float32,
    )
    key, at = jnp.arange(s), at[:, None, None]
    visible = (key <= at) & (key < length)
    if sliding_window is not None:
      visible &= key > at - sliding_window
    score = jnp.where(visible, score * scale, -jnp.inf)
    top = jnp.maximum(jnp.max(score, axis=-1), -1e30)
    return top + jnp.log(jnp.sum(jnp.exp(score - top[..., None]), axis=-1))

  row = jnp.arange(batch * kv_heads) // kv_heads
  dense = lax.map(
    one,
    (
      sample.swapaxes(1, 2).reshape(batch * kv_heads, samples, -1, h),
      k.reshape(batch * kv_heads, s, h),
      at[row],
      lengths[row],
    ),
  )
  dense = dense.reshape(batch, kv_heads, samples, -1).swapaxes(1, 2)
  dense = dense.reshape(batch, samples, heads)
  share = jnp.where(seen > -jnp.inf, jnp.exp(seen - dense), 0.0)
  share = jnp.sum(jnp.mean(share, axis=1), axis=1)
  return jnp.where(n_valid > 0, share * n_valid, 0.0)
