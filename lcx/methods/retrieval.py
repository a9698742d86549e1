"""RetrievalAttention: keys in host memory, found by an index, attended there.

Liu et al., "RetrievalAttention: accelerating long-context LLM inference via
vector retrieval", arXiv:2409.10516, section 3. The device keeps and attends the
first `sink` and the last `recent` tokens; of all others, in the host, each
query head attends the `top` that an index finds, and the two partial outputs
are merged by their normalisers (equations 4 and 5). The prompt is read densely.

The index of the paper is a graph over keys that is projected from the prompt's
own queries, since decode queries are far from keys and near those
(`lcx.select.vector_index_graph`); here there is one a kv head, from the queries
of all its query heads, or, as in the paper, one a query head (`graphs`), with
one store of keys. `exact`, `flat`, `ivf` and `hnsw` are the baselines, and
`fastscan` a scan of 4-bit codes, for hosts whose memory a graph waits for.

Beyond the paper: where a search may have failed, or has found too little of a
query's softmax, it is widened (`lcx.cache.host_row`); new tokens join the index
in blocks; an index of a fixed context can be kept in a folder.

The host needs to know what the device's tokens weigh to tell what is too
little, so it is called after the device attended its few tokens, once a layer.
A call stops the device's stream: to search while the device attends would take
two calls a layer, and the second costs more than the device's part
(experiments/results/retrieval_notes.md).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.partial import Partial, merge
from kernels_pallas.selected_token import attend_pages
from lcx import cache as caches
from lcx import cores
from lcx.cache.host import STATS
from lcx.cache.host_row import Near, Search
from lcx.methods.base import Axes, Context, Decode, Method, Rope, Trace
from lcx.methods.dense import DensePrefill, dense_pairs
from lcx.select import vector_index
from lcx.select.vector_index_nearest import nearest, sampled

_EFFORT = {
  'graph': 200,
  'hnsw': 200,
  'ivf': 64,
  'flat': 0,
  'exact': 0,
  'fastscan': 250,
}
_HELD_OUT = 16  # of as many sampled tokens of the last quarter, one
_WANTED = 100  # nearest keys of a held-out query, at most


@dataclasses.dataclass(frozen=True)
class RetrievalDecode(Decode):
  """Device tokens, and those that the host finds.

  Attributes:
    top: tokens retrieved per query head (100 in the paper, 2000 for some).
    index: a kind of `lcx.select.vector_index`.
    effort: efSearch of a graph, nprobe of `ivf`, keys that `fastscan` ranks
      by their products; 0: a default of the kind.
    mass: estimated share of a query's softmax below which more keys are taken.
    most: keys taken for the sake of `mass`, at most.
    sink: first tokens that are always seen, on the device.
    recent: last tokens that are always seen, on the device.
    queries: tokens of the prompt whose queries are sampled.
    neighbours: nearest keys of each of those, from which a graph is made.
    degree: links of a key in a graph.
    graphs: one a 'kv_head', or one a 'query_head': as many times the links.
    bits: of an element in the codes of `fastscan`, in the mean: 2, 3 or 4.
    jobs: threads among which the queries of a layer are split; 0: the cores.
      Where they are more than the kv heads of the rows that decode together,
      `fastscan` has as many indexes of a head, each of a part of its keys.
    folder: where indexes are kept, by the fingerprint of what they are made of
      (keys, numbers, what the queries said); '': nowhere.
  """

  top: int = 100
  index: str = 'graph'
  effort: int = 0
  mass: float = 0.8
  most: int = 2000
  sink: int = 128
  recent: int = 512
  queries: int = 8192
  neighbours: int = 32
  degree: int = 32
  graphs: str = 'kv_head'
  bits: int = 4
  jobs: int = 0
  folder: str = ''

  needs = frozenset({'host_tokens', 'rotated'})

  def at_full_budget(self, length: int) -> 'RetrievalDecode':
    return dataclasses.replace(self, top=length + 1)

  def at_tight_budget(self, length: int) -> 'RetrievalDecode':
    return dataclasses.replace(
      self, top=max(length // 32, 1), sink=4, recent=32, mass=0.0
    )

  def check(self, config, capacity: int) -> None:
    del capacity
    for name in ('top', 'recent', 'queries', 'neighbours'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'decode.{name}={getattr(self, name)} must be at least 1'
        )
    if self.jobs < 0:
      raise ValueError(f'decode.jobs={self.jobs} must be at least 0')
    if min(self.sink, self.effort) < 0 or not 0 <= self.mass < 1:
      raise ValueError(
        f'decode.sink={self.sink} and effort={self.effort} must be at least '
        f'0, and mass={self.mass} in [0, 1)'
      )
    if self.recent < self.max_queries:
      raise ValueError(
        f'decode.recent={self.recent} must be at least {self.max_queries}: '
        'that many tokens are read at a time'
      )
    if config.sliding_window is not None:
      raise ValueError(
        f'retrieval does not serve a model with a sliding window of '
        f'{config.sliding_window}: it bounds the cache by itself, use dense'
      )
    _ = self.numbers  # checks them
    vector_index.require(self.index)

  def misfit(self, cache) -> str | None:
    if self.sink > cache.sink or self.recent > cache.recent:
      return (
        f'decode keeps sink={self.sink} and recent={self.recent} tokens on '
        f'the device, but the cache sink={cache.sink}, recent={cache.recent}'
      )
    return None

  def state_specs(self, axes: Axes):
    return jax.sharding.PartitionSpec(axes.data, axes.model)

  @property
  def numbers(self) -> vector_index.Numbers:
    """Of the index."""
    return vector_index.Numbers(
      kind=self.index, degree=self.degree, graphs=self.graphs, bits=self.bits
    )

  def index_bytes(self, config) -> int:
    """Of a key in the index."""
    group = config.n_heads // config.n_kv_heads
    return self.numbers.bytes_per_key(config.head_dim, group)

  def search(self, page: int) -> Search:
    """How the host searches."""
    return Search(
      top=self.top,
      effort=self.effort or _EFFORT[self.index],
      first=-(-self.sink // page) * page,
      recent=self.recent,
      page=page,
      mass=self.mass,
      most=max(self.most, self.top),
      jobs=self.jobs,
    )

  def observe(self, q, k, v, rope: Rope, state, ctx: Context) -> Near:
    """Samples queries; a graph also needs the nearest keys of them and of keys.

    Sampled queries see the keys before them. Held-out ones, of the last quarter
    of the prompt, are asked for the nearest of all keys, as an index is.
    """
    del v, state
    b, t, n, h = q.shape
    kv = k.shape[2]
    valid = ctx.valid & (ctx.source >= 0)  # no copies
    m = -(-min(self.queries, t) // _HELD_OUT) * _HELD_OUT
    place, new = sampled(valid, m)
    picked = jnp.take_along_axis(q, place[..., None, None], axis=1)
    at = jnp.take_along_axis(ctx.positions, place, axis=1)
    picked = rope(picked, at).reshape(b, m, kv, n // kv, h)
    keys = rope(k, ctx.positions)
    at = jnp.where(new, at, -1)
    key_at = jnp.where(valid, ctx.positions, -1)

    def by_head(which):
      """Queries [B K M' H] and their positions [B K M'] of listed samples."""
      chosen = picked[:, which].transpose(0, 2, 1, 3, 4)
      where = jnp.repeat(at[:, which], n // kv, axis=1)[:, None]
      size = chosen.shape[2] * chosen.shape[3]
      return chosen.reshape(b, kv, size, h), jnp.broadcast_to(
        where, (b, kv, size)
      )

    slot = np.arange(m)
    held = (slot >= 3 * m // 4) & (slot % _HELD_OUT == _HELD_OUT - 1)
    asked, asked_at = by_head(np.flatnonzero(~held))
    out, out_at = by_head(np.flatnonzero(held))
    weight = (asked_at >= 0)[..., None]
    count = jnp.maximum(jnp.sum(weight, axis=2), 1)
    centre = jnp.sum(jnp.where(weight, asked, 0), axis=2) / count
    spread = jnp.where(weight, asked - centre[:, :, None], 0) ** 2
    spread = jnp.sqrt(jnp.sum(spread, axis=2) / count)
    last = jnp.max(key_at, axis=1)[:, None, None]
    near = near_of = key_near = every = None

    def heads_of(chosen):
      of = jnp.arange(chosen.shape[2], dtype=jnp.int32) % (n // kv)
      return jnp.broadcast_to(of, chosen.shape[:3])

    if self.index == 'graph':
      near_of = heads_of(asked)
      near = nearest(asked, asked_at, keys, key_at, self.neighbours)
      every = jnp.broadcast_to(key_at[:, None], (b, kv, t))
      key_near = nearest(
        keys.swapaxes(1, 2), every, keys, key_at, self.degree // 2, causal=False
      )
    return Near(
      near,
      near_of,
      key_near,
      every,
      out.astype(jnp.float32),
      nearest(
        out,
        jnp.where(out_at >= 0, last, -1),
        keys,
        key_at,
        min(self.top, _WANTED),
      ),
      heads_of(out),
      centre.astype(jnp.float32),
      spread.astype(jnp.float32),
    )

  def start(self, cache, state):
    """Starts the build; the first search waits for it."""
    numbers = self.numbers
    if self.index == 'fastscan':
      heads = cache.ring.table.shape[0] * cache.ring.table.shape[1]
      jobs = self.jobs or cores.available()
      numbers = dataclasses.replace(numbers, parts=max(1, jobs // heads))
    return cache.index(state, numbers, self.search(cache.page), self.folder)

  def attend(self, q, k, v, rope: Rope, cache, state, ctx: Context):
    q, k = rope(q, ctx.positions), rope(k, ctx.positions)
    search, used = self.search(cache.page), cache.used
    cache = cache.append_device(k, v, ctx.positions, ctx.count)
    ids, starts = cache.static_pages(search)
    static = attend_pages(
      q, cache.pages(), ids, starts, q_positions=ctx.positions
    )
    cache, found = cache.attend_host(
      used, q, k, v, ctx.positions, static.lse, search, state
    )
    part = merge(static, Partial(found.out, found.lse))
    trace = self._trace(part, found, starts, cache.page, q, ctx)
    return part.out.astype(q.dtype), cache, state, trace

  def _trace(self, part, found, starts, page, q, ctx: Context):
    if not ctx.trace:
      return None
    group = q.shape[2] // starts.shape[1]
    keys = ctx.positions[:, :, None, None] + 1 - starts[:, None]
    keys = jnp.sum(jnp.clip(keys, 0, page), axis=(2, 3)) * group
    keys = jnp.sum(jnp.where(ctx.valid, keys, 0), axis=1, dtype=jnp.float32)
    counters = {
      name: found.stats[:, i]
      for i, name in enumerate(STATS)
      if name != 'attended'
    }
    mass = jax.nn.sigmoid(part.lse - found.rest)
    mass = jnp.where(ctx.valid[:, :, None], mass, 0.0)
    return Trace(
      keys=keys + found.stats[:, STATS.index('attended')],
      pairs=dense_pairs(q, ctx),
      mass=jnp.sum(mass, axis=(1, 2)),
      counters=counters,
    )


METHOD = Method(
  'retrieval', DensePrefill(), caches.CONFIGS['host'], RetrievalDecode()
)
