"""Selectors at 1M tokens: what XLA would allocate, without running them."""

import jax
import jax.numpy as jnp
import pytest

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
    n_queries=LENGTH,
    q_start=start,
    lengths=lengths,
  )


@pytest.mark.parametrize(
  'select',
  [
    pytest.param(by_stride(16, threshold=0.9), id='stride 16'),
    pytest.param(by_stride(16, density=1 / 16), id='fixed', marks=LONG),
    pytest.param(by_stride(8, threshold=0.9), id='stride 8', marks=LONG),
    pytest.param(by_means, id='sparge', marks=LONG),
    pytest.param(by_window, id='vertical slash', marks=LONG),
  ],
)
def test_a_million_tokens_need_at_most_512_mib(select):
  q = jax.ShapeDtypeStruct((1, LENGTH, HEADS, DIM), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, KV_HEADS, LENGTH, DIM), jnp.bfloat16)
  row = jax.ShapeDtypeStruct((1,), jnp.int32)
  compiled = jax.jit(select).lower(q, k, row, row).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes <= 512 * MIB
  # The lists themselves: 256 MiB of ids, their counts and shares.
  assert memory.output_size_in_bytes <= 260 * MIB
