"""The Hopper kernels against the oracle: on a GPU; interpreted elsewhere.

Lowering needs no plugin: it runs Pallas' own checks of layouts and of shared
memory, at production sizes.
"""

import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
  block_sparse,
  mosaic_gpu,
  passing_block,
  selected_token,
)
from kernels_pallas.block_sparse import gpu as block_sparse_gpu
from kernels_pallas.keys import Pages
from kernels_pallas.passing_block import gpu as passing_block_gpu
from kernels_pallas.selected_token import gpu as selected_token_gpu
from tests import oracle
from tests.kernels import cases, gpu_interpret

BF16 = jnp.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize('h', [64, 128, 256])
@pytest.mark.parametrize('group', [1, 4])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('block_k', [64, 128, 256])
def test_block_sparse(h, group, dtype, block_k):
  args, kwargs = cases.block_case(
    t=300,
    s=900,
    kv=2,
    group=group,
    h=h,
    dtype=dtype,
    block_q=128,
    block_k=block_k,
    width=5,
  )
  got = block_sparse.block_sparse(*args, **kwargs, implementation='gpu')
  want = oracle.block_sparse(*args, **kwargs)
  oracle.assert_close(got, want, jnp.dtype(dtype).name)


@pytest.mark.gpu
@pytest.mark.parametrize('group', [2, 4])
def test_a_program_may_take_all_heads_of_a_group(group, monkeypatch):
  """Lists of many lengths, none too; the same as with a head a program."""
  args, kwargs = cases.block_case(
    t=700, s=1900, kv=2, group=group, h=128, dtype=BF16, block_q=128,
    block_k=128, width=9,
  )  # fmt: skip
  run = block_sparse.block_sparse
  one = run(*args, **kwargs, implementation='gpu')
  monkeypatch.setattr(mosaic_gpu, 'WAVES', 0)
  for _ in range(5):
    many = run(*args, **kwargs, implementation='gpu')
    chex.assert_trees_all_equal(many, one)
  oracle.assert_close(one, oracle.block_sparse(*args, **kwargs), 'bfloat16')


@pytest.mark.gpu
@pytest.mark.parametrize('group', [1, 8])
def test_every_family_takes_small_and_large_groups(group):
  shape = {'kv': 2, 'group': group, 'h': 128, 'dtype': BF16}
  args, kwargs = cases.block_case(
    t=300, s=900, block_q=128, block_k=128, width=5, **shape
  )
  got = block_sparse.block_sparse(*args, **kwargs, implementation='gpu')
  oracle.assert_close(got, oracle.block_sparse(*args, **kwargs), 'bfloat16')
  args = cases.passing_case(t=200, s=500, **shape)
  got = passing_block.passing_block(*args, implementation='gpu')
  oracle.assert_close(got, oracle.passing_block(*args), 'bfloat16')
  (q, pages, ids, starts), kwargs = cases.page_case(page=64, **shape)
  got = selected_token.attend_pages(
    q, pages, ids, starts, **kwargs, implementation='gpu'
  )
  rows, positions = oracle.rows_of_pages(ids, starts, 64)
  want = oracle.selected(q, pages, rows, positions, **kwargs)
  oracle.assert_close(got, want, 'bfloat16')


def check_paged(bits, implementation):
  rng = np.random.default_rng(0)
  page, width = 64, 14
  (q, _, _, blocks), kwargs = cases.block_case(
    t=300, s=page * width, h=128, dtype=BF16, block_q=128, block_k=128, width=5
  )
  b, kv = q.shape[0], 2
  pages = cases.pool(rng, bits, b * kv * width, page, 128, BF16)
  table = rng.permutation(b * kv * width).reshape(b, kv, width)
  got = block_sparse.block_sparse_paged(
    q,
    pages,
    jnp.asarray(table, jnp.int32),
    blocks,
    **kwargs,
    implementation=implementation,
  )
  k, v = (
    oracle.dequantise(*leaves)[table].reshape(b, kv, width * page, 128)
    for leaves in (
      (pages.k, pages.k_scale, pages.k_zero),
      (pages.v, pages.v_scale, pages.v_zero),
    )
  )
  want = oracle.block_sparse(q, k, v, blocks, **kwargs)
  oracle.assert_close(got, want, {16: 'bfloat16', 8: 'int8'}[bits])


@pytest.mark.gpu
@pytest.mark.parametrize('bits', [16, 8])
def test_block_sparse_paged(bits):
  check_paged(bits, 'gpu')


@pytest.mark.gpu
@pytest.mark.parametrize('t', [1, 70, 700])
def test_passing_block(t):
  rng = np.random.default_rng(0)
  q = cases.floats(rng, (2, t, 8, 128), BF16)
  k, v = (cases.floats(rng, (2, 2, 1000, 128), BF16) for _ in range(2))
  start = np.sort(rng.integers(0, 500, (2, t)), axis=1).astype(np.int32)
  stop = np.sort(rng.integers(0, 1000, (2, t)), axis=1).astype(np.int32)
  got = passing_block.passing_block(
    q, k, v, jnp.asarray(start), jnp.asarray(stop), implementation='gpu'
  )
  oracle.assert_close(
    got, oracle.passing_block(q, k, v, start, stop), 'bfloat16'
  )


@pytest.mark.gpu
@pytest.mark.parametrize('bits', [16, 8, 4])
@pytest.mark.parametrize('page', [32, 64, 128])
@pytest.mark.parametrize('t', [1, 3, 16])
@pytest.mark.parametrize('streaming', [False, True])
def test_attend_pages(bits, page, t, streaming):
  args, kwargs = cases.page_case(
    t=t, h=128, page=page, bits=bits, dtype=BF16, streaming=streaming, width=9
  )
  got = selected_token.attend_pages(*args, **kwargs, implementation='gpu')
  q, pages, ids, starts = args
  rows, positions = oracle.rows_of_pages(ids, starts, page)
  want = oracle.selected(q, pages, rows, positions, **kwargs)
  kind = {16: 'bfloat16', 8: 'int8', 4: 'int4'}[bits]
  oracle.assert_close(got, want, kind)


@pytest.mark.gpu
@pytest.mark.parametrize(
  ('page', 'width'), [(32, 9), (64, 9), (128, 9), (64, 701)]
)
@pytest.mark.parametrize('t', [1, 16])
@pytest.mark.parametrize('streaming', [False, True])
def test_attend_contiguous(page, t, width, streaming):
  args, kwargs = cases.contiguous_case(
    t=t, h=128, page=page, dtype=BF16, streaming=streaming, width=width
  )
  got = selected_token.attend_contiguous(*args, **kwargs, implementation='gpu')
  gpu_interpret.check_contiguous(got, args, kwargs, 'bfloat16')


def check_tokens(bits, t, streaming, implementation):
  args, kwargs = cases.token_case(
    t=t, h=128, bits=bits, dtype=BF16, streaming=streaming, width=300
  )
  got = selected_token.attend_tokens(
    *args, **kwargs, implementation=implementation
  )
  want = oracle.selected(*args, **kwargs)
  kind = {16: 'bfloat16', 8: 'int8', 4: 'int4'}[bits]
  oracle.assert_close(got, want, kind)


@pytest.mark.gpu
@pytest.mark.parametrize('bits', [16, 8, 4])
@pytest.mark.parametrize('t', [1, 16])
@pytest.mark.parametrize('streaming', [False, True])
def test_attend_tokens(bits, t, streaming):
  check_tokens(bits, t, streaming, 'gpu')


@pytest.mark.gpu
@pytest.mark.parametrize('bits', [16, 8, 4])
@pytest.mark.parametrize('t', [1, 16])
def test_long_lists_give_the_same_bits_every_time(bits, t):
  # Many tiles a program, so that a warp ahead of the others would be seen.
  args, kwargs = cases.page_case(
    t=t, h=128, page=64, bits=bits, dtype=BF16, streaming=False, width=40
  )

  @jax.jit
  def attend(q, pages, ids, starts):
    return selected_token.attend_pages(
      q,
      pages,
      ids,
      starts,
      **kwargs,
      block_sizes={'splits': 2},
      implementation='gpu',
    )

  got = attend(*args)
  q, pages, ids, starts = args
  rows, positions = oracle.rows_of_pages(ids, starts, 64)
  want = oracle.selected(q, pages, rows, positions, **kwargs)
  kind = {16: 'bfloat16', 8: 'int8', 4: 'int4'}[bits]
  oracle.assert_close(got, want, kind)
  for _ in range(20):
    chex.assert_trees_all_equal(attend(*args), got)


@pytest.mark.parametrize(
  'group',
  [
    *gpu_interpret.CASES,
    *(pytest.param(x, marks=pytest.mark.long) for x in gpu_interpret.MORE),
  ],
)
def test_interpreted_kernels_equal_the_oracle(group):
  run = subprocess.run(
    [sys.executable, '-m', 'tests.kernels.gpu_interpret', group],
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def lowers(function, *specs):
  """Lowers for CUDA on any machine; raises what Pallas has against it."""
  args = [jax.ShapeDtypeStruct(*spec) for spec in specs]
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('one',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    jax.jit(function).trace(*args).lower(lowering_platforms=('cuda',))


@pytest.mark.h100_aot
@pytest.mark.parametrize('h', [64, 128, 256])
def test_block_sparse_lowers(h):
  s = 2**17

  def run(q, k, v, ids, count, per_head, row):
    blocks = block_sparse.BlockList(ids, count, per_head, per_head)
    return block_sparse_gpu.block_sparse(
      q, k, v, blocks, q_start=row, lengths=row, scale=1.0
    )

  i = jnp.int32
  lowers(
    run,
    ((1, s, 32, h), BF16),
    ((1, 8, s, h), BF16),
    ((1, 8, s, h), BF16),
    ((1, 32, s // 128, 64), i),
    ((1, 32, s // 128), i),
    ((32,), i),
    ((1,), i),
  )


@pytest.mark.h100_aot
def test_passing_block_lowers():
  t, s = 20480, 26624

  def run(q, k, v, start, stop):
    return passing_block_gpu.passing_block(q, k, v, start, stop, scale=1.0)

  row = ((1, t), jnp.int32)
  lowers(
    run,
    ((1, t, 32, 128), BF16),
    ((1, 8, s, 128), BF16),
    ((1, 8, s, 128), BF16),
    row,
    row,
  )


@pytest.mark.h100_aot
@pytest.mark.parametrize('bits', [16, 8, 4])
@pytest.mark.parametrize('t', [1, 16])
def test_attend_pages_lowers(bits, t):
  count = 8 * 2048
  i, f = jnp.int32, jnp.float32
  kind = {16: BF16, 8: jnp.int8, 4: jnp.uint8}[bits]
  codes = ((count, 64, 64 if bits == 4 else 128), kind)
  scale = ((count, 64), f)
  pool = [codes, codes] + [scale] * {16: 0, 8: 2, 4: 4}[bits]

  def run(q, ids, starts, at, *pool):
    return selected_token_gpu.attend_pages(
      q, Pages(*pool), ids, starts, q_positions=at, scale=1.0
    )

  lowers(
    run,
    ((1, t, 32, 128), BF16),
    ((1, 8, 2048), i),
    ((1, 8, 2048), i),
    ((1, t), i),
    *pool,
  )
