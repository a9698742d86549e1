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
one that is turned round. What is kept of a chunk's scores is float32 [rows,
Sb], the log-sum-exp of each block (kernels_pallas/block_scores).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas import block_scores
from kernels_pallas.block_choice import Listed, choose_blocks
from lcx.select.block_rows import (
  Rows,
  Selected,
  blocks_at_density,
  blocks_of,
  by_chunks,
  check_budget,
  list_width,
  padded,
  rows_at,
)

# Rows of Q~ of a kv head in one matrix product: more no longer help.
_ROWS = 4096
# float32 elements of what is kept of a chunk (64 MiB), one a row and block.
_KEPT = 2**24
# Bytes of keys that are copied at once, where they must be; of more, one kv
# head at a time, which is 256 MiB at 2**20 tokens (head dim 128, bfloat16).
_COPIED = 2**27


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
    q: rotated queries; query i of row b stands at q_start[b] + i. A chunk of
      whole blocks of a prompt gets the rows that the whole prompt would.
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
    The lists, the captured mass and what the width cut off. Keys that no block
    divides (on Hopper, no 8 blocks: its kernel reads whole tiles) are padded, a
    copy: of more than 128 MiB, that of one kv head at a time.

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
  batch, t, heads, h = q.shape
  kv_heads, s = k.shape[1], k.shape[2]
  group = heads // kv_heads
  if threshold is not None and jnp.shape(threshold) not in ((), (heads,)):
    raise ValueError(
      f'threshold of shape {jnp.shape(threshold)}: give one number, or one for '
      f'each of {heads} query heads'
    )
  tb, sb = -(-t // block_q), -(-s // block_k) * shards
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
  if threshold is not None:
    threshold = jnp.asarray(threshold, jnp.float32)
    if threshold.ndim:
      threshold = threshold.reshape(kv_heads, -1)
      threshold = threshold if per == 'head' else threshold.mean(1)[:, None]
      threshold = threshold[..., None, None]
  n_cells = -(-s // block_k) * block_k // stride
  f = stride * h
  granule = block_k * block_scores.granule(
    jax.ShapeDtypeStruct((batch, kv_heads, group, 1, f), q.dtype),
    jax.ShapeDtypeStruct((batch, kv_heads, n_cells, f), k.dtype),
    per_block=block_k // stride,
  )

  def lists(row, head, n_rows, n_heads, part=1) -> Selected:
    """Of some kv heads, from `head` on, of some rows of the batch.

    A chunk's memory is `part` times as small.
    """
    start_at, length, cells = (
      lax.dynamic_slice_in_dim(x, row, n_rows) for x in (q_start, lengths, k)
    )
    cells = lax.dynamic_slice_in_dim(cells, head, n_heads, 1)
    # Once, not for every chunk.
    cells = padded(cells, 2, granule).reshape(n_rows, n_heads, -1, f)
    goal = threshold
    if goal is not None and goal.ndim:
      goal = lax.dynamic_slice_in_dim(goal, head, n_heads)
    some = {0: (row, n_rows), 2: (head * group, n_heads * group)}
    kept = _KEPT // (n_rows * n_heads * group * sb)
    rows = min(_ROWS // group, kept) // (shards * part)
    chunk = max(1, min(rows // per_block, tb))

    def make(first):
      piece = blocks_of(q, 1, first, chunk, block_q, some)
      start = start_at[:, None] + (first * per_block) * stride
      start = start + jnp.arange(chunk * per_block) * stride  # [B R]
      piece = _fold(piece, start, length, stride, n_heads)
      if shards > 1:
        gather = functools.partial(lax.all_gather, axis_name=axis, tiled=True)
        piece, start = gather(piece, axis=3), gather(start, axis=1)
      mass = _block_mass(
        piece,
        cells,
        start,
        length,
        n_cells=n_cells,
        stride=stride,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        axis=axis,
      )
      if shards > 1:  # rows return to their queries, columns come together
        mass = lax.all_to_all(mass, axis, 3, 4, tiled=True)
      if per == 'group':
        mass = jnp.mean(mass, axis=2, keepdims=True)
      index = first + jnp.arange(chunk)
      at = rows_at(start_at, length, index, block_q, dense_below)
      return _pick(mass, at, goal, density, width, bounded, block_k)

    return by_chunks(
      make,
      n_blocks=tb,
      chunk=chunk,
      shape=(n_rows, n_heads * group, n_heads),
      width=width,
      block_q=block_q,
      block_k=block_k,
    )

  copied = k.size * k.dtype.itemsize if s % granule else 0
  if copied <= _COPIED:
    return lists(0, 0, batch, kv_heads)
  found = lax.map(
    lambda i: lists(i // kv_heads, i % kv_heads, 1, 1, 2),
    jnp.arange(batch * kv_heads),
  )
  return _all_heads(found, batch, heads)


def _all_heads(found: Selected, batch: int, heads: int) -> Selected:
  """Lists of single kv heads, in the order of rows and heads, as one."""

  def join(x):
    return x.reshape(batch, heads, *x.shape[3:])

  none = jnp.zeros((heads,), jnp.int32)
  blocks = dataclasses.replace(
    found.blocks,
    ids=join(found.blocks.ids),
    count=join(found.blocks.count),
    sink=none,
    window=none,
  )
  return Selected(blocks, join(found.captured), join(found.cut))


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
  rows: Float[Array, 'B K G R F'],
  cells: Float[Array, 'B K C F'],
  start: Int32[Array, 'B R'],
  lengths: Int32[Array, 'B'],
  *,
  n_cells: int,
  stride: int,
  block_q: int,
  block_k: int,
  scale: float,
  axis: str | None,
) -> Float[Array, 'B K G c Sb']:
  """Softmax mass of key blocks, a mean over the rows of a query block.

  The first `n_cells` cells are keys. With `axis` they are this shard's: its
  columns of the mass come back.
  """
  n_valid = jnp.clip(lengths[:, None] - start, 0, stride)  # queries in a row
  # The last cell that a row sees. A cell that padding cuts is not seen: its
  # one row has it in the diagonal block, which is listed anyway.
  last = jnp.minimum(
    (start + stride - 1) // stride, lengths[:, None] // stride - 1
  )
  last = jnp.where(n_valid > 0, last, -1)
  if axis is not None:
    last = last - lax.axis_index(axis) * n_cells
  lse = block_scores.block_lse(
    rows,
    cells,
    last,
    scale / jnp.maximum(n_valid, 1),
    per_block=block_k // stride,
  )[..., : n_cells * stride // block_k]
  best = jnp.max(lse, axis=-1)
  if axis is not None:
    best = lax.pmax(best, axis)
  weight = jnp.exp2(lse - jnp.where(best > -jnp.inf, best, 0.0)[..., None])
  total = jnp.sum(weight, axis=-1)
  if axis is not None:
    total = lax.psum(total, axis)
  # A query block's mass is the mean over its rows that are no padding.
  part = (n_valid > 0).reshape(len(start), -1, block_q // stride)
  part = part / jnp.maximum(jnp.sum(part, axis=-1, keepdims=True), 1)
  shape = (*lse.shape[:3], *part.shape[1:])  # [B K G c r]
  part = part[:, None, None] / jnp.where(total > 0, total, 1.0).reshape(shape)
  weight = weight.reshape(*shape, -1)
  return jnp.sum(weight * part[..., None], axis=4)


def _pick(
  mass: Float[Array, 'B K G c Sb'],
  at: Rows,
  threshold: Array | None,
  density: float | None,
  width: int,
  bounded: bool,
  block_k: int,
) -> Listed:
  """Lists of a chunk's rows; `bounded`: the width may cut the budget."""
  n_blocks = mass.shape[-1]
  reachable = at.reachable(n_blocks, block_k)[:, None, None]
  forced = at.forced(n_blocks, block_k)[:, None, None]
  budget = n_blocks
  if density is not None:
    budget = blocks_at_density(reachable, density)
  return choose_blocks(
    mass,
    reachable=reachable,
    forced=forced,
    budget=budget,
    width=width,
    threshold=threshold,
    bounded=bounded,
  )
