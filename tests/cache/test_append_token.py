"""The append of one token in one launch does what `append` does."""

import dataclasses
import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import append_token, dispatch
from lcx.cache import CacheShape, Dense, Paged, Status

SMALL = dict(page=8, logical_page=4, sink=5, recent=9, slack=4)
RINGS = ((False, True, False),)
CONFIGS = {
  'dense': Dense(page=8),
  'dense-bounds': Dense(page=8, stats=True),
  'paged': Paged(**SMALL),
  'moments': Paged(**SMALL, stats='moments'),
  'mixed-int8': Paged(**SMALL, bits=8, ring_heads=RINGS),
  'rings-int4': Paged(**SMALL, bits=4, ring_heads='all'),
  'few-pages': Paged(**SMALL, ring_heads=RINGS, pool_pages=17),
}
ROWS, HEADS, GROUP, DIM, STEPS = 3, 3, 2, 12, 40


def empty(config):
  return config.init(
    CacheShape(
      batch=ROWS,
      n_kv_heads=HEADS,
      head_dim=DIM,
      capacity=48,
      dtype='bfloat16',
    )
  )


def poisoned(cache):
  """With NaN in every floating point page: recycled ones may hold some."""

  def fill(x):
    return jnp.full_like(x, jnp.nan) if x.dtype == jnp.bfloat16 else x

  if isinstance(cache.config, Dense):
    return dataclasses.replace(cache, k=fill(cache.k), v=fill(cache.v))
  pool = jax.tree.map(fill, cache.pool)
  return dataclasses.replace(cache, pool=pool)


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  run = functools.partial(append_token.gpu.append_token, interpret=True)
  monkeypatch.setattr(append_token.gpu, 'append_token', run)


def appended(cache, k, v, positions, count):
  return cache.append(k, v, positions, count)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.long)
    if name in ('dense-bounds', 'rings-int4')
    else name
    for name in CONFIGS
  ],
)
def test_one_launch_appends_like_array_operations(name, interpreted):
  check(name)


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('dense', 'moments', 'mixed-int8')
    else pytest.param(name, marks=pytest.mark.long)
    for name in CONFIGS
  ],
)
def test_it_appends_beside_queries(name, interpreted):
  check_beside(name)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.gpu
def test_it_appends_beside_queries_on_a_gpu(name):
  assert dispatch.prefers('gpu'), 'an older GPU would compare XLA with itself'
  check_beside(name)


def check_beside(name):
  cache = poisoned(empty(CONFIGS[name]))
  random = np.random.default_rng(0)
  shape = (2, ROWS, 1, (GROUP + 2) * HEADS, DIM)
  for x in jnp.asarray(random.normal(size=shape), 'bfloat16'):
    q, k, v = jnp.split(x, [GROUP * HEADS, (GROUP + 1) * HEADS], axis=2)
    args = q, k, v, np.asarray(cache.used)[:, None], np.array([1, 0, 1])
    want = jax.jit(_without_kernel)(cache, *args[1:])
    jaxpr = jax.make_jaxpr(beside)(cache, *args)
    assert 'concatenate' in str(jaxpr), 'they are not joined'
    got, cache = jax.jit(lambda *args: beside(*args))(cache, *args)
    chex.assert_trees_all_equal((got, cache), (q, want))


def beside(cache, q, k, v, *args):
  assert cache.takes_joint(q, k, v)
  return cache.append_joint(append_token.Joint.of(q, k, v), *args)[:2]


@pytest.mark.gpu
@pytest.mark.parametrize('name', CONFIGS)
def test_it_does_on_a_gpu(name):
  assert dispatch.prefers('gpu'), 'an older GPU would compare XLA with itself'
  check(name)


def check(name):
  plain = jax.jit(lambda *args: _without_kernel(*args))
  fused = jax.jit(lambda *args: appended(*args))
  random = np.random.default_rng(0)
  mine = theirs = poisoned(empty(CONFIGS[name]))
  for step in range(STEPS):
    k, v = jnp.asarray(random.normal(size=(2, ROWS, 1, HEADS, DIM)), 'bfloat16')
    used = np.asarray(mine.used)
    # Some rows rest; row 2 leaves gaps, which are allowed between pages.
    count = (random.random(ROWS) < 0.9).astype(np.int32)
    positions = used + (np.arange(ROWS) == 2) * (step // 12)
    args = k, v, positions[:, None].astype(np.int32), count
    mine, theirs = fused(mine, *args), plain(theirs, *args)
    chex.assert_trees_all_equal(mine, theirs)
  ended = set(np.asarray(mine.status).tolist())
  assert Status.POSITION_GAP in ended
  if name == 'few-pages':
    assert Status.OUT_OF_PAGES in ended
    assert int(np.asarray(mine.used).max()) > 8


def _without_kernel(*args):
  with mock.patch.object(append_token, 'serves', return_value=False):
    return appended(*args)


@pytest.mark.h100_aot
@pytest.mark.parametrize('name', CONFIGS)
def test_it_lowers_for_a_gpu(name, monkeypatch):
  monkeypatch.setattr(dispatch, '_order', lambda: ('gpu', 'xla'))
  queries, tokens = (
    jax.ShapeDtypeStruct((ROWS, 1, heads, DIM), jnp.bfloat16)
    for heads in (GROUP * HEADS, HEADS)
  )
  rows = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32)
  h100 = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=h100)
  with jax.sharding.use_abstract_mesh(mesh):
    jax.export.export(
      jax.jit(
        lambda cache, q, *args: (
          cache.append(*args),
          beside(cache, q, *args),
        )
      ),
      platforms=['cuda'],
      disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call('__gpu$xla.gpu.triton')
      ],
    )(
      jax.eval_shape(lambda: empty(CONFIGS[name])),
      queries,
      *(tokens,) * 2,
      rows,
    )
