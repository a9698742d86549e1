"""Codes of keys and values: error bounds, packing, extremes."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.keys import dequantise
from lcx.cache.quantise import empty_pool, encode, error_bound, quantise
from tests.cache.reading import decode


def vectors(seed, scale, shift):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(5, 16)) * scale + shift
  x[1] = shift  # a constant vector has no range
  x[2] = 0
  x[3, 0] *= 100  # an outlier channel, as keys have
  return x.astype(np.float32)


@given(
  st.sampled_from([8, 4]),
  st.integers(0, 2**16),
  st.sampled_from([1e-30, 1e-3, 1.0, 3e4]),
  st.sampled_from([0.0, 0.01, -7.0, 1e4]),
)
def test_error_is_at_most_half_a_step(bits, seed, scale, shift):
  x = vectors(seed, scale, shift)
  codes, step, zero = quantise(jnp.asarray(x), bits)
  got = np.asarray(dequantise(codes, step, zero, jnp.float32))
  bound = np.asarray(error_bound(step))[:, None]
  assert (np.abs(got - x) <= bound).all()
  top = np.abs(x).max(-1) / 127
  if bits == 4:
    top = np.maximum((x.max(-1) - x.min(-1)) / 15, np.abs(x).max(-1) / 2**16)
  np.testing.assert_allclose(step, top, rtol=1e-5, atol=1e-35)


def test_low_nibble_is_the_even_channel():
  x = jnp.asarray([[0.0, 15.0, 3.0, 12.0]])
  codes, scale, zero = quantise(x, 4)
  np.testing.assert_array_equal(codes, [[0 | 15 << 4, 3 | 12 << 4]])
  np.testing.assert_allclose(decode(codes, scale, zero), x, atol=1e-6)


@pytest.mark.parametrize('bits', [16, 8, 4])
def test_codes_have_the_types_of_the_pool(bits):
  pool = empty_pool(3, 8, 16, bits, jnp.bfloat16)
  tokens = encode(*[jnp.ones((2, 5, 16), jnp.bfloat16)] * 2, bits)
  for kept, new in zip(
    (pool.k, pool.v, pool.k_scale, pool.v_scale, pool.k_zero, pool.v_zero),
    (
      tokens.k,
      tokens.v,
      tokens.k_scale,
      tokens.v_scale,
      tokens.k_zero,
      tokens.v_zero,
    ),
  ):
    assert (kept is None) == (new is None)
    if kept is not None:
      assert kept.dtype == new.dtype
      assert kept.shape[2:] == new.shape[2:]
  assert pool.bits == bits
  assert pool.head_dim == 16
