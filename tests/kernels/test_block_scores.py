"""block_lse: every implementation against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import block_scores
from kernels_pallas.block_scores import gpu, reference, xla
from tests import oracle

SHAPE = {'b': 2, 'kv': 2, 'group': 3, 'n_rows': 9, 'n_cells': 48, 'f': 16}


def case(seed=0, *, b, kv, group, n_rows, n_cells, f, dtype=jnp.float32):
  """Rows that see nothing, one cell, some, and all; unseen cells are loud."""
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=(b, kv, group, n_rows, f)) / np.sqrt(f)
  cells = rng.normal(size=(b, kv, n_cells, f)) * 4
  last = np.sort(rng.integers(-1, n_cells, (b, n_rows)), axis=1)
  last[:, 0], last[:, 1] = -1, 0
  cells[:, :, last.max() + 1 :] *= 1e3
  factor = rng.uniform(0.5, 2, (b, n_rows))
  return (
    jnp.asarray(rows, dtype),
    jnp.asarray(cells, dtype),
    jnp.asarray(last, jnp.int32),
    jnp.asarray(factor, jnp.float32),
  )


def expected(rows, cells, last, factor, per_block):
  rows, cells, factor = map(oracle.wide, (rows, cells, factor))
  scores = np.einsum('bkgrf,bkcf->bkgrc', rows, cells)
  scores *= factor[:, None, None, :, None]
  seen = np.arange(cells.shape[2]) <= np.asarray(last)[..., None]
  scores = np.where(seen[:, None, None], scores, -np.inf)
  scores = scores.reshape(*scores.shape[:-1], -1, per_block)
  return np.logaddexp2.reduce(scores, axis=-1)


def check(run, args, per_block, kind='float32', **kwargs):
  got = np.asarray(run(*args, per_block=per_block, **kwargs), np.float64)
  want = expected(*args, per_block)
  none = want == -np.inf
  # A share of 2**-100 of its row is as good as none.
  none |= want < want.max(axis=-1, keepdims=True, initial=-1e9) - 100
  assert np.all(got[want == -np.inf] == -np.inf)
  _, tolerance = oracle.TOLERANCE[kind]
  size = max(1.0, np.abs(want[~none]).max(initial=0))
  np.testing.assert_allclose(got[~none], want[~none], atol=tolerance * size)


@pytest.mark.parametrize('run', [reference.block_lse, xla.block_lse])
@pytest.mark.parametrize('per_block', [1, 4, 8])
def test_every_block_weighs_what_its_cells_do(run, per_block):
  check(jax.jit(run, static_argnames='per_block'), case(**SHAPE), per_block)


@functools.cache
def tiled(tile):
  """A program of its own for each size of tile, which is read in tracing."""
  run = functools.partial(block_scores.block_lse, implementation='xla')
  return jax.jit(run, static_argnames='per_block')


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 4]))
def test_ranges_and_tiles_change_nothing(seed, tile):
  args = case(seed, **SHAPE)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, '_TILE', tile * 8 * SHAPE['f'])
    patch.setattr(xla, '_RUNG', 8)
    check(tiled(tile), args, 8)


def test_scores_above_the_largest_float16_count():
  args = case(**SHAPE, dtype=jnp.float16)
  rows, cells, last, factor = args[0] * 250, args[1] * 30, *args[2:]
  lse = block_scores.block_lse(rows, cells, last, factor / 1e4, per_block=8)
  assert not np.any(np.isnan(lse)) and np.max(lse) > 7


def test_what_does_not_fit_is_refused():
  rows, cells, last, factor = case(**SHAPE)
  lse = block_scores.block_lse
  with pytest.raises(ValueError, match='per_block=5 must divide 48'):
    lse(rows, cells, last, factor, per_block=5)
  with pytest.raises(ValueError, match='differ in B, K or dtype'):
    lse(rows, cells[:1], last, factor, per_block=8)
  with pytest.raises(ValueError, match='last.shape'):
    lse(rows, cells, last[:, 1:], factor, per_block=8)
  with pytest.raises(ValueError, match='neither bfloat16 nor float16'):
    lse(rows, cells, last, factor, per_block=8, implementation='gpu')


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('per_block', [4, 8, 16])
def test_the_hopper_kernel_equals_the_oracle(per_block, dtype, monkeypatch):
  """Rows and cells that do not fill a tile, more tiles than one a program."""
  monkeypatch.setattr(gpu, 'WAVES', 0)
  shape = {'b': 2, 'kv': 2, 'group': 3, 'n_rows': 130, 'f': 256}
  args = case(n_cells=16 * 83, dtype=dtype, **shape)
  assert gpu.refuse('block_lse', *args, per_block=per_block) is None
  run = jax.jit(gpu.block_lse, static_argnames='per_block')
  for _ in range(3):
    check(run, args, per_block, jnp.dtype(dtype).name)


@pytest.mark.gpu
def test_the_hopper_kernel_repeats_itself_over_many_tiles():
  shape = {'b': 1, 'kv': 8, 'group': 4, 'n_rows': 512, 'n_cells': 8192}
  args = case(f=2048, dtype=jnp.bfloat16, **shape)
  run = jax.jit(gpu.block_lse, static_argnames='per_block')
  first = np.asarray(run(*args, per_block=8))
  for _ in range(5):
    np.testing.assert_array_equal(run(*args, per_block=8), first)
  want = jax.jit(xla.block_lse, static_argnames='per_block')(*args, per_block=8)
  heavy = first > first.max(axis=-1, keepdims=True) - 20
  # XLA's scores are rounded to bfloat16.
  np.testing.assert_allclose(
    first[heavy], np.asarray(want)[heavy], rtol=2e-2, atol=0.2
  )
