"""What is kept per token: caches of one layer, made by frozen configs."""

from lcx.cache.base import Cache, CacheConfig, CacheShape, Shards, Status
from lcx.cache.dense import Dense, DenseCache

# Caches that a composition can name.
CONFIGS = {
  'dense': Dense(),
}

__all__ = [
  'CONFIGS',
  'Cache',
  'CacheConfig',
  'CacheShape',
  'Dense',
  'DenseCache',
  'Shards',
  'Status',
]
