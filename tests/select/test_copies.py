"""Lengths that no block divides: copied in part, and to the same lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.select.block_rows import blocks_of
from lcx.select.xattention import xattention
from tests.select import test_selectors as cases

BLOCK, BATCH, HEADS = cases.BLOCK, cases.BATCH, cases.HEADS


def fresh(name, q, k, lengths, budget=0.5):
  """Lists of a program of its own: constants may be patched."""
  run = cases.compiled.__wrapped__(name, budget)
  start = jnp.zeros(BATCH, jnp.int32)
  return run(q, k, start, jnp.asarray(lengths, jnp.int32))


def assert_same(got, want):
  rows = got.blocks.count.shape[2]
  np.testing.assert_array_equal(
    got.blocks.count, want.blocks.count[:, :, :rows]
  )
  assert cases.sets(got.blocks) == {
    at: row for at, row in cases.sets(want.blocks).items() if at[2] < rows
  }
  captured = want.captured[:, :, :rows]
  np.testing.assert_allclose(got.captured, captured, atol=1e-5)


@cases.EVERY
def test_a_length_that_no_block_divides_gives_the_same_lists(name):
  q, k = cases.draw(21)
  lengths = (201, 190)
  want = cases.select(name, q, k, lengths=lengths)
  assert_same(fresh(name, q[:, :201], k[:, :, :201], lengths), want)


@pytest.mark.parametrize('size', [256, 201])
@pytest.mark.parametrize(
  'name',
  ['xattention', 'grouped', pytest.param('fixed', marks=pytest.mark.long)],
)
def test_one_head_at_a_time_gives_the_same_lists(name, size, monkeypatch):
  """As where whole tiles of blocks are wanted of keys that have others."""
  monkeypatch.setattr('lcx.select.xattention._COPIED', 0)
  monkeypatch.setattr('kernels_pallas.block_scores.xla.granule', lambda: 3)
  q, k = cases.draw(22)
  lengths = (201, 190)
  want = cases.select(name, q, k, lengths=lengths)
  assert_same(fresh(name, q[:, :size], k[:, :, :size], lengths), want)


def test_one_head_at_a_time_takes_its_own_threshold(monkeypatch):
  q, k = cases.draw(23)
  run = functools.partial(
    xattention,
    stride=4,
    q_start=jnp.zeros(BATCH, jnp.int32),
    lengths=jnp.asarray(cases.LENGTHS, jnp.int32),
    block_q=BLOCK,
    block_k=BLOCK,
  )
  goals = jnp.asarray([0.2, 0.5, 0.8, 1.0])
  want = jax.jit(lambda q, k: run(q, k, threshold=goals))(q, k)
  monkeypatch.setattr('lcx.select.xattention._COPIED', 0)
  monkeypatch.setattr('kernels_pallas.block_scores.xla.granule', lambda: 3)
  assert_same(jax.jit(lambda q, k: run(q, k, threshold=goals))(q, k), want)
  mean = np.mean(want.blocks.count, axis=(0, 2))
  assert np.all(np.diff(mean) > 0)


@pytest.mark.parametrize('size', [5, 16, 21, 24])
def test_blocks_are_cut_with_zeros_past_the_end(size):
  x = np.arange(1, 3 * size * 2 + 1, dtype=np.float32).reshape(3, size, 2)
  padded = np.pad(x, ((0, 0), (0, -size % 8), (0, 0)))
  count = -(-size // 8)
  for first in range(count):
    for n in range(1, count - first + 1):
      got = blocks_of(jnp.asarray(x), 1, first, n, 8, {0: (1, 2)})
      np.testing.assert_array_equal(got, padded[1:, first * 8 :][:, : n * 8])
