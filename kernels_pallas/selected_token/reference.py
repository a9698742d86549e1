"""selected_token, dense in float32: the definition, for tests."""

import jax.numpy as jnp

from kernels_pallas.block_sparse.reference import masked_attention
from kernels_pallas.partial import Partial
from kernels_pallas.selected_token.rows import row_lists


def visible(position, usable, q_positions, sink, window):
  """[B K S] positions -> mask [B K T S]; S selected keys."""
  p = q_positions[:, None, :, None]
  s = position[:, :, None]
  mask = usable[:, :, None] & (s <= p)
  if sink is not None:
    sink, window = sink[:, None, None], window[:, None, None]
    mask &= (s < sink) | (s > p - window)
  return mask


def _attend(q, k, v, position, usable, q_positions, sink, window, scale):
  mask = visible(position, usable, q_positions, sink, window)
  mask = jnp.repeat(mask, q.shape[2] // k.shape[1], axis=1)
  return masked_attention(q, k, v, mask, scale)


def attend_pages(
  q, pages, ids, starts, *, q_positions, sink, window, scale, block_sizes=None,
  out_dtype=jnp.float32,
) -> Partial:  # fmt: skip
  """See `kernels_pallas.selected_token.attend_pages`."""
  del block_sizes
  b, kv, width = ids.shape
  k, v = pages.read(jnp.maximum(ids, 0), jnp.float32)
  shape = (b, kv, width * pages.page, pages.head_dim)
  position = starts[..., None] + jnp.arange(pages.page)
  usable = jnp.repeat(ids >= 0, pages.page, axis=-1)
  part = _attend(
    q,
    k.reshape(shape),
    v.reshape(shape),
    position.reshape(shape[:3]),
    usable,
    q_positions,
    sink,
    window,
    scale,
  )
  return Partial(part.out.astype(out_dtype), part.lse)


def attend_contiguous(q, pages, starts, used, **named) -> Partial:
  """See `kernels_pallas.selected_token.attend_contiguous`."""
  return attend_pages(q, pages, *row_lists(pages, starts, used), **named)


def attend_tokens(
  q,
  pages,
  rows,
  positions,
  *,
  q_positions,
  sink,
  window,
  scale,
  block_sizes=None,
) -> Partial:
  """See `kernels_pallas.selected_token.attend_tokens`."""
  del block_sizes
  k, v = pages.tokens(jnp.maximum(rows, 0)).read((), jnp.float32)
  return _attend(
    q, k, v, positions, rows >= 0, q_positions, sink, window, scale
  )
