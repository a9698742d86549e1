"""Prompt queries over a list of key blocks per (query head, query block).

  out[b, t, n] = sum_s p_s v[b, n // G, s]      p = softmax over visible s of
                                    scale * q[b, t, n] . k[b, n // G, s]

Which s are visible is the rule of `BlockList`: causality, a length per row, a
sink, a window, and listed blocks; any mixture of head kinds goes in one call.

A visited block costs 4 * block_q * block_k * H FLOPs and reads
2 * block_k * H * itemsize bytes. A dense causal head visits T (2 S - T) / 2
pairs; a streaming head T (sink + window); a listed head its list.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.keys import Pages
from kernels_pallas.partial import Partial

EVERYTHING = 2**30  # a window that holds every key: dense causal attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockList:
  """Which keys a tile of query rows may see, beside causality and lengths.

  The query at position p of head n, in query block i, sees key s iff
    s <= p  and  s < lengths[b]  and
    (s < sink[n]  or  s > p - window[n]  or  s // block_k in ids[b, n, i])
  A listed block is visible whole, but for the causal edge. The three sets may
  overlap; a key counts once.

  Attributes:
    ids: [B N Tb W] int32, the first `count` of a row sorted ascending, unique.
    count: [B N Tb] int32, how many ids of a row are used. 0 <= count <= W.
    sink: [N] int32, tokens at the start that every query of head n sees.
    window: [N] int32, last tokens that a query sees, itself included; 0: none;
      EVERYTHING: dense causal.
    block_q: query rows a list row stands for (static).
    block_k: keys a block holds (static).
    dense: a static promise that every head is dense causal (window EVERYTHING
      in all heads), so that a path need not look at the lists.
  """

  ids: Int32[Array, 'B N Tb W']
  count: Int32[Array, 'B N Tb']
  sink: Int32[Array, 'N']
  window: Int32[Array, 'N']
  block_q: int = dataclasses.field(default=128, metadata={'static': True})
  block_k: int = dataclasses.field(default=128, metadata={'static': True})
  dense: bool = dataclasses.field(default=False, metadata={'static': True})


def listed(
  ids: Int32[Array, 'B N Tb W'],
  count: Int32[Array, 'B N Tb'],
  *,
  block_q: int = 128,
  block_k: int = 128,
) -> BlockList:
  """A BlockList of lists alone: no sink, no window.

  Raises:
    ValueError: shapes or dtypes do not fit.
  """
  zero = jnp.zeros(ids.shape[1:2], jnp.int32)
  blocks = BlockList(ids, count, zero, zero, block_q, block_k)
  _check_list(blocks)
  return blocks


def mixed(
  sink: Int32[Array, 'N'],
  window: Int32[Array, 'N'],
  batch: int,
  t: int,
  *,
  block_q: int = 128,
  block_k: int = 128,
) -> BlockList:
  """Closed-form heads, one (sink, window) each; window EVERYTHING is dense.

  Lists of width 0: nothing of size T x S or T / block_q x W is made, at any
  length.
  """
  n = sink.shape[0]
  tb = -(-t // block_q)
  return BlockList(
    jnp.zeros((batch, n, tb, 0), jnp.int32),
    jnp.zeros((batch, n, tb), jnp.int32),
    jnp.asarray(sink, jnp.int32),
    jnp.asarray(window, jnp.int32),
    block_q,
    block_k,
  )


def dense_blocks(
  batch: int, n: int, t: int, *, block_q: int = 128, block_k: int = 128
) -> BlockList:
  """Every head dense causal."""
  blocks = streaming_blocks(
    batch, n, t, 0, EVERYTHING, block_q=block_q, block_k=block_k
  )
  return dataclasses.replace(blocks, dense=True)


def streaming_blocks(
  batch: int,
  n: int,
  t: int,
  sink: int,
  window: int,
  *,
  block_q: int = 128,
  block_k: int = 128,
) -> BlockList:
  """Every head sees `sink` first and `window` last tokens (in tokens)."""
  return mixed(
    jnp.full(n, sink, jnp.int32),
    jnp.full(n, window, jnp.int32),
    batch,
    t,
    block_q=block_q,
    block_k=block_k,
  )


def block_sparse(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  v: Float[Array, 'B K S H'],
  blocks: BlockList,
  *,
  q_start: Int32[Array, 'B'] | None = None,
  lengths: Int32[Array, 'B'] | None = None,
  scale: float | None = None,
  sliding_window: int | None = None,
  block_sizes: dict[str, int] | None = None,
  implementation: str | None = None,
) -> Partial:
  """Attention of prompt queries over the visible keys.

  Args:
    q: queries, rotated. Query i of row b stands at q_start[b] + i.
    k: keys, rotated; a key's position is its index.
    v: values.
    blocks: which keys each tile sees. Made for these B, N, T.
    q_start: position of each row's first query; None: S - T (the queries are
      the last T of the keys).
    lengths: keys each row has; None: S. A query at or past its length gives
      (0, -inf).
    scale: of the scores; None: H**-0.5.
    sliding_window: the layer's own window, intersected with all the rest.
    block_sizes: explicit tile sizes of the implementation; None: tuned, else
      default.
    implementation: 'reference', 'xla', 'gpu', 'tpu' (refused with the reason
      where it does not fit), or None: the platform's order.

  Returns:
    Partial(out [B T N H] of q's dtype, lse [B T N] float32). A row that sees
    no key has out 0, lse -inf.

  Raises:
    ValueError: an argument does not fit; the message names it. Values are
      checked under `jax.experimental.checkify.checkify` only.
    NotImplementedError: on differentiation (see
      `kernels_pallas.differentiable`).
  """
  if k.ndim != 4 or k.shape != v.shape:
    raise ValueError(f'{k.shape=} and {v.shape=} must be one [B K S H]')
  _check_dtypes(q=q.dtype, k=k.dtype, v=v.dtype)
  if k.shape[0] != q.shape[0]:
    raise ValueError(f'{k.shape[0]=} must equal the batch {q.shape[0]=}')
  q_start, lengths, scale = _prepare(
    q,
    k.shape[1],
    k.shape[2],
    k.shape[3],
    blocks,
    q_start,
    lengths,
    scale,
    sliding_window,
  )
  _check_values(blocks, q_start, lengths, k.shape[2])
  kwargs = {
    'scale': scale,
    'sliding_window': sliding_window,
    'block_sizes': block_sizes,
  }
  run = dispatch.choose(
    implementation, 'block_sparse', 'block_sparse', q, k, v, blocks, **kwargs
  )

  def call(q, k, v, blocks, q_start, lengths):
    return run(q, k, v, blocks, q_start=q_start, lengths=lengths, **kwargs)

  if implementation != 'reference':
    call = dispatch.forward_only(call, 'block_sparse')
  return call(q, k, v, blocks, q_start, lengths)


def block_sparse_paged(
  q: Float[Array, 'B T N H'],
  pages: Pages,
  table: Int32[Array, 'B K W'],
  blocks: BlockList,
  *,
  q_start: Int32[Array, 'B'] | None = None,
  lengths: Int32[Array, 'B'],
  scale: float | None = None,
  sliding_window: int | None = None,
  block_sizes: dict[str, int] | None = None,
  implementation: str | None = None,
) -> Partial:
  """`block_sparse` over keys in pages (chunked prefill while serving).

  Args:
    q: queries.
    pages: the pool; 16-bit or 32-bit floating point, int8 or int4.
    table: page number w of row b, kv head k is pages[table[b, k, w]] and holds
      the keys at positions w * page .. ; -1 past the row's length.
    blocks: as in `block_sparse`; the page size must divide its block_k.
    q_start: None: lengths - T.
    lengths: keys each row has.
    scale: of the scores.
    sliding_window: the layer's own window.
    block_sizes: as in `block_sparse`.
    implementation: as in `block_sparse`.

  Returns:
    Partial(out [B T N H] of q's dtype, lse [B T N] float32).

  Raises:
    ValueError: an argument does not fit; the message names it.
    NotImplementedError: on differentiation.
  """
  check_pages(pages, q.shape[-1])
  if blocks.block_k % pages.page:
    raise ValueError(f'{pages.page=} must divide {blocks.block_k=}')
  if table.ndim != 3 or table.shape[0] != q.shape[0]:
    raise ValueError(f'{table.shape=} must be [B K W], B = {q.shape[0]}')
  if table.dtype != jnp.int32:
    raise ValueError(f'{table.dtype=} must be int32')
  capacity = table.shape[2] * pages.page
  # Whole blocks of pages: a block past the table is never visited.
  short = -table.shape[2] % (blocks.block_k // pages.page)
  table = jnp.pad(table, ((0, 0), (0, 0), (0, short)), constant_values=-1)
  if q_start is None:
    q_start = lengths - q.shape[1]
  q_start, lengths, scale = _prepare(
    q,
    table.shape[1],
    capacity,
    pages.head_dim,
    blocks,
    q_start,
    lengths,
    scale,
    sliding_window,
  )
  _check_values(blocks, q_start, lengths, capacity)
  checkify.debug_check(
    jnp.all(table < pages.k.shape[0]), 'table must be below the pool size'
  )
  held = jnp.arange(table.shape[2]) * pages.page < lengths[:, None, None]
  checkify.debug_check(
    jnp.all((table >= 0) | ~held), 'table must name a page of every key'
  )
  kwargs = {
    'scale': scale,
    'sliding_window': sliding_window,
    'block_sizes': block_sizes,
  }
  run = dispatch.choose(
    implementation,
    'block_sparse',
    'block_sparse_paged',
    q,
    pages,
    table,
    blocks,
    **kwargs,
  )

  def call(q, pages, table, blocks, q_start, lengths):
    return run(
      q, pages, table, blocks, q_start=q_start, lengths=lengths, **kwargs
    )

  if implementation != 'reference':
    call = dispatch.forward_only(call, 'block_sparse_paged')
  return call(q, pages, table, blocks, q_start, lengths)


def check_pages(pages: Pages, head_dim: int) -> None:
  """Raises ValueError unless the pool's leaves fit each other and q."""
  pool = pages.k.shape[:2]
  if pages.k.shape != pages.v.shape or pages.k.dtype != pages.v.dtype:
    raise ValueError(f'{pages.k.shape=} and {pages.v.shape=} must be equal')
  for name in ('k_scale', 'v_scale', 'k_zero', 'v_zero'):
    leaf = getattr(pages, name)
    if leaf is not None and leaf.shape != pool:
      raise ValueError(f'pages.{name}.shape={leaf.shape} must be {pool}')
  if (pages.k_scale is None) != (pages.v_scale is None):
    raise ValueError('pages.k_scale and pages.v_scale must come together')
  if (pages.k_zero is None) != (pages.v_zero is None):
    raise ValueError('pages.k_zero and pages.v_zero must come together')
  if pages.k_scale is None:
    _check_dtypes(**{'pages.k': pages.k.dtype})
  else:
    kind = jnp.int8 if pages.k_zero is None else jnp.uint8
    if pages.k.dtype != kind:
      raise ValueError(f'{pages.k.dtype=} must be {kind.__name__} here')
  if pages.head_dim != head_dim:
    raise ValueError(f'{pages.head_dim=} must equal that of q, {head_dim}')


def _check_dtypes(**dtypes) -> None:
  for name, dtype in dtypes.items():
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
      raise ValueError(f'{name}.dtype={dtype} must be a 16 or 32 bit float')


def _check_list(blocks: BlockList) -> None:
  for name in ('ids', 'count', 'sink', 'window'):
    leaf = getattr(blocks, name)
    if leaf.dtype != jnp.int32:
      raise ValueError(f'blocks.{name}.dtype={leaf.dtype} must be int32')
  if blocks.ids.ndim != 4 or blocks.count.shape != blocks.ids.shape[:3]:
    raise ValueError(
      f'{blocks.ids.shape=} must be [B N Tb W], {blocks.count.shape=} [B N Tb]'
    )
  if blocks.block_q < 1 or blocks.block_k < 1:
    raise ValueError(f'{blocks.block_q=}, {blocks.block_k=} must be positive')


def _prepare(
  q, kv, s, head_dim, blocks, q_start, lengths, scale, sliding_window
):
  """Checks what is known at trace time and fills in the defaults."""
  if q.ndim != 4:
    raise ValueError(f'{q.shape=} must be [B T N H]')
  b, t, n, h = q.shape
  _check_dtypes(q=q.dtype)
  if h != head_dim:
    raise ValueError(f'head dim of q, {h}, must equal that of k, {head_dim}')
  if n % kv:
    raise ValueError(f'kv heads {kv} must divide the query heads {n}')
  _check_list(blocks)
  want = (b, n, -(-t // blocks.block_q))
  if blocks.ids.shape[:3] != want:
    raise ValueError(f'{blocks.ids.shape[:3]=} must be (B, N, Tb) = {want}')
  for name in ('sink', 'window'):
    if getattr(blocks, name).shape != (n,):
      raise ValueError(f'blocks.{name} must have shape ({n},)')
  if sliding_window is not None and sliding_window < 1:
    raise ValueError(f'{sliding_window=} must be positive')
  if q_start is None:
    q_start = jnp.full(b, s - t, jnp.int32)
  if lengths is None:
    lengths = jnp.full(b, s, jnp.int32)
  for name, x in (('q_start', q_start), ('lengths', lengths)):
    if x.shape != (b,) or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(f'{name} must be int32 [{b}], is {x.dtype}{x.shape}')
  scale = h**-0.5 if scale is None else float(scale)
  return q_start.astype(jnp.int32), lengths.astype(jnp.int32), scale


def _check_values(blocks: BlockList, q_start, lengths, s: int) -> None:
  """What only run time knows; drops out unless checkify is on."""
  width = blocks.ids.shape[-1]
  debug = checkify.debug_check
  debug(jnp.all(lengths <= s), 'lengths must be at most S')
  debug(jnp.all(q_start >= 0), 'q_start must not be negative')
  debug(
    jnp.all((blocks.count >= 0) & (blocks.count <= width)),
    'blocks.count must be within 0 and the width of blocks.ids',
  )
  debug(
    jnp.all((blocks.sink >= 0) & (blocks.window >= 0)),
    'blocks.sink and blocks.window must not be negative',
  )
  if width:
    used = jnp.arange(width) < blocks.count[..., None]
    in_range = (blocks.ids >= 0) & (blocks.ids * blocks.block_k < s)
    debug(jnp.all(in_range | ~used), 'blocks.ids out of range')
    rising = blocks.ids[..., 1:] > blocks.ids[..., :-1]
    debug(jnp.all(rising | ~used[..., 1:]), 'blocks.ids must ascend, each once')
  if blocks.dense:
    debug(jnp.all(blocks.window >= s), 'blocks.dense needs window EVERYTHING')
