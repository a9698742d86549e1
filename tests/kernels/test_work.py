"""The XLA paths do the list's work, and no offset is too large for them."""

import collections
import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import pytest

from kernels_pallas import block_sparse, selected_token, xla_tiles
from kernels_pallas.passing_block import passing_block
from tests.kernels import cases, test_tpu

S = jax.ShapeDtypeStruct


@pytest.fixture
def flops(monkeypatch):
  """Counts the FLOPs of every matmul that runs: trip counts are data."""
  counted = collections.Counter()
  dot = xla_tiles.dot

  def counting(spec, x, y):
    sizes = dict(zip(spec.split('->')[0].replace(',', ''), x.shape + y.shape))
    work = 2
    for size in sizes.values():
      work *= size
    jax.debug.callback(lambda: counted.update(flops=work))
    return dot(spec, x, y)

  monkeypatch.setattr(xla_tiles, 'dot', counting)

  def run(function, *args, **kwargs):
    counted.clear()
    jax.block_until_ready(jax.jit(function)(*args, **kwargs))
    jax.effects_barrier()
    return counted['flops']

  return run


def _visits(t, tile, chunk, first, stop):
  """Visited (tile, chunk) rectangles of rows with one interval each."""
  visits = 0
  for i in range(0, t, tile):
    rows = range(i, min(i + tile, t))
    low, high = min(map(first, rows)), max(map(stop, rows))
    visits += -(-(high - low) // chunk)
  return visits


def test_dense_is_the_causal_half(flops):
  (q, k, v, _), _ = cases.block_case(b=1, t=2048, s=2048, h=16)
  dense = block_sparse.dense_blocks(1, 8, 2048)
  work = flops(block_sparse.block_sparse, q, k, v, dense)
  visits = _visits(2048, 256, 512, lambda p: 0, lambda p: p + 1)
  assert work == visits * 4 * 256 * 512 * 16 * 8
  assert work < 0.63 * 4 * 2048**2 * 16 * 8


@pytest.mark.parametrize('share', [1, 2, 4, 8])
def test_lists_cost_their_share(flops, share):
  t, bq, bk, n = 1024, 64, 64, 8
  (q, k, v, _), kwargs = cases.block_case(b=1, t=t, s=t, h=16)
  tb = t // bq
  count = jnp.broadcast_to(
    jnp.maximum((jnp.arange(tb) + 1) // share, 1), (1, n, tb)
  )
  ids = jnp.broadcast_to(jnp.arange(tb), (1, n, tb, tb))
  blocks = block_sparse.listed(ids, count, block_q=bq, block_k=bk)

  def run(q, k, v, blocks):
    return block_sparse.block_sparse(
      q, k, v, blocks, block_sizes={'lanes': 4, 'chunk': 1}, **kwargs
    )

  work = flops(run, q, k, v, blocks)
  exact = int(count.sum()) * 4 * bq * bk * 16
  assert exact <= work <= 1.02 * exact


def test_half_streaming_half_dense_is_the_sum(flops):
  t, n = 1024, 8
  (q, k, v, _), _ = cases.block_case(b=1, t=t, s=t, h=16)
  kinds = [(32, 96)] * 4 + [(0, block_sparse.EVERYTHING)] * 4

  def work(kinds):
    sink, window = (jnp.asarray(x, jnp.int32) for x in zip(*kinds))
    blocks = block_sparse.mixed(sink, window, 1, t, block_q=64, block_k=32)

    def run(q, k, v, blocks):
      return block_sparse.block_sparse(
        q, k, v, blocks, block_sizes={'lanes': 4, 'chunk': 1}
      )

    return flops(run, q, k, v, blocks)

  parts = (work([kinds[0]] * n) + work([kinds[-1]] * n)) / 2
  assert work(kinds) <= 1.05 * parts


def test_selected_work_ends_with_the_list(flops):
  args, kwargs = cases.page_case(width=64, page=16)
  q, pages, ids, starts = args

  def run(q, pages, ids, starts):
    return selected_token.attend_pages(
      q, pages, ids, starts, block_sizes={'chunk': 4}, **kwargs
    )

  few = jnp.where(jnp.arange(64) < 7, ids, -1)
  work = flops(run, q, pages, few, starts)
  assert work == 2 * 4 * (2 * 3 * 8 * 64) * (4 * 16)


def test_passing_skips_what_no_row_sees(flops):
  q, k, v, start, stop = cases.passing_case(t=256, s=2048, b=1)

  def run(q, k, v, start, stop):
    return passing_block(
      q, k, v, start, stop, block_sizes={'tile': 64, 'chunk': 64}
    )

  work = flops(run, q, k, v, start, jnp.minimum(stop, start + 64))
  dense = 4 * 256 * 2048 * 64 * 4
  assert work <= dense * (128 + 64) / 2048


# Keys of 2**32 elements: 8 kv heads x 4M tokens x 128, or 32 rows of 128K.
LARGE = {
  'prompt': functools.partial(test_tpu._prompt, t=2**22),
  'pages': functools.partial(
    test_tpu._selected,
    function='attend_pages',
    bits=16,
    page=64,
    width=2**11,
    b=32,
  ),
  'tokens': functools.partial(
    test_tpu._selected,
    function='attend_tokens',
    bits=16,
    page=64,
    width=2**11,
    b=32,
  ),
}


@pytest.mark.parametrize('implementation', ['xla', 'tpu'])
@pytest.mark.parametrize('name', LARGE)
def test_lowers_past_two_to_the_31_elements(name, implementation):
  function, args = LARGE[name](implementation)
  assert max(x.size for x in jax.tree.leaves(args)) > 2**31
  platform = 'tpu' if implementation == 'tpu' else 'cpu'
  exported = jax.export.export(jax.jit(function), platforms=[platform])(*args)
  assert exported.out_avals[0].shape == args[0].shape


def test_lists_of_a_million_tokens_are_bounded():
  """One layer at 1M tokens, 32 heads, 64 blocks a row: at most 256 MB."""
  blocks = test_tpu.blocks(32, 2**20, 64, 512, 128)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(blocks))
  assert size <= 256 * 2**20
  closed = jax.eval_shape(
    lambda: block_sparse.dense_blocks(1, 32, 2**20, block_q=128)
  )
  assert sum(x.size for x in jax.tree.leaves(closed)) < 2**19
  assert dataclasses.replace(closed, dense=False).ids.shape[-1] == 0
