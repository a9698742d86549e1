"""Retrieval on the device: clusters of keys are probed, tokens attended.

RetrievalAttention (arXiv:2409.10516, section 3) with its graph in host memory
replaced by an index of dense products (`lcx.select.vector_index_cluster`): the
first `sink` and the last `recent` tokens are always seen, of the others the
best `top`. Every query selects for itself. Tokens that leave the recent window
join the index a segment at a time; until then they are seen. The prompt is read
densely.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.keys import NEVER
from kernels_pallas.partial import Partial, merge
from kernels_pallas.selected_token import attend_tokens
from lcx import cache as caches
from lcx.methods import shards
from lcx.methods.base import Axes, Context, Decode, Method, Rope, Trace
from lcx.methods.dense import DensePrefill, dense_pairs
from lcx.methods.listed_pages import attend_listed
from lcx.select.vector_index_cluster import Clusters, page_of, search


@dataclasses.dataclass(frozen=True)
class ClusterDecode(Decode):
  """Sink, recent tokens, and the best of the others by a cluster index.

  Attributes:
    top: tokens retrieved per kv head and query.
    probe: tokens of the index that are scored exactly, per shard.
    sink: first tokens that are always seen.
    recent: last tokens that are always seen.
    segment: tokens that join the index together.
    cluster: tokens per centroid, on average.
  """

  top: int = 512
  probe: int = 4096
  sink: int = 128
  recent: int = 512
  segment: int = 1024
  cluster: int = 16

  needs = frozenset({'all_tokens', 'rotated'})

  def at_full_budget(self, length: int) -> 'ClusterDecode':
    return dataclasses.replace(self, top=length + 1, probe=length + 1)

  def check(self, config, capacity: int) -> None:
    if not 0 < self.top <= self.probe:
      raise ValueError(
        f'decode.top={self.top} must be at least 1 and at most '
        f'probe={self.probe}'
      )
    if self.sink < 0 or self.recent < 1:
      raise ValueError(
        f'decode.sink={self.sink} must be at least 0 and '
        f'recent={self.recent} at least 1'
      )
    if self.segment < self.max_queries or self.segment % self.cluster:
      raise ValueError(
        f'decode.segment={self.segment} must be at least {self.max_queries} '
        f'and a multiple of cluster={self.cluster}'
      )

  def misfit(self, cache) -> str | None:
    if self.segment % cache.page:
      return (
        f'decode.segment={self.segment} must be a multiple of the cache '
        f'page={cache.page}'
      )
    return None

  def state_specs(self, axes: Axes):
    # Each sequence shard indexes its own tokens.
    return jax.sharding.PartitionSpec((axes.data, axes.seq), axes.model)

  def start(self, cache, state) -> Clusters:
    """Indexes every whole segment of the prompt."""
    del state
    ids, page = cache.page_ids(), cache.page
    b, kv, width = ids.shape
    tokens = (width - -(-self.sink // page)) * page
    # Room for one at least: partitioned loops with empty arrays crash XLA.
    n = max(1, tokens // self.segment)
    per = self.segment // self.cluster
    dim = cache.pages().head_dim
    index = Clusters.empty(b, kv, dim, n, self.segment, per)
    newest = lax.pmax(cache.last_position(), Axes().seq)
    return lax.fori_loop(
      0, n, lambda _, index: self._joined(index, cache, newest), index
    )

  def attend(self, q, k, v, rope: Rope, cache, state, ctx: Context):
    q, cache = shards.append_rotated(q, k, v, rope, cache, ctx)
    newest = ctx.lengths - 1
    state = lax.cond(
      jnp.any(self._due(state, cache, newest)),
      lambda: self._joined(state, cache, newest),
      lambda: state,
    )
    rule: dict[str, Any] = shards.window(k.shape[2], ctx.sliding_window)
    until = shards.seen_until(cache, ctx)
    ids, starts = self._static(state, cache)
    static = attend_listed(q, cache, ids, starts, ctx)
    positions, found, part = self._retrieved(state, cache, q, rule, ctx)
    part = merge(static, part)
    out = shards.merged(part, ctx.axes).astype(q.dtype)
    trace = self._trace(
      part, found, positions, starts, cache.page, q, until, ctx
    )
    return out, cache, state, trace

  def _first(self, cache):
    """int32 [B]: pages of the sink on this shard."""
    return jnp.sum(cache.page_starts()[:, 0] < self.sink, axis=1)

  def _due(self, index: Clusters, cache, newest):
    """Rows whose next segment is whole and no longer recent."""
    page = cache.page
    last = (
      self._first(cache) + (index.joined[:, 0] + 1) * (self.segment // page) - 1
    )
    starts = cache.page_starts()[:, 0]
    safe = jnp.minimum(last, starts.shape[1] - 1)[:, None]
    end = jnp.take_along_axis(starts, safe, axis=1)[:, 0] + page - 1
    room = index.joined[:, 0] < index.order.shape[2] // self.segment
    whole = (last < starts.shape[1]) & (end <= cache.last_position())
    return room & whole & (end <= newest - self.recent)

  def _joined(self, index: Clusters, cache, newest) -> Clusters:
    b, kv, _ = cache.page_ids().shape
    number = jnp.arange(self.segment, dtype=jnp.int32)
    number = index.joined[:, :1] * self.segment + number
    number = jnp.broadcast_to(number[:, None], (b, kv, self.segment))
    keys = self._reader(cache)(number)
    per = self.segment // self.cluster
    return index.join(keys, self._due(index, cache, newest), per)

  def _reader(self, cache):
    """(token numbers [B K m]) -> keys [B K m H]."""
    pages, first = cache.pages(), self._first(cache)
    ids, starts = cache.page_ids(), cache.page_starts()
    dtype = jnp.float32 if pages.bits < 16 else pages.k.dtype

    def read(tokens):
      rows, _ = page_of(tokens, first, ids, starts, pages.page)
      return pages.tokens(jnp.maximum(rows, 0)).read((), dtype)[0]

    return read

  def _static(self, index: Clusters, cache):
    """Ids and starts of the pages that are always seen."""
    ids, starts, page = cache.page_ids(), cache.page_starts(), cache.page
    width, per = ids.shape[2], self.segment // cache.page
    first = self._first(cache)[:, None]
    sink = jnp.arange(min(width, -(-self.sink // page)), dtype=jnp.int32)
    # A shard whose tokens are all old keeps less than a segment out of the
    # index; the last one keeps the recent window, too, and this call's tokens.
    tail = self.segment + self.recent + self.max_queries
    tail = jnp.arange(min(width, -(-tail // page) + 2), dtype=jnp.int32)
    tail = first + index.joined[:, :1] * per + tail
    sink = jnp.where(sink < first, sink, width)
    slot = jnp.concatenate([sink, tail], axis=1)[:, None]
    slot = jnp.broadcast_to(slot, (*ids.shape[:2], slot.shape[2]))
    safe = jnp.minimum(slot, width - 1)
    there = slot < width

    def take(x, none):
      return jnp.where(there, jnp.take_along_axis(x, safe, axis=2), none)

    return take(ids, -1), take(starts, NEVER)

  def _retrieved(self, index, cache, q, rule, ctx: Context):
    """Positions of what was found, the search's report, and its partial."""
    b, t, n, h = q.shape
    kv = index.order.shape[1]
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 1, 3, 4)
    found = search(
      index,
      grouped,
      self._reader(cache),
      probe=self.probe,
      top=self.top,
      axis=ctx.axes.seq,
    )
    ids, starts = cache.page_ids(), cache.page_starts()
    tokens = found.tokens.reshape(b, kv, -1)
    rows, positions = page_of(
      tokens, self._first(cache), ids, starts, cache.page
    )

    def by_query(x):  # [B K T*k] -> [B*T K k]
      x = x.reshape(b, kv, t, -1).swapaxes(1, 2)
      return x.reshape(b * t, kv, -1)

    positions = by_query(positions)
    part = attend_tokens(
      q.reshape(b * t, 1, n, h),
      cache.pages(),
      by_query(rows),
      positions,
      q_positions=ctx.positions.reshape(b * t, 1),
      **rule,
    )
    part = Partial(part.out.reshape(q.shape), part.lse.reshape(b, t, n))
    return positions.reshape(b, t, kv, -1), found, part

  def _trace(self, part, found, positions, starts, page, q, until, ctx):
    """Keys seen, and the share of the softmax that they are estimated to hold.

    What was not found counts by its cluster's mean (or by its exact score,
    where it was probed): RetroInfer's estimation zone.
    """
    if not ctx.trace:
      return None
    b, t, n, _ = q.shape
    kv = starts.shape[1]
    axis, n_shards = ctx.axes.seq, lax.axis_size(ctx.axes.seq)
    low = jnp.full((b, t), -1)
    if ctx.sliding_window is not None:
      low = ctx.positions - ctx.sliding_window
    low, until = low[..., None, None], until[..., None, None]
    start = starts[:, None]
    stop = jnp.minimum(until + 1, start + page)
    keys = jnp.sum(
      jnp.maximum(stop - jnp.maximum(start, low + 1), 0), axis=(2, 3)
    )
    keys += jnp.sum((positions <= until) & (positions > low), axis=(2, 3))
    rest = found.rest.transpose(0, 2, 1, 3).reshape(b, t, n)
    scored = jnp.sum(jnp.where(ctx.valid, found.scored, 0), axis=1)
    keys = jnp.where(ctx.valid, keys * (n // kv), 0)
    keys = jnp.sum(keys, axis=1, dtype=jnp.float32)

    def over_shards(lse):
      peak = lax.pmax(lse, axis)
      safe = jnp.where(peak > -jnp.inf, peak, 0.0)
      return jnp.log(lax.psum(jnp.exp(lse - safe), axis)) + safe

    seen, rest = over_shards(part.lse), over_shards(rest)
    mass = jnp.where(seen > -jnp.inf, jax.nn.sigmoid(seen - rest), 0.0)
    mass = jnp.sum(jnp.where(ctx.valid[..., None], mass, 0.0), axis=(1, 2))
    return Trace(
      keys=keys,
      pairs=dense_pairs(q, ctx) / n_shards,
      mass=mass / n_shards,
      counters={'scored': scored * (n // kv)},
    )


METHOD = Method(
  'retrieval_cluster',
  DensePrefill(),
  caches.CONFIGS['dense'],
  ClusterDecode(),
)
