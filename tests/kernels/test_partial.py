"""The merge law: partials over disjoint sets merge exactly, empty ones too."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import partial


def _attend(scores, values) -> partial.Partial:
  if scores.shape[-1] == 0:
    return partial.empty((*scores.shape[:-1], values.shape[-1]))
  wide = scores.astype(np.float64)
  lse = np.logaddexp.reduce(wide, axis=-1)
  out = np.exp(wide - lse[..., None]) @ values
  return partial.Partial(*(jnp.asarray(x, jnp.float32) for x in (out, lse)))


@hypothesis.settings(derandomize=True, deadline=None, max_examples=30)
@hypothesis.given(
  cuts=st.lists(st.integers(0, 12), min_size=0, max_size=4),
  spread=st.sampled_from([1.0, 30.0, 200.0]),
  seed=st.integers(0, 99),
)
def test_merge_equals_the_union(cuts, spread, seed):
  rng = np.random.default_rng(seed)
  scores = (spread * rng.normal(size=(3, 12))).astype(np.float32)
  values = rng.normal(size=(12, 5)).astype(np.float32)
  edges = [0, *sorted(cuts), 12]
  parts = [
    _attend(scores[:, a:b], values[a:b]) for a, b in itertools.pairwise(edges)
  ]
  whole = _attend(scores, values)
  merged = partial.merge(*parts)
  # An lse of size x is rounded to x * 2**-24, and so are the weights.
  tolerance = 1e-6 * max(1.0, float(np.max(np.abs(whole.lse))))
  np.testing.assert_allclose(merged.out, whole.out, atol=tolerance)
  np.testing.assert_allclose(merged.lse, whole.lse, atol=tolerance)


def test_empty_is_neutral_and_all_empty_is_not_nan():
  none = partial.empty((2, 3, 4))
  merged = partial.merge(none, none)
  np.testing.assert_array_equal(merged.out, 0)
  np.testing.assert_array_equal(merged.lse, -np.inf)
  some = partial.Partial(jnp.ones((2, 3, 4)), jnp.zeros((2, 3)))
  merged = partial.merge(none, some, none)
  np.testing.assert_array_equal(merged.out, some.out)
  np.testing.assert_array_equal(merged.lse, some.lse)


@pytest.mark.parametrize('n', [1, 5, 33, 40])  # few are written out
def test_merge_keeps_the_first_dtype_and_any_axis(n):
  rng = np.random.default_rng(0)
  out = jnp.asarray(rng.normal(size=(2, n, 3, 4)), jnp.bfloat16)
  lse = 3 * rng.normal(size=(2, n, 3)).astype(np.float32)
  lse[0, 0, 0] = lse[1, :, 2] = -np.inf
  out = jnp.where(lse[..., None] > -np.inf, out, 0)  # as empty parts are
  lse = jnp.asarray(lse)
  stacked = partial.merge_axis(partial.Partial(out, lse), axis=-2)
  merged = partial.merge(
    *(partial.Partial(out[:, i], lse[:, i]) for i in range(n))
  )
  top = np.max(lse, axis=1, where=np.isfinite(lse), initial=-1e3)
  weight = np.exp(np.asarray(lse, np.float64) - top[:, None])
  total = weight.sum(1)
  want = (weight[..., None] * np.asarray(out, np.float64)).sum(1)
  want = want / np.where(total > 0, total, 1)[..., None]
  with np.errstate(divide='ignore'):
    want_lse = np.log(total) + top
  for got in (merged, stacked):
    assert got.out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      np.asarray(got.out, np.float64), want, rtol=1e-2, atol=1e-2
    )
    np.testing.assert_allclose(got.lse, want_lse, rtol=1e-5, atol=1e-5)


def test_merge_under_vmap_matches_merge_over_a_mapped_axis():
  rng = np.random.default_rng(1)
  out = rng.normal(size=(4, 3, 8)).astype(np.float32)
  lse = rng.normal(size=(4, 3)).astype(np.float32)
  lse[1] = -np.inf
  part = partial.Partial(jnp.asarray(out), jnp.asarray(lse))
  over = jax.vmap(lambda p: partial.merge_over(p, 'i'), axis_name='i')
  every = jax.tree.map(np.asarray, jax.jit(over)(part))
  whole = jax.jit(partial.merge_axis, static_argnames='axis')(part, axis=0)
  for i in range(4):
    np.testing.assert_array_equal(every.out[i], whole.out)
