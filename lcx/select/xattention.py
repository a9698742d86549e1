"""XAttention: key blocks by the antidiagonals of the score matrix.

Xu et al., "XAttention: block sparse attention with antidiagonal scoring",
arXiv:2503.16428, section 2 and Algorithm 1. Per head, stride s, block B:

  Q~[i] = [q[is + s-1]; ...; q[is]]    K~[j] = [k[js]; ...; k[js + s-1]]
  A = softmax(Q~ K~^T / (s sqrt(H)))   causal: j <= i
  mass[I, J] = sum of A over the (B/s) x (B/s) tile of blocks I, J
  row I: the fewest blocks J whose mass reaches the threshold; block 0 and the
  diagonal count first.

Q~ K~^T sums each s x s cell's antidiagonal and costs 1/s of Q K^T: causal,
T^2 N H / s FLOPs, 1 / (2 s) of dense attention. K~ is a reshape, so Q is the
one that is turned round. The scores of a kv head's query chunk against the keys
before it are one matrix product, kept in the queries' dtype; what is kept of
them is float32 [rows, Sb].
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lcx.select.block_rows import (
  Chunk,
  Rows,
  Selected,
  blocks_at_density,
  by_chunks,
  check_budget,
  choose,
  list_width,
  padded,
  rows_at,
  share,
  to_list,
)

# Sizes of one matrix product, for an H100: rows of Q~ (above, more rows no
# longer help), and elements of K~ that it copies (32 MiB of bfloat16).
_ROWS = 4096
_TILE = 2**24
# float32 elements of what is kept of a chunk (32 MiB): of one kv head's rows,
# and of all heads' blocks.
_KEPT = 2**23
# Key ranges that are compiled: chunk i reads its range rounded up to eighths.
_RUNGS = 8
_RUNG = 512  # cells of a range, at least


def xattention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  *,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  threshold: float | Float[Array, 'N'] | None = None,
  density: float | None = None,
  stride: int = 16,
  width: int | None = None,
  dense_below: int = 0,
  per: str = 'head',
  scale: float | None = None,
  block_q: int = 128,
  block_k: int = 128,
  axis: str | None = None,
) -> Selected:
  """Lists of the key blocks that hold most of the antidiagonal mass.

  Args:
    q: rotated queries; query i of row b stands at q_start[b] + i.
    k: rotated keys; with `axis`, this shard's piece of the sequence, and q and
      q_start its queries.
    q_start: position of each row's first query.
    lengths: keys of each row, over all shards; what lies past it is padding.
    threshold: share of a row's mass that its blocks must reach, one for all or
      one a head (the paper's per-head values come from dynamic programming).
      1: all causal blocks.
    density: a fixed budget instead: this share of the row's causal blocks.
    stride: s; 8 and 16 in the paper.
    width: most blocks of a row; None: what 256 MiB of lists allow.
    dense_below: rows of the batch with at most so many keys list all blocks.
    per: 'head': a list per query head; 'group': one for the query heads of a
      kv head, from their mean mass.
    scale: of the scores; None: H**-0.5.
    block_q: queries that share a list.
    block_k: keys of a block.
    axis: mesh axis that shards the sequence. Scores are computed where keys
      live: queries travel, masses come back; the lists are the unsharded ones.

  Returns:
    The lists, the captured mass and what the width cut off.

  Raises:
    ValueError: a budget outside (0, 1] (of an array: where its values are
      known when this is traced), thresholds for another number of heads, a
      stride that does not divide the blocks, a width that cannot hold sink and
      diagonal.
  """
  check_budget(threshold, density)
  if per not in ('head', 'group'):
    raise ValueError(f"{per=} must be 'head' or 'group'")
  if stride < 1 or block_q % stride or block_k % stride:
    raise ValueError(f'{stride=} must divide {block_q=} and {block_k=}')
  shards = 1 if axis is None else lax.axis_size(axis)
  axis = axis if shards > 1 else None
  if shards > 1 and k.shape[2] % block_k:
    raise ValueError(f'{block_k=} must divide a shard of {k.shape[2]} keys')
  q, k = padded(q, 1, block_q), padded(k, 2, block_k)
  batch, t, heads, h = q.shape
  kv_heads, s = k.shape[1], k.shape[2]
  group = heads // kv_heads
  if threshold is not None and jnp.shape(threshold) not in ((), (heads,)):
    raise ValueError(
      f'threshold of shape {jnp.shape(threshold)}: give one number, or one for '
      f'each of {heads} query heads'
    )
  tb, sb = t // block_q, s // block_k * shards
  bound = functools.partial(
    list_width,
    n_blocks=sb,
    block_q=block_q,
    block_k=block_k,
    density=density,
    dense_below=dense_below,
  )
  width = bound(width, rows=batch * heads * tb)
  bounded = width < bound(sb, rows=1)
  scale = (h**-0.5 if scale is None else scale) * math.log2(math.e)
  per_block = block_q // stride
  kept = _KEPT * min(batch * kv_heads, per_block) // (batch * heads * sb)
  rows = min(_ROWS // group, kept) // shards
  chunk = max(1, min(rows // per_block, tb))
  cells = k.reshape(batch * kv_heads, s // stride, stride * h)
  if threshold is not None:
    threshold = jnp.asarray(threshold, jnp.float32)
    if threshold.ndim:
      threshold = threshold.reshape(kv_heads, -1)
      threshold = threshold if per == 'head' else threshold.mean(1)[:, None]
      threshold = threshold[..., None, None]

  def make(first):
    piece = lax.dynamic_slice_in_dim(q, first * block_q, chunk * block_q, 1)
    start = q_start[:, None] + (first * per_block) * stride
    start = start + jnp.arange(chunk * per_block) * stride  # [B R]
    piece = _fold(piece, start, lengths, stride, kv_heads)
    if shards > 1:
      gather = functools.partial(lax.all_gather, axis_name=axis, tiled=True)
      piece, start = gather(piece, axis=3), gather(start, axis=1)
    mass = _block_mass(
      piece, cells, start, lengths, stride, block_q, block_k, scale, axis
    )
    if shards > 1:  # rows return to their queries, columns come together
      mass = lax.all_to_all(mass, axis, 3, 4, tiled=True)
    if per == 'group':
      mass = jnp.mean(mass, axis=2, keepdims=True)
    index = first + jnp.arange(chunk)
    at = rows_at(q_start, lengths, index, block_q, dense_below)
    return _pick(mass, at, threshold, density, width, bounded, block_k)

  return by_chunks(
    make,
    n_blocks=tb,
    chunk=chunk,
    shape=(batch, heads, kv_heads),
    width=width,
    block_q=block_q,
    block_k=block_k,
  )


def _fold(
  q: Float[Array, 'B t N H'],
  start: Int32[Array, 'B R'],
  lengths: Int32[Array, 'B'],
  stride: int,
  kv_heads: int,
) -> Float[Array, 'B K G R F']:
  """Q~: a row holds `stride` queries, the last one first; padding is 0."""
  batch, t, heads, h = q.shape
  q = q.reshape(batch, t // stride, stride, kv_heads, heads // kv_heads, h)
  valid = start[..., None] + jnp.arange(stride) < lengths[:, None, None]
  q = jnp.where(valid[..., None, None, None], q, 0)[:, :, ::-1]
  q = q.transpose(0, 3, 4, 1, 2, 5)
  return q.reshape(*q.shape[:4], stride * h)


def _block_mass(
  q: Float[Array, 'B K G R F'],
  cells: Float[Array, 'BK C F'],
  start: Int32[Array, 'B R'],
  lengths: Int32[Array, 'B'],
  stride: int,
  block_q: int,
  block_k: int,
  scale: float,
  axis: str | None,
) -> Float[Array, 'B K G c Sb']:
  """Softmax mass of key blocks, a mean over the rows of a query block.

  With `axis`, cells are this shard's: its columns of the mass come back.
  """
  batch, kv_heads, group, n_rows, f = q.shape
  per_q, per_k = block_q // stride, block_k // stride
  n_cells = cells.shape[1]
  n_valid = jnp.clip(lengths[:, None] - start, 0, stride)  # queries in a row
  # The last cell that a row sees. A cell that padding cuts is not seen: its
  # one row has it in the diagonal block, which is listed anyway.
  last = jnp.minimum(
    (start + stride - 1) // stride, lengths[:, None] // stride - 1
  )
  last = jnp.where(n_valid > 0, last, -1)
  if axis is not None:
    last = last - lax.axis_index(axis) * n_cells
  factor = scale / jnp.maximum(n_valid, 1)
  # A query block's mass is the mean over its rows that are no padding.
  part = (n_valid > 0).reshape(batch, -1, per_q).astype(jnp.float32)
  part = part / jnp.maximum(jnp.sum(part, axis=-1, keepdims=True), 1)
  row = jnp.arange(batch * kv_heads) // kv_heads
  q = q.reshape(batch * kv_heads, group, n_rows, f)

  def upto(end):
    """The mass of all heads from the first `end` cells."""

    def one(args):
      head, q, row = args
      part_of = (last[row], factor[row], part[row])
      mass = _head_mass(q, cells, head, end, *part_of, per_k=per_k, axis=axis)
      return jnp.pad(mass, ((0, 0), (0, 0), (0, (n_cells - end) // per_k)))

    return lambda: lax.map(one, (jnp.arange(len(row)), q, row))

  if axis is not None:
    mass = upto(n_cells)()  # every shard must meet in the collectives
  else:
    unit = -(-max(n_cells // _RUNGS, _RUNG) // per_k) * per_k
    ends = [*range(unit, n_cells, unit), n_cells]
    rung = jnp.clip(jnp.max(last) // unit, 0, len(ends) - 1)
    mass = lax.switch(rung, [upto(end) for end in ends])
  return mass.reshape(batch, kv_heads, *mass.shape[1:])


def _head_mass(
  q: Float[Array, 'G R F'],
  cells: Float[Array, 'BK C F'],
  head: Int32[Array, ''],
  end: int,
  last: Int32[Array, 'R'],
  factor: Float[Array, 'R'],
  part: Float[Array, 'c r'],
  *,
  per_k: int,
  axis: str | None,
) -> Float[Array, 'G c Eb']:
  """The mass in the first `end` cells of one head; see `_block_mass`."""
  group, n_rows, f = q.shape
  tile = max(min(_TILE // f, end) // per_k * per_k, per_k)
  n_tiles = -(-end // tile)
  q = q.reshape(group * n_rows, f)
  exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

  def one(i):
    # The last tile is moved back; cells it shares with the one before count
    # there.
    first = jnp.minimum(i * tile, end - tile)
    keys = lax.dynamic_slice(cells, (head, first, 0), (1, tile, f))[0]
    score = jnp.einsum(
      'mf,cf->mc', q, keys, precision=exact, preferred_element_type=q.dtype
    ).reshape(group, n_rows, tile)
    cell = first + jnp.arange(tile)
    seen = (cell <= last[:, None]) & (cell >= i * tile)
    score = jnp.where(
      seen, score.astype(jnp.float32) * factor[:, None], -jnp.inf
    )
    top = jnp.max(score, axis=-1)
    safe = jnp.where(top > -jnp.inf, top, 0.0)[..., None]
    weight = jnp.exp2(score - safe).reshape(group, n_rows, -1, per_k)
    return top, jnp.sum(weight, axis=-1)

  top, weight = lax.map(one, jnp.arange(n_tiles))  # [i G R], [i G R tile_b]
  best = jnp.max(top, axis=0)
  if axis is not None:
    best = lax.pmax(best, axis)
  fade = jnp.exp2(top - jnp.where(best > -jnp.inf, best, 0.0))
  total = jnp.sum(fade * jnp.sum(weight, axis=-1), axis=0)
  if axis is not None:
    total = lax.psum(total, axis)
  fade = fade / jnp.where(total > 0, total, 1.0)
  fade = fade.reshape(n_tiles, group, *part.shape) * part
  weight = weight.reshape(n_tiles, group, *part.shape, -1)
  mass = jnp.sum(fade[..., None] * weight, axis=3)  # [i G c tile_b]
  tail = (end - (n_tiles - 1) * tile) // per_k
  flat = jnp.moveaxis(mass[:-1], 0, 2).reshape(*mass.shape[1:3], -1)
  return jnp.concatenate([flat, mass[-1, ..., -tail:]], axis=-1)


def _pick(
  mass: Float[Array, 'B K G c Sb'],
  at: Rows,
  threshold: Array | None,
  density: float | None,
  width: int,
  bounded: bool,
  block_k: int,
) -> Chunk:
  """Lists of a chunk's rows; `bounded`: the width may cut the budget."""
  n_blocks = mass.shape[-1]
  reachable = at.reachable(n_blocks, block_k)[:, None, None]
  forced = at.forced(n_blocks, block_k)[:, None, None]
  budget = n_blocks
  if density is not None:
    budget = blocks_at_density(reachable, density)
  shapes = {
    'reachable': jnp.broadcast_to(reachable, mass.shape),
    'forced': jnp.broadcast_to(forced, mass.shape),
    'threshold': threshold,
  }
  limit = jnp.minimum(jnp.asarray(budget, jnp.int32), width)
  chosen = choose(mass, limit=limit, **shapes)
  captured = share(mass, chosen)
  cut = jnp.zeros_like(captured)
  if bounded:
    whole = share(mass, choose(mass, limit=budget, **shapes))
    cut = jnp.maximum(whole - captured, 0.0)
  return Chunk(*to_list(chosen, width), captured, cut)
