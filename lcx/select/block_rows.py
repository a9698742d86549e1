"""From scores of key blocks to the sorted lists that attention reads.

Every block selector ends here: `Rows` says where query blocks stand, `choose`
takes the best blocks of each row, `to_list` sorts them, `by_chunks` walks the
query blocks so that scores of a whole layer never exist at once.

`choose` does not sort. It finds, bit by bit, the score of the last block that
is taken: 15 passes of two bits over rows that lie in cache, deterministic, any
width; then a prefix sum puts the chosen ids in ascending order.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int32

from kernels_pallas.block_sparse import BlockList

# Scores are ordered by 30 bits of their float32 pattern; any finite one is
# below these two.
_TOP = 2**30 - 1
_ALWAYS = _TOP - 1
# A layer's lists take at most 256 MiB (int32), whatever the length.
LIST_ENTRIES = 2**26


class Selected(NamedTuple):
  """What a selector returns.

  Attributes:
    blocks: the lists.
    captured: float32 [B N Tb] share of the row's estimated softmax mass that
      the listed blocks hold; 0 for rows of padding.
    cut: float32 [B N Tb] share that was asked for and that the width bound cut
      off; 0 where nothing was.
  """

  blocks: BlockList
  captured: Float[Array, 'B N Tb']
  cut: Float[Array, 'B N Tb']


class Rows(NamedTuple):
  """Positions of query blocks.

  Attributes:
    first: int32 [B c] position of a block's first query.
    last: int32 [B c] position of its last query that is no padding; below
      `first` where all are padding.
    whole: bool [B c] rows that list all they can reach.
  """

  first: Int32[Array, 'B c']
  last: Int32[Array, 'B c']
  whole: Bool[Array, 'B c']

  def reachable(self, n_blocks: int, block_k: int) -> Bool[Array, 'B c Sb']:
    """Key blocks that hold a key some query may see."""
    block = jnp.arange(n_blocks)
    alive = (self.last >= self.first)[..., None]
    return alive & (block <= (self.last // block_k)[..., None])

  def forced(self, n_blocks: int, block_k: int) -> Bool[Array, 'B c Sb']:
    """The sink block and those that the diagonal crosses; all of `whole`."""
    block = jnp.arange(n_blocks)
    near = block >= (self.first // block_k)[..., None]
    near |= (block == 0) | self.whole[..., None]
    return self.reachable(n_blocks, block_k) & near


def rows_at(
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  index: Int32[Array, 'c'],
  block_q: int,
  dense_below: int = 0,
) -> Rows:
  """The query blocks `index` of a call whose first query is at q_start.

  Rows of the batch with at most `dense_below` keys list everything.
  """
  first = q_start[:, None] + index * block_q
  last = jnp.minimum(first + block_q, lengths[:, None]) - 1
  whole = jnp.broadcast_to((lengths <= dense_below)[:, None], first.shape)
  return Rows(first, last, whole)


def list_width(
  width: int | None,
  rows: int,
  n_blocks: int,
  block_q: int,
  block_k: int,
  density: float | None = None,
  dense_below: int = 0,
) -> int:
  """The width bound of a row's list, checked.

  Args:
    width: as asked for; None: what keeps a layer's lists under 256 MiB.
    rows: B * N * Tb.
    n_blocks: key blocks there are; no list is longer.
    block_q: queries of a row.
    block_k: keys of a block.
    density: a fixed budget, which no list exceeds.
    dense_below: rows of the batch that are this short list everything.

  Raises:
    ValueError: the bound cannot hold the sink block and the diagonal.
  """
  least = min(n_blocks, 2 + -(-block_q // block_k))
  short = min(n_blocks, -(-dense_below // block_k))
  if width is None:
    width = max(LIST_ENTRIES // rows, least, short)
  if width < least:
    raise ValueError(
      f'{width=} must be at least {least}: a row always lists the sink block '
      f'and the {least - 1} blocks that its diagonal may cross'
    )
  if width < short:
    raise ValueError(
      f'{width=} must be at least {short}, the blocks of {dense_below=} tokens'
    )
  most = n_blocks if density is None else math.ceil(n_blocks * density)
  return min(width, max(most, least, short))


def check_budget(
  threshold: ArrayLike | None, density: ArrayLike | None
) -> None:
  """Raises ValueError unless exactly one budget is given, within (0, 1].

  Values that a traced array will hold cannot be read and are not checked.
  """
  if (threshold is None) == (density is None):
    given = 'neither' if density is None else 'both'
    raise ValueError(f'give one of threshold and density, not {given}')
  for name, value in (('threshold', threshold), ('density', density)):
    if value is None or isinstance(value, jax.core.Tracer):
      continue
    values = np.asarray(value)
    for at in np.argwhere(~((values > 0) & (values <= 1)))[:1].tolist():
      place = f'{at}' if at else ''
      raise ValueError(f'{name}{place}={values[*at]} must lie in (0, 1]')


def padded(x: Array, axis: int, multiple: int) -> Array:
  """Zeros up to whole blocks; a copy only where there is a remainder."""
  short = -x.shape[axis] % multiple
  if not short:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, short)
  return jnp.pad(x, pad)


def blocks_at_density(
  reachable: Bool[Array, '*R C'], density: float
) -> Int32[Array, '*R 1']:
  """A fixed budget: this share of each row's causal blocks, rounded up."""
  causal = jnp.sum(reachable, axis=-1, keepdims=True, dtype=jnp.int32)
  # float32 rounds 0.1 * 10 up; a budget must not grow by that.
  return jnp.ceil(causal * density - 1e-4).astype(jnp.int32)


def choose(
  score: Float[Array, '*R C'],
  *,
  reachable: Bool[Array, '*R C'],
  forced: Bool[Array, '*R C'],
  limit: Int32[Array, '*R 1'] | int,
  threshold: Float[Array, '*R 1'] | float | None = None,
  always: Bool[Array, '*R C'] | None = None,
) -> Bool[Array, '*R C']:
  """The best blocks of each row, forced ones first.

  Blocks stand in a fixed order: forced, always, then by falling score, equal
  scores (to 30 bits) by index. A row takes the shortest prefix of that order
  that holds all of `forced` and `always` and reaches the threshold, but no more
  than `limit` (forced blocks alone may exceed it). Since the order does not
  depend on the budget, a larger budget's set holds a smaller one's.

  Args:
    score: at least 0; a row's sum counts as its whole mass.
    reachable: blocks that may be chosen.
    forced: subset of `reachable`.
    limit: most blocks of a row.
    threshold: share of the mass, in (0, 1]; 1: every reachable block, those of
      no mass, too. None: the limit alone decides.
    always: chosen next after `forced`, whatever they score.
  """
  score = jnp.where(reachable, score, 0.0).astype(jnp.float32)
  free = reachable & ~forced
  bits = lax.bitcast_convert_type(score, jnp.int32) >> 1
  key = jnp.where(free, bits, -1)
  if always is not None:
    key = jnp.where(always & free, _ALWAYS, key)
  n_forced = jnp.sum(forced, axis=-1, keepdims=True, dtype=jnp.int32)
  limit = jnp.maximum(jnp.asarray(limit, jnp.int32) - n_forced, 0)
  held = jnp.sum(jnp.where(forced, score, 0.0), axis=-1, keepdims=True)

  def mass(mask):
    return held + jnp.sum(jnp.where(mask, score, 0.0), axis=-1, keepdims=True)

  def count(mask):
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)

  if threshold is None:
    goal = jnp.float32(jnp.inf)
  else:
    goal = jnp.asarray(threshold, jnp.float32)
    goal = jnp.where(goal < 1, goal * mass(key >= 0), jnp.inf)

  def enough(t):
    """Whether the blocks of key >= t fill the budget: falls as t grows."""
    above = key >= t
    full = count(above) >= limit
    if threshold is None:
      return full
    return ((mass(above) >= goal) & (t <= _ALWAYS)) | full

  digits = jnp.arange(1, 4, dtype=jnp.int32).reshape(3, *(1,) * score.ndim)

  def two_bits(i, last):
    shift = 28 - 2 * i
    step = enough(last + (digits << shift))
    return last + (jnp.sum(step, axis=0, dtype=jnp.int32) << shift)

  # A loop, not its 15 copies: they compile four times as long.
  last = jnp.zeros((*score.shape[:-1], 1), jnp.int32)
  last = lax.fori_loop(0, 15, two_bits, last)
  above = key > last
  tie = key == last
  # Of the blocks that tie with the last one, the first few by index.
  value = lax.bitcast_convert_type(last << 1, jnp.float32)
  some = (last < _ALWAYS) & (value > 0) & jnp.isfinite(goal)
  lacking = jnp.ceil((goal - mass(above)) / jnp.where(some, value, 1.0))
  want = jnp.where(some, jnp.clip(lacking, 1, 2**30), 2**30).astype(jnp.int32)
  want = jnp.minimum(want, limit - count(above))
  rank = jnp.cumsum(tie, axis=-1, dtype=jnp.int32)
  return forced | above | (tie & (rank <= want))


def to_list(
  chosen: Bool[Array, '*R C'], width: int
) -> tuple[Int32[Array, '*R W'], Int32[Array, '*R']]:
  """Indices of the chosen, ascending, and how many; unused entries are 0.

  More than `width` chosen: the first `width`, which `choose` must prevent.
  """
  columns = chosen.shape[-1]
  flat = chosen.reshape(-1, columns)
  rows = flat.shape[0]
  seat = jnp.cumsum(flat, axis=-1, dtype=jnp.int32) - 1
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  column = jnp.arange(columns, dtype=jnp.int32)
  # Each dropped entry has a seat of its own, out of bounds: seats are unique.
  seat = jnp.where(
    flat & (seat < width),
    row * width + seat,
    rows * width + row * columns + column,
  )
  ids = jnp.zeros((rows * width,), jnp.int32)
  ids = ids.at[seat].set(
    jnp.broadcast_to(column, flat.shape), mode='drop', unique_indices=True
  )
  count = jnp.minimum(jnp.sum(flat, axis=-1, dtype=jnp.int32), width)
  return (
    ids.reshape(*chosen.shape[:-1], width),
    count.reshape(chosen.shape[:-1]),
  )


def share(
  mass: Float[Array, '*R C'], chosen: Bool[Array, '*R C']
) -> Float[Array, '*R']:
  """Part of a row's mass that the chosen blocks hold; 0 of nothing."""
  total = jnp.sum(mass, axis=-1)
  part = jnp.sum(jnp.where(chosen, mass, 0.0), axis=-1)
  return part / jnp.where(total > 0, total, 1.0)


class Chunk(NamedTuple):
  """Lists of some query blocks, heads apart or one for a group (G = 1)."""

  ids: Int32[Array, 'B K G c W']
  count: Int32[Array, 'B K G c']
  captured: Float[Array, 'B K G c']
  cut: Float[Array, 'B K G c']


def by_chunks(
  make: Callable[[Int32[Array, '']], Chunk],
  *,
  n_blocks: int,
  chunk: int,
  shape: tuple[int, int, int],
  width: int,
  block_q: int,
  block_k: int,
) -> Selected:
  """Runs `make(first block)` over all query blocks, `chunk` at a time.

  The last chunk is moved back so that it ends with the last block; blocks that
  it shares with the one before are computed twice, to the same result.

  Args:
    make: traced; takes the index of a chunk's first block.
    n_blocks: Tb.
    chunk: query blocks at a time, at most Tb.
    shape: (B, N, K).
    width: W.
    block_q: for the list.
    block_k: for the list.
  """
  batch, heads, kv_heads = shape
  group = heads // kv_heads

  def write(whole, piece, first):
    target = (*piece.shape[:2], group, *piece.shape[3:])
    piece = jnp.broadcast_to(piece, target)
    piece = piece.reshape(batch, heads, *piece.shape[3:])
    return lax.dynamic_update_slice_in_dim(whole, piece, first, axis=2)

  def body(i, whole):
    first = jnp.minimum(i * chunk, n_blocks - chunk)
    return tuple(write(w, p, first) for w, p in zip(whole, make(first)))

  rows = (batch, heads, n_blocks)
  start = (
    jnp.zeros((*rows, width), jnp.int32),
    jnp.zeros(rows, jnp.int32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros(rows, jnp.float32),
  )
  ids, count, captured, cut = lax.fori_loop(
    0, -(-n_blocks // chunk), body, start
  )
  none = jnp.zeros((heads,), jnp.int32)
  blocks = BlockList(ids, count, none, none, block_q, block_k)
  return Selected(blocks, captured, cut)
