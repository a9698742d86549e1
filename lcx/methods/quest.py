"""Quest: decode over the pages whose key bounds promise most.

Tang et al., "Quest: query-aware sparsity for efficient long-context LLM
inference", arXiv:2406.10774. A page's score is an upper bound of every q.k in
it, from the page's channel-wise minimum and maximum of keys (equation 2); the
best pages are attended exactly. Here a list is shared by the query heads of a
kv head (the largest score counts), pages may be larger than the pages of the
bounds (LServe's hierarchy), and the prompt is read densely.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx import cache as caches
from lcx.methods import shards
from lcx.methods.base import Context, Decode, Method, Rope
from lcx.methods.dense import DenseDecode, DensePrefill, decode_trace
from lcx.methods.listed_pages import attend_listed
from lcx.select.top_pages import take_pages, top_pages


@dataclasses.dataclass(frozen=True)
class QuestDecode(Decode):
  """Top pages by bounds, a budget of tokens per kv head.

  Attributes:
    budget: tokens attended per kv head, new ones included.
    sink: first tokens that are always seen.
    recent: last tokens that are always seen.
    dense_layers: first layers that see everything (2 in the paper).
  """

  budget: int = 1024
  sink: int = 64
  recent: int = 128
  dense_layers: int = 2

  needs = frozenset({'all_tokens', 'rotated', 'bounds'})

  def at_full_budget(self, length: int) -> 'QuestDecode':
    return dataclasses.replace(self, budget=2 * length + 4096)

  def at_tight_budget(self, length: int) -> 'QuestDecode':
    budget = max(length // 4, 64)
    return dataclasses.replace(
      self, budget=budget, sink=4, recent=budget // 4, dense_layers=0
    )

  def at_layer(self, layer: int) -> Decode:
    return DenseDecode() if layer < self.dense_layers else self

  def check(self, config, capacity: int) -> None:
    if self.budget < self.sink + self.recent:
      raise ValueError(
        f'decode.budget={self.budget} is below sink={self.sink} + '
        f'recent={self.recent}: raise the budget'
      )

  def attend(self, q, k, v, rope: Rope, cache, state, ctx: Context):
    q, cache = shards.append_rotated(q, k, v, rope, cache, ctx)
    pages, ids = cache.pages(), cache.page_ids()
    starts = cache.page_starts()
    newest = jnp.max(jnp.where(ctx.valid, ctx.positions, 0), axis=1)

    low, high = cache.bounds()
    index = top_pages(
      q,
      low,
      high,
      starts,
      newest,
      ctx.valid,
      pages=self.budget // pages.page + 1,  # the newest is rarely full
      sink=self.sink,
      recent=self.recent,
      page=pages.page,
      axis=ctx.axes.seq,
    )
    ids, starts = take_pages(index, ids, starts)
    part = attend_listed(q, cache, ids, starts, ctx)
    out = shards.merged(part, ctx.axes).astype(q.dtype)
    keys = seen_keys(starts, q, ctx, pages.page)
    return out, cache, state, decode_trace(keys, q, ctx)


def seen_keys(starts, q, ctx: Context, page: int) -> Float[Array, 'B']:
  """Keys that the listed pages show to valid queries, all heads and shards."""
  group = q.shape[2] // starts.shape[1]
  keys = ctx.positions[:, :, None, None] + 1 - starts[:, None]
  keys = jnp.sum(jnp.clip(keys, 0, page), axis=(2, 3)) * group
  keys = jnp.sum(jnp.where(ctx.valid, keys, 0), axis=1, dtype=jnp.float32)
  return jax.lax.psum(keys, ctx.axes.seq)


METHOD = Method('quest', DensePrefill(), caches.CONFIGS['paged'], QuestDecode())
