"""A few queries over selected pages or tokens (decode, speculation).

  out[b, t, n] = sum_s p_s v_s       p = softmax over the selected, visible s of
                                     scale * q[b, t, n] . k_s,  kv head n // G

A key at position s is visible to the query at p iff
  s <= p  and  (sink is None or s < sink[k] or s > p - window[k]),
so one path serves retrieval heads (lists of selected pages) and streaming
heads (sink and recent pages with exact token boundaries): the lists differ.

A selected token costs 4 T G H FLOPs and 2 H * bits / 8 bytes (+ 8 for int8's,
16 for int4's scales and zeros): decoding is bound by bytes.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.block_sparse import check_pages
from kernels_pallas.keys import Pages
from kernels_pallas.partial import Partial
from kernels_pallas.selected_token.rows import row_lists
from kernels_pallas.selected_token.scores import (
  likely_page_scores,
  page_scores,
  soft_vote,
  token_scores,
  top_k,
)

__all__ = [
  'MAX_QUERIES',
  'attend_contiguous',
  'attend_pages',
  'attend_tokens',
  'contiguous',
  'likely_page_scores',
  'page_scores',
  'soft_vote',
  'token_scores',
  'top_k',
]

MAX_QUERIES = 16


def contiguous(
  k: Float[Array, 'B K S H'], v: Float[Array, 'B K S H'], page: int = 64
) -> tuple[Pages, Int32[Array, 'B K W'], Int32[Array, 'B K W']]:
  """A contiguous cache as (pages, ids, starts): a reshape, no copy.

  Raises:
    ValueError: the page size does not divide S.
  """
  b, kv, s, h = k.shape
  if s % page:
    raise ValueError(f'{page=} must divide the capacity {s}')
  width = s // page
  ids = jnp.arange(b * kv * width, dtype=jnp.int32).reshape(b, kv, width)
  starts = jnp.broadcast_to(
    jnp.arange(width, dtype=jnp.int32) * page, ids.shape
  )
  return Pages(k.reshape(-1, page, h), v.reshape(-1, page, h)), ids, starts


def attend_pages(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  ids: Int32[Array, 'B K W'],
  starts: Int32[Array, 'B K W'],
  *,
  q_positions: Int32[Array, 'B T'],
  sink: Int32[Array, 'K'] | None = None,
  window: Int32[Array, 'K'] | None = None,
  scale: float | None = None,
  out_dtype: Any = jnp.float32,
  block_sizes: dict[str, int] | None = None,
  implementation: str | None = None,
) -> Partial:
  """Attention of up to 16 queries a row over whole pages of its kv heads.

  Args:
    q: rotated queries, T <= 16.
    pages: the pool: floating point, int8 or int4.
    ids: physical pages that row b, kv head k sees, each once; -1: skipped.
    starts: position of each page's first token.
    q_positions: position of each query.
    sink: per kv head, tokens at the start that every query sees; comes with
      `window`. None: all keys up to the query.
    window: per kv head, last tokens that a query sees, itself included.
    scale: of the scores; None: H**-0.5.
    out_dtype: of the output; parts that are merged later stay float32.
    block_sizes: explicit sizes of the implementation; None: tuned or default.
    implementation: 'reference', 'xla', 'gpu', 'tpu', or None.

  Returns:
    Partial(out [B T N H], lse [B T N] float32); an empty list gives out 0, lse
    -inf.

  Raises:
    ValueError: an argument does not fit; the message names it. Values are
      checked under `jax.experimental.checkify.checkify` only.
    NotImplementedError: on differentiation.
  """
  kwargs = _prepare(
    q, pages, ids, 'starts', starts, q_positions, sink, window, scale
  )
  checkify.debug_check(
    jnp.all(ids < pages.k.shape[0]), 'ids must be below the pool size'
  )
  checkify.debug_check(_each_once(ids), 'ids must name a page once')
  return _run(
    'attend_pages',
    implementation,
    q,
    pages,
    ids,
    starts,
    **kwargs,
    block_sizes=block_sizes,
    out_dtype=jnp.dtype(out_dtype),
  )


def attend_contiguous(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  starts: Int32[Array, 'B W'],
  used: Int32[Array, 'B'],
  *,
  q_positions: Int32[Array, 'B T'],
  sink: Int32[Array, 'K'] | None = None,
  window: Int32[Array, 'K'] | None = None,
  scale: float | None = None,
  out_dtype: Any = jnp.float32,
  block_sizes: dict[str, int] | None = None,
  implementation: str | None = None,
) -> Partial:
  """`attend_pages` over all of a contiguous cache, without lists.

  Args:
    q: rotated queries, T <= 16.
    pages: the cache [B K S H] as a pool [B*K*W page H], W = S / page.
    starts: position of each page's first token; above the queries' where a page
      holds no token.
    used: tokens that each row holds, page after page.
    q_positions: as in `attend_pages`, like all that follow.
    sink: see there.
    window: see there.
    scale: see there.
    out_dtype: see there.
    block_sizes: see there.
    implementation: see there.

  Returns:
    Partial(out [B T N H], lse [B T N] float32).

  Raises:
    ValueError: an argument does not fit; the message names it. Values are
      checked under `jax.experimental.checkify.checkify` only.
    NotImplementedError: on differentiation.
  """
  b, p = q.shape[0], pages.k.shape[0]
  if starts.ndim != 2 or starts.shape[0] != b or p % max(1, starts.size):
    raise ValueError(
      f'{starts.shape=} must be [B W] with B = {b} and B W dividing {p} pages'
    )
  if used.shape != (b,) or used.dtype != jnp.int32:
    raise ValueError(f'used must be int32 [{b}], is {used.dtype}{used.shape}')
  ids, listed = row_lists(pages, starts, used)  # as shapes alone
  kwargs = _prepare(
    q, pages, ids, 'starts', listed, q_positions, sink, window, scale
  )
  checkify.debug_check(
    jnp.all((used >= 0) & (used <= starts.shape[1] * pages.page)),
    'used must be within 0 and the capacity',
  )
  return _run(
    'attend_contiguous',
    implementation,
    q,
    pages,
    starts,
    used,
    **kwargs,
    block_sizes=block_sizes,
    out_dtype=jnp.dtype(out_dtype),
  )


def attend_tokens(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  rows: Int32[Array, 'B K W'],
  positions: Int32[Array, 'B K W'],
  *,
  q_positions: Int32[Array, 'B T'],
  sink: Int32[Array, 'K'] | None = None,
  window: Int32[Array, 'K'] | None = None,
  scale: float | None = None,
  block_sizes: dict[str, int] | None = None,
  implementation: str | None = None,
) -> Partial:
  """`attend_pages` over single tokens.

  Args:
    q: rotated queries, T <= 16.
    pages: the pool that holds the tokens.
    rows: page * page_size + slot of each token, each once; -1: skipped.
    positions: position of each token.
    q_positions: as in `attend_pages`, like all that follow.
    sink: see there.
    window: see there.
    scale: see there.
    block_sizes: see there.
    implementation: see there.

  Returns:
    Partial(out [B T N H] float32, lse [B T N] float32).

  Raises:
    ValueError: an argument does not fit; the message names it.
    NotImplementedError: on differentiation.
  """
  kwargs = _prepare(
    q, pages, rows, 'positions', positions, q_positions, sink, window, scale
  )
  checkify.debug_check(
    jnp.all(rows < pages.k.shape[0] * pages.page),
    'rows must be below the tokens of the pool',
  )
  checkify.debug_check(_each_once(rows), 'rows must name a token once')
  return _run(
    'attend_tokens',
    implementation,
    q,
    pages,
    rows,
    positions,
    **kwargs,
    block_sizes=block_sizes,
  )


def _each_once(ids: Int32[Array, 'B K W']) -> Array:
  """Whether no list names anything twice; what is below 0 is skipped."""
  ids = jnp.sort(ids, axis=-1)
  return jnp.all((ids[..., 1:] > ids[..., :-1]) | (ids[..., 1:] < 0))


def _run(
  function, implementation, *arrays, q_positions, sink, window, **static
):
  named = {'q_positions': q_positions, 'sink': sink, 'window': window}
  run = dispatch.choose(
    implementation, 'selected_token', function, *arrays, **named, **static
  )

  def call(arrays, named):
    return run(*arrays, **named, **static)

  if implementation != 'reference':
    call = dispatch.forward_only(call, function)
  return call(arrays, named)


def _prepare(
  q, pages, ids, name, where, q_positions, sink, window, scale
) -> dict:
  """Checks what is known at trace time and fills in the defaults."""
  if q.ndim != 4:
    raise ValueError(f'{q.shape=} must be [B T N H]')
  b, t, n, h = q.shape
  if t > MAX_QUERIES:
    raise ValueError(f'T={t} queries a row must be at most {MAX_QUERIES}')
  if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise ValueError(f'{q.dtype=} must be a 16 or 32 bit float')
  check_pages(pages, h)
  if ids.ndim != 3 or ids.shape[0] != b or n % ids.shape[1]:
    raise ValueError(
      f'{ids.shape=} must be [B K W] with B = {b} and K dividing N = {n}'
    )
  if where.shape != ids.shape:
    raise ValueError(f'{name} shape {where.shape} must be {ids.shape}')
  if q_positions.shape != (b, t):
    raise ValueError(f'{q_positions.shape=} must be {(b, t)}')
  if (sink is None) != (window is None):
    raise ValueError('sink and window must come together')
  for label, x in (('sink', sink), ('window', window)):
    if x is not None and x.shape != ids.shape[1:2]:
      raise ValueError(f'{label}.shape={x.shape} must be {ids.shape[1:2]}')
  for label, x in (
    ('ids', ids),
    (name, where),
    ('q_positions', q_positions),
    ('sink', sink),
    ('window', window),
  ):
    if x is not None and x.dtype != jnp.int32:
      raise ValueError(f'{label}.dtype={x.dtype} must be int32')
  return {
    'q_positions': q_positions,
    'sink': sink,
    'window': window,
    'scale': h**-0.5 if scale is None else float(scale),
  }
