"""block_sparse against the float64 oracle: the reference and the XLA path."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from kernels_pallas import block_sparse as family
from kernels_pallas.keys import Pages
from tests import oracle
from tests.kernels import cases

RUN = jax.jit(
  family.block_sparse,
  static_argnames=('scale', 'sliding_window', 'implementation'),
)
# Few distinct shapes, many values: compilations cost more than runs.
CASES = {
  'f32_group4_h64': {},
  'bf16_group8_h64': {'dtype': jnp.bfloat16, 'kv': 1, 'group': 8},
  'f16_group1_h128': {'dtype': jnp.float16, 'kv': 8, 'group': 1, 'h': 128},
  'bf16_h256': {'dtype': jnp.bfloat16, 'h': 256, 't': 33, 's': 97},
  'one_token': {'t': 1, 's': 65},
  'wide_blocks': {'block_q': 64, 'block_k': 128, 's': 333, 'width': 2},
}


def _check(args, kwargs, kind='float32', **static):
  got = RUN(*args, **kwargs, **static)
  static.pop('implementation', None)
  oracle.assert_close(got, oracle.block_sparse(*args, **kwargs, **static), kind)
  assert got.out.dtype == args[0].dtype
  assert got.lse.dtype == jnp.float32


# The reference is one formula: two shapes show it.
RUNS = [(name, 'xla') for name in CASES]
RUNS += [(name, 'reference') for name in ('f32_group4_h64', 'one_token')]


@pytest.mark.parametrize(('name', 'implementation'), RUNS)
def test_equals_the_oracle(name, implementation):
  args, kwargs = cases.block_case(**CASES[name])
  kind = str(args[0].dtype)
  for sliding_window in (None, 45) if name == 'f32_group4_h64' else (None,):
    _check(
      args,
      kwargs,
      kind,
      sliding_window=sliding_window,
      implementation=implementation,
    )


@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=st.integers(0, 10**6), s=st.just(200))
def test_lists_of_any_content(seed, s):
  args, kwargs = cases.block_case(seed, s=s)
  rng = np.random.default_rng(seed)
  shuffled = tuple(cases.KINDS[i] for i in rng.integers(0, len(cases.KINDS), 8))
  sink = jnp.asarray([k[0] for k in shuffled], jnp.int32)
  window = jnp.asarray([k[1] for k in shuffled], jnp.int32)
  q, k, v, blocks = args
  blocks = dataclasses.replace(blocks, sink=sink, window=window)
  _check((q, k, v, blocks), kwargs)


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  t=st.integers(1, 60),
  more=st.integers(0, 90),
  group=st.sampled_from([1, 2, 3]),
  block_q=st.sampled_from([8, 16, 24]),
  block_k=st.sampled_from([8, 16, 32]),
  width=st.integers(0, 5),
  seed=st.integers(0, 99),
)
def test_shapes(t, more, group, block_q, block_k, width, seed):
  args, kwargs = cases.block_case(
    seed,
    t=t,
    s=t + more,
    kv=1,
    group=group,
    h=16,
    block_q=block_q,
    block_k=block_k,
    width=width,
  )
  _check(args, kwargs)


@pytest.mark.parametrize('sliding_window', [None, 19])
def test_dense_promise_equals_dense_data(sliding_window):
  (q, k, v, _), kwargs = cases.block_case()
  dense = family.dense_blocks(2, 8, 70, block_q=16, block_k=32)
  _check((q, k, v, dense), kwargs, sliding_window=sliding_window)
  plain = dataclasses.replace(dense, dense=False)
  _check((q, k, v, plain), kwargs, sliding_window=sliding_window)


def test_defaults_are_the_last_queries_of_all_keys():
  (q, k, v, blocks), _ = cases.block_case()
  got = RUN(q, k, v, blocks)
  want = oracle.block_sparse(
    q, k, v, blocks, q_start=[130, 130], lengths=[200, 200]
  )
  oracle.assert_close(got, want, 'float32')


@pytest.mark.parametrize('bits', [32, 8, 4])
def test_paged_equals_the_oracle(bits):
  rng = np.random.default_rng(0)
  page, width = 16, 13  # not a whole number of 32-key blocks
  (q, _, _, blocks), _ = cases.block_case(s=width * page)
  kwargs = {
    'q_start': jnp.asarray([100, 20], jnp.int32),
    'lengths': jnp.asarray([170, 77], jnp.int32),
  }
  pages = cases.pool(rng, bits, 2 * 2 * width, page, 64)
  table = rng.permutation(2 * 2 * width).reshape(2, 2, width)
  k, v = (
    oracle.dequantise(*leaves)[table].reshape(2, 2, width * page, 64)
    for leaves in (
      (pages.k, pages.k_scale, pages.k_zero),
      (pages.v, pages.v_scale, pages.v_zero),
    )
  )
  table[1, :, 5:] = -1  # past the row's 77 tokens
  want = oracle.block_sparse(q, k, v, blocks, **kwargs)
  for implementation in ('xla', 'reference'):
    run = functools.partial(
      family.block_sparse_paged, implementation=implementation
    )
    got = jax.jit(run)(
      q, pages, jnp.asarray(table, jnp.int32), blocks, **kwargs
    )
    oracle.assert_close(got, want, 'float32')


def test_empty_list_is_neutral():
  (q, k, v, blocks), kwargs = cases.block_case()
  none = family.listed(blocks.ids, jnp.zeros_like(blocks.count), block_q=16)
  none = dataclasses.replace(none, block_k=32)
  got = RUN(q, k, v, none, **kwargs)
  np.testing.assert_array_equal(got.out, 0)
  np.testing.assert_array_equal(got.lse, -np.inf)


def _fix(**changes):
  (q, k, v, blocks), kwargs = cases.block_case(h=16)
  named = {'q': q, 'k': k, 'v': v, 'blocks': blocks, **kwargs}
  for name, change in changes.items():
    named[name] = change(named[name]) if callable(change) else change
  return named


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'k': lambda x: x[:, :, 1:]}, 'k.shape'),
    ({'q': lambda x: x[..., :8]}, 'head dim'),
    ({'q': lambda x: x[:, :, :7]}, 'kv heads 2 must divide'),
    ({'q': lambda x: x.astype(jnp.int8)}, 'q.dtype'),
    ({'v': lambda x: x.astype(jnp.int32)}, 'v.dtype'),
    (
      {'blocks': lambda x: dataclasses.replace(x, count=x.count[:, :, 1:])},
      'blocks.count.shape',
    ),
    (
      {'blocks': lambda x: dataclasses.replace(x, ids=x.ids.astype(float))},
      'blocks.ids.dtype',
    ),
    ({'blocks': lambda x: dataclasses.replace(x, block_q=32)}, r'\(B, N, Tb\)'),
    (
      {'blocks': lambda x: dataclasses.replace(x, sink=x.sink[1:])},
      'blocks.sink',
    ),
    ({'q_start': lambda x: x[:1]}, 'q_start'),
    ({'lengths': lambda x: x * 1.0}, 'lengths'),
    ({'sliding_window': 0}, 'sliding_window=0'),
    ({'implementation': 'cuda'}, "implementation='cuda'"),
  ],
)
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      functools.partial(
        family.block_sparse,
        sliding_window=changes.pop('sliding_window', None),
        implementation=changes.pop('implementation', None),
      ),
      **_fix(**changes),
    )


@pytest.mark.parametrize('page', [24, 64])
def test_page_must_divide_the_block(page):
  (q, _, _, blocks), kwargs = cases.block_case(h=16)
  pages = Pages(jnp.zeros((8, page, 16)), jnp.zeros((8, page, 16)))
  table = jnp.zeros((2, 2, 4), jnp.int32)
  with pytest.raises(ValueError, match=r'pages\.page=.* must divide'):
    family.block_sparse_paged(q, pages, table, blocks, **kwargs)


def paged_case():
  (q, _, _, blocks), _ = cases.block_case(h=16, s=128)
  pages = Pages(jnp.zeros((32, 16, 16)), jnp.zeros((32, 16, 16)))
  table = jnp.arange(32, dtype=jnp.int32).reshape(2, 2, 8)
  return (q, pages, table, blocks), jnp.asarray([128, 100], jnp.int32)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda x: x[:1], r'table\.shape'),
    (lambda x: x * 1.0, r'table\.dtype'),
    (lambda x: jnp.pad(x, ((0, 0), (0, 1), (0, 0))), 'kv heads 3 must divide'),
  ],
)
def test_bad_tables_are_named(change, message):
  (q, pages, table, blocks), lengths = paged_case()
  run = functools.partial(family.block_sparse_paged, lengths=lengths)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(run, q, pages, change(table), blocks)


def test_debug_mode_checks_tables():
  (q, pages, table, blocks), lengths = paged_case()
  run = functools.partial(family.block_sparse_paged, implementation='reference')
  run = jax.jit(checkify.checkify(run))
  past = table.at[1, :, 7].set(-1)  # past the 100 tokens of the row
  run(q, pages, past, blocks, lengths=lengths)[0].throw()
  for wrong, message in (
    (table + 1, 'below the pool'),
    (table.at[1, 0, 6].set(-1), 'a page of every key'),
  ):
    error, _ = run(q, pages, wrong, blocks, lengths=lengths)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
      error.throw()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda x: dataclasses.replace(x, count=x.count + 9), 'blocks.count'),
    (lambda x: dataclasses.replace(x, ids=x.ids + 50), 'blocks.ids out of'),
    (lambda x: dataclasses.replace(x, ids=x.ids * 0), 'ascend'),
    (lambda x: dataclasses.replace(x, sink=x.sink - 99), 'blocks.sink'),
    (lambda x: x, None),
  ],
)
def test_debug_mode_checks_values(change, message):
  args, kwargs = cases.block_case(h=16, kinds=(cases.KINDS[3],))
  q, k, v, blocks = args

  @jax.jit
  @checkify.checkify
  def run(q, k, v, blocks, kwargs):
    return family.block_sparse(
      q, k, v, blocks, implementation='reference', **kwargs
    )

  error, _ = run(q, k, v, change(blocks), kwargs)
  if message is None:
    error.throw()
  else:
    with pytest.raises(checkify.JaxRuntimeError, match=message):
      error.throw()
