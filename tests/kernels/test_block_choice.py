"""block_choice on a GPU lists what the search in XLA lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import block_choice
from kernels_pallas.block_choice import gpu, xla


def case(seed, shape, *, ties):
  """Rows that reach nothing, one block, some and all."""
  rng = np.random.default_rng(seed)
  columns = shape[-1]
  if ties:  # sums of eighths are exact: no rounding hides behind a tie
    score = rng.integers(0, 5, shape) / 8
  else:
    score = rng.exponential(size=shape) ** 3
  last = rng.integers(-1, columns, (*shape[:-1], 1))
  reachable = np.arange(columns) <= last
  forced = reachable & (rng.random(shape) < 0.05)
  return {
    'score': jnp.asarray(score, jnp.float32),
    'reachable': jnp.asarray(reachable),
    'forced': jnp.asarray(forced),
    'always': jnp.asarray(rng.random(shape) < 0.1),
    'mass': jnp.asarray(rng.random(shape), jnp.float32),
    'budget': jnp.asarray(
      rng.integers(0, columns + 1, (*shape[:-1], 1)), jnp.int32
    ),
    'threshold': jnp.asarray(
      rng.choice([0.25, 0.5, 0.75, 1.0], (*shape[:-1], 1)), jnp.float32
    ),
  }


STATIC = {'static_argnames': ('width', 'bounded')}
DEFINITION = jax.jit(xla.choose_blocks, **STATIC)


def check(run, given, width, bounded):
  score = given['score']
  rest = {'threshold': None, 'always': None, 'mass': None} | given
  rest.pop('score')
  for name in ('reachable', 'forced'):
    rest[name] = np.broadcast_to(rest[name], score.shape)
  got = run(score, **rest, width=width, bounded=bounded)
  want = DEFINITION(score, **rest, width=width, bounded=bounded)
  np.testing.assert_array_equal(got.count, want.count)
  np.testing.assert_array_equal(got.ids, want.ids)
  np.testing.assert_allclose(got.captured, want.captured, atol=1e-5)
  np.testing.assert_allclose(got.cut, want.cut, atol=1e-5)


def judge(run, seed, shape, width, bounded):
  for ties in (True, False):
    given = case(seed, shape, ties=ties)
    check(run, given, width, bounded)
    fixed = {k: given[k] for k in ('score', 'reachable', 'forced', 'budget')}
    check(run, fixed, width, bounded)


@pytest.mark.parametrize(
  ('shape', 'width', 'bounded'),
  [
    ((7, 24), 24, False),
    pytest.param((2, 3, 70), 9, True, marks=pytest.mark.long),
    ((3, 129), 40, True),
  ],
)
def test_interpreted(shape, width, bounded):
  run = functools.partial(gpu.choose_blocks, interpret=True)
  judge(jax.jit(run, **STATIC), 0, shape, width, bounded)


@pytest.mark.gpu
@pytest.mark.parametrize(
  ('shape', 'width', 'bounded'),
  [((7, 24), 24, False), ((2, 3, 70), 9, True), ((64, 1024), 1024, False),
   ((40, 8192), 256, True), ((512, 2048), 300, True)],
)  # fmt: skip
def test_on_a_gpu(shape, width, bounded):
  judge(gpu.choose_blocks, 1, shape, width, bounded)


def test_defaults_are_filled_in():
  given = case(3, (5, 16), ties=True)
  run = functools.partial(
    block_choice.choose_blocks,
    reachable=np.ones(16, bool),
    forced=np.arange(16) == 0,
    budget=4,
    width=8,
  )
  got = jax.tree.map(np.asarray, jax.jit(run)(given['score']))
  assert got.ids.shape == (5, 8) and got.ids.dtype == jnp.int32
  np.testing.assert_array_equal(got.count, 4)
  np.testing.assert_array_equal(got.ids[:, 0], 0)
  assert jax.tree.all(jax.tree.map(lambda x: bool((x >= 0).all()), got))
