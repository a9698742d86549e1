"""LServe's list in two launches is the one of array operations, step by step.

So is the one whose first launch is that of the append. Interpreted on the CPU;
on a GPU compiled (`-m gpu`).
"""

import dataclasses
import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import append_token, dispatch
from kernels_pallas.page_choice import gpu, reuse
from lcx import sharding
from lcx.cache import CacheShape, Dense, Status
from lcx.methods import shards
from lcx.methods.base import Context
from lcx.methods.listed_pages import is_ring
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
  'one token': (
    TwoWayPaged(**PAGED, ring_heads=RINGS),
    dataclasses.replace(DECODE, budget=32),
  ),
  'looseness': (
    TwoWayPaged(**PAGED, ring_heads=RINGS),
    dataclasses.replace(DECODE, budget=32, looseness=0.7),
  ),
  'moments': (
    TwoWayPaged(**PAGED, ring_heads=RINGS, stats='moments'),
    dataclasses.replace(DECODE, budget=32, scorer='moments'),
  ),
}
MESH = sharding.make_mesh()


def rotate(x, positions):
  del positions
  return x


def steps(config, decode, in_place, most=2):
  """What 14 calls give, of 0 to `most` tokens a row; one row is cut once."""

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
      rules = decode._rules(cache)
      assert reused_pages.serves(q, cache, ctx, rules) == in_place
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
    count = np.array([most if i in (0, 6) else 1, i not in (3, 4)], np.int32)
    if i == 9:
      lengths = np.array([107, lengths[1]], np.int32)
      cache = jax.jit(lambda cache, n: cache.truncate(n))(cache, lengths)
    lengths = lengths + count
    q, k, v = (draw(BATCH, most, heads, H) for heads in (K * G, K, K))
    out, cache, state, trace = call(q, k, v, cache, state, lengths, count)
    yield out, state, trace


def check(name):
  config, decode = CASES[name]
  most = 1 if name == 'one token' else 2
  for mine, theirs in zip(
    list(steps(config, decode, in_place=True, most=most)),
    _array_operations(config, decode, most),
  ):
    chex.assert_trees_all_equal(mine[1], theirs[1])
    chex.assert_trees_all_close(mine, theirs, rtol=1e-5, atol=1e-5)


def _array_operations(config, decode, most):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reuse, 'serves', lambda *args: False)
    return list(steps(config, decode, in_place=False, most=most))


@pytest.mark.parametrize(
  'name',
  [
    'one token',
    'looseness',
    'moments',
    pytest.param('rings', marks=pytest.mark.long),
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


# 53 pages do for the first two that the rows begin, not for the third.
TOGETHER = {
  'few pages': (
    TwoWayPaged(**PAGED, ring_heads=RINGS, pool_pages=53),
    dataclasses.replace(DECODE, budget=32),
  ),
  'int8': (TwoWayPaged(**PAGED, ring_heads=RINGS, bits=8), DECODE),
  'dense': (
    CASES['dense'][0],
    dataclasses.replace(DECODE, budget=24, group='sum'),
  ),
  'moments': (
    TwoWayPaged(**PAGED, ring_heads=RINGS, stats='moments'),
    dataclasses.replace(DECODE, budget=32, scorer='moments'),
  ),
}

# Three programs a row of the bounds; by sums two, of two tiles.
SMALL_TILES = gpu.Sizes(tile_bytes=2048, programs=8)


def poisoned(cache):
  """With NaN in the statistics that no token has entered."""
  pages = jax.tree.leaves(cache.stats)[0].shape[2]
  first = jnp.arange(pages) * (CAPACITY // pages)
  unused = first >= cache.used[:, None]
  stats = jax.tree.map(
    lambda x: jnp.where(unused[:, None, :, None], jnp.nan, x), cache.stats
  )
  return dataclasses.replace(cache, stats=stats)


def single_steps(config, decode, together):
  """Queries, caches, choices and lists of 13 tokens a row, with few rests."""

  @jax.jit
  def call(q, k, v, cache, choice, lengths, count):
    def run(q, k, v, cache, choice, lengths, count):
      at = (lengths - count)[:, None]
      ctx = Context(
        positions=at,
        valid=count[:, None] > 0,
        source=at,
        lengths=lengths,
        layer=jnp.int32(0),
        key=jax.random.key(0),
      )
      rules = decode._rules(cache)
      assert reused_pages.serves(q, cache, ctx, rules)
      ring = cache.ring if is_ring(cache) else None
      work = reused_pages.scoring(choice, q, cache, ctx, rules, ring)
      q, cache, scored = shards.append_scored(
        q, k, v, rotate, cache, ctx, work if together else None
      )
      assert (scored is not None) == together
      choice, *listed = reused_pages.listed(
        choice, q, cache, ctx, rules, work, scored
      )
      return q, cache, choice, listed

    return jax.shard_map(
      run, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False
    )(q, k, v, cache, choice, lengths, count)

  random = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.bfloat16)

  shape = CacheShape(BATCH, K, H, CAPACITY, 'bfloat16')
  at = jnp.broadcast_to(jnp.arange(120, dtype=jnp.int32), (BATCH, 120))
  lengths = np.array([117, 40], np.int32)
  k, v = draw(2, BATCH, 120, K, H)
  cache = jax.jit(lambda *new: poisoned(config.init(shape).append(*new)))(
    k, v, at, lengths
  )
  choice = decode.start(cache, decode.init_state(shape))
  for i in range(13):
    count = np.array([1, i != 3], np.int32)
    lengths = lengths + count
    q, k, v = (draw(BATCH, 1, heads, H) for heads in (K * G, K, K))
    q, cache, choice, listed = call(q, k, v, cache, choice, lengths, count)
    yield q, cache, choice, listed


def check_together(name):
  """Bit for bit, though bounds of the newest page are not read alike."""
  config, decode = TOGETHER[name]
  chosen = []
  for mine, theirs in zip(
    single_steps(config, decode, together=True),
    single_steps(config, decode, together=False),
  ):
    chex.assert_trees_all_equal(mine, theirs)
    chosen.append(np.asarray(mine[2].slots))
  assert any(np.any(a != b) for a, b in itertools.pairwise(chosen))
  if name == 'few pages':
    assert Status.OUT_OF_PAGES in np.asarray(mine[1].status).tolist()


@pytest.mark.long
@pytest.mark.parametrize('name', TOGETHER)
def test_the_append_scores_pages_meanwhile(name, monkeypatch):
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  monkeypatch.setattr(gpu, 'SIZES', SMALL_TILES)
  for module, function in (
    (append_token.gpu, 'append_token'),
    (reuse, 'list_pages'),
  ):
    run = functools.partial(getattr(module, function), interpret=True)
    monkeypatch.setattr(module, function, run)
  check_together(name)


@pytest.mark.gpu
@pytest.mark.parametrize('name', TOGETHER)
def test_it_does_on_a_gpu(name, monkeypatch):
  assert dispatch.prefers('gpu'), 'an older GPU has no such launch'
  monkeypatch.setattr(gpu, 'SIZES', SMALL_TILES)
  check_together(name)


def test_an_append_scores_by_the_statistics_that_it_moves():
  shape = CacheShape(BATCH, K, H, CAPACITY, 'bfloat16')
  cache = TwoWayPaged(**PAGED).init(shape)
  array = jnp.zeros((BATCH, K * G + 2 * K, H), jnp.bfloat16)
  at = jnp.zeros((BATCH, 1), jnp.int32)
  call = gpu.Call(at == 0, None, None)
  numbers = {'n': 2, 'page': PAGE, 'group': 'max', 'moments': True}
  q, low = array[:, None, : K * G], cache.bounds()[0]
  work = gpu.Scoring.of(q, low, cache.page_starts(), at[:, 0], call, **numbers)
  joint = append_token.Joint(array, K)
  with pytest.raises(ValueError, match="'moments', which are scored"):
    cache.append_joint(joint, at, None, work)


@pytest.mark.h100_aot
@pytest.mark.parametrize(
  'decode, logical',
  (
    (LServeDecode(), 16),
    (LServeDecode(looseness=0.7), 16),
    (LServeDecode(scorer='moments'), 16),
    (LServeDecode(scorer='moments', group='sum'), 4),
  ),
)
@pytest.mark.parametrize('bits', (16, pytest.param(8, marks=pytest.mark.long)))
def test_a_list_is_two_launches_with_the_append(
  bits, decode, logical, monkeypatch
):
  """On the shape of Llama 3 8B at 128K."""
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  config = TwoWayPaged(
    profile='alternate', bits=bits, stats=decode.scorer, logical_page=logical
  )
  shape = CacheShape(1, 8, 128, 2**17, 'bfloat16')

  def call(cache, choice, array, q, positions, count):
    held = reuse.Held(choice.slots, choice.newest, choice.age)
    rules, newest = decode._rules(cache), positions[:, 0]
    low, high = jax.tree.leaves(cache.stats)
    work = reuse.scoring(
      q, low, cache.starts, newest, count[:, None] > 0, count, held,
      rules=rules, unscored=cache.ring,
      loose=None if choice.loose is None else choice.loose[:, :, 0],
    )  # fmt: skip
    joint = append_token.Joint(array, 8)
    q, cache, scored = cache.append_joint(joint, positions, count, work)
    table = reuse.Table(cache.table, cache.starts, cache.used)
    listed = reuse.list_pages(
      q, low, high, table, count, held, work, rules=rules, scored=scored
    )
    return q, cache, listed

  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('one',), abstract_device=device)
  cache = jax.eval_shape(lambda: config.init(shape))
  args = (
    cache,
    jax.eval_shape(
      lambda cache: decode.start(cache, decode.init_state(shape)), cache
    ),
    jax.ShapeDtypeStruct((1, 48, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 1, 32, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 1), jnp.int32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(call).trace(*args).lower(lowering_platforms=('cuda',))
  assert lowered.as_text().count('__gpu$xla.gpu.triton') == 2
