"""Dense: every query sees every key before it. The baseline of all others."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse import block_sparse, dense_blocks
from lcx import cache as caches
from lcx.methods import shards
from lcx.methods.base import Context, Decode, Method, Prefill, Rope, Trace
from lcx.methods.listed_pages import attend_all


@dataclasses.dataclass(frozen=True)
class DensePrefill(Prefill):
  """Causal attention over the whole prompt.

  Where the sequence is sharded, keys and values are all-gathered: the exact
  baseline that moves (P - 1) / P * 2 * B * S * K * H * e bytes a layer to each
  of P shards, e bytes an element.
  """

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, length, heads, _ = q.shape
    rotated = rope(k, ctx.positions)
    cache = shards.store(cache, k, rotated, v, ctx)
    out, _ = block_sparse(
      rope(q, ctx.positions),
      *shards.gather_sequence(rotated, v, ctx.axes),
      dense_blocks(batch, heads, length),
      q_start=shards.first_query(length, batch, ctx.axes),
      lengths=ctx.lengths,
      sliding_window=ctx.sliding_window,
    )
    return out, cache, dense_trace(q, ctx)

  def fill(self, k, v, rope: Rope, cache, ctx: Context):
    """What `attend` does to the cache, without the attention."""
    return shards.store(cache, k, rope(k, ctx.positions), v, ctx)


@dataclasses.dataclass(frozen=True)
class DenseDecode(Decode):
  """Attention over everything in the cache; shards merge exactly."""

  needs = frozenset({'all_tokens', 'rotated'})

  def attend(self, q, k, v, rope: Rope, cache, state, ctx: Context):
    q, cache = shards.append_rotated(q, k, v, rope, cache, ctx)
    part = attend_all(q, cache, ctx, shards.part_dtype(q, ctx.axes))
    out = shards.merged(part, ctx.axes).astype(q.dtype)
    return out, cache, state, decode_trace(dense_pairs(q, ctx), q, ctx)


def dense_pairs(q, ctx: Context):
  """float32 [B]: keys that causal attention shows to this shard's queries."""
  visible = ctx.positions + 1
  if ctx.sliding_window is not None:
    visible = jnp.minimum(visible, ctx.sliding_window)
  per_head = jnp.sum(
    jnp.where(ctx.valid, visible, 0), axis=1, dtype=jnp.float32
  )
  return per_head * q.shape[2]


def dense_trace(q, ctx: Context) -> Trace | None:
  """The trace of exact attention: all that is visible was seen."""
  if not ctx.trace:
    return None
  pairs = dense_pairs(q, ctx)
  return Trace(keys=pairs, pairs=pairs)


def decode_trace(keys, q, ctx: Context) -> Trace | None:
  """The trace of a decode call, whose queries stand on every sequence shard.

  Args:
    keys: float32 [B] keys seen, the same number on every sequence shard.
    q: the queries.
    ctx: the context.
  """
  if not ctx.trace:
    return None
  shards = jax.lax.axis_size(ctx.axes.seq)
  return Trace(keys=keys / shards, pairs=dense_pairs(q, ctx) / shards)


METHOD = Method('dense', DensePrefill(), caches.CONFIGS['dense'], DenseDecode())
