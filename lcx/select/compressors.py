"""Compressors: which keys of a block are worth passing on to later blocks.

A compressor scores the tokens of each local block, per kv head; APB keeps the
best `passing` of them. Pluggable by name: `COMPRESSORS[name](block)`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from lcx.select import retaining_head

# Max-pool over neighbouring tokens, as APB and Spava do (kernel 5, stride 1).
POOL = 5


@dataclasses.dataclass(frozen=True)
class Block:
  """What a compressor may look at: the local blocks of E = B x hosts rows.

  Attributes:
    q: [E b N H] rotated queries of the local tokens.
    k: [E b K H] rotated keys.
    v: [E b K H] values.
    unrotated_q: [E b N H] queries before rotation.
    unrotated_k: [E b K H] keys before rotation.
    question: [E Q N H] rotated queries of anchor rows.
    asked: bool [E Q] which anchor rows are the question's.
    positions: int32 [E b].
    valid: bool [E b] False for padding.
    layer: int32 [] index of the layer.
    learned: trained arrays of this layer, or ().
    model_axis: mesh axis that splits the heads.
  """

  q: Float[Array, 'E b N H']
  k: Float[Array, 'E b K H']
  v: Float[Array, 'E b K H']
  unrotated_q: Float[Array, 'E b N H']
  unrotated_k: Float[Array, 'E b K H']
  question: Float[Array, 'E Q N H']
  asked: Bool[Array, 'E Q']
  positions: Int32[Array, 'E b']
  valid: Bool[Array, 'E b']
  layer: Int32[Array, '']
  learned: Any = ()
  model_axis: str = 'model'


def pooled(scores: Float[Array, 'E b K']) -> Float[Array, 'E b K']:
  """Maximum over a window of tokens, so that neighbours come along."""
  return jax.lax.reduce_window(
    scores, -jnp.inf, jax.lax.max, (1, POOL, 1), (1, 1, 1), 'SAME'
  )


def query_aware(block: Block) -> Float[Array, 'E b K']:
  """Mean over the question's tokens of k . (mean of the group's queries).

  Spava's training-free score (thunlp/APB, zigzag_lring_flash_attn.py).
  """
  e, _, n_kv_heads, dim = block.k.shape
  weight = block.asked / jnp.maximum(
    jnp.sum(block.asked, axis=1, keepdims=True), 1
  )
  query = jnp.einsum('eqnh,eq->enh', block.question, weight)
  query = query.reshape(e, n_kv_heads, -1, dim).mean(axis=2)
  scores = jnp.einsum(
    'ebkh,ekh->ebk',
    block.k,
    query.astype(block.k.dtype),
    preferred_element_type=jnp.float32,
  )
  return pooled(scores)


def last_window(block: Block, window: int = 32) -> Float[Array, 'E b K']:
  """Attention that the block's own last queries pay (SnapKV's score).

  arXiv:2404.14469, equation 1, on the block instead of the prompt.
  """
  e, length, n_kv_heads, dim = block.k.shape
  last = jnp.sum(block.valid, axis=1) - window
  index = jnp.clip(last[:, None] + jnp.arange(window), 0, length - 1)
  q = jnp.take_along_axis(block.q, index[:, :, None, None], axis=1)
  q = q.reshape(e, window, n_kv_heads, -1, dim)
  scores = jnp.einsum(
    'ewkgh,ebkh->ekgwb', q, block.k, preferred_element_type=jnp.float32
  )
  seen = jnp.arange(length) <= index[:, :, None]
  scores = jnp.where(seen[:, None, None], scores * dim**-0.5, -jnp.inf)
  mass = jax.nn.softmax(scores, axis=-1).sum(axis=(2, 3))
  return pooled(jnp.swapaxes(mass, 1, 2))


def random(block: Block) -> Float[Array, 'E b K']:
  """A score that depends on position, head and layer alone: the control."""
  n_kv_heads = block.k.shape[2]
  key = jax.random.fold_in(jax.random.key(0), block.layer)

  def draw(position):
    return jax.random.uniform(jax.random.fold_in(key, position), (n_kv_heads,))

  return jax.vmap(jax.vmap(draw))(block.positions)


def retained(block: Block) -> Float[Array, 'E b K']:
  """What trained heads say will be attended (Locret; APB, section 3.4)."""
  scores = retaining_head.score(
    block.learned,
    block.unrotated_q,
    block.unrotated_k,
    block.v,
    block.model_axis,
  )
  return pooled(scores)


COMPRESSORS = {
  'query': query_aware,
  'retaining_head': retained,
  'snapkv': last_window,
  'random': random,
}
