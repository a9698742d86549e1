"""What is kept per token: caches of one layer, made by frozen configs."""

from lcx.cache.base import Cache, CacheConfig, CacheShape, Shards, Status
from lcx.cache.dense import Dense, DenseCache
from lcx.cache.host import Host, HostCache
from lcx.cache.paged import Paged
from lcx.cache.paged_cache import PagedCache

# Caches that a composition can name.
CONFIGS = {
  'dense': Dense(),
  'paged': Paged(),
  'paged_int8': Paged(bits=8),
  'paged_int4': Paged(bits=4),
  'host': Host(),
}

__all__ = [
  'CONFIGS',
  'Cache',
  'CacheConfig',
  'CacheShape',
  'Dense',
  'DenseCache',
  'Host',
  'HostCache',
  'Paged',
  'PagedCache',
  'Shards',
  'Status',
]
