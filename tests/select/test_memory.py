"""Selectors at 1M tokens: what XLA would allocate, without running them.

Memory of a selector is what it needs beside its arguments and its result:
XLA's temporaries, at most 512 MiB. The lists come on top and are bounded apart:
256 MiB of ids by the default width, 3 MiB of counts and shares. SnapKV returns
the tokens that it keeps, 16 KiB a kv head.
"""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.selected_token import contiguous
from lcx.select.snapkv import snapkv
from lcx.select.sparge import sparge
from lcx.select.vertical_slash import vertical_slash
from lcx.select.xattention import xattention

LONG = pytest.mark.long
MIB = 2**20
LENGTH, HEADS, KV_HEADS, DIM = 2**20, 32, 8, 128


def by_stride(stride, **budget):
  def select(q, k, start, lengths):
    return xattention(
      q, k, q_start=start, lengths=lengths, stride=stride, **budget
    )

  return select


def by_means(q, k, start, lengths):
  return sparge(q, k, q_start=start, lengths=lengths, threshold=0.98)


def by_window(q, k, start, lengths):
  return vertical_slash(
    q[:, -64:].swapaxes(1, 2),
    lengths[:, None] - 64 + jnp.arange(64),
    k,
    n_queries=q.shape[1],
    q_start=start,
    lengths=lengths,
  )


def by_votes(q, k, start, lengths):
  del start
  pages, ids, starts = contiguous(k, k, 64)
  return snapkv(
    q[:, -32:].swapaxes(1, 2),
    lengths[:, None] - 32 + jnp.arange(32),
    pages,
    ids,
    starts,
    since=lengths - 32,
    keep=2048 - 32,
  )


def memory(select, length):
  q = jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, KV_HEADS, length, DIM), jnp.bfloat16)
  row = jax.ShapeDtypeStruct((1,), jnp.int32)
  compiled = jax.jit(select).lower(q, k, row, row).compile()
  return compiled.memory_analysis()


SELECTORS = {
  'stride 16': by_stride(16, threshold=0.9),
  'fixed': by_stride(16, density=1 / 16),
  'stride 8': by_stride(8, threshold=0.9),
  'sparge': by_means,
  'vertical slash': by_window,
  'snapkv': by_votes,
}


@pytest.mark.parametrize(
  ('name', 'length'),
  [
    pytest.param(name, LENGTH, marks=[LONG] * (name in ('stride 8', 'fixed')))
    for name in SELECTORS
  ]
  # A number of blocks that 8 does not divide; then a length of no whole one.
  + [('stride 16', LENGTH + 128)]
  + [
    pytest.param(name, LENGTH + 64, marks=LONG)
    for name in SELECTORS
    if name != 'snapkv'  # its pages are whole
  ],
)
def test_a_million_tokens_need_at_most_512_mib(name, length):
  found = memory(SELECTORS[name], length)
  assert found.temp_size_in_bytes <= 512 * MIB
  assert found.output_size_in_bytes <= 260 * MIB


def test_keys_that_a_kernel_wants_padded_are_copied_a_head_at_a_time(
  monkeypatch,
):
  """As Hopper's kernel does, which reads tiles of 8 blocks."""
  monkeypatch.setattr('kernels_pallas.block_scores.xla.granule', lambda: 8)
  found = memory(by_stride(16, threshold=0.9), LENGTH + 128)
  assert 256 * MIB < found.temp_size_in_bytes <= 512 * MIB
