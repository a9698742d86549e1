"""The merge of splits in one launch, interpreted: what `merge_axis` gives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.partial import Partial, merge_axis
from kernels_pallas.selected_token.merge import merge_splits


def check(shape, queries, **how):
  b, kv, splits, _, width = shape
  rng = np.random.default_rng(0)
  out = rng.normal(size=shape).astype(np.float32)
  lse = 3 * rng.normal(size=(b, kv, splits, width)).astype(np.float32)
  empty = rng.random(lse.shape) < 0.3
  empty[0, 0, :, 0] = True  # a query that sees nothing
  lse[empty] = -np.inf
  out = np.where(empty[:, :, :, None], 0, out)
  run = functools.partial(merge_splits, queries=queries, **how)
  got = jax.tree.map(np.asarray, jax.jit(run)(out, lse))
  part = Partial(np.swapaxes(out, -1, -2), lse)
  want = jax.jit(merge_axis, static_argnames='axis')(part, axis=2)
  want = jax.tree.map(np.asarray, want)
  chex.assert_trees_all_close(got, first(want, queries), atol=2e-6, rtol=2e-6)
  assert (got.lse[0, 0, 0] == -np.inf) and not np.any(got.out[0, 0, 0])


def test_another_dtype():
  shape = (1, 2, 5, 64, 8)
  out = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  lse = jnp.zeros((1, 2, 5, 8), jnp.float32)
  got = merge_splits(out, lse, 3, out_dtype=jnp.bfloat16, interpret=True)
  want = merge_splits(out, lse, 3, interpret=True)
  np.testing.assert_array_equal(got.out, want.out.astype(jnp.bfloat16))


def first(part, queries):
  return Partial(part.out[:, :, :queries], part.lse[:, :, :queries])


SHAPES = [
  ((1, 8, 16, 128, 8), 4),
  ((2, 2, 66, 64, 8), 7),
  ((1, 2, 5, 256, 24), 20),
  ((1, 1, 33, 128, 64), 64),
  ((1, 2, 1, 64, 8), 1),
  ((1, 1, 140, 16, 64), 50),  # more than are read at once
]


@pytest.mark.parametrize(('shape', 'queries'), SHAPES)
def test_interpreted(shape, queries):
  check(shape, queries, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize(('shape', 'queries'), SHAPES)
def test_on_a_gpu(shape, queries):
  check(shape, queries)
