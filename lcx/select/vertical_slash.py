"""MInference's vertical-slash pattern, in blocks.

Jiang et al., "MInference 1.0: accelerating pre-filling for long-context LLMs
via dynamic sparse attention", arXiv:2407.02490, section 3.2 and Algorithm 1.
Per head, from the softmax A of the last 64 queries over all keys:

  vertical[s] = sum over the queries of A[., s]; the best `columns` keys
  slash[o]    = sum of A over the diagonal of offset o = query - key; the best
                `diagonals` offsets

A query block lists every key block that holds a chosen column or that a chosen
diagonal crosses. The paper gathers single columns; here columns are rounded to
blocks and diagonals to blocks of offsets, so that one kernel serves all lists.

The window decides for the whole prompt. What its sums say of any row's mass,
taken as if all queries looked at its columns and as far back as it does:

  mass[I, J] = sum of vertical over J
             + sum over o of slash[o] * (share of queries of I whose key at
                                         distance o lies in J)

shared out over the blocks that row I may see. Columns and diagonals are chosen
by the same sums, so the captured share reads high away from the window.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.block_choice import choose, choose_blocks
from kernels_pallas.keys import NEVER
from lcx.select import window
from lcx.select.block_rows import (
  Rows,
  Selected,
  by_chunks,
  list_width,
  padded,
  rows_at,
)

_TILE = 65536  # keys read at a time
_KEPT = 2**23  # elements of all heads' block scores at a time
_CHOSEN = 2**22  # keys, of some heads, among which is chosen at a time


def vertical_slash(
  q: Float[Array, 'B N w H'],
  at: Int32[Array, 'B w'],
  k: Float[Array, 'B K S H'],
  *,
  n_queries: int,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  columns: int = 1000,
  diagonals: int = 6096,
  sink: int = 30,
  recent: int = 100,
  width: int | None = None,
  dense_below: int = 0,
  scale: float | None = None,
  block_q: int = 128,
  block_k: int = 128,
) -> Selected:
  """Lists of the blocks that the best columns and diagonals cross.

  Args:
    q: the rotated last queries of each row, see `window.last_queries`. They
      choose for the whole prompt: a chunk of it (q_start, n_queries) gets the
      whole prompt's lists only from the prompt's last queries, not its own.
    at: their positions, which must be consecutive; -1: no query.
    k: rotated keys.
    n_queries: T, the queries that get lists.
    q_start: position of each row's first query of those.
    lengths: keys of each row.
    columns: keys chosen a head.
    diagonals: offsets chosen a head.
    sink: first columns that are always among them (30 in the code).
    recent: smallest offsets that are always among them (100 in the code).
    width: most blocks of a row; None: what 256 MiB of lists allow.
    dense_below: rows of the batch with at most so many keys list all blocks.
    scale: of the scores; None: H**-0.5.
    block_q: queries that share a list.
    block_k: keys of a block.

  Returns:
    The lists, the estimated mass that they capture and what the width cut off.

  Raises:
    ValueError: columns or diagonals below 1, or a width too small.
  """
  if columns < 1 or diagonals < 1:
    raise ValueError(f'{columns=} and {diagonals=} must be at least 1')
  batch, heads, size, h = q.shape
  kv_heads, s = k.shape[1], k.shape[2]
  tb, sb = -(-n_queries // block_q), -(-s // block_k)
  width = list_width(
    width,
    batch * heads * tb,
    sb,
    block_q,
    block_k,
    dense_below=dense_below,
  )
  scale = h**-0.5 if scale is None else scale

  def pick(vertical, slash, length):
    column = jnp.arange(sb * block_k)
    old = jnp.broadcast_to(column < length, vertical.shape)

    def best(sums, first, limit):
      chosen = choose(
        sums,
        reachable=old,
        forced=old & (column < first),
        limit=max(limit, first),
      )
      weight = jnp.where(chosen, sums, 0.0).reshape(-1, sb, block_k).sum(-1)
      return weight, jnp.any(chosen.reshape(-1, sb, block_k), axis=-1)

    seen = vertical.reshape(-1, sb, block_k).sum(-1), _behind(slash, block_k)
    return best(vertical, sink, columns), best(slash, recent, diagonals), seen

  flat = batch * kv_heads
  queries, keys = q.reshape(flat, -1, size, h), k.reshape(flat, s, h)

  def sums_of(i):
    row = i // kv_heads
    sums = _sums(queries[i], keys[i], at[row], lengths[row], scale)
    return tuple(padded(x, 1, block_k) for x in sums)

  def of_heads(some):
    """A choice is a chain of small steps: of some heads at once."""
    vertical, slash = lax.map(sums_of, some)
    return jax.vmap(pick)(vertical, slash, lengths[some // kv_heads])

  most = max(1, _CHOSEN // (heads // kv_heads * s))
  at_once = max(n for n in range(1, flat + 1) if flat % n == 0 and n <= most)
  columns_of, diagonals_of, seen = jax.tree.map(
    lambda x: x.reshape(batch, kv_heads, *x.shape[2:]),
    lax.map(of_heads, jnp.arange(flat).reshape(-1, at_once)),
  )
  chunk = max(1, min(_KEPT // (batch * heads * sb), tb))

  def make(first):
    index = first + jnp.arange(chunk)
    rows = rows_at(q_start, lengths, index, block_q, dense_below)
    crossed, by_slash = _crossing(diagonals_of, rows, block_q, block_k)
    weight = columns_of[0][..., None, :] + crossed
    marked = columns_of[1][..., None, :] | by_slash
    reachable = rows.reachable(sb, block_k)[:, None, None]
    forced = rows.forced(sb, block_k)[:, None, None]
    marked = (marked & reachable) | forced
    mass = _row_mass(seen[0], seen[1], rows, block_k)
    return choose_blocks(
      jnp.where(marked, weight, 0.0),
      reachable=marked,
      forced=forced,
      budget=sb,
      width=width,
      mass=jnp.where(reachable, mass, 0.0),
      bounded=width < sb,
    )

  return by_chunks(
    make,
    n_blocks=tb,
    chunk=chunk,
    shape=(batch, heads, kv_heads),
    width=width,
    block_q=block_q,
    block_k=block_k,
  )


def _sums(
  q: Float[Array, 'G w H'],
  k: Float[Array, 'S H'],
  at: Int32[Array, 'w'],
  length: Int32[Array, ''],
  scale: float,
) -> tuple[Float[Array, 'G S'], Float[Array, 'G S']]:
  """Vertical and slash sums of one kv head's query heads."""
  group, size, h = q.shape
  s = k.shape[0]
  rows = q.reshape(-1, h)
  row_at = jnp.tile(at, group)
  fetch, n_tiles = window.contiguous_tiles(k, length, _TILE, NEVER)
  tile = min(_TILE, s)
  lse = window.normaliser(rows, row_at, fetch, n_tiles, scale)

  def one(slash, i):
    score = window.scores(rows, row_at, *fetch(i), scale)
    weight = jnp.exp(score - lse[:, None]).reshape(group, size, tile)
    first = jnp.minimum(i * tile, s - tile)
    span = tile + size - 1
    old = lax.dynamic_slice_in_dim(slash, first, span, 1)
    new = old + jnp.sum(_shear(weight), axis=1)
    slash = lax.dynamic_update_slice_in_dim(slash, new, first, 1)
    return slash, jnp.sum(weight, axis=1)

  slash = jnp.zeros((group, s + size - 1), jnp.float32)
  slash, vertical = lax.scan(one, slash, jnp.arange(n_tiles))
  done = (n_tiles - 1) * tile
  rest = s - done
  vertical = vertical.swapaxes(0, 1)
  vertical = jnp.concatenate(
    [vertical[:, :-1].reshape(group, done), vertical[:, -1, tile - rest :]],
    axis=1,
  )
  # Row r stands at length - w + r, so column c = key - r + w - 1 holds offset
  # length - 1 - c.
  offset = length - 1 - jnp.arange(s)
  slash = jnp.take(slash, jnp.maximum(offset, 0), axis=1)
  return vertical, jnp.where(offset >= 0, slash, 0.0)


def _shear(x: Float[Array, 'G w c']) -> Float[Array, 'G w e']:
  """Moves row r right by w - 1 - r; e = c + w - 1. Diagonals become columns.

  The rows come back in reverse order.
  """
  group, rows, columns = x.shape
  x = jnp.pad(x[:, ::-1], ((0, 0), (0, 0), (0, rows)))
  x = x.reshape(group, -1)[:, : rows * (columns + rows - 1)]
  return x.reshape(group, rows, -1)


def _crossing(
  diagonals: tuple[Float[Array, 'B K G Sb'], Bool[Array, 'B K G Sb']],
  rows: Rows,
  block_q: int,
  block_k: int,
) -> tuple[Float[Array, 'B K G c Sb'], Bool[Array, 'B K G c Sb']]:
  """Weight and presence of chosen diagonals in each pair of blocks.

  Queries p0..p1 and keys j0..j0 + block_k - 1 have offsets from
  p0 - j0 - block_k + 1 to p1 - j0; blocks of offsets that overlap these count.
  """
  weight, chosen = diagonals
  n_blocks = weight.shape[-1]
  key = jnp.arange(n_blocks) * block_k
  low = (rows.first[..., None] - key - block_k + 1) // block_k
  high = (rows.last[..., None] - key) // block_k  # [B c Sb]
  take = jax.vmap(lambda x, index: jnp.take(x, index, axis=2))
  shape = (*weight.shape[:3], *low.shape[1:])
  total, some = jnp.zeros(shape), jnp.zeros(shape, bool)
  for step in range(1 + -(-(block_q + block_k - 2) // block_k)):
    index = low + step
    good = (index >= 0) & (index <= high) & (index < n_blocks)
    index = jnp.clip(index, 0, n_blocks - 1)
    good = good[:, None, None]
    total += jnp.where(good, take(weight, index), 0.0)
    some |= good & take(chosen, index)
  return total, some


def _behind(slash: Float[Array, 'G S'], block: int) -> Float[Array, 'G Sb']:
  """Mass of the key block `d` blocks behind a whole query block, for each d.

  Offset d * block + r leads (block - r) / block of the block's queries there
  and the others one block further back.
  """
  slash = slash.reshape(slash.shape[0], -1, block)
  further = jnp.arange(block) / block
  near = jnp.sum(slash * (1 - further), axis=-1)
  far = jnp.sum(slash * further, axis=-1)
  return near.at[:, 1:].add(far[:, :-1])


def _row_mass(
  vertical: Float[Array, 'B K G Sb'],
  behind: Float[Array, 'B K G Sb'],
  rows: Rows,
  block_k: int,
) -> Float[Array, 'B K G c Sb']:
  """The mass of key blocks that the window's sums promise each row.

  Query blocks that do not stand at a multiple of `block_k` are between two
  distances and get their weighted mean.
  """
  n_blocks = vertical.shape[-1]
  steps, rest = jnp.divmod(rows.first, block_k)  # [B c]
  index = steps[..., None] - jnp.arange(n_blocks)  # [B c Sb]
  take = jax.vmap(
    lambda x, i: jnp.take(x, i, axis=2, mode='fill', fill_value=0)
  )
  # Negative indices would count from the end.
  at = [jnp.where(i < 0, n_blocks, i) for i in (index, index + 1)]
  part = (rest / block_k)[:, None, None, :, None]
  slash = (1 - part) * take(behind, at[0]) + part * take(behind, at[1])
  return vertical[..., None, :] + slash
