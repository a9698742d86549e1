"""One TPU kernel in interpret mode, with race detection: run as a script.

`JAX_PLATFORMS=cpu python -m tests.kernels.tpu_interpret GROUP` runs a group of
CASES; a kernel that waits for a lost semaphore hangs, so the test gives it a
process and a time limit. Uninitialised memory reads as NaN, reads out of bounds
raise.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import block_sparse, passing_block, selected_token
from tests import oracle
from tests.kernels import cases

PARAMS = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory='nan', out_of_bounds_reads='raise'
)


def _run(function, *args, **kwargs):
  with pltpu.force_tpu_interpret_mode(PARAMS):
    got = function(*args, implementation='tpu', **kwargs)
    jax.block_until_ready(got)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert not interpret_pallas_call.races.races_found
  return got


def _block(kind, sliding_window=None, **shape):
  shape = {'block_q': 128, 'block_k': 64, 'width': 5, **shape}
  args, kwargs = cases.block_case(**shape)
  got = _run(
    block_sparse.block_sparse,
    *args,
    **kwargs,
    sliding_window=sliding_window,
    block_sizes={'step_keys': 128},
  )
  kwargs['sliding_window'] = sliding_window
  oracle.assert_close(got, oracle.block_sparse(*args, **kwargs), kind)


def _paged(bits, t):
  rng = np.random.default_rng(0)
  page, width = 32, 9
  (q, _, _, blocks), _ = cases.block_case(
    t=t, s=page * width, block_q=128, block_k=64, group=2
  )
  pages = cases.pool(rng, bits, 4 * width, page, 64)
  table = rng.permutation(4 * width).reshape(2, 2, width)
  shape = (2, 2, width * page, 64)
  k = oracle.dequantise(pages.k, pages.k_scale, pages.k_zero)[table]
  v = oracle.dequantise(pages.v, pages.v_scale, pages.v_zero)[table]
  kwargs = {
    'q_start': jnp.asarray([288 - t, 20], jnp.int32),
    'lengths': jnp.asarray([288, 100], jnp.int32),
  }
  table[1, :, 4:] = -1
  got = _run(
    block_sparse.block_sparse_paged,
    q,
    pages,
    jnp.asarray(table, jnp.int32),
    blocks,
    **kwargs,
    block_sizes={'step_keys': 128},
  )
  want = oracle.block_sparse(
    q, k.reshape(shape), v.reshape(shape), blocks, **kwargs
  )
  oracle.assert_close(got, want, 'float32')


def _passing(kind, **shape):
  args = cases.passing_case(t=200, s=500, **shape)
  sizes = {'block_q': 128, 'block_k': 128, 'step_keys': 256}
  got = _run(passing_block.passing_block, *args, block_sizes=sizes)
  oracle.assert_close(got, oracle.passing_block(*args), kind)


def _pages(kind, **shape):
  args, kwargs = cases.page_case(**shape)
  got = _run(
    selected_token.attend_pages,
    *args,
    **kwargs,
    block_sizes={'step_keys': 128, 'stages': 3},
  )
  q, pages, ids, starts = args
  rows, positions = oracle.rows_of_pages(ids, starts, pages.page)
  oracle.assert_close(
    got, oracle.selected(q, pages, rows, positions, **kwargs), kind
  )


def _tokens(kind, **shape):
  args, kwargs = cases.token_case(**shape)
  got = _run(selected_token.attend_tokens, *args, **kwargs)
  oracle.assert_close(got, oracle.selected(*args, **kwargs), kind)


BF16 = jnp.bfloat16
CASES = {
  'block': (
    functools.partial(
      _block, 'float32', b=2, t=140, s=300, kv=1, group=8, sliding_window=150
    ),
  ),
  'paged_passing': (
    functools.partial(_paged, 32, 150),
    functools.partial(_passing, 'bfloat16', dtype=BF16),
  ),
  'selected': (
    functools.partial(_pages, 'float32', streaming=True),
    functools.partial(_pages, 'float32', bits=8, page=32, streaming=True),
    functools.partial(_tokens, 'float32', bits=4),
  ),
}
# More dtypes and head dims of the same code: make test-all.
MORE = {
  'block_more': (
    functools.partial(
      _block, 'bfloat16', b=1, t=100, s=300, kv=4, group=1, h=128, dtype=BF16
    ),
    functools.partial(_block, 'float32', b=1, t=1, s=65, group=1, h=256),
    functools.partial(_block, 'float32', b=2, t=300, s=700, kv=1, group=8),
    # Blocks that are no whole vectors of keys: a step is filled with dead ones.
    functools.partial(_block, 'float32', b=1, t=140, s=400, block_k=96),
    functools.partial(_paged, 8, 40),
  ),
  'selected_more': (
    functools.partial(_pages, 'bfloat16', dtype=BF16, page=64, h=128, t=1),
    functools.partial(_pages, 'float32', bits=4, page=32, h=128),
    functools.partial(_pages, 'float32', width=1, page=128),
    functools.partial(_tokens, 'float32', streaming=True),
  ),
}


if __name__ == '__main__':
  for case in {**CASES, **MORE}[sys.argv[1]]:
    case()
    print('passed', case.args, case.keywords, flush=True)
