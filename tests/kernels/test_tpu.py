"""The TPU kernels without a TPU: interpreted, lowered, compiled ahead."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import pytest

from kernels_pallas import block_sparse, differentiable, selected_token
from kernels_pallas.keys import Pages
from kernels_pallas.passing_block import passing_block
from tests.kernels import tpu_aot, tpu_interpret

# The cache cannot load what it holds for a chip that is not here.
pytestmark = pytest.mark.filterwarnings(
  'ignore:Error reading persistent compilation cache'
)
ROOT = pathlib.Path(__file__).parents[2]
S = jax.ShapeDtypeStruct
I32, BF16 = jnp.int32, jnp.bfloat16
KEYS = 131072


def blocks(n, t, width, block_q, block_k, b=1):
  tb = -(-t // block_q)
  return block_sparse.BlockList(
    S((b, n, tb, width), I32),
    S((b, n, tb), I32),
    S((n,), I32),
    S((n,), I32),
    block_q,
    block_k,
  )


def pool(bits, pages, page, h):
  row = S((pages, page), jnp.float32)
  if bits == 16:
    return Pages(*[S((pages, page, h), BF16)] * 2)
  if bits == 8:
    return Pages(*[S((pages, page, h), jnp.int8)] * 2, row, row)
  codes = S((pages, page, h // 2), jnp.uint8)
  return Pages(codes, codes, row, row, row, row)


def _prompt(
  implementation, t, h=128, width=64, dtype=BF16, bq=512, bk=128, **kwargs
):
  q, k = S((1, t, 32, h), dtype), S((1, 8, t, h), dtype)
  run = functools.partial(
    block_sparse.block_sparse, implementation=implementation, **kwargs
  )
  return run, (q, k, k, blocks(32, t, width, bq, bk))


def _paged(implementation, bits):
  lengths = S((1,), I32)

  def run(q, pages, table, blocks, lengths):
    return block_sparse.block_sparse_paged(
      q, pages, table, blocks, lengths=lengths, implementation=implementation
    )

  q, table = S((1, 2048, 32, 128), BF16), S((1, 8, KEYS // 64), I32)
  pages = pool(bits, KEYS // 8, 64, 128)
  return run, (q, pages, table, blocks(32, 2048, 64, 512, 128), lengths)


def _passing(implementation):
  t, s = 16384 + 4096, 2048 * 8 + 4096 + 16384
  q, k, row = S((1, t, 32, 128), BF16), S((1, 8, s, 128), BF16), S((1, t), I32)
  run = functools.partial(passing_block, implementation=implementation)
  return run, (q, k, k, row, row)


def _selected(implementation, function, bits, page, width, h=128, t=1, b=1):
  def run(q, pages, ids, where, at, sink, window):
    return getattr(selected_token, function)(
      q,
      pages,
      ids,
      where,
      q_positions=at,
      sink=sink,
      window=window,
      implementation=implementation,
    )

  ids, kind = S((b, 8, width), I32), S((8,), I32)
  pages = pool(bits, b * KEYS // page * 8, page, h)
  q, at = S((b, t, 32, h), BF16), S((b, t), I32)
  return run, (q, pages, ids, ids, at, kind, kind)


# Production sizes: heads 32 / 8 / 128, 128K keys.
CALLS = {
  'dense_128k': functools.partial(_prompt, t=KEYS, width=0, bk=512),
  'lists_128k': functools.partial(_prompt, t=KEYS),
  'lists_h64': functools.partial(_prompt, t=KEYS, h=64),
  'lists_h256': functools.partial(_prompt, t=KEYS, h=256),
  'paged': functools.partial(_paged, bits=16),
  'paged_int8': functools.partial(_paged, bits=8),
  'passing': _passing,
  'all_pages': functools.partial(
    _selected, function='attend_pages', bits=16, page=64, width=2048
  ),
  'pages_16_queries': functools.partial(
    _selected, function='attend_pages', bits=16, page=16, width=64, t=16, b=2
  ),
  'pages_int8': functools.partial(
    _selected, function='attend_pages', bits=8, page=64, width=2048
  ),
  'pages_int4': functools.partial(
    _selected, function='attend_pages', bits=4, page=64, width=2048
  ),
  'tokens': functools.partial(
    _selected, function='attend_tokens', bits=16, page=64, width=2048
  ),
}


@pytest.mark.parametrize(
  'group',
  [
    *tpu_interpret.CASES,
    *(pytest.param(x, marks=pytest.mark.long) for x in tpu_interpret.MORE),
  ],
)
def test_interpreted_kernels_equal_the_oracle(group):
  run = subprocess.run(
    [sys.executable, '-m', 'tests.kernels.tpu_interpret', group],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


@pytest.mark.parametrize('name', CALLS)
def test_lowers_for_tpu(name):
  function, args = CALLS[name]('tpu')
  exported = jax.export.export(jax.jit(function), platforms=['tpu'])(*args)
  assert 'tpu_custom_call' in exported.mlir_module()


@pytest.mark.parametrize('name', CALLS)
def test_lowers_for_cuda(name):
  """The same calls through the GPU kernels, where they take them."""
  function, args = CALLS[name]('gpu')
  try:
    jax.eval_shape(function, *args)
  except ValueError as error:
    assert "implementation='gpu'" in str(error)  # refused, with the reason
    pytest.skip(str(error))
  h100 = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=h100)
  triton = '__gpu$xla.gpu.triton'
  with jax.sharding.use_abstract_mesh(mesh):
    exported = jax.export.export(
      jax.jit(function),
      platforms=['cuda'],
      disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(triton)],
    )(*args)
  assert 'mosaic_gpu' in exported.mlir_module()


AOT = [
  *(
    (chip, name)
    for chip in ('v5e', 'tpu7x')  # the oldest and the newest
    for name in ('lists_128k', 'all_pages')
  ),
  *(('v5e', name) for name in ('passing', 'paged', 'pages_int8')),
]
# Every kernel on every chip takes minutes: make test-all.
REST = [
  (chip, name)
  for chip in tpu_aot.CHIPS
  for name in CALLS
  if (chip, name) not in AOT
]


def _compile(chip, name):
  reason = tpu_aot.missing()
  if reason:
    pytest.skip(reason)
  function, args = CALLS[name]('tpu')
  compiled = tpu_aot.compile_for(chip, function, *args)
  assert compiled.cost_analysis()['flops'] > 1e6  # cost_estimate is set
  return compiled


@pytest.mark.tpu_aot
@pytest.mark.parametrize(('chip', 'name'), AOT)
def test_compiles_ahead_of_time(chip, name):
  _compile(chip, name)


@pytest.mark.tpu_aot
@pytest.mark.long
@pytest.mark.parametrize(('chip', 'name'), REST)
def test_compiles_ahead_of_time_rest(chip, name):
  _compile(chip, name)


@pytest.mark.tpu_aot
@pytest.mark.parametrize('streaming', [{}, {'sink': 64, 'window': 256}])
def test_splash_gradients_compile(streaming):
  if tpu_aot.missing():
    pytest.skip(tpu_aot.missing())
  q, k = S((1, 2048, 8, 128), BF16), S((1, 2, 2048, 128), BF16)

  def loss(q, k, v):
    out = differentiable.attention(
      q, k, v, implementation='splash', **streaming
    )
    return jnp.sum(out.astype(jnp.float32))

  tpu_aot.compile_for('v5e', jax.grad(loss, (0, 1, 2)), q, k, k)


@pytest.mark.tpu_aot
def test_the_compiler_refuses_what_does_not_fit():
  if tpu_aot.missing():
    pytest.skip(tpu_aot.missing())
  _, args = _selected('tpu', 'attend_pages', 16, 64, 2048)

  def run(q, pages, ids, starts, at, *_):
    return selected_token.attend_pages(
      q,
      pages,
      ids,
      starts,
      q_positions=at,
      implementation='tpu',
      block_sizes={'stages': 64},  # 32 MiB of buffers
    )

  with pytest.raises(Exception, match='(?i)vmem'):
    tpu_aot.compile_for('v5e', run, *args)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (functools.partial(_prompt, t=1024, dtype=jnp.float16), 'float16'),
    (functools.partial(_prompt, t=1024, h=96), 'head dim 96'),
    (functools.partial(_prompt, t=1024, bq=64), 'block_q=64'),
    (functools.partial(_prompt, t=1024, bk=16), 'block_k=16'),
    (functools.partial(_prompt, t=1024, scale=-1.0), 'scale=-1.0'),
    (
      functools.partial(
        _selected, function='attend_pages', bits=8, page=16, width=4
      ),
      'page=16',
    ),
    (
      functools.partial(
        _selected, function='attend_pages', bits=16, page=64, width=40000
      ),
      '40000 pages',
    ),
  ],
)
def test_refuses_with_the_reason(call, message):
  function, args = call('tpu')
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(function, *args)
