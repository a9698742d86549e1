"""The plans of the Hopper kernels, by brute force: each visible key once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas import mosaic_gpu
from kernels_pallas.block_sparse import EVERYTHING, BlockList
from kernels_pallas.block_sparse import gpu as block_sparse_gpu
from kernels_pallas.passing_block import gpu as passing_block_gpu
from tests import oracle

TILE_Q = mosaic_gpu.TILE_Q
# Shapes are drawn: one program for each costs less than one for each operation.
PLAN = jax.jit(block_sparse_gpu.plan_tiles, static_argnames=('t', 'tile_k'))
PASSING_PLAN = jax.jit(passing_block_gpu.plan_tiles, static_argnames='tile_k')


def streamed(plan, ids, at, parts, stride):
  """Full and masked tiles of one query tile, as the kernel walks them."""
  b, n, tile = at
  one = {
    name: int(x[b, n if x.shape[1] > 1 else 0, tile])
    for name, x in plan._asdict().items()
  }

  def interval(name):
    return range(one[name], one[name] + one[f'n_{name}'])

  full = [*interval('full0'), *interval('full1')]
  for e in range(one['n_list']):
    block = int(ids[b, n, tile // stride, one['list0'] + e // parts])
    full.append(block * parts + e % parts)
  masked = [
    x for name in ('masked0', 'masked1', 'masked2') for x in interval(name)
  ]
  assert len(set(full + masked)) == len(full + masked), 'a tile comes twice'
  return full, masked, one


def seen_by(full, masked, one, first, stop, s, tile_k):
  """The kernel's rule, row by row: [rows s]."""
  key = np.arange(s)
  seen = np.isin(key // tile_k, full)[None] & np.ones((len(first), 1), bool)
  for e, j in enumerate(masked):
    sink = (j + 1) * tile_k if one['listed'] >> e & 1 else one['sink']
    here = key // tile_k == j
    rule = (key >= first[:, None] - one['window']) | (key < sink)
    seen |= here & rule & (key < stop[:, None])
  return seen & (stop > 0)[:, None]


@given(st.integers(0, 10**6))
def test_block_sparse_plan(seed):
  rng = np.random.default_rng(seed)
  tile_k = int(rng.choice([64, 128]))
  block_k = tile_k * int(rng.choice([1, 2, 8]))
  block_q = TILE_Q * int(rng.choice([1, 2]))
  t = int(rng.integers(1, 700))
  s = t + int(rng.integers(0, 600))
  n, width = 3, int(rng.choice([0, 3, 9]))
  q_start = np.array([rng.integers(0, s - t + 1), s - t])
  lengths = np.array([rng.integers(0, s + 1), s])
  tb, count_k = -(-t // block_q), -(-s // block_k)
  ids = np.zeros((2, n, tb, width), np.int32)
  count = np.zeros((2, n, tb), np.int32)
  for at in np.ndindex(2, n, tb):
    count[at] = rng.integers(0, min(width, count_k) + 1)
    ids[at][: count[at]] = np.sort(rng.permutation(count_k)[: count[at]])
  blocks = BlockList(
    jnp.asarray(ids),
    jnp.asarray(count),
    jnp.asarray(rng.choice([0, 1, 64, 100, 300, 1024], n), jnp.int32),
    jnp.asarray(rng.choice([0, 1, 64, 200, 513, EVERYTHING], n), jnp.int32),
    block_q,
    block_k,
  )
  plan = PLAN(
    blocks,
    jnp.asarray(q_start, jnp.int32),
    jnp.asarray(lengths, jnp.int32),
    t,
    tile_k,
  )
  plan = jax.tree.map(np.asarray, plan)
  want = oracle.block_mask(blocks, q_start, lengths, t, s)
  parts, tiles = block_k // tile_k, -(-t // TILE_Q)
  stride = -(-tiles // tb)
  for at in np.ndindex(2, n, tiles):
    full, masked, one = streamed(plan, ids, at, parts, stride)
    assert len(masked) <= block_sparse_gpu.most_masked(tile_k, parts)
    rows = np.arange(at[2] * TILE_Q, min(t, (at[2] + 1) * TILE_Q))
    p = q_start[at[0]] + rows
    stop = np.where(p < lengths[at[0]], p + 1, 0)
    got = seen_by(full, masked, one, p + 1, stop, s, tile_k)
    np.testing.assert_array_equal(got, want[at[0], at[1], rows])


@given(st.integers(0, 10**6))
def test_passing_block_plan(seed):
  rng = np.random.default_rng(seed)
  t, s, tile_k = 3 * TILE_Q, 1000, int(rng.choice([64, 128]))
  first = np.sort(rng.integers(0, s // 2, t))
  stop = np.sort(rng.integers(0, s, t))
  stop = np.where((stop > first) & (rng.random(t) < 0.95), stop, 0)
  plan = PASSING_PLAN(
    jnp.asarray(first[None], jnp.int32),
    jnp.asarray(stop[None], jnp.int32),
    tile_k,
  )
  plan = jax.tree.map(np.asarray, plan)
  key = np.arange(s)
  for tile in range(3):
    full, masked, one = streamed(plan, None, (0, 0, tile), 1, 1)
    rows = slice(tile * TILE_Q, (tile + 1) * TILE_Q)
    got = seen_by(full, masked, one, first[rows], stop[rows], s, tile_k)
    want = (key >= first[rows, None]) & (key < stop[rows, None])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ('dtype', 'h', 'word'),
  [(jnp.float32, 128, 'bfloat16'), (jnp.bfloat16, 96, 'head dim')],
)
def test_refusal_names_the_reason(dtype, h, word):
  x = jnp.zeros((1, 2, 128, h), dtype)
  assert word in mosaic_gpu.unsupported(x, x)


def test_blocks_of_too_many_tiles_are_refused():
  """Whether a masked tile is listed is one bit of a number."""
  q, k = (jnp.zeros((1, n, 1, 128), jnp.bfloat16) for n in (128, 4096))
  ids, count = jnp.zeros((1, 1, 1, 2), jnp.int32), jnp.ones((1, 1, 1))
  one = jnp.ones((1,), jnp.int32)

  def reason(block_k, **sizes):
    blocks = BlockList(ids, count, one, one, 128, block_k)
    return block_sparse_gpu.refuse(
      'block_sparse', q, k, k, blocks, block_sizes=sizes
    )

  assert reason(1024) is None
  assert 'tiles of a query tile would be masked' in reason(2048)
  assert 'blocks.block_k=1024 and tile_k=64' in reason(1024, tile_k=64)
