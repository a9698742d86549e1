"""LServe's list in two launches is the one of array operations, step by step.

Interpreted on the CPU; on a GPU compiled (`-m gpu`).
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas.page_choice import reuse
from lcx import sharding
from lcx.cache import CacheShape, Dense
from lcx.methods.base import Context
from lcx.methods.lserve import LServeDecode, TwoWayPaged
from lcx.select import reused_pages

BATCH, K, G, H, PAGE, CAPACITY = 2, 3, 2, 64, 8, 192
RINGS = ((False, True, False),)
PAGED: dict[str, Any] = {
  'page': PAGE,
  'logical_page': 4,
  'sink': 8,
  'recent': 12,
  'slack': 4,
}
DECODE = LServeDecode(budget=48, sink=4, recent=12, reuse=4)
CASES = {
  'rings': (TwoWayPaged(**PAGED, ring_heads=RINGS), DECODE),
  'short lists': (
    TwoWayPaged(**PAGED, ring_heads=RINGS),
    # A ring has more pages than the list of a head with bounds.
    dataclasses.replace(DECODE, budget=16, recent=9, reuse=1),
  ),
  'dense': (
    Dense(page=PAGE, stats=True),
    dataclasses.replace(DECODE, group='sum', reuse=17),
  ),
}
MESH = sharding.make_mesh()


def rotate(x, positions):
  del positions
  return x


def steps(config, decode, in_place):
  """What 14 calls give, of 0 to 2 tokens a row; one row is cut between two."""

  @jax.jit
  def call(q, k, v, cache, state, lengths, count):
    def run(q, k, v, cache, state, lengths, count):
      index = jnp.arange(q.shape[1], dtype=jnp.int32)
      at = (lengths - count)[:, None] + index
      ctx = Context(
        positions=at,
        valid=index < count[:, None],
        source=at,
        lengths=lengths,
        layer=jnp.int32(0),
        key=jax.random.key(0),
        trace=True,
      )
      assert reused_pages.serves(q, cache, ctx) == in_place
      out, cache, state, trace = decode.attend(
        q, k, v, rotate, cache, state, ctx
      )
      # Queries that do not count may give anything.
      return jnp.where(ctx.valid[..., None, None], out, 0), cache, state, trace

    return jax.shard_map(
      run, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False
    )(q, k, v, cache, state, lengths, count)

  random = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

  cache = config.init(CacheShape(BATCH, K, H, CAPACITY, 'float32'))
  at = jnp.broadcast_to(jnp.arange(120, dtype=jnp.int32), (BATCH, 120))
  lengths = np.array([117, 40], np.int32)
  k, v = draw(2, BATCH, 120, K, H)
  cache = jax.jit(lambda cache, *new: cache.append(*new))(
    cache, k, v, at, lengths
  )
  shape = CacheShape(BATCH, K, H, CAPACITY, 'float32')
  state = decode.start(cache, decode.init_state(shape))
  for i in range(14):
    count = np.array([2 if i in (0, 6) else 1, i not in (3, 4)], np.int32)
    if i == 9:
      lengths = np.array([107, lengths[1]], np.int32)
      cache = jax.jit(lambda cache, n: cache.truncate(n))(cache, lengths)
    lengths = lengths + count
    q, k, v = (draw(BATCH, 2, heads, H) for heads in (K * G, K, K))
    out, cache, state, trace = call(q, k, v, cache, state, lengths, count)
    yield out, state, trace


def check(name):
  config, decode = CASES[name]
  for mine, theirs in zip(
    list(steps(config, decode, in_place=True)),
    _array_operations(config, decode),
  ):
    chex.assert_trees_all_equal(mine[1], theirs[1])
    chex.assert_trees_all_close(mine, theirs, rtol=1e-5, atol=1e-5)


def _array_operations(config, decode):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reuse, 'serves', lambda *args: False)
    return list(steps(config, decode, in_place=False))


@pytest.mark.parametrize(
  'name',
  [
    'rings',
    pytest.param('short lists', marks=pytest.mark.long),
    pytest.param('dense', marks=pytest.mark.long),
  ],
)
def test_two_launches_list_like_array_operations(name, monkeypatch):
  run = functools.partial(reuse.list_pages, interpret=True)
  monkeypatch.setattr(reuse, 'list_pages', run)
  monkeypatch.setattr(reuse, 'serves', lambda *args: True)
  check(name)


@pytest.mark.gpu
@pytest.mark.parametrize('name', CASES)
def test_they_do_on_a_gpu(name):
  check(name)
