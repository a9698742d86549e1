"""Attention over listed pages with a sink and a window per kv head.

One launch serves retrieval and streaming heads. Where the sequence is sharded,
a shard's last page may be half full while later tokens live elsewhere, and the
page's unused slots must not be seen. Without a window, it is enough that a
query's position ends with the shard's last token. A window reaches back from
the query's true position: then that page is read token by token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.block_sparse import EVERYTHING
from kernels_pallas.keys import NEVER
from kernels_pallas.partial import Partial, merge
from kernels_pallas.selected_token import (
  attend_contiguous,
  attend_pages,
  attend_tokens,
)
from lcx.cache import DenseCache
from lcx.methods import shards
from lcx.methods.base import Context


def visible(
  cache, n_kv_heads: int, sliding_window: int | None
) -> tuple[Int32[Array, 'K'], Int32[Array, 'K']]:
  """(sink, window) per kv head: the cache's ring heads, the model's window."""
  sink = jnp.zeros((n_kv_heads,), jnp.int32)
  window = jnp.full((n_kv_heads,), EVERYTHING, jnp.int32)
  if is_ring(cache):
    sink, window = cache.visible()
  if sliding_window is not None:  # takes the sink away, too
    sink, window = jnp.zeros_like(sink), jnp.minimum(window, sliding_window)
  return sink, window


def is_ring(cache) -> bool:
  """Whether a cache may hold ring heads (static)."""
  return getattr(getattr(cache, 'config', None), 'has_ring', False)


def attend_listed(
  q: Float[Array, 'B T N H'],
  cache,
  ids: Int32[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
  ctx: Context,
  window: tuple[Int32[Array, 'K'], Int32[Array, 'K']] | None = None,
  out_dtype: Any = jnp.float32,
) -> Partial:
  """This shard's part over the listed pages.

  Args:
    q: rotated queries.
    cache: whose pages are listed.
    ids: pages of its pool, each once a row; -1: skipped.
    starts: their first positions; NEVER where skipped.
    ctx: positions of the queries are true ones.
    window: (sink, window) per kv head; None: the cache's and the model's.
    out_dtype: of the output, where nothing is merged.
  """
  pages = cache.pages()
  if window is None and (is_ring(cache) or ctx.sliding_window is not None):
    window = visible(cache, ids.shape[1], ctx.sliding_window)
  if window is None:
    until = shards.seen_until(cache, ctx)
    return attend_pages(
      q, pages, ids, starts, q_positions=until, out_dtype=out_dtype
    )
  rule: dict[str, Any] = {
    'q_positions': ctx.positions,
    'sink': window[0],
    'window': window[1],
  }
  if jax.lax.axis_size(ctx.axes.seq) == 1:
    return attend_pages(q, pages, ids, starts, **rule, out_dtype=out_dtype)
  last = cache.last_position()[:, None, None]
  tail = (starts <= last) & (last < starts + pages.page - 1)
  at = jnp.argmax(tail, axis=2, keepdims=True)  # there is at most one

  def one(x, none):
    return jnp.where(
      jnp.any(tail, axis=2, keepdims=True),
      jnp.take_along_axis(x, at, axis=2),
      none,
    )

  page, start = one(ids, -1), one(starts, NEVER)
  slot = jnp.arange(pages.page, dtype=jnp.int32)
  used = (page >= 0) & (start + slot <= last)
  return merge(
    attend_pages(q, pages, jnp.where(tail, -1, ids), starts, **rule),
    attend_tokens(
      q,
      pages,
      jnp.where(used, page * pages.page + slot, -1),
      start + slot,
      **rule,
    ),
  )


def attend_all(
  q: Float[Array, 'B T N H'], cache, ctx: Context, out_dtype: Any
) -> Partial:
  """`attend_listed` over all pages of a cache."""
  cut = ctx.sliding_window is not None and jax.lax.axis_size(ctx.axes.seq) > 1
  if cut or not isinstance(cache, DenseCache):
    return attend_listed(
      *(q, cache, cache.page_ids(), cache.page_starts(), ctx),
      out_dtype=out_dtype,
    )
  return attend_contiguous(
    q,
    cache.pages(),
    cache.starts,
    cache.used,
    q_positions=shards.seen_until(cache, ctx),
    **shards.window(cache.k.shape[1], ctx.sliding_window),
    out_dtype=out_dtype,
  )


def listed_keys(
  cache,
  ids: Int32[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
  q: Float[Array, 'B T N H'],
  ctx: Context,
) -> Float[Array, 'B']:
  """Keys that valid queries see in listed pages: all heads, all shards."""
  kv_heads = ids.shape[1]
  sink, window = visible(cache, kv_heads, ctx.sliding_window)
  sink, window = sink[:, None], window[:, None]
  at = ctx.positions[:, :, None, None]  # [B T 1 1]
  start = jnp.where(ids < 0, NEVER, starts)[:, None]
  stop = jnp.minimum(start + cache.page, at + 1)
  if jax.lax.axis_size(ctx.axes.seq) > 1:
    stop = jnp.minimum(stop, cache.last_position()[:, None, None, None] + 1)
  first = jnp.maximum(jnp.minimum(stop, sink) - start, 0)
  recent = jnp.maximum(start, jnp.maximum(at - window + 1, sink))
  keys = first + jnp.maximum(stop - recent, 0)
  keys = jnp.sum(keys, axis=(2, 3)) * (q.shape[2] // kv_heads)
  keys = jnp.sum(jnp.where(ctx.valid, keys, 0), axis=1, dtype=jnp.float32)
  return jax.lax.psum(keys, ctx.axes.seq)
