"""The Hopper kernels in interpret mode, beside the oracle: run as a script.

`JAX_PLATFORMS=cpu python -m tests.kernels.gpu_interpret GROUP` runs a group of
CASES; a kernel that waits for a lost barrier hangs, so the test gives it a
process and a time limit. Every program of a grid is traced and compiled anew:
shapes are small.
"""

import functools
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np

from kernels_pallas import (
  block_scores,
  block_sparse,
  mosaic_gpu,
  passing_block,
  selected_token,
)
from kernels_pallas.selected_token import rows
from tests import oracle
from tests.kernels import cases, mosaic_gpu_interpreter, test_block_scores

BF16 = jnp.bfloat16
# Three heads: a list over sink and window, a streaming one, an empty one.
KINDS = ((40, 21, True), (5, 137, False), (0, 0, False))


def _run(function, *args, **kwargs):
  with mosaic_gpu_interpreter.installed():
    return function(*args, implementation='gpu', **kwargs)


def _block(kinds, waves=mosaic_gpu.WAVES, **shape):
  shape = {'block_q': 128, 'block_k': 128, 'width': 2, 'dtype': BF16, **shape}
  args, kwargs = cases.block_case(b=1, kinds=kinds, **shape)
  with mock.patch.object(mosaic_gpu, 'WAVES', waves):
    got = _run(block_sparse.block_sparse, *args, **kwargs)
  oracle.assert_close(got, oracle.block_sparse(*args, **kwargs), 'bfloat16')


def _passing(t, s):
  rng = np.random.default_rng(0)
  q = cases.floats(rng, (1, t, 2, 64), BF16)
  k, v = (cases.floats(rng, (1, 1, s, 64), BF16) for _ in range(2))
  start = np.sort(rng.integers(0, s // 2, (1, t)), axis=1)
  stop = np.sort(rng.integers(0, s, (1, t)), axis=1)
  bounds = [jnp.asarray(x, jnp.int32) for x in (start, stop)]
  got = _run(passing_block.passing_block, q, k, v, *bounds)
  want = oracle.passing_block(q, k, v, *bounds)
  oracle.assert_close(got, want, 'bfloat16')


def _pages(kind, **shape):
  shape = {'b': 1, 'kv': 2, 'width': 3, 'page': 64, 't': 1, **shape}
  args, kwargs = cases.page_case(dtype=BF16, **shape)
  got = _run(selected_token.attend_pages, *args, **kwargs)
  q, pages, ids, starts = args
  rows, positions = oracle.rows_of_pages(ids, starts, pages.page)
  want = oracle.selected(q, pages, rows, positions, **kwargs)
  oracle.assert_close(got, want, kind)


def _contiguous(kind, **shape):
  args, kwargs = cases.contiguous_case(b=1, dtype=BF16, **shape)
  got = _run(selected_token.attend_contiguous, *args, **kwargs)
  check_contiguous(got, args, kwargs, kind)


def check_contiguous(got, args, kwargs, kind):
  q, pages, starts, used = args
  lists = rows.row_lists(pages, starts, used)
  want = oracle.selected(
    *(q, pages, *oracle.rows_of_pages(*lists, pages.page)), **kwargs
  )
  oracle.assert_close(got, want, kind)


def _scores(**shape):
  args = test_block_scores.case(dtype=BF16, **shape)
  test_block_scores.check(
    functools.partial(_run, block_scores.block_lse),
    args,
    per_block=8,
    kind='bfloat16',
  )


def _tokens(kind, **shape):
  args, kwargs = cases.token_case(dtype=BF16, **shape)
  got = _run(selected_token.attend_tokens, *args, **kwargs)
  want = oracle.selected(*args, **kwargs)
  oracle.assert_close(got, want, kind)


CASES = {
  'prompts': (
    # One program takes the three heads, one after the other.
    functools.partial(_block, KINDS, waves=0, t=130, s=400, kv=1, group=3),
    functools.partial(_passing, 100, 300),
    # Two programs that share cells, three tiles.
    functools.partial(
      _scores, b=1, kv=1, group=1, n_rows=200, n_cells=528, f=64
    ),
  ),
  'decode': (
    functools.partial(_pages, 'bfloat16', group=3, width=7, streaming=True),
    functools.partial(_pages, 'int8', bits=8, t=2, page=32, h=128),
    # An odd number of pages of which two are a tile; the last is half full.
    functools.partial(
      _contiguous, 'bfloat16', kv=2, group=3, width=7, page=32, t=1
    ),
  ),
}
# More head dims and page sizes of the same code: make test-all.
MORE = {
  'prompts_more': (
    functools.partial(_block, KINDS, t=130, s=400, kv=1, group=3),
    functools.partial(_block, KINDS[:1], t=100, s=500, kv=1, group=1, h=256),
    functools.partial(_block, KINDS[1:2], t=300, s=700, kv=1, group=1, h=128),
  ),
  'decode_more': (
    functools.partial(_pages, 'bfloat16', page=16, width=9, group=1, t=5),
    functools.partial(_pages, 'bfloat16', page=128, h=256, group=8, t=16),
    functools.partial(_tokens, 'bfloat16', streaming=True),
    functools.partial(_contiguous, 'bfloat16', width=5, page=128, t=2),
  ),
}


if __name__ == '__main__':
  for case in {**CASES, **MORE}[sys.argv[1]]:
    case()
    print('passed', case.args, case.keywords, flush=True)
