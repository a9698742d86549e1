"""StreamingLLM: the first tokens and a window of the last ones.

Xiao et al., "Efficient streaming language models with attention sinks",
arXiv:2309.17453, with 4 sink and 1,020 recent tokens as its default. Keys keep
their true positions. Memory is a ring of pages, constant in length; nothing
outside sink and window can be found again.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_sparse import (
  EVERYTHING,
  block_sparse,
  streaming_blocks,
)
from lcx.cache import Paged
from lcx.methods import shards
from lcx.methods.base import Context, Decode, Method, Prefill, Rope, Trace
from lcx.methods.dense import decode_trace, dense_pairs
from lcx.methods.listed_pages import attend_listed
from lcx.select.audit import sampled_mass

SINK, RECENT = 4, 1020


@dataclasses.dataclass(frozen=True)
class StreamingPrefill(Prefill):
  """Each prompt query sees the sink and its own window.

  Attributes:
    sink: first tokens that are always seen.
    recent: last tokens that are always seen, the query's own included.
  """

  sink: int = SINK
  recent: int = RECENT

  def at_tight_budget(self, length: int) -> 'StreamingPrefill':
    return dataclasses.replace(self, sink=4, recent=max(length // 4, 1))

  def at_full_budget(self, length: int) -> 'StreamingPrefill':
    del length
    return dataclasses.replace(self, recent=EVERYTHING)

  def check(self, config, capacity: int) -> None:
    check_window(self.sink, self.recent)

  def attend(self, q, k, v, rope: Rope, cache, ctx: Context):
    batch, length, heads, _ = q.shape
    rotated = rope(k, ctx.positions)
    cache = shards.store(cache, k, rotated, v, ctx)
    turned = rope(q, ctx.positions)
    keys, values = shards.gather_sequence(rotated, v, ctx.axes)
    where = {
      'q_start': shards.first_query(length, batch, ctx.axes),
      'lengths': ctx.lengths,
      'sliding_window': ctx.sliding_window,
    }
    lists = streaming_blocks(batch, heads, length, self.sink, self.recent)
    out, lse = block_sparse(turned, keys, values, lists, **where)
    trace = None
    if ctx.trace:
      mass = sampled_mass(turned, keys, lse, **where)
      trace = Trace(seen(self, q, ctx), dense_pairs(q, ctx), mass=mass)
    return out, cache, trace


@dataclasses.dataclass(frozen=True)
class StreamingDecode(Decode):
  """Each new query sees the sink and its own window.

  Attributes: as in `StreamingPrefill`.
  """

  sink: int = SINK
  recent: int = RECENT

  needs = frozenset({'recent_tokens', 'rotated'})

  def at_tight_budget(self, length: int) -> 'StreamingDecode':
    return dataclasses.replace(self, sink=4, recent=max(length // 4, 1))

  def at_full_budget(self, length: int) -> 'StreamingDecode':
    del length
    return dataclasses.replace(self, recent=EVERYTHING)

  def check(self, config, capacity: int) -> None:
    check_window(self.sink, self.recent)

  def misfit(self, cache) -> str | None:
    if 'all_tokens' in cache.provides:
      return None
    if self.sink > cache.sink or self.recent > cache.recent:
      return (
        f'decode sees sink={self.sink} and recent={self.recent} tokens, but '
        f'the cache keeps sink={cache.sink} and recent={cache.recent}'
      )
    return None

  def attend(self, q, k, v, rope: Rope, cache, state, ctx: Context):
    q, cache = shards.append_rotated(q, k, v, rope, cache, ctx)
    heads = k.shape[2]
    recent = min(self.recent, ctx.sliding_window or self.recent)
    # A model's own window takes the sink away, too.
    sink = 0 if ctx.sliding_window is not None else self.sink
    part = attend_listed(
      q,
      cache,
      cache.page_ids(),
      cache.page_starts(),
      ctx,
      (
        jnp.full((heads,), sink, jnp.int32),
        jnp.full((heads,), recent, jnp.int32),
      ),
    )
    out = shards.merged(part, ctx.axes).astype(q.dtype)
    return out, cache, state, decode_trace(seen(self, q, ctx), q, ctx)


def check_window(sink: int, recent: int) -> None:
  """Refuses windows that hold no key."""
  if sink < 0 or recent < 1:
    raise ValueError(f'{sink=} must be at least 0 and {recent=} at least 1')


def seen(part, q, ctx: Context) -> Float[Array, 'B']:
  """Keys seen: sink + window, or everything where that is less."""
  keys = jnp.minimum(ctx.positions + 1, part.sink + part.recent)
  keys = jnp.sum(jnp.where(ctx.valid, keys, 0), axis=1, dtype=jnp.float32)
  return jnp.minimum(keys * q.shape[2], dense_pairs(q, ctx))


METHOD = Method(
  'streaming',
  StreamingPrefill(),
  Paged(ring_heads='all', sink=SINK, recent=RECENT, stats='none'),
  StreamingDecode(),
)
