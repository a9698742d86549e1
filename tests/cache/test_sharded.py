"""A cache in pieces on a mesh holds what one cache holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.keys import NEVER, dequantise
from lcx.cache import CacheShape, Dense, Paged, Shards, Status
from lcx.sharding import make_mesh, named
from tests.cache.reading import DIM, HEADS, KEYS, VALUES

SMALL = dict(page=8, logical_page=4, sink=5, recent=9, slack=4)
MIXED = ((False, True),)
CONFIGS = {
  'dense': Dense(page=8, stats=True),
  'paged': Paged(**SMALL),
  'mixed': Paged(**SMALL, ring_heads=MIXED),
}
LENGTHS = np.array([30, 9, 32, 17], np.int32)
PROMPT, TOTAL = 32, 40


def by_position(cache):
  """[B K TOTAL 2H] keys and values at their positions; 0 where not held."""
  p, ids = cache.pages(), cache.page_ids()
  k = dequantise(p.k, p.k_scale, p.k_zero, jnp.float32)
  v = dequantise(p.v, p.v_scale, p.v_zero, jnp.float32)
  pages = jnp.concatenate([k, v], axis=-1)[jnp.maximum(ids, 0)]
  at = cache.page_starts()[..., None] + jnp.arange(cache.page)
  at = jnp.where(at > cache.last_position()[:, None, None, None], NEVER, at)
  out = jnp.zeros((*ids.shape[:2], TOTAL, 2 * DIM))
  b = jnp.arange(ids.shape[0])[:, None, None, None]
  h = jnp.arange(ids.shape[1])[:, None, None]
  return out.at[b, h, at].add(pages, mode='drop')


@pytest.mark.mesh
@pytest.mark.parametrize('name', CONFIGS)
def test_pieces_make_the_whole(name):
  mesh = make_mesh(2, 2, 2)
  config = CONFIGS[name]
  shape = CacheShape(4, HEADS, DIM, 96, jnp.float32, shards=Shards(2, 2, 2))
  specs = config.specs()
  cache = jax.device_put(config.init(shape), named(mesh, specs))

  def serve(cache, k, v, positions, lengths):
    """Prompt by shards of the sequence, then 3 tokens on the last, 1 cut."""
    count = jnp.sum(positions < lengths[:, None], axis=1, dtype=jnp.int32)
    cache = cache.append(k, v, positions, count)
    last = jax.lax.axis_index('seq') == 1
    new = lengths[:, None] + jnp.arange(3, dtype=jnp.int32)
    kv = [
      jnp.ones((len(lengths), 3, k.shape[2], DIM)) * (new + 1)[..., None, None]
    ] * 2
    cache = cache.append(*kv, new, jnp.where(last, 3, jnp.zeros_like(lengths)))
    cache = cache.truncate(cache.used - jnp.where(last, 1, 0))
    held = jax.lax.psum(by_position(cache), 'seq')
    return cache, held

  tokens = P('data', 'seq', 'model')
  run = jax.jit(
    jax.shard_map(
      serve,
      mesh=mesh,
      in_specs=(specs, tokens, tokens, P('data', 'seq'), P('data')),
      out_specs=(specs, P('data', 'model')),
      check_vma=False,
    ),
    donate_argnums=0,
  )
  index = np.arange(4)[:, None] * 100 + np.arange(PROMPT)
  positions = np.broadcast_to(np.arange(PROMPT, dtype=np.int32), (4, PROMPT))
  cache, held = run(cache, KEYS[index], VALUES[index], positions, LENGTHS)
  assert not np.asarray(cache.status).any()
  for b, n in enumerate(LENGTHS):
    for h in range(HEADS):
      ring = name == 'mixed' and MIXED[0][h]
      for s in range(TOTAL):
        if s >= n + 2:
          want = np.zeros(2 * DIM)
        elif s >= n:
          want = np.full(2 * DIM, s + 1.0)
        elif ring and not (s < 5 or s > n + 2 - 9):
          continue
        else:
          want = np.r_[KEYS[index[b, s], h], VALUES[index[b, s], h]]
        np.testing.assert_allclose(held[b, h, s], want, rtol=1e-6)


@pytest.mark.mesh
def test_shards_agree_on_who_gets_pages():
  """A row that finds no page on one shard of heads gets none on the other."""
  mesh = make_mesh(1, 1, 2)
  config = dataclasses.replace(
    CONFIGS['mixed'], pool_pages=5, agree_over='model'
  )
  shape = CacheShape(1, HEADS, DIM, 64, jnp.float32, shards=Shards(1, 1, 2))
  specs = config.specs()
  cache = jax.device_put(config.init(shape), named(mesh, specs))
  tokens = P('data', 'seq', 'model')
  append = jax.jit(
    jax.shard_map(
      lambda c, k, p: c.append(k, k, p),
      mesh=mesh,
      in_specs=(specs, tokens, P('data', 'seq')),
      out_specs=specs,
      check_vma=False,
    )
  )
  for step in range(6):  # the full head wants a 6th page, the ring has 4
    positions = np.arange(8, dtype=np.int32)[None] + 8 * step
    cache = append(cache, jnp.ones((1, 8, HEADS, DIM)), positions)
  for piece in cache.used.addressable_shards:
    np.testing.assert_array_equal(piece.data, [40])
  for piece in cache.status.addressable_shards:
    np.testing.assert_array_equal(piece.data, [Status.OUT_OF_PAGES])
