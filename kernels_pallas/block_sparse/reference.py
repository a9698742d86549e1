"""block_sparse, dense in float32: the definition, for tests."""

import jax
import jax.numpy as jnp

from kernels_pallas.partial import Partial


def visible(blocks, q_start, lengths, t: int, s: int, sliding_window=None):
  """The mask [B N T S] that `BlockList` defines."""
  key = jnp.arange(s)
  position = (q_start[:, None] + jnp.arange(t))[:, None, :, None]  # [B 1 T 1]
  length = lengths[:, None, None, None]
  used = jnp.arange(blocks.ids.shape[-1]) < blocks.count[..., None]
  member = blocks.ids[..., None] == key // blocks.block_k  # [B N Tb W S]
  listed = jnp.any(member & used[..., None], axis=3)
  listed = jnp.repeat(listed, blocks.block_q, axis=2)[:, :, :t]
  sink = blocks.sink[:, None, None]
  window = blocks.window[:, None, None]
  mask = (key < sink) | (key > position - window) | listed
  mask &= (key <= position) & (key < length) & (position < length)
  if sliding_window is not None:
    mask &= key > position - sliding_window
  return mask


def masked_attention(q, k, v, mask, scale) -> Partial:
  """softmax(scale q k^T + log mask) v; q [B T N H], k [B K S H], float32."""
  b, t, n, h = q.shape
  q = q.astype(jnp.float32).reshape(b, t, k.shape[1], -1, h)
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  high = jax.lax.Precision.HIGHEST
  scores = jnp.einsum('btkgh,bksh->bkgts', q, k, precision=high) * scale
  scores = scores.reshape(b, n, t, -1)
  scores = jnp.where(mask, scores, -jnp.inf)
  some = jnp.any(mask, axis=-1)
  lse = jax.nn.logsumexp(jnp.where(some[..., None], scores, 0.0), axis=-1)
  weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0.0)
  weights = weights.reshape(b, k.shape[1], -1, t, weights.shape[-1])
  out = jnp.einsum('bkgts,bksh->btkgh', weights, v, precision=high)
  lse = jnp.where(some, lse, -jnp.inf)
  return Partial(out.reshape(b, t, n, h), lse.transpose(0, 2, 1))


def block_sparse(
  q, k, v, blocks, *, q_start, lengths, scale, sliding_window, block_sizes=None
) -> Partial:
  """See `kernels_pallas.block_sparse.block_sparse`."""
  del block_sizes
  mask = visible(
    blocks, q_start, lengths, q.shape[1], k.shape[2], sliding_window
  )
  out, lse = masked_attention(q, k, v, mask, scale)
  return Partial(out.astype(q.dtype), lse)


def block_sparse_paged(q, pages, table, blocks, **kwargs) -> Partial:
  """See `kernels_pallas.block_sparse.block_sparse_paged`."""
  b, kv, width = table.shape
  k, v = pages.read(jnp.maximum(table, 0), jnp.float32)
  shape = (b, kv, width * pages.page, pages.head_dim)
  return block_sparse(q, k.reshape(shape), v.reshape(shape), blocks, **kwargs)
