"""selected_token in plain XLA: gathers what is listed, nothing else.

A long list goes in chunks under an online softmax, and the loop ends with the
last chunk that any row uses.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import tiles, xla_tiles
from kernels_pallas.partial import Partial
from kernels_pallas.selected_token.rows import row_lists


def refuse(function: str, *args, **kwargs) -> str | None:
  """XLA takes every call that the public functions let through."""
  del function, args, kwargs
  return None


def _attend(
  q,
  fetch,
  listed,
  positions,
  tokens,
  *,
  q_positions,
  sink,
  window,
  scale,
  chunk,
  out_dtype=jnp.float32,
) -> Partial:
  """Online softmax over chunks of the list.

  FLOPs: 4 T N H times the listed tokens, rounded up to the chunk.

  Args:
    q: [B T N H].
    fetch: (entries [B K chunk], number of the first) -> k, v
      [B K chunk*tokens H].
    listed: [B K W]; -1: skipped.
    positions: [B K W], position of an entry's first token.
    tokens: tokens an entry stands for.
    q_positions: [B T].
    sink: [K] or None.
    window: [K] or None.
    scale: of the scores.
    chunk: entries that go together.
    out_dtype: of the output.
  """
  b, t, n, h = q.shape
  kv, width = listed.shape[1], listed.shape[2]
  g = n // kv
  qs = (q * jnp.asarray(scale, jnp.float32)).astype(q.dtype)
  qs = qs.reshape(b, t, kv, g, h).transpose(0, 2, 1, 3, 4)
  qs = qs.reshape(b, kv, t * g, h)
  at = jnp.repeat(q_positions, g, axis=1)[:, None, :, None]  # [B 1 T*G 1]
  chunk = max(1, min(chunk, width))

  def visit(j, carry):
    # The last chunk begins earlier than its turn, so that it ends in the list.
    first = jnp.minimum(j * chunk, width - chunk)
    entry = lax.dynamic_slice_in_dim(listed, first, chunk, axis=2)
    entry = jnp.where(first + jnp.arange(chunk) >= j * chunk, entry, -1)
    start = lax.dynamic_slice_in_dim(positions, first, chunk, axis=2)
    k, v = fetch(jnp.maximum(entry, 0), first)
    s = (start[..., None] + jnp.arange(tokens)).reshape(b, kv, 1, -1)
    mask = jnp.repeat(entry >= 0, tokens, axis=2)[:, :, None] & (s <= at)
    if sink is not None:
      edge, recent = sink[:, None, None], window[:, None, None]
      mask &= (s < edge) | (s > at - recent)
    scores = xla_tiles.dot('bkqh,bksh->bkqs', qs, k)
    return xla_tiles.step(carry, scores, v, mask, 'bkqs,bksh->bkqh')

  carry = xla_tiles.begin((b, kv, t * g), h)
  if width:
    last = jnp.max(jnp.where(listed >= 0, jnp.arange(width) + 1, 0))
    steps = tiles.ceil_div(last, chunk)
    carry = lax.fori_loop(0, steps, visit, carry)
  out, lse = xla_tiles.finish(carry, out_dtype)
  out = out.reshape(b, kv, t, g, h).transpose(0, 2, 1, 3, 4)
  lse = lse.reshape(b, kv, t, g).transpose(0, 2, 1, 3)
  return Partial(out.reshape(b, t, n, h), lse.reshape(b, t, n))


def _chunk(block_sizes, b: int, kv: int, h: int, tokens: int) -> int:
  """Entries a step: 4 MB of keys on a CPU, 64 MB elsewhere."""
  if block_sizes and 'chunk' in block_sizes:
    return block_sizes['chunk']
  budget = 2**20 if jax.default_backend() == 'cpu' else 2**24
  return max(1, budget // (b * kv * h * tokens))


def attend_pages(
  q, pages, ids, starts, *, q_positions, sink, window, scale, block_sizes,
  out_dtype,
) -> Partial:  # fmt: skip
  """See `kernels_pallas.selected_token.attend_pages`.

  A pool that is a contiguous cache with every page at its own place (what
  `contiguous` makes, entries of -1 aside) is sliced, not gathered: a third of
  the bytes. Which it is, the ids say at run time.
  """
  b, kv, width = ids.shape
  h = q.shape[-1]
  chunk = _chunk(block_sizes, b, kv, h, pages.page)

  def attend(fetch):
    return _attend(
      q,
      fetch,
      ids,
      starts,
      pages.page,
      q_positions=q_positions,
      sink=sink,
      window=window,
      scale=scale,
      chunk=chunk,
      out_dtype=out_dtype,
    )

  def gather(entry, first):
    del first
    k, v = pages.read(entry, q.dtype)
    return k.reshape(b, kv, -1, h), v.reshape(b, kv, -1, h)

  if pages.k.shape[0] != b * kv * width or not width:
    return attend(gather)
  chunk = min(chunk, width)

  def cut(entry, first):
    del entry

    def piece(pool):
      pool = pool.reshape(b, kv, width, *pool.shape[1:])
      return lax.dynamic_slice_in_dim(pool, first, chunk, axis=2)

    k, v = jax.tree.map(piece, pages).read((), q.dtype)
    return k.reshape(b, kv, -1, h), v.reshape(b, kv, -1, h)

  home = jnp.arange(b * kv * width, dtype=jnp.int32).reshape(ids.shape)
  return lax.cond(
    jnp.all((ids == home) | (ids < 0)),
    lambda: attend(cut),
    lambda: attend(gather),
  )


def attend_contiguous(q, pages, starts, used, **named) -> Partial:
  """See `kernels_pallas.selected_token.attend_contiguous`."""
  return attend_pages(q, pages, *row_lists(pages, starts, used), **named)


def attend_tokens(
  q, pages, rows, positions, *, q_positions, sink, window, scale, block_sizes
) -> Partial:
  """See `kernels_pallas.selected_token.attend_tokens`."""
  b, kv, _ = rows.shape
  chunk = _chunk(block_sizes, b, kv, q.shape[-1], 1)

  def fetch(entry, first):
    del first
    return pages.tokens(entry).read((), q.dtype)

  return _attend(
    q,
    fetch,
    rows,
    positions,
    1,
    q_positions=q_positions,
    sink=sink,
    window=window,
    scale=scale,
    chunk=chunk,
  )
