"""SpargeAttn, first stage: key blocks by the softmax of block means.

Zhang et al., "SpargeAttn: accurate sparse attention accelerating any model
inference", arXiv:2502.18137, section 3.2, as its code does it:

  q^[I], k^[J]: means of a block's rows
  sim(X) = mean of the Gram matrix of X's L2-normalised rows
         = |mean of the normalised rows|^2
  P[I] = softmax_J(q^[I] . k^[J] / sqrt(H)), over similar causal J alone
  row I: the fewest J whose P reaches the threshold (or a fixed share of them)
  and every J that is not similar; all causal J where q block I is not similar

The mean of a block that is not similar says nothing about it, so such a block
is never skipped. The code stops one block earlier than "reaches the threshold"
(it counts cumulative sums <= tau); the paper's rule is used here. Costs
2 (T / block_q) (S / block_k) N H FLOPs and one reading of q and k.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.block_choice import choose_blocks
from lcx.select.block_rows import (
  Selected,
  blocks_at_density,
  blocks_of,
  by_chunks,
  check_budget,
  list_width,
  rows_at,
)

# Query blocks at a time: float32 elements of all heads' scores (16 MiB).
_KEPT = 2**22
_PIECE = 2**24  # elements of k read at a time


def sparge(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B K S H'],
  *,
  q_start: Int32[Array, 'B'],
  lengths: Int32[Array, 'B'],
  threshold: float | None = None,
  density: float | None = None,
  similarity: float = 0.6,
  width: int | None = None,
  dense_below: int = 0,
  scale: float | None = None,
  block_q: int = 128,
  block_k: int = 128,
  axis: str | None = None,
) -> Selected:
  """Lists of the key blocks whose means promise most.

  Args:
    q: rotated queries; query i of row b stands at q_start[b] + i. A chunk of
      whole blocks of a prompt gets the rows that the whole prompt would.
    k: rotated keys; with `axis`, this shard's piece of the sequence.
    q_start: position of each row's first query.
    lengths: keys of each row, over all shards.
    threshold: share of P that a row's blocks must reach (0.98 in the code).
    density: a fixed budget instead: this share of the row's causal blocks (the
      code's recommended `topk`, 0.5, with similarity -0.1).
    similarity: least self-similarity of a block whose mean is trusted.
    width: most blocks of a row; None: what 256 MiB of lists allow.
    dense_below: rows of the batch with at most so many keys list all blocks.
    scale: of the scores; None: H**-0.5.
    block_q: queries that share a list.
    block_k: keys of a block.
    axis: mesh axis that shards the sequence. Means are taken where keys live
      and gathered (4 K S H / block_k bytes); scores are computed where the
      queries live, each shard's rows over all means.

  Returns:
    The lists, the captured share of P and what the width cut off; where no
    block is similar, P says nothing, and blocks count alike.

  Raises:
    ValueError: a budget outside (0, 1], a similarity outside [-1, 1], a width
      that cannot hold sink and diagonal.
  """
  check_budget(threshold, density)
  if not -1 <= similarity <= 1:
    raise ValueError(f'{similarity=} must lie in [-1, 1]')
  shards = 1 if axis is None else lax.axis_size(axis)
  if shards > 1 and k.shape[2] % block_k:
    raise ValueError(f'{block_k=} must divide a shard of {k.shape[2]} keys')
  batch, t, heads, h = q.shape
  kv_heads, s = k.shape[1], k.shape[2]
  group = heads // kv_heads
  tb, n = -(-t // block_q), -(-s // block_k)
  sb = n * shards
  # No bound by density: blocks that are not similar come on top of it.
  width = list_width(
    width,
    batch * heads * tb,
    sb,
    block_q,
    block_k,
    dense_below=dense_below,
  )
  scale = h**-0.5 if scale is None else scale
  chunk = max(1, min(_KEPT // (batch * heads * sb), tb))

  first_key = 0 if shards == 1 else lax.axis_index(axis) * s
  # Key blocks go in pieces; XLA on a CPU makes float32 copies of what it reads.
  # The last piece is moved back, its blocks' means taken twice.
  size = max(1, min(_PIECE // (block_k * h), n))
  pieces = -(-n // size)

  def of_keys(i, found):
    row, head = i // pieces // kv_heads, i // pieces % kv_heads
    first = jnp.minimum(i % pieces * size, n - size)
    piece = blocks_of(k, 2, first, size, block_k, {0: (row, 1), 1: (head, 1)})
    valid = first * block_k + jnp.arange(size * block_k)
    valid = (first_key + valid < lengths[row]).reshape(1, 1, size, block_k)
    piece = piece.reshape(1, 1, size, block_k, h)
    mean, similar = _means(piece, valid, similarity)
    return (
      lax.dynamic_update_slice(found[0], mean, (row, head, first, 0)),
      lax.dynamic_update_slice(found[1], similar, (row, head, first)),
    )

  means, trusted = lax.fori_loop(
    0,
    batch * kv_heads * pieces,
    of_keys,
    (
      jnp.zeros((batch, kv_heads, n, h), jnp.float32),
      jnp.zeros((batch, kv_heads, n), bool),
    ),
  )
  if shards > 1:
    means, trusted = (
      lax.all_gather(x, axis, axis=2, tiled=True) for x in (means, trusted)
    )
  trusted = trusted[:, :, None, None]  # [B K 1 1 Sb]

  def make(first):
    index = first + jnp.arange(chunk)
    at = rows_at(q_start, lengths, index, block_q, dense_below)
    piece = blocks_of(q, 1, first, chunk, block_q)
    piece = piece.reshape(batch, chunk, block_q, kv_heads, group, h)
    piece = piece.transpose(0, 3, 4, 1, 2, 5)
    valid = at.first[..., None] + jnp.arange(block_q) <= at.last[..., None]
    mean, similar = _means(piece, valid[:, None, None], similarity)
    score = jnp.einsum(
      'bkgch,bkjh->bkgcj', mean, means, precision=lax.Precision.HIGHEST
    )
    reachable = at.reachable(sb, block_k)[:, None, None]
    score = jnp.where(reachable & trusted, score * scale, -jnp.inf)
    top = jnp.max(score, axis=-1, keepdims=True)
    score = jnp.exp(score - jnp.where(top > -jnp.inf, top, 0.0))
    rule = {
      'reachable': reachable,
      'forced': at.forced(sb, block_k)[:, None, None],
      'always': ~trusted,
    }
    budget = sb
    if density is not None:
      budget = blocks_at_density(rule['reachable'], density)
      # What must not be skipped comes on top of a fixed budget.
      extra = rule['reachable'] & rule['always'] & ~rule['forced']
      budget += jnp.sum(extra, axis=-1, keepdims=True, dtype=jnp.int32)
    budget = jnp.where(similar[..., None], budget, sb)
    if threshold is not None:
      rule['threshold'] = jnp.where(similar[..., None], threshold, 1.0)
    mute = ~jnp.any(reachable & trusted, axis=-1, keepdims=True)
    mass = jnp.where(mute, reachable.astype(score.dtype), score)
    return choose_blocks(
      score, budget=budget, width=width, mass=mass, bounded=width < sb, **rule
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


def _means(
  x: Float[Array, '*A c r H'], valid: Bool[Array, '*a c r'], similarity: float
) -> tuple[Float[Array, '*A c H'], Bool[Array, '*A c']]:
  """Mean of each block's rows that are no padding, and whether it is similar.

  A block of padding alone counts as similar.
  """
  x = jnp.where(valid[..., None], x, 0).astype(jnp.float32)
  count = jnp.sum(valid, axis=-1)[..., None]
  one = jnp.maximum(count, 1)
  norm = lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30))
  direction = jnp.sum(x * norm, axis=-2) / one
  gram = jnp.sum(direction * direction, axis=-1)
  similar = (gram > similarity) | (count[..., 0] == 0)
  return jnp.sum(x, axis=-2) / one, similar
