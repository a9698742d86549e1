"""Numbers of the paged cache; `paged_cache` says how it works."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_sparse import EVERYTHING
from kernels_pallas.keys import NEVER, Pages
from lcx.cache.base import ROWS, CacheShape, split
from lcx.cache.paged_cache import PagedCache
from lcx.cache.quantise import BITS, empty_pool
from lcx.cache.stats import Bounds, Moments
from lcx.cache.vacancy import Vacancy
from lcx.cache.write import window

STATS = {'none': None, 'bounds': Bounds, 'moments': Moments}


@dataclasses.dataclass(frozen=True)
class Paged:
  """Numbers of the paged cache.

  Attributes:
    page: tokens a page holds.
    logical_page: tokens a page of the statistics holds; divides `page`.
    bits: 16 (keys and values as they arrive), 8 or 4.
    stats: 'bounds', 'moments' or 'none', of full heads' keys.
    rotated: whether keys are stored rotated.
    ring_heads: None (every head is full), 'all', or per layer per kv head
      whether it is a ring head. Layers with equally many ring heads have equal
      shapes.
    sink: first tokens that ring heads keep.
    recent: last tokens that ring heads keep, a query's own included.
    slack: tokens that can be truncated without a loss to ring heads; also how
      many may be appended before their queries attend.
    pool_pages: pages of a layer's pool, per shard; None: no row runs out.
    agree_over: mesh axis over which shards must agree that a row gets pages:
      'model' where `pool_pages` is given and kv heads are sharded.
  """

  page: int = 64
  logical_page: int = 16
  bits: int = 16
  stats: str = 'bounds'
  rotated: bool = True
  ring_heads: str | tuple[tuple[bool, ...], ...] | None = None
  sink: int = 128
  recent: int = 256
  slack: int = 16
  pool_pages: int | None = None
  agree_over: str | None = None

  def __post_init__(self):
    if min(self.page, self.logical_page, self.recent) < 1:
      raise ValueError(
        f'page={self.page}, logical_page={self.logical_page} and '
        f'recent={self.recent} must be at least 1'
      )
    if self.page % self.logical_page:
      raise ValueError(
        f'logical_page={self.logical_page} must divide page={self.page}'
      )
    if min(self.sink, self.slack) < 0:
      raise ValueError(f'sink={self.sink}, slack={self.slack} must be >= 0')
    if self.bits not in BITS:
      raise ValueError(f'bits={self.bits} must be one of {BITS}')
    if self.stats not in STATS:
      raise ValueError(f'stats={self.stats!r} must be one of {list(STATS)}')
    if isinstance(self.ring_heads, str) and self.ring_heads != 'all':
      raise ValueError(
        f"ring_heads={self.ring_heads!r} must be None, 'all' or flags by layer"
      )
    if self.pool_pages is not None and self.pool_pages < 1:
      raise ValueError(f'pool_pages={self.pool_pages} must be at least 1')

  @property
  def sink_pages(self) -> int:
    return -(-self.sink // self.page)

  @property
  def ring_pages(self) -> int:
    """Pages that `recent` + `slack` tokens can touch, wherever they begin."""
    return window(self.recent + self.slack, self.page)

  @property
  def ring_width(self) -> int:
    """Table slots of a ring head."""
    return self.sink_pages + self.ring_pages

  @property
  def has_ring(self) -> bool:
    return self.ring_heads is not None

  @property
  def endless(self) -> bool:
    """Rings alone hold rows of any length."""
    return self.ring_heads == 'all'

  @property
  def stats_kind(self) -> type[Bounds] | type[Moments] | None:
    return None if self.endless else STATS[self.stats]

  @property
  def provides(self) -> frozenset[str]:
    found = {'recent_tokens', 'rotated' if self.rotated else 'unrotated'}
    if not self.has_ring:
      found.add('all_tokens')
    if self.stats_kind is not None:
      found.add(self.stats)
    return frozenset(found)

  def at_full_budget(self, length: int) -> Self:
    """Rings so long that they drop nothing up to `length` tokens."""
    recent = max(self.recent, length)
    return dataclasses.replace(self, recent=recent, pool_pages=None)

  def check(self, config: Any, capacity: int, batch: int, decode: Any) -> None:
    """Refuses nothing; `init` refuses shapes."""

  def rewindable(self, tokens: int) -> Self:
    if not self.has_ring:
      return self
    return dataclasses.replace(self, slack=max(self.slack, tokens))

  def ring_flags(self, layer: int, n_kv_heads: int) -> np.ndarray:
    """Bool [K]: which kv heads of a layer are ring heads.

    Raises:
      ValueError: flags for this layer are missing or of another model.
    """
    if self.ring_heads is None or self.endless:
      return np.full((n_kv_heads,), self.endless)
    if layer >= len(self.ring_heads):
      raise ValueError(
        f'ring_heads has {len(self.ring_heads)} layers, but {layer=} is asked'
      )
    flags = np.asarray(self.ring_heads[layer], bool)
    if flags.shape != (n_kv_heads,):
      raise ValueError(
        f'ring_heads[{layer}] has {flags.size} kv heads, the model {n_kv_heads}'
      )
    return flags

  def init(self, shape: CacheShape) -> PagedCache:
    """An empty cache; capacity is rounded up to pages.

    Raises:
      ValueError: numbers that do not fit the shape.
    """
    ring = self.ring_flags(shape.layer, shape.n_kv_heads)
    data, seq, model = shape.shards
    width = self._width(shape)
    full = np.sum(~ring.reshape(model, -1), axis=1)  # per model shard
    pool_pages = self.pool_pages
    if pool_pages is None:
      rings = ring.size // model - full
      of_a_row = full * (width // seq) + rings * self.ring_width
      pool_pages = shape.batch // data * int(of_a_row.max())
    shards, rows = data * seq * model, shape.batch * seq
    entries = (shape.batch, shape.n_kv_heads, width)
    logical = width * (self.page // self.logical_page)
    # At least one a shard, though it may be nobody's: a profile can let every
    # head of a layer stream, and arrays without heads have no group.
    heads = max(int(full.max()), 1) * model
    kind = self.stats_kind
    return PagedCache(
      pool=empty_pool(
        pool_pages * shards, self.page, shape.head_dim, self.bits, shape.dtype
      ),
      table=jnp.full(entries, -1, jnp.int32),
      starts=jnp.full(entries, NEVER, jnp.int32),
      used=jnp.zeros((rows,), jnp.int32),
      peak=jnp.zeros((rows,), jnp.int32),
      shared=jnp.zeros((rows * model,), jnp.int32),
      status=jnp.zeros((rows,), jnp.int32),
      ring=jnp.asarray(ring),
      first=jnp.asarray(np.where(ring, self.sink, 0), jnp.int32),
      last=jnp.asarray(np.where(ring, self.recent, EVERYTHING), jnp.int32),
      vacancy=Vacancy.all_free(pool_pages, shards),
      stats=kind
      and kind.zeros(
        (shape.batch, heads, logical, shape.head_dim), shape.dtype
      ),
      config=self,
    )

  def specs(self) -> PagedCache:
    """Batch over "data", kv heads over "model", pages over "seq".

    The pool's leading dim is split over all three; ids in the table are local.
    """
    pool = split(('data', 'seq', 'model'))
    heads = split('data', 'model', 'seq')
    scale = pool if self.bits < 16 else None
    zero = pool if self.bits == 4 else None
    kind = self.stats_kind
    return PagedCache(
      pool=Pages(pool, pool, scale, scale, zero, zero),
      table=heads,
      starts=heads,
      used=ROWS,
      peak=ROWS,
      shared=pool,
      status=ROWS,
      ring=split('model'),
      first=split('model'),
      last=split('model'),
      vacancy=Vacancy(pool, pool),
      stats=kind and kind(heads, heads),
      config=self,
    )

  def _width(self, shape: CacheShape) -> int:
    """Table slots a head has, over all seq shards; equal for all layers."""
    rings = self.ring_width * shape.shards.seq if self.has_ring else 0
    return rings if self.endless else max(shape.pages_per_row(self.page), rings)
