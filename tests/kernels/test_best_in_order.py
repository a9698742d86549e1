"""The n best in order: every implementation finds the definition's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import nth_best
from kernels_pallas.best_in_order import best_in_order, gpu, reference, xla
from tests.kernels.test_page_choice import hard_scores, lower

IMPLEMENTATIONS = {
  'xla': xla.best_in_order,
  'gpu': functools.partial(gpu.best_in_order, interpret=True),
}


def check(run, width, n):
  x = jnp.asarray(hard_scores(np.random.default_rng(width + n), width))
  want = reference.best_in_order(x, n)
  for got, definition in zip(run(x), want):
    np.testing.assert_array_equal(got, definition)
  assert np.asarray(want[1])[4] == 0 < np.asarray(want[1])[0]


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize(
  'width, n', ((1, 1), (37, 5), (37, 37), (1500, 64), (2100, 700))
)
def test_it_equals_the_definition(name, width, n):
  check(jax.jit(lambda x: IMPLEMENTATIONS[name](x, n)), width, n)


@pytest.mark.parametrize('width, n', ((1700, 30), (601, 32), (8 * 256 + 1, 1)))
def test_long_rows_are_narrowed_to_the_same(monkeypatch, width, n):
  """Groups, groups of groups, and one that is not full."""
  monkeypatch.setattr(gpu, 'MOST', 256)
  assert gpu.coarser(width) == (1 if width < 2048 else 2)
  check(jax.jit(lambda x: IMPLEMENTATIONS['gpu'](x, n)), width, n)


@pytest.mark.parametrize('width', (1, 8, 9, 1024, 1025, 16384, 16448, 32768))
def test_pieces_follow_one_another(width):
  found = nth_best.pieces(width, 8, 128, 1024)
  end = 0
  for first, lanes in found:
    assert first == end and lanes & (lanes - 1) == 0 and lanes <= 1024
    end = first + lanes * 8
  assert width <= end < width + 128 * 8


def test_rows_of_several_pieces(monkeypatch):
  monkeypatch.setattr(gpu, '_LANES', (4, 16))
  check(jax.jit(lambda x: IMPLEMENTATIONS['gpu'](x, 70)), 700, 70)


def test_nothing_is_read_that_is_not_due():
  x = jnp.asarray(hard_scores(np.random.default_rng(0), 50))
  due = jnp.arange(len(x)) % 2 == 0
  got, count = gpu.best([x], 9, due, interpret=True)
  want, total = reference.best_in_order(x, 9)
  np.testing.assert_array_equal(got[::2], want[::2])
  np.testing.assert_array_equal(count[::2], total[::2])


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match='float32'):
    best_in_order(jnp.zeros((2, 3), jnp.bfloat16), 1)
  with pytest.raises(ValueError, match='within 1 and 3'):
    best_in_order(jnp.zeros((2, 3), jnp.float32), 4)
  assert 'exceeds 4096' in gpu.refuse('', jnp.zeros((1, 40000)), 5000)


@pytest.mark.gpu
@pytest.mark.parametrize(
  'width, n', ((8192, 2048), (32768, 2048), (131584, 2048), (1 << 20, 2048))
)
def test_on_a_gpu(width, n):
  check(jax.jit(lambda x: best_in_order(x, n, implementation='gpu')), width, n)


@pytest.mark.h100_aot
@pytest.mark.parametrize('width, launches', ((8192, 1), (131584, 2)))
def test_it_lowers_through_triton(width, launches):
  x = jax.ShapeDtypeStruct((2, width), jnp.float32)
  lowered = lower(lambda x: gpu.best_in_order(x, 2048), [x])
  assert lowered.as_text().count('__gpu$xla.gpu.triton') == launches
