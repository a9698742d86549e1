"""From scores of key blocks to the sorted lists that attention reads.

Every block selector ends here: `Rows` says where query blocks stand,
`kernels_pallas.block_choice` takes the best blocks of each row in order, and
`by_chunks` walks the query blocks so that scores of a whole layer never exist
at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int32

from kernels_pallas.block_choice import Listed
from kernels_pallas.block_sparse import BlockList

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


def blocks_of(
  x: Array,
  axis: int,
  first: ArrayLike,
  count: int,
  block: int,
  others: dict[int, tuple[ArrayLike, int]] | None = None,
) -> Array:
  """`count` blocks of x, zeros past its end: a copy of no more than these.

  Args:
    x: of any shape.
    axis: that is cut into blocks.
    first: the first block; the last one must reach less than a block past the
      end of x.
    count: blocks.
    block: entries of a block.
    others: (first entry, entries) of other axes that are not taken whole.
  """
  size, want = x.shape[axis], count * block
  starts: list[ArrayLike] = [0] * x.ndim
  sizes = list(x.shape)
  for other, (start, n) in (others or {}).items():
    starts[other], sizes[other] = start, n
  sizes[axis] = min(size, want)
  at = jnp.asarray(first) * block
  starts[axis] = jnp.minimum(at, size - sizes[axis])
  piece = lax.dynamic_slice(x, starts, sizes)
  if size % block == 0:
    return piece
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, want - sizes[axis] + block)
  piece = jnp.pad(piece, pad)
  return lax.dynamic_slice_in_dim(piece, at - starts[axis], want, axis)


def blocks_at_density(
  reachable: Bool[Array, '*R C'], density: float
) -> Int32[Array, '*R 1']:
  """A fixed budget: this share of each row's causal blocks, rounded up."""
  causal = jnp.sum(reachable, axis=-1, keepdims=True, dtype=jnp.int32)
  # float32 rounds 0.1 * 10 up; a budget must not grow by that.
  return jnp.ceil(causal * density - 1e-4).astype(jnp.int32)


def by_chunks(
  make: Callable[[Int32[Array, '']], Listed],
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
