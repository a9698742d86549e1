"""passing_block against the float64 oracle: the reference, the XLA path."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from kernels_pallas.passing_block import passing_block
from tests import oracle
from tests.kernels import cases

RUN = jax.jit(passing_block, static_argnames='implementation')
TILED = {
  tile: jax.jit(
    functools.partial(passing_block, block_sizes={'tile': tile, 'chunk': 48})
  )
  for tile in (16, 32)
}
CASES = {
  'f32_group2': {},
  'bf16_group8': {'dtype': jnp.bfloat16, 'kv': 1, 'group': 8},
  'f16_group1_h128': {'dtype': jnp.float16, 'group': 1, 'h': 128},
  'bf16_group4_h256': {'dtype': jnp.bfloat16, 'group': 4, 'h': 256},
  'one_row': {'t': 1, 's': 65},
}
RUNS = [(name, 'xla') for name in CASES] + [('f32_group2', 'reference')]


@pytest.mark.parametrize(('name', 'implementation'), RUNS)
def test_equals_the_oracle(name, implementation):
  args = cases.passing_case(**CASES[name])
  got = RUN(*args, implementation=implementation)
  oracle.assert_close(got, oracle.passing_block(*args), str(args[0].dtype))
  assert got.out.dtype == args[0].dtype


@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=st.integers(0, 10**6), tile=st.sampled_from([16, 32]))
def test_any_intervals(seed, tile):
  q, k, v, _, _ = cases.passing_case(h=16)
  rng = np.random.default_rng(seed)
  start = np.sort(rng.integers(0, 200, (2, 70)), axis=1)
  stop = np.clip(start + rng.integers(-5, 120, (2, 70)), 0, 200)
  start, stop = (jnp.asarray(x, jnp.int32) for x in (start, stop))
  got = TILED[tile](q, k, v, start, stop)
  want = oracle.passing_block(q, k, v, start, stop)
  oracle.assert_close(got, want, 'float32')


@pytest.mark.long
@hypothesis.settings(max_examples=8)
@hypothesis.given(
  t=st.integers(1, 60),
  s=st.integers(1, 90),
  kv=st.integers(1, 2),
  group=st.integers(1, 3),
  seed=st.integers(0, 99),
)
def test_shapes(t, s, kv, group, seed):
  rng = np.random.default_rng(seed)
  q = cases.floats(rng, (1, t, kv * group, 16), jnp.float32)
  k, v = (cases.floats(rng, (1, kv, s, 16), jnp.float32) for _ in range(2))
  start = np.sort(rng.integers(0, s, (1, t))).astype(np.int32)
  stop = np.sort(rng.integers(0, s + 1, (1, t))).astype(np.int32)
  got = TILED[32](q, k, v, start, stop)
  want = oracle.passing_block(q, k, v, start, stop)
  oracle.assert_close(got, want, 'float32')


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('q', lambda x: x[..., :8], 'H = 8'),
    ('k', lambda x: x[:, :, 1:], 'k.shape'),
    ('v', lambda x: x.astype(jnp.int8), 'v.dtype'),
    ('start', lambda x: x[:, 1:], 'start must be int32'),
    ('stop', lambda x: x * 1.0, 'stop must be int32'),
  ],
)
def test_bad_arguments_are_named(name, change, message):
  named = dict(zip(('q', 'k', 'v', 'start', 'stop'), cases.passing_case(h=16)))
  named[name] = change(named[name])
  with pytest.raises(ValueError, match=message):
    passing_block(**named)


def test_debug_mode_checks_values():
  args = cases.passing_case(h=16)
  run = jax.jit(checkify.checkify(passing_block))
  run(*args)[0].throw()
  error, _ = run(*args[:4], args[4] + 500)
  with pytest.raises(checkify.JaxRuntimeError, match='start and stop'):
    error.throw()
